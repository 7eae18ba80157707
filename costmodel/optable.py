"""The op table: an applied template as rows of numbers, ready for the formulas.

One row is one kernel or collective of one rank. A row knows its local sizes and how the free
dims (batch, tokens, context) enter, so a table is made once a layout and priced for any batch,
length and dtype. Rows fall into groups by what they depend on:

    token      the tokens of a step (matmuls, norms, expert kernels, most collectives)
    attention  batch, new tokens and context (attention, MLA's up-projections, the gathers of keys
               and of partial results where contexts are split)
    logits     the tokens whose logits are wanted (LM head, its gather, sampling)

and where a prediction layer drafts tokens ahead (its first pass has token and attention rows)

    draft_logits      one token a sequence: the head of the first pass
    draft             the same: all but the attention of each further pass
    draft_attention   the attention of each further pass

Engine fusion is decided here: projections that share an input become one matmul, a residual add
joins the norm that follows it, query/key norms join the rotary embedding; `rowfusion` marks what
depends on the order of the kernels (quantization inside a norm, prefetch, a fused all_reduce).
An engine that does not sample does not gather the logits either.
What ranks of a step wait for one another is charged to the gather of logits over tp, not to what
data-parallel groups that share a head exchange.
Left out: kernels under a microsecond that real engines hide (reshapes, casts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.algorithms import AUTO, runs
from shardplan.costmodel.placement import (
    TierSpan,
    neighbour_tiers,
    tiers_crossed,
    with_algorithm,
)
from shardplan.costmodel.rowfusion import (
    join_rotary,
    mark,
    merged,
    quantized,
    runs_inside_rotary,
)
from shardplan.costmodel.rows import (
    NO_OVERLAP,
    Group,
    Overlap,
    Placed,
    Row,
    pointwise_bytes,
    pointwise_kernel,
)
from shardplan.models.accounting import Transfer, local_product, transfers
from shardplan.models.apply import ShardedBlock, ShardedGraph, ShardedOp
from shardplan.models.graph import FREE_DIMS, Op
from shardplan.models.weight_groups import group_of

__all__ = [
    "NO_OVERLAP",
    "Group",
    "Overlap",
    "Row",
    "block_rows",
    "draft_rows",
    "phase_rows",
    "placed_rows",
    "pointwise_bytes",
    "pointwise_kernel",
    "spans_of",
]

_PLAIN_NORMS = ("hnorm", "enorm")
"""Norms of the prediction layer's inputs: no residual add comes before them."""
_AGAIN: Mapping[Group, Group] = {"attention": "draft_attention"}
"""Groups of a further draft; all others are `draft`."""


_ATTENTION = ("attention", "mla_attention", "mla_absorbed")


def _ways(graph: ShardedGraph, node: ShardedOp, layout: tuple[tuple[str, str], ...]) -> int:
    cut = graph.mesh.ways(layout)
    return math.prod(cut.get(d, 1) for d in ("B", "T") if d in node.dims)


def _local(graph: ShardedGraph, dims: tuple[str, ...], node: ShardedOp) -> float:
    """Elements over the fixed dims, kept or contracted, as the operator's assignment cuts them."""
    sizes, mesh = graph.model.sizes, graph.mesh
    kept, held = mesh.ways(node.layout), mesh.ways(node.weight_layout)
    return math.prod(
        sizes[d] / max(kept.get(d, 1), held.get(d, 1)) for d in dims if d not in FREE_DIMS
    )


def _group(op: Op, phase: str) -> Group:
    if op.role in ("head", "select"):
        return "logits"
    if "S" in op.dims and op.kind != "cache":
        return "attention"
    if op.kind in (*_ATTENTION, "context_merge"):
        return "attention"
    if phase == "decode" and op.weight_class == "absorbed":
        return "attention"
    return "token"


def _matmul(graph: ShardedGraph, node: ShardedOp, op: Op) -> Row:
    k = _local(graph, op.contract, node)
    n = _local(graph, tuple(d for d in op.weight if d not in op.contract), node)
    row = Row(
        kind="matmul",
        group=_group(op, graph.model.phase),
        ways=_ways(graph, node, node.layout),
        n=n,
        k=k,
        weight_class=op.weight_class,
        weight_group=group_of(op),
        context="S" in op.dims,
        fuse=op.fuse,
    )
    if op.role != "expert":
        return row
    local_experts = _local(graph, ("E",), node)
    moe = graph.model.spec.moe
    topk = moe.experts_per_token if moe is not None else 1
    return row._replace(
        kind="grouped_matmul",
        n=n / local_experts,
        experts=local_experts,
        spread=graph.model.sizes["E"] / local_experts,
        share=topk * local_experts / graph.model.sizes["E"],
    )


def _attention(graph: ShardedGraph, node: ShardedOp, op: Op) -> Row:
    sizes = graph.model.sizes
    kv = sizes["K"] / graph.split("K", node.layout)
    queries = sizes.get("G", 1) / graph.split("G", node.layout) if "G" in op.dims else 1.0
    if op.kind == "attention":
        head, value, rope = sizes["D"], sizes["D"], 0
    elif op.kind == "mla_attention":
        head, value, rope = sizes["N"], sizes["D"], sizes["R"]
    else:
        head, value, rope = sizes["C"], sizes["C"], sizes["R"]
    return Row(
        kind=op.kind,
        group="attention",
        heads=kv * queries,
        kv_heads=kv,
        head_dim=float(head),
        value_dim=float(value),
        rope_dim=float(rope),
        window=op.attrs.get("window", 0.0),
        parts=float(graph.split("W" if "W" in node.dims else "T", node.layout)),
    )


def _merge(graph: ShardedGraph, node: ShardedOp) -> Row:
    """The merge of partial results: it reads those of all parts."""
    row, sizes = _pointwise(graph, node, "context_merge"), graph.model.sizes
    return row._replace(width=row.width / sizes[node.dims[-1]] * sizes["W"] * sizes["P"])


def _pointwise(graph: ShardedGraph, node: ShardedOp, kind: str) -> Row:
    op = node.op
    width = _local(graph, node.dims, node) if op is not None else 0.0
    share = 1.0
    moe = graph.model.spec.moe
    if kind in ("dispatch", "combine") and moe is not None:
        experts = graph.split("E", node.layout) if kind == "dispatch" else 1
        if kind == "combine":
            experts = graph.mesh.size(tuple(a for a, d in node.layout if d == "+"))
        width = float(graph.model.sizes["H"])
        share = moe.experts_per_token / max(experts, 1)
    elif "E" in node.dims and moe is not None and kind == "swiglu":
        local = _local(graph, ("E",), node)
        width /= local
        share = moe.experts_per_token * local / graph.model.sizes["E"]
    group: Group = "token" if op is None else _group(op, graph.model.phase)
    return Row(
        kind=kind,
        group=group,
        ways=_ways(graph, node, node.layout),
        width=width,
        share=share,
    )


def _collective(
    cluster: Cluster, graph: ShardedGraph, block: str, one: Transfer, algorithm: str
) -> Row:
    free = dict(one.elements.free)
    last = block == "head" and (graph.model.phase == "decode" or "T" not in free)
    ahead = block == "mtp_head" and "T" not in free
    whole: Group = "logits" if last else "draft_logits" if ahead else "token"
    return Row(
        kind=one.kind,
        group="attention" if one.attention else whole,
        ways=math.prod(free.values()),
        n=one.elements.factor,
        context="S" in free,
        element_bytes=one.element_bytes,
        settled=block == "head" and set(one.axes) <= set(graph.mesh.groups["dp"]),
        spans=spans_of(cluster, one, algorithm),
    )


def spans_of(cluster: Cluster, one: Transfer, algorithm: str = AUTO) -> tuple[TierSpan, ...]:
    """Tiers that a collective crosses, or in which neighbouring stages meet."""
    if one.kind == "send":
        return neighbour_tiers(cluster, one.lies)
    spans = tiers_crossed(cluster, one.lies)
    return with_algorithm(cluster, spans, algorithm) if runs(algorithm, one.kind) else spans


def _node_rows(graph: ShardedGraph, node: ShardedOp, engine: EngineProfile) -> Iterator[Row]:
    """The rows of one operator; none where the engine runs it inside another kernel."""
    op = node.op
    if op is not None and op.kind == "swiglu" and "swiglu" not in engine.fused:
        yield _pointwise(graph, node, "activation")
        yield _pointwise(graph, node, "swiglu")._replace(kind="gate")
    elif op is not None:
        row = _node_row(graph, node, op, engine)
        if row is not None:
            yield row


def _node_row(graph: ShardedGraph, node: ShardedOp, op: Op, engine: EngineProfile) -> Row | None:
    """The row of an operator that is one kernel; None where it is part of another."""
    if op.kind == "matmul":
        return _matmul(graph, node, op)
    if op.kind in _ATTENTION:
        return _attention(graph, node, op)
    if op.kind == "context_merge":
        return _merge(graph, node)
    if op.kind == "cache":
        row = _pointwise(graph, node, "kv_append")._replace(group="token")
        return row._replace(ways=row.ways * graph.split("S", node.layout)) if op.cut_as else row
    if op.kind == "topk":
        return _pointwise(graph, node, "topk_router")
    if op.kind == "bias" and op.role != "token":
        return None
    fused_norm = "add_rmsnorm" in engine.fused
    if op.kind == "add" and op.role == "token" and fused_norm:
        return None
    if op.kind == "rmsnorm" and op.role == "token" and op.name not in _PLAIN_NORMS:
        return _pointwise(graph, node, "add_rmsnorm" if fused_norm else "rmsnorm")
    return _pointwise(graph, node, op.kind)


def placed_rows(
    graph: ShardedGraph,
    block: ShardedBlock,
    cluster: Cluster,
    engine: EngineProfile,
    overlap: Overlap = NO_OVERLAP,
) -> list[Placed]:
    """Rows of one template under one layout with the operators that each runs.

    Fusions are applied and the switches of `overlap` set; collectives come last.
    """
    placed = mark(
        _placed(graph, block, cluster, engine, overlap.collectives), graph, block, engine, overlap
    )
    return [_drafting(one) for one in placed] if block.name == "mtp_head" else placed


def _drafting(one: Placed) -> Placed:
    """A row of the head of a draft: one token a sequence, but for what moves all tokens."""
    if one.row.is_collective and one.row.group == "token":
        return one
    return Placed(one.row._replace(group="draft_logits"), one.nodes)


def block_rows(
    graph: ShardedGraph,
    block: ShardedBlock,
    cluster: Cluster,
    engine: EngineProfile,
    overlap: Overlap = NO_OVERLAP,
) -> tuple[Row, ...]:
    """The rows of `placed_rows` alone, in its order."""
    return tuple(one.row for one in placed_rows(graph, block, cluster, engine, overlap))


def draft_rows(first: tuple[Row, ...], head: tuple[Row, ...]) -> tuple[Row, ...]:
    """Rows of a draft after the first one: those of `mtp` and `mtp_head`, one token a sequence."""
    return tuple(row._replace(group=_AGAIN.get(row.group, "draft")) for row in (*first, *head))


def phase_rows(
    graph: ShardedGraph, names: Iterable[str], rows_of: Callable[[str], tuple[Row, ...]]
) -> dict[str, tuple[Row, ...]]:
    """Rows of the templates that a phase runs, `draft` with them where a step drafts again."""
    found = {name: rows_of(name) for name in names}
    if "mtp" in found and graph.model.phase == "decode":
        found["draft"] = draft_rows(found["mtp"], found["mtp_head"])
    return found


def _kernels(graph: ShardedGraph, block: ShardedBlock, engine: EngineProfile) -> list[Placed]:
    """The rows that stay on one rank: the same for all layouts that share the template."""
    known: tuple[EngineProfile, list[Placed]] | None = block.known.get("kernels")
    if known is None or known[0] != engine:
        known = block.known["kernels"] = engine, _made_kernels(graph, block, engine)
    return known[1]


def _made_kernels(graph: ShardedGraph, block: ShardedBlock, engine: EngineProfile) -> list[Placed]:
    placed: list[Placed] = []
    for node in block.ops():
        if node.kind == "slice":
            ways = _ways(graph, node, node.layout)
            width = local_product(graph, node.dims, node.layout).factor * node.density
            row = Row(kind="slice", group="token", ways=ways, width=width)
            placed.append(Placed(row, (node.name,)))
        elif node.kind not in ("input", "recv") and not runs_inside_rotary(node, graph, engine):
            placed += [Placed(row, (node.name,)) for row in _node_rows(graph, node, engine)]
    return quantized(list(merged(join_rotary(placed, graph, engine), engine)), block, engine)


def _placed(
    graph: ShardedGraph,
    block: ShardedBlock,
    cluster: Cluster,
    engine: EngineProfile,
    algorithm: str,
) -> list[Placed]:
    placed = [*_kernels(graph, block, engine)]
    moving = [
        node.name
        for node in block.ops()
        if node.kind == "send" or (node.axes and node.kind != "slice")
    ]
    for name, one in zip(moving, transfers(graph, block), strict=True):
        if engine.sampling or not one.logits:
            row = _collective(cluster, graph, block.name, one, algorithm)
            placed.append(Placed(row, (name,)))
    if block.name in ("head", "mtp_head") and engine.sampling:
        row = Row(
            kind="softmax_sample",
            group="logits",
            ways=graph.parallel.dp,
            width=float(graph.model.sizes["V"]),
        )
        placed.append(Placed(row, ()))
    return placed
