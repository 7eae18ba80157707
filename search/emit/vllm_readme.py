"""The prose, the balancer and the load test that go with the vLLM scripts.

The load test sends the plan's own workload: random prompts of its input length, of which the
share found in the prefix cache is one prefix common to all, and a fixed number of output tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from shardplan.search.emit.common import (
    Raw,
    command_line,
    model_name,
    predicted,
    printable,
    table,
)
from shardplan.search.emit.vllm_layout import Launch, Split
from shardplan.search.emit.vllm_schemes import Checkpoint
from shardplan.search.plan import Plan

__all__ = ["ahead_words", "balancer", "bench", "readme"]


def bench(plan: Plan, checkpoint: Checkpoint, split: Split) -> str:
    """The load test script; BASE_URL names the balancer where there are several servers."""
    work = plan.request.workload
    slots = work.concurrency or max(1, round(plan.performance.concurrency))
    facts = table("vllm_ascend")["bench"]
    prompts = max(facts["fewest_prompts"], facts["prompts_per_slot"] * slots)
    shared = round(work.input_len * work.prefix_hit)
    flags: list[tuple[str, str | None]] = [
        ("--backend", "openai"),
        ("--base-url", Raw('"$BASE_URL"')),
        ("--endpoint", "/v1/completions"),
        ("--model", Raw('"$MODEL"')),
        ("--served-model-name", model_name(plan)),
        ("--dataset-name", "random"),
        ("--random-input-len", str(work.input_len - shared)),
        ("--random-prefix-len", str(shared)),
        ("--random-output-len", str(work.output_len)),
        ("--num-prompts", str(prompts)),
        ("--max-concurrency", str(slots)),
        ("--ignore-eos", None),
    ]
    if work.request_rate is not None:
        flags.append(("--request-rate", f"{work.request_rate:g}"))
    lines = [
        "#!/usr/bin/env bash",
        "# Sends the plan's workload to the running deployment and prints what it measured.",
        "set -euo pipefail",
        *checkpoint.shell,
        f'BASE_URL="${{BASE_URL:-{_url(0)}}}"' if split.servers == 1 else _need_url(split),
        "",
        "exec "
        + command_line("vllm_ascend", "bench", ["vllm", "bench", "serve"], flags)
        + ' \\\n  "$@"',
    ]
    return "\n".join(lines) + "\n"


def _url(offset: int, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{table('vllm_ascend')['ports']['serve'] + offset}"


def _addresses(todo: Sequence[Launch]) -> list[tuple[str, int]]:
    """(host, port offset) of each server; this host where all of them are on one node."""
    heads = [one for one in todo if one.index == 0]
    alone = len({one.slot.node for one in todo}) == 1
    return [("127.0.0.1" if alone else f"NODE{one.head}", one.port_offset) for one in heads]


def balancer(todo: Sequence[Launch]) -> str:
    """An nginx file that spreads requests over the servers, least busy first."""
    facts = table("vllm_ascend")
    lines = [
        "# For nginx, inside its http block (such as a file of /etc/nginx/conf.d): one address for",
        "# all servers of the deployment. Put the address of node i where NODE<i> stands.",
        "upstream vllm {",
        "    least_conn;",
        *(f"    server {host}:{facts['ports']['serve'] + o};" for host, o in _addresses(todo)),
        "}",
        "server {",
        f"    listen {facts['balancer']['port']};",
        "    location / {",
        "        proxy_pass http://vllm;",
        "        proxy_buffering off;",
        f"        proxy_read_timeout {facts['balancer']['read_timeout_s']}s;",
        "    }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _need_url(split: Split) -> str:
    return f': "${{BASE_URL:?set BASE_URL to the balancer before the {split.servers} servers}}"'


def readme(plan: Plan, checkpoint: Checkpoint, split: Split, todo: Sequence[Launch]) -> str:
    """README.md of the deployment."""
    way, engine = plan.strategy, table("vllm_ascend")["engine"]
    nodes = sorted({one.slot.node for one in todo})
    scripts = ", ".join(f"serve_node{node}.sh" for node in nodes)
    shape = f"tp {way.tp}, pp {way.pp}, dp {way.dp}, ep {way.ep}"
    lines = [
        f"# {model_name(plan)} with vLLM on Ascend: {shape}",
        "",
        f"For {printable(plan.cluster.title)}, {len(nodes)} node(s), {way.ranks} ranks. Written "
        f"for vllm {engine['vllm']} and vllm-ascend {engine['vllm_ascend']}. Files: README.md, "
        f"bench.sh, {'balancer.conf, ' * (split.servers > 1)}{scripts}.",
        "",
        "## Steps",
        "",
        *_steps(checkpoint, split, todo),
        "",
        "## A first request",
        "",
        "```bash",
        *_first_request(plan),
        "```",
        "",
        "## Load test",
        "",
        f"`./bench.sh` sends the plan's workload{_balancer(split)}. The plan promises:",
        "",
        *predicted(plan),
        "",
        "## Assumed",
        "",
        *_assumed(plan, split),
    ]
    return "\n".join(lines) + "\n"


def _steps(checkpoint: Checkpoint, split: Split, todo: Sequence[Launch]) -> list[str]:
    """Checkpoint, then start, then the addresses to send requests to."""
    steps = [
        "1. Put the checkpoint on every node at one path (or let vLLM download it). It holds: "
        + "; ".join(checkpoint.needs)
        + "."
    ]
    settings = "MODEL=FOLDER "
    if any(one.nodes > 1 for one in todo):
        settings += "HEAD_ADDRESS=IP NODE_ADDRESS=IP NIC=INTERFACE "
    nodes = sorted({one.slot.node for one in todo})
    steps += [
        f"{number}. On node {node}: `{settings}./serve_node{node}.sh`"
        for number, node in enumerate(nodes, start=2)
    ]
    heads = [one for one in todo if one.index == 0]
    where = [_url(one.port_offset, f"NODE{one.head}") for one in heads]
    if split.servers == 1:
        return [*steps, f"{len(steps) + 1}. Requests go to {where[0]} once it answers /health."]
    port = table("vllm_ascend")["balancer"]["port"]
    return [
        *steps,
        f"{len(steps) + 1}. These are {split.servers} independent servers, each with all weights: "
        f"{', '.join(where)}. Put a load balancer before them, least busy first, once all answer "
        f"/health: balancer.conf is one for nginx and listens on port {port}.",
    ]


def _first_request(plan: Plan) -> list[str]:
    body = {"model": model_name(plan), "prompt": "The capital of France is", "max_tokens": 16}
    return [
        f"curl -sS {_url(0)}/v1/completions \\",
        "  -H 'Content-Type: application/json' \\",
        f"  -d '{json.dumps(body)}'",
    ]


def _balancer(split: Split) -> str:
    if split.servers == 1:
        return ""
    return f"; set BASE_URL to the load balancer before the {split.servers} servers"


def _assumed(plan: Plan, split: Split) -> list[str]:
    way = plan.strategy
    lines = [
        f"- Priced for engine profile {printable(plan.request.engine_profile)}.",
        "- Further flags may follow a script's name; environment variables that are already set "
        "win over the script's.",
        "- Not run on a device by the tool that wrote this.",
    ]
    if split.experts:
        size = table("vllm_ascend")["hccl_buffsize_mib"]["experts"]
        lines.append(
            f"- HCCL_BUFFSIZE is {size} MiB for the expert exchange: twice that per communicator, "
            "more than the plan's memory ledger counts; vLLM takes it from the KV cache."
        )
        lines.append(
            f"- The plugin picks the exchange by device and batch; the plan priced {way.exchange}."
        )
    if way.pp > 1 and way.dp > 1:
        lines.append(
            "- vLLM puts the stages of one data-parallel group side by side; the plan priced all "
            "groups of one stage side by side. Traffic between nodes may differ."
        )
    if way.weight_prefetch:
        lines.append(
            "- Weight prefetch is on with the plugin's default ratios; its gain was priced from an "
            "assumed rate: compare bench.sh with it off."
        )
    if way.fused_collectives:
        lines.append(
            "- Fused matmul and all_reduce is on (enable_matmul_allreduce, gone after this "
            "release); priced as a gain of prefill alone, though decode steps run it too."
        )
    lines += ahead_words(plan)
    if way.collectives != "auto":
        lines.append(
            f"- HCCL_ALGO picks {printable(way.collectives)} between servers. HCCL still chooses "
            "by itself for messages so small that its vector-core kernels carry them."
        )
    if way.weight_dtype == "w4a16":
        lines.append("- The engine's W4A16 covers experts; attention stays in 16 bit.")
    return lines


def ahead_words(plan: Plan) -> list[str]:
    """What is assumed of tokens that are predicted ahead; nothing where none are."""
    way = plan.strategy
    if not way.mtp:
        return []
    share = plan.request.workload.mtp_acceptance
    kept = "" if share is None else f"; the plan assumed that {share:.0%} of drafts are kept"
    return [
        f"- The checkpoint holds the model's prediction layer, which drafts {way.mtp} token(s) "
        f"a step{kept}. Random prompts may be predicted less well: measure with real ones."
    ]
