"""Target `sglang`: one `sglang.launch_server` script a node, a load test, and a README.

    serve_node<i>.sh   environment and command of node i; more flags may follow on its line
    balancer.conf      where there are several servers: nginx before them
    quantize.sh, bench.sh, README.md   as of every serving target

SGLang's `--tp-size` counts all ranks of a server; `--dp-size` with `--enable-dp-attention` are the
attention groups among them, `--ep-size` those that share experts:

    tp_size = tp * groups    dp_size = groups = ep / tp    ep_size = ep or 1

so the LM head is split by tp alone with `--enable-dp-lm-head`, dense layers with
`--moe-dense-tp-size 1` or `--enable-dense-mlp-attn-tp`. Requests and chunk are those of the whole
server. `--mem-fraction-static` holds weights and cache: what is left of the engine's share after
activations, communicators and reserve. What Ascend supports is in `search/data/sglang.toml`. A
chunk that is no whole number of cache pages, which SGLang refuses, is rounded down to one.
Left out, and refused: pipeline stages, context and sequence parallelism, an int8 cache, module
splits other than those above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from shardplan.models.errors import InputError
from shardplan.models.modules import MODULES, module_ranks
from shardplan.search.emit.common import (
    Raw,
    algorithm_variable,
    check_algorithm,
    command_line,
    family_of,
    model_name,
    printable,
    refuse,
    table,
)
from shardplan.search.emit.node_script import node_addresses, node_script, server_files
from shardplan.search.emit.serving_page import Page, ahead_words, page
from shardplan.search.emit.vllm_flags import Flag, capture_sizes, longest_request
from shardplan.search.emit.vllm_layout import Launch, Split, has_experts, launches, split_servers
from shardplan.search.emit.vllm_readme import about, server_steps, shape_of, url_of
from shardplan.search.emit.vllm_schemes import Checkpoint, checkpoint_of
from shardplan.search.plan import Plan

__all__ = ["assumed", "checked", "files", "script", "server_split"]

_TARGET = "sglang"
_NETWORK = (
    'export HCCL_IF_IP="$NODE_ADDRESS" HCCL_SOCKET_IFNAME="$NIC" GLOO_SOCKET_IFNAME="$NIC"',
)
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def files(plan: Plan) -> dict[str, str]:
    """Texts by file name. `InputError` for a plan that SGLang on Ascend cannot run."""
    if plan.pools:
        from shardplan.search.emit.sglang_pools import pool_files

        return pool_files(plan)
    checkpoint, split = checked(plan), server_split(plan)
    todo = launches(plan, split, _TARGET)
    port = table("sglang")["ports"]["serve"]
    made = server_files(
        plan,
        checkpoint,
        split,
        todo,
        port=port,
        script=lambda here: script(plan, checkpoint, split, here),
    )
    engine = table("sglang")["engine"]["sglang"]
    names = sorted({*made, "README.md"})
    before = f"; set BASE_URL to what stands before the {split.servers} servers"
    made["README.md"] = page(
        plan,
        Page(
            title=f"{model_name(plan)} with SGLang on Ascend: {shape_of(plan)}",
            about=about(plan, len({one.slot.node for one in todo}), f"sglang {engine}", names),
            steps=server_steps(plan, checkpoint, split, todo, port),
            url=url_of(port),
            load=f"`./bench.sh` sends the plan's workload{before * (split.servers > 1)}.",
            assumed=assumed(plan, split),
        ),
    )
    return made


def checked(plan: Plan) -> Checkpoint:
    """The checkpoint of the plan. `InputError` for what SGLang on Ascend has not."""
    facts = table("sglang")
    family = family_of(
        plan, _TARGET, facts["families"], "its devices are A2 and A3; use target vllm-ascend"
    )
    for broken, rule, got, hint in _rules(plan):
        if broken:
            raise refuse(_TARGET, rule, got=got, hint=hint)
    check_algorithm(_TARGET, plan)
    return checkpoint_of(plan, family, _TARGET)


def server_split(plan: Plan) -> Split:
    """Servers of the plan, by the same rule of expert groups as vLLM's."""
    return split_servers(plan, _TARGET)


def _rules(plan: Plan) -> list[tuple[bool, str, str, str]]:
    """(broken, rule, got, hint) of what no flag says on Ascend."""
    way, work, facts = plan.strategy, plan.request.workload, table("sglang")
    par = way.parallelism()
    groups = max(par.ep // par.tp, 1)
    own = {name: module_ranks(par, name) for name in MODULES}
    free = {"head": (par.tp, par.tp * groups), "ffn": (par.tp, par.tp * groups)}
    odd = [name for name, ranks in own.items() if ranks not in free.get(name, (par.tp,))]
    ahead = facts["speculative"]["architectures"]
    longest = work.input_len + work.output_len
    return [
        (
            way.pp > facts["pipeline"]["most"],
            "no pipeline stages on Ascend",
            f"pp={way.pp}",
            "search with --only pp=1",
        ),
        (way.cp > 1, "no context parallelism on Ascend", f"cp={way.cp}", "search with cp=1"),
        (
            way.sp,
            "sequence parallelism is for other devices",
            "sp=True",
            "search with --only sp=off",
        ),
        (
            way.attention == "naive",
            "its attention is always fused",
            "attention=naive",
            "search with flash attention",
        ),
        (
            way.weight_prefetch or way.fused_collectives,
            "no weight prefetch and no fused collectives",
            f"weight_prefetch={way.weight_prefetch}, fused_collectives={way.fused_collectives}",
            "search with both off",
        ),
        (
            bool(odd),
            "only the LM head and dense layers may be split over all ranks of a server",
            ", ".join(f"{name}_tp={own[name]}" for name in odd),
            "search with " + ", ".join(f"{name}_tp=0" for name in odd),
        ),
        (
            way.mtp > 0 and plan.model.architecture not in ahead,
            f"tokens are predicted ahead with {', '.join(ahead)}",
            f"mtp={way.mtp}, architecture={printable(plan.model.architecture)}",
            "search with mtp off",
        ),
        (
            0 < plan.model.max_context < longest,
            "requests must fit the model's context",
            f"input_len + output_len = {longest}, max_context = {plan.model.max_context}",
            "plan for shorter requests",
        ),
    ]


def script(
    plan: Plan,
    checkpoint: Checkpoint,
    split: Split,
    here: Sequence[Launch],
    more: Callable[[Launch], list[Flag]] = lambda _: [],
    network: Sequence[str] = (),
) -> str:
    """The script of one node. `more`: further flags of a launch; `network`: further lines."""
    settings = [*node_addresses(here, _NETWORK), *network, *_environment(plan)]
    words = ["python3", "-m", "sglang.launch_server"]
    commands = [
        command_line(
            "sglang_flags", "serve", words, [*_flags(plan, checkpoint, split, one), *more(one)]
        )
        for one in here
    ]
    return node_script(checkpoint, settings, here, commands)


def _sent(plan: Plan) -> bool:
    return plan.strategy.exchange == "alltoall" and plan.strategy.ep > 1


def _environment(plan: Plan) -> list[str]:
    facts, way = table("sglang"), plan.strategy
    wanted = [(entry["name"], entry["value"]) for entry in facts["environment"]]
    buffers = facts["hccl_buffsize_mib"]
    wanted.append(("HCCL_BUFFSIZE", str(buffers["sent" if _sent(plan) else "plain"])))
    if _sent(plan):
        wanted.append((facts["dispatch"]["variable"], str(way.batch * (1 + way.mtp))))
    wanted += algorithm_variable(plan).items()
    return [f'export {name}="${{{name}:-{value}}}"' for name, value in wanted]


def _flags(plan: Plan, checkpoint: Checkpoint, split: Split, one: Launch) -> list[Flag]:
    way, facts = plan.strategy, table("sglang")
    flags: list[Flag] = [
        ("--model-path", Raw('"$MODEL"')),
        ("--served-model-name", model_name(plan)),
        ("--host", Raw('"${HOST:-0.0.0.0}"')),
        ("--port", str(facts["ports"]["serve"] + one.port_offset)),
        ("--device", "npu"),
        ("--attention-backend", "ascend"),
        *_parallel(plan, split, one),
    ]
    if way.weight_dtype in _DTYPES:
        flags.append(("--dtype", _DTYPES[way.weight_dtype]))
    if checkpoint.quantized:
        flags.append(("--quantization", "modelslim"))
    if way.mtp:
        flags += [
            ("--speculative-algorithm", facts["speculative"]["algorithm"]),
            ("--speculative-num-steps", str(way.mtp)),
            ("--speculative-eagle-topk", "1"),
            ("--speculative-num-draft-tokens", str(way.mtp + 1)),
        ]
    return [*flags, *_sizes(plan, split)]


def _parallel(plan: Plan, split: Split, one: Launch) -> list[Flag]:
    """Sizes of the mesh, and how a server's processes find each other."""
    way, facts = plan.strategy, table("sglang")
    ranks, par = way.tp * split.groups, plan.strategy.parallelism()
    flags: list[Flag] = [("--tp-size", str(ranks)), ("--pp-size", str(way.pp))]
    if split.groups > 1:
        flags += [("--dp-size", str(split.groups)), ("--enable-dp-attention", None)]
        if module_ranks(par, "head") == way.tp:
            flags.append(("--enable-dp-lm-head", None))
        if module_ranks(par, "ffn") == way.tp:
            by_one = ("--moe-dense-tp-size", "1")
            flags.append(by_one if way.tp == 1 else ("--enable-dense-mlp-attn-tp", None))
    if split.experts:
        flags.append(("--ep-size", str(ranks)))
    if _sent(plan):
        sent = facts["sent"]
        flags += [("--moe-a2a-backend", sent["backend"]), ("--deepep-mode", sent["mode"])]
    ports = facts["ports"]
    if one.nodes > 1:
        flags += [
            ("--nnodes", str(one.nodes)),
            ("--node-rank", str(one.index)),
            ("--dist-init-addr", Raw(f'"$HEAD_ADDRESS:{ports["dist_init"]}"')),
        ]
    elif split.groups > 1 and one.port_offset:  # its own ports would be its neighbour's
        port = ports["dist_init"] + ports["dist_init_step"] * one.port_offset
        flags.append(("--dist-init-addr", f"127.0.0.1:{port}"))
    return flags


def _sizes(plan: Plan, split: Split) -> list[Flag]:
    """Batch, lengths and memory of the whole server; its chunk is a whole number of pages."""
    way, block = plan.strategy, int(table("sglang")["page_size"]["value"])
    chunk = max(way.chunk // block, 1) * block
    flags: list[Flag] = [
        ("--max-running-requests", str(way.batch * split.groups)),
        ("--chunked-prefill-size", str(chunk * split.groups)),
        ("--max-prefill-tokens", str(way.chunk)),
        ("--context-length", str(longest_request(plan, block))),
        ("--page-size", str(block)),
    ]
    if plan.memory:
        flags.append(("--mem-fraction-static", _static_share(plan)))
    if plan.request.workload.prefix_hit == 0:
        flags.append(("--disable-radix-cache", None))
    if plan.request.engine_profile == "vllm-ascend-eager":
        return [*flags, ("--disable-decode-cuda-graph", None)]
    sizes = " ".join(str(size) for size in capture_sizes(plan))
    return [*flags, ("--cuda-graph-bs-decode", Raw(sizes))]


def _static_share(plan: Plan) -> str:
    """Share of the card for weights and cache, rounded down. `InputError` where none is left."""
    left = min(
        row.capacity_bytes - row.activations_bytes - row.communicators_bytes - row.reserve_bytes
        for row in plan.memory
    )
    share = math.floor(left / plan.cluster.hbm_bytes * 1e4) / 1e4
    if not 0 < share < 1:
        raise InputError(
            "activations, communicators and reserve leave room for weights in a plan's memory",
            got=f"share={share:g}",
            hint="make the plan anew with `shardplan search`",
        )
    return f"{share:g}"


def assumed(plan: Plan, split: Split) -> list[str]:
    """What the README says of the difference between this engine and the plan's prices."""
    way = plan.strategy
    lines = [
        f"- Priced for engine profile {printable(plan.request.engine_profile)}; SGLang runs "
        "prompts in steps of their own, before decode steps.",
        "- Further flags may follow a script's name; environment variables that are already set "
        "win over the script's.",
    ]
    if split.groups > 1:
        lines.append(
            "- --dp-size with --enable-dp-attention is the spelling of the Ascend guides; 0.5.23 "
            "takes it and calls --attn-dp-size its successor."
        )
    if _sent(plan):
        size = table("sglang")["hccl_buffsize_mib"]["sent"]
        lines.append(
            f"- HCCL_BUFFSIZE is {size} MiB for the expert exchange, more than the plan's memory "
            "ledger counts."
        )
    if has_experts(plan) and way.weight_dtype == "w4a8":
        lines.append("- The engine's W4A8 covers experts; its other layers take W8A8.")
    return [*lines, *ahead_words(plan)]
