"""Target `vllm-ascend`: one `vllm serve` script a node, a load test, and a README.

    serve_node<i>.sh   environment and command of node i; more flags may follow on its line
    rank_table<k>.json of server k over several nodes, where addresses are given
    balancer.conf      where there are several servers: nginx before them
    quantize.sh        where ModelSlim makes the checkpoint with one command (`modelslim`)
    bench.sh           `vllm bench serve` with the plan's workload (`serving_page`)
    README.md          steps, assumptions, a first request, what the plan promises

Environment and quantization schemes are those of `search/data/vllm_ascend.toml`, flags those of
`vllm_flags.toml`; both name the releases they were read from. How ranks become servers is in
`vllm_layout`. Lengths are rounded up to the KV block; modules split over data-parallel ranks are in
`vllm_modules`, rank tables in `vllm_rank_tables`.
Left out, and refused: context parallelism (the plugin has it for prefill and decode apart, for some
models and runners), unfused attention, dtypes without a scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from shardplan.search.emit.common import (
    Raw,
    check_algorithm,
    command_line,
    family_of,
    printable,
    refuse,
    table,
)
from shardplan.search.emit.node_script import node_addresses, node_script, server_files
from shardplan.search.emit.vllm_flags import DTYPES, Flag, environment, serve_flags
from shardplan.search.emit.vllm_layout import Launch, Split, has_experts, launches, split_servers
from shardplan.search.emit.vllm_modules import module_rules
from shardplan.search.emit.vllm_rank_tables import Fleet, rank_tables, table_steps
from shardplan.search.emit.vllm_readme import readme
from shardplan.search.emit.vllm_schemes import Checkpoint, checkpoint_of
from shardplan.search.plan import Plan

if TYPE_CHECKING:
    from shardplan.search.rulebook import Role

__all__ = ["checked_family", "files", "script"]

_TARGET = "vllm-ascend"
_NETWORK = (
    'export HCCL_IF_IP="$NODE_ADDRESS" HCCL_SOCKET_IFNAME="$NIC"',
    'export GLOO_SOCKET_IFNAME="$NIC" TP_SOCKET_IFNAME="$NIC"',
)


def files(plan: Plan, *, addresses: str = "", device_addresses: str = "") -> dict[str, str]:
    """Texts by file name. `InputError` for a plan that vLLM on Ascend cannot run."""
    if plan.pools:
        from shardplan.search.emit.vllm_disagg import disagg_files

        return disagg_files(plan, addresses, device_addresses)
    family = checked_family(plan)
    checkpoint = checkpoint_of(plan, family)
    split = split_servers(plan)
    todo = launches(plan, split)
    made = server_files(
        plan,
        checkpoint,
        split,
        todo,
        port=table("vllm_ascend")["ports"]["serve"],
        script=lambda here: script(plan, family, checkpoint, split, here),
    )
    fleets = [Fleet(role="", cluster=plan.cluster, launches=todo)]
    tables = rank_tables(fleets, addresses=addresses, device_addresses=device_addresses)
    made |= tables
    names, steps = sorted({*made, "README.md"}), table_steps(fleets, tables)
    made["README.md"] = readme(plan, checkpoint, split, todo, names, tuple(steps))
    return made


def checked_family(plan: Plan, role: Role = "mixed") -> str:
    """Family of the plan's device. `InputError` for a plan that vLLM on Ascend cannot run."""
    facts = table("vllm_ascend")
    hint = "its devices are 310P, A2, A3 and 950" + (
        "; use target atc" if plan.cluster.soc_versions else "; plan for an Ascend cluster"
    )
    family = family_of(plan, _TARGET, facts["families"], hint)
    _check_strategy(plan, family, role)
    return family


def _check_strategy(plan: Plan, family: str, role: Role) -> None:
    """`InputError` for what no flag of the engine says."""
    way, work = plan.strategy, plan.request.workload
    longest = work.input_len + work.output_len
    rules = (
        (way.cp > 1, "context parallelism", f"cp={way.cp}", "search with cp=1"),
        (
            way.attention == "naive",
            "its attention is always fused",
            "attention=naive",
            "search with flash attention",
        ),
        (
            way.sp and way.tp == 1,
            "sequence parallelism needs tensor parallelism",
            "sp=True, tp=1",
            "search with --only sp=off",
        ),
        (
            way.sp and has_experts(plan) and way.ep == 1,
            "sequence parallelism of a model with experts needs expert parallelism",
            "sp=True, ep=1",
            f"try sp off, or ep={way.tp}",
        ),
        *_switch_rules(plan, family),
        *_ahead_rules(plan, role),
        *module_rules(plan),
        (
            0 < plan.model.max_context < longest,
            "requests must fit the model's context",
            f"input_len + output_len = {longest}, max_context = {plan.model.max_context}",
            "plan for shorter requests",
        ),
    )
    for broken, rule, got, hint in rules:
        if broken:
            raise refuse(_TARGET, rule, got=got, hint=hint)
    check_algorithm(_TARGET, plan)


def _ahead_rules(plan: Plan, role: Role) -> list[tuple[bool, str, str, str]]:
    """(broken, rule, got, hint) of tokens predicted ahead."""
    way, facts = plan.strategy, table("vllm_ascend")["speculative"]
    known, most = facts["architectures"], facts["most"]
    return [
        (
            way.mtp > most,
            f"at most {most} tokens are predicted ahead",
            f"mtp={way.mtp}",
            "search with a smaller mtp",
        ),
        (
            way.mtp > 0 and plan.model.architecture not in known,
            f"tokens are predicted ahead with {', '.join(known)}",
            f"mtp={way.mtp}, architecture={printable(plan.model.architecture)}",
            "search with mtp off",
        ),
        (
            way.mtp > 0 and way.pp > 1 and role != "prefill",
            "a server that predicts tokens ahead has one pipeline stage",
            f"mtp={way.mtp}, pp={way.pp}",
            "search with --mtp off, or --only pp=1",
        ),
    ]


def _switch_rules(plan: Plan, family: str) -> list[tuple[bool, str, str, str]]:
    """(broken, rule, got, hint) of the plugin's switches that a plan sets."""
    way, facts = plan.strategy, table("vllm_ascend")["switches"]
    fused, prefetch = way.fused_collectives, way.weight_prefetch
    dense = not has_experts(plan)
    return [
        (
            fused and (family not in facts["fused_families"] or way.tp not in facts["fused_tp"]),
            "fused collectives run on Atlas A2 with tp 2, 4 or 8",
            f"fused_collectives=True, device family {family}, tp={way.tp}",
            "search with fused collectives off",
        ),
        (
            fused and (way.sp or way.weight_dtype not in DTYPES),
            "fused collectives take 16-bit weights and no sequence parallelism",
            f"fused_collectives=True, sp={way.sp}, weight_dtype={printable(way.weight_dtype)}",
            "search with fused collectives off",
        ),
        (
            prefetch and family not in facts["prefetch_families"],
            "weight prefetch runs on Atlas A2, A3 and 950",
            f"weight_prefetch=True, device family {family}",
            "search with weight prefetch off",
        ),
        (
            prefetch and dense and not (way.sp or fused),
            "weight prefetch of a dense model needs sequence parallelism or fused collectives",
            "weight_prefetch=True, sp=False, fused_collectives=False",
            "search with weight prefetch off",
        ),
    ]


def script(
    plan: Plan,
    family: str,
    checkpoint: Checkpoint,
    split: Split,
    here: Sequence[Launch],
    more: Callable[[Launch], list[Flag]] = lambda _: [],
) -> str:
    """The script of one node: environment, then one command, or several side by side.

    `more`: further flags of a launch.
    """
    settings = [
        *node_addresses(here, _NETWORK),
        *(
            f'export {name}="${{{name}:-{value}}}"'
            for name, value in environment(plan, family, split)
        ),
    ]
    words = ["vllm", "serve", Raw('"$MODEL"')]
    commands = [
        command_line(
            "vllm_flags",
            "serve",
            words,
            [*serve_flags(plan, family, checkpoint, split, one), *more(one)],
        )
        for one in here
    ]
    return node_script(checkpoint, settings, here, commands)
