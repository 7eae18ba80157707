"""The prose and the balancer that go with scripts of servers, one or several a node.

Both engines that start so (vLLM, SGLang) share them; each names its first port.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardplan.search.emit.common import model_name, printable, table
from shardplan.search.emit.modelslim import quantize_steps
from shardplan.search.emit.serving_page import Page, ahead_words, page
from shardplan.search.emit.vllm_layout import Launch, Split
from shardplan.search.emit.vllm_schemes import Checkpoint
from shardplan.search.plan import Plan

__all__ = ["about", "balancer", "readme", "server_steps", "shape_of", "url_of"]


def url_of(port: int, host: str = "127.0.0.1") -> str:
    """Where a server answers."""
    return f"http://{host}:{port}"


def _addresses(todo: Sequence[Launch]) -> list[tuple[str, int]]:
    """(host, port offset) of each server; this host where all of them are on one node."""
    heads = [one for one in todo if one.index == 0]
    alone = len({one.slot.node for one in todo}) == 1
    return [("127.0.0.1" if alone else f"NODE{one.head}", one.port_offset) for one in heads]


def balancer(todo: Sequence[Launch], first_port: int) -> str:
    """An nginx file that spreads requests over the servers, least busy first."""
    facts = table("vllm_ascend")["balancer"]
    lines = [
        "# For nginx, inside its http block (such as a file of /etc/nginx/conf.d): one address for",
        "# all servers of the deployment. Put the address of node i where NODE<i> stands.",
        "upstream servers {",
        "    least_conn;",
        *(f"    server {host}:{first_port + offset};" for host, offset in _addresses(todo)),
        "}",
        "server {",
        f"    listen {facts['port']};",
        "    location / {",
        "        proxy_pass http://servers;",
        "        proxy_buffering off;",
        f"        proxy_read_timeout {facts['read_timeout_s']}s;",
        "    }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def about(plan: Plan, nodes: int, written_for: str, names: Sequence[str]) -> list[str]:
    """First paragraph of a README."""
    return [
        f"For {printable(plan.cluster.title)}, {nodes} node(s), {plan.strategy.ranks} ranks. "
        f"Written for {written_for}. Files: {', '.join(names)}."
    ]


def shape_of(plan: Plan) -> str:
    """The strategy's sizes in a title."""
    way = plan.strategy
    return f"tp {way.tp}, pp {way.pp}, dp {way.dp}, ep {way.ep}"


def readme(
    plan: Plan,
    checkpoint: Checkpoint,
    split: Split,
    todo: Sequence[Launch],
    names: Sequence[str],
    network: Sequence[str],
) -> str:
    """README.md of the vLLM deployment; `network`: steps before the servers start."""
    engine, port = table("vllm_ascend")["engine"], table("vllm_ascend")["ports"]["serve"]
    nodes = {one.slot.node for one in todo}
    written_for = f"vllm {engine['vllm']} and vllm-ascend {engine['vllm_ascend']}"
    return page(
        plan,
        Page(
            title=f"{model_name(plan)} with vLLM on Ascend: {shape_of(plan)}",
            about=about(plan, len(nodes), written_for, names),
            steps=[*network, *server_steps(plan, checkpoint, split, todo, port)],
            url=url_of(port),
            load=f"`./bench.sh` sends the plan's workload{_balancer(split)}.",
            assumed=_assumed(plan, split),
        ),
    )


def server_steps(
    plan: Plan, checkpoint: Checkpoint, split: Split, todo: Sequence[Launch], first_port: int
) -> list[str]:
    """Checkpoint, then start, then the addresses to send requests to."""
    settings = "MODEL=FOLDER "
    if any(one.nodes > 1 for one in todo):
        settings += "HEAD_ADDRESS=IP NODE_ADDRESS=IP NIC=INTERFACE "
    steps = [
        "Put the checkpoint on every node at one path (or let the engine download it). It holds: "
        + "; ".join(checkpoint.needs)
        + ".",
        *quantize_steps(plan),
        *(
            f"On node {node}: `{settings}./serve_node{node}.sh`"
            for node in sorted({one.slot.node for one in todo})
        ),
    ]
    heads = [one for one in todo if one.index == 0]
    where = [url_of(first_port + one.port_offset, f"NODE{one.head}") for one in heads]
    if split.servers == 1:
        return [*steps, f"Requests go to {where[0]} once it answers /health."]
    port = table("vllm_ascend")["balancer"]["port"]
    return [
        *steps,
        f"These are {split.servers} independent servers, each with all weights: "
        f"{', '.join(where)}. Put a load balancer before them, least busy first, once all answer "
        f"/health: balancer.conf is one for nginx and listens on port {port}.",
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
