"""The op table: an applied template as rows of numbers, ready for the formulas.

One row is one kernel or collective of one rank. A row knows its local sizes and how the free
dims (batch, tokens, context) enter, so a table is made once a layout and priced for any batch,
length and dtype. Rows fall into three groups by what they depend on:

    token      the tokens of a step (matmuls, norms, expert kernels, most collectives)
    attention  batch, new tokens and context (attention, MLA's up-projections)
    logits     the sequences whose logits are wanted (LM head, its gather, sampling)

Engine fusion is decided here: projections that share an input become one matmul, a residual add
joins the norm that follows it, query/key norms join the rotary embedding.
Left out: kernels under a microsecond that real engines hide (reshapes, casts).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.placement import TierSpan, group_tiers
from shardplan.models.accounting import Transfer, local_product, transfers
from shardplan.models.apply import ShardedBlock, ShardedGraph, ShardedOp
from shardplan.models.graph import FREE_DIMS, Op, WeightClass

__all__ = ["Group", "Row", "block_rows"]

Group = Literal["token", "attention", "logits"]

_POINTWISE_BYTES: Mapping[str, float] = {
    "add": 6.0,
    "bias": 6.0,
    "scale": 4.0,
    "sumsq": 2.0,
    "gate": 6.0,
    "swiglu": 6.0,
    "rmsnorm": 4.0,
    "add_rmsnorm": 8.0,
    "rope": 4.0,
    "qk_norm_rope": 4.0,
    "kv_append": 4.0,
    "slice": 4.0,
    "embedding": 4.0,
    "topk_router": 6.0,
    "dispatch": 4.0,
    "combine": 4.0,
    "select": 4.0,
    "softmax_sample": 4.0,
}
"""Bytes that one element of the output (routed element for dispatch and combine) makes a kernel
move: 16-bit reads of its inputs and writes of its outputs."""

_KIND_OF_POINTWISE: Mapping[str, str] = {
    "add": "add",
    "bias": "bias",
    "scale": "mul",
    "sumsq": "mul",
    "gate": "mul",
    "select": "slice",
    "dispatch": "slice",
    "combine": "add",
}
"""Which fitted pointwise kernel stands for an operator that has none of its own."""

_ONE_WEIGHT = ("q_b", "kv_b", "qkv_a")
"""Projections that are one matrix in every checkpoint, whatever the engine fuses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kernel of one rank. Sizes are local; `ways` is how many ways the tokens are cut."""

    kind: str
    group: Group
    ways: int = 1
    n: float = 0.0
    """Matmul: output features. Collective: elements a token of the full tensor of its group."""
    k: float = 0.0
    width: float = 0.0
    """Pointwise: elements a token."""
    context: bool = False
    """The rows are the context's tokens, not the new ones."""
    weight_class: WeightClass = "none"
    experts: float = 0.0
    """Local experts of a grouped matmul."""
    spread: float = 1.0
    """Ranks that share the experts: above 1, the busiest has more rows than the mean."""
    share: float = 1.0
    """Routed rows a token on this rank."""
    heads: float = 0.0
    kv_heads: float = 0.0
    head_dim: float = 0.0
    value_dim: float = 0.0
    rope_dim: float = 0.0
    window: float = 0.0
    spans: tuple[TierSpan, ...] = ()
    fuse: str = ""

    @property
    def is_collective(self) -> bool:
        """Whether it crosses ranks."""
        return bool(self.spans)


def _ways(graph: ShardedGraph, node: ShardedOp, layout: tuple[tuple[str, str], ...]) -> int:
    return math.prod(graph.split(d, layout) for d in set(node.dims) & {"B", "T"})


def _local(graph: ShardedGraph, dims: tuple[str, ...], node: ShardedOp) -> float:
    """Elements over the fixed dims, kept or contracted, as the operator's assignment cuts them."""
    return math.prod(
        graph.model.sizes[d] / max(graph.split(d, node.layout), graph.split(d, node.weight_layout))
        for d in dims
        if d not in FREE_DIMS
    )


def _group(op: Op, phase: str) -> Group:
    if op.role in ("head", "select"):
        return "logits"
    if "S" in op.dims and op.kind != "cache":
        return "attention"
    if op.kind in ("attention", "mla_attention", "mla_absorbed"):
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
        context="S" in op.dims,
        fuse=op.fuse,
    )
    if op.role != "expert":
        return row
    local_experts = _local(graph, ("E",), node)
    moe = graph.model.spec.moe
    topk = moe.experts_per_token if moe is not None else 1
    return replace(
        row,
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
    )


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


def _collective(cluster: Cluster, graph: ShardedGraph, block: str, one: Transfer) -> Row:
    spans = group_tiers(cluster, group=one.ranks, stride=one.stride)
    free = dict(one.elements.free)
    last = block == "head" and (graph.model.phase == "decode" or "T" not in free)
    return Row(
        kind=one.kind,
        group="logits" if last else "token",
        ways=math.prod(free.values()),
        n=one.elements.factor,
        spans=spans,
    )


def _fuses(engine: EngineProfile, label: str) -> bool:
    if label in _ONE_WEIGHT:
        return True
    return ("gate_up" if label.endswith("gate_up") else label) in engine.fused


def _merged(rows: list[Row], engine: EngineProfile) -> Iterator[Row]:
    """Projections of one fuse label as one matmul; the rest as they are."""
    waiting: dict[str, Row] = {}
    for row in rows:
        if not row.fuse or not _fuses(engine, row.fuse):
            yield row
        elif row.fuse in waiting:
            waiting[row.fuse] = replace(waiting[row.fuse], n=waiting[row.fuse].n + row.n)
        else:
            waiting[row.fuse] = row
    yield from waiting.values()


def _node_row(graph: ShardedGraph, node: ShardedOp, engine: EngineProfile) -> Row | None:
    """The row of one operator; None where the engine runs it inside another kernel."""
    op = node.op
    if op is None:
        return None
    if op.kind == "matmul":
        return _matmul(graph, node, op)
    if op.kind in ("attention", "mla_attention", "mla_absorbed"):
        return _attention(graph, node, op)
    if op.kind == "cache":
        return replace(_pointwise(graph, node, "kv_append"), group="token")
    if op.kind == "topk":
        return _pointwise(graph, node, "topk_router")
    if op.kind == "bias" and op.role != "token":
        return None
    fused_norm = "add_rmsnorm" in engine.fused
    if op.kind == "add" and op.role == "token" and fused_norm:
        return None
    if op.kind == "rmsnorm" and op.role == "token":
        return _pointwise(graph, node, "add_rmsnorm" if fused_norm else "rmsnorm")
    return _pointwise(graph, node, op.kind)


def _join_rotary(rows: list[Row], graph: ShardedGraph, engine: EngineProfile) -> list[Row]:
    """Rotary embeddings of queries and keys as one kernel, with their norms where fused."""
    rope = [row for row in rows if row.kind == "rope"]
    if not rope:
        return rows
    fused = graph.model.spec.qk_norm == "head" and "qk_norm_rope" in engine.fused
    joined = replace(
        rope[0],
        kind="qk_norm_rope" if fused else "rope",
        width=sum(row.width for row in rope),
    )
    return [row for row in rows if row.kind != "rope"] + [joined]


def _head_norms(node: ShardedOp, graph: ShardedGraph, engine: EngineProfile) -> bool:
    """Whether a node is a per-head norm that runs inside the rotary kernel."""
    op = node.op
    per_head = op is not None and op.kind == "rmsnorm" and op.role in ("heads", "kv_heads")
    return per_head and graph.model.spec.qk_norm == "head" and "qk_norm_rope" in engine.fused


def block_rows(
    graph: ShardedGraph, block: ShardedBlock, cluster: Cluster, engine: EngineProfile
) -> tuple[Row, ...]:
    """Rows of one template under one layout, fusions applied."""
    rows: list[Row] = []
    for node in block.ops():
        if node.kind == "slice":
            ways = _ways(graph, node, node.layout)
            width = local_product(graph, node.dims, node.layout).factor * node.density
            rows.append(Row(kind="slice", group="token", ways=ways, width=width))
        elif node.kind not in ("input", "recv") and not _head_norms(node, graph, engine):
            row = _node_row(graph, node, engine)
            if row is not None:
                rows.append(row)
    rows = list(_merged(_join_rotary(rows, graph, engine), engine))
    rows += [_collective(cluster, graph, block.name, one) for one in transfers(graph, block)]
    if block.name == "head" and engine.sampling:
        rows.append(
            Row(
                kind="softmax_sample",
                group="logits",
                ways=graph.parallel.dp,
                width=float(graph.model.sizes["V"]),
            )
        )
    return tuple(rows)


def pointwise_bytes(row: Row) -> float:
    """Bytes moved an element."""
    return _POINTWISE_BYTES[row.kind]


def pointwise_kernel(row: Row) -> str:
    """The fitted kernel that stands for a pointwise row."""
    return _KIND_OF_POINTWISE.get(row.kind, row.kind)
