"""Which servers a plan becomes under vLLM, and what runs on each node.

    servers             = replicas of the plan: dp groups that share experts are one of them
    ranks of one server = tp * pp * d        d = dp / replicas, `--data-parallel-size`

dense, and experts split by tp   d = 1: vLLM would split the experts over tp * d
experts over ep >= tp            d = ep / tp: vLLM's expert group is the tp * d ranks of a stage

Servers are independent: each its own ranks and port, one balancer before them all. A copy that
fills several nodes uses `--nnodes`; a server of several nodes otherwise uses `--data-parallel-*`.
How a plan's order of ranks becomes the engine's is in `placing`.
Source: vllm-project/vllm@01e4fce docs/serving/data_parallel_deployment.md; vllm 0.23.0
vllm/config/parallel.py and vllm/engine/arg_utils.py.
Left out: experts split both ways (1 < ep < tp), and expert groups of copies that each fill
several nodes: AscendMultiprocExecutor of vllm-ascend 0.23.0 binds every group's queue to the
address of node 0. vLLM's own balancer over dense data-parallel groups: it starts the same
independent copies behind one process, and one way to deploy replicas is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardplan.search.emit.common import Slot, place, refuse
from shardplan.search.emit.placing import in_order
from shardplan.search.plan import Plan

__all__ = ["Launch", "Split", "has_experts", "launches", "split_servers"]

_TARGET = "vllm-ascend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a plan divides into servers."""

    servers: int
    groups: int
    """Data-parallel groups of one server (`--data-parallel-size`)."""
    experts: bool
    """Whether experts are spread over the ranks of a stage (`--enable-expert-parallel`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One `vllm serve` on one node."""

    server: int
    slot: Slot
    head: int
    """Node where the server's API runs."""
    index: int
    """Place among the server's nodes; 0 is the head."""
    nodes: int
    """Nodes of the server."""
    spans: bool
    """Whether one copy of the model fills several nodes."""
    port_offset: int
    """Servers whose head is the same node take consecutive ports."""


def has_experts(plan: Plan) -> bool:
    """Whether the model routes tokens to experts: a token then touches a part of it."""
    return plan.model.active_parameters < plan.model.parameters


def split_servers(plan: Plan, target: str = _TARGET) -> Split:
    """Servers of the plan. `InputError` with the nearest plan that the engine can run.

    The rule of expert groups is SGLang's too; that of copies over several nodes is vLLM's alone.
    """
    way = plan.strategy
    spans = way.tp * way.pp > plan.cluster.ranks_per_node
    replicas = way.parallelism().replicas
    if not has_experts(plan) or way.ep == 1:
        return Split(servers=replicas, groups=1, experts=False)
    if way.ep % way.tp or way.dp % (way.ep // way.tp):
        near = sorted({1, way.tp, way.tp * way.dp})
        raise refuse(
            target,
            "its expert group is all ranks of a stage of a server: tp divides ep, ep divides tp*dp",
            got=f"ep={way.ep}, tp={way.tp}, dp={way.dp}",
            hint="try ep=" + ", ".join(str(size) for size in near),
        )
    groups = way.ep // way.tp
    if spans and groups > 1 and target == _TARGET:
        raise refuse(
            _TARGET,
            "experts spread over model copies that each fill several nodes",
            got=f"ep={way.ep}, tp*pp={way.tp * way.pp}, per node {plan.cluster.ranks_per_node}",
            hint=f"try ep={way.tp}, or tp*pp of at most {plan.cluster.ranks_per_node}",
        )
    return Split(servers=replicas, groups=groups, experts=True)


def launches(plan: Plan, split: Split, target: str = _TARGET) -> tuple[Launch, ...]:
    """Every process group to start, by node. `InputError` where ranks do not fit the nodes."""
    way, per_node = plan.strategy, plan.cluster.ranks_per_node
    copy = way.tp * way.pp
    spans = copy > per_node
    if not spans:  # a copy must not cross a border between nodes either
        place(target, groups=way.dp, ranks=copy, per_node=per_node)
    placed = in_order(target, plan, groups=split.servers, ranks=copy * split.groups)
    made = [
        Launch(
            server=server,
            slot=slot,
            head=slots[0].node,
            index=index,
            nodes=len(slots),
            spans=spans,
            port_offset=_before(placed, server),
        )
        for server, slots in enumerate(placed)
        for index, slot in enumerate(slots)
    ]
    return tuple(sorted(made, key=lambda one: (one.slot.node, one.server)))


def _before(placed: Sequence[Sequence[Slot]], server: int) -> int:
    """Earlier servers with the same head node."""
    head = placed[server][0].node
    return sum(slots[0].node == head for slots in placed[:server])
