"""What an engine joins and marks in the rows of one template, in computing order.

    merged      projections of one fuse label are one product
    joined      rotary embeddings are one kernel, with per-head norms (`qk_norm_rope`); MLA's latent
                norm, rotary key and cache writes are another (`mla_kv_norm_rope`); the writes of
                keys and values are one (`cache_write`), or run with plain rotary embeddings in
                what prepares attention (`attention_rope`)
    inside      norms that the all_reduce before them runs (`all_reduce_norm`, decode): as many as
                there are such sums in the layer, the first of a layer after the last of another
    norm_quant  a norm whose readers are linear products of one group alone writes their input's
                type; so do the activation (`act_quant`) and attention (`attention_quant`)
    fused       a row-parallel product and the all_reduce of its result, in prefill (`overlap`)
    behind      the kernels between a product and the one before it, if its weights are prefetched;
                before the first product of a layer come the last kernels of the layer before it

Left out: norm_quant's smaller all_gather under sequence parallelism (its input is int8 there).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.rows import Overlap, Placed, Row
from shardplan.models.apply import ShardedBlock, ShardedGraph, ShardedOp
from shardplan.models.weight_groups import WeightGroup, group_of

__all__ = ["join_rotary", "mark", "merged", "quantized", "runs_inside_rotary"]

_MLA_KERNEL = "mla_kv_norm_rope"
_MLA_KV = frozenset({"kv_a_norm", "k_pe_rope", "latent_cache", "rotary_cache"})
"""Operators of MLA's keys that one kernel runs."""

_ONE_WEIGHT = ("q_b", "kv_b", "qkv_a")
"""Projections that are one matrix in every checkpoint, whatever the engine fuses."""


_CUBE = ("matmul", "grouped_matmul", "attention", "mla_attention", "mla_absorbed")
_NORMS = ("rmsnorm", "add_rmsnorm")
_QUANTIZING: Mapping[str, Sequence[str]] = {
    "norm_quant": _NORMS,
    "act_quant": ("swiglu",),
    "attention_quant": ("attention", "mla_attention"),
}
"""Kernels that write the type of the products that read them, by fusion."""
_APART = ("embed", "head", "mtp_head", "send", "recv")
"""Templates that are no layer: nothing of their own kind comes before them."""


def _fuses(engine: EngineProfile, label: str) -> bool:
    if label in _ONE_WEIGHT:
        return True
    return ("gate_up" if label.endswith("gate_up") else label) in engine.fused


def merged(placed: list[Placed], engine: EngineProfile) -> Iterator[Placed]:
    """Projections of one fuse label as one matmul; the rest as they are."""
    waiting: dict[str, Placed] = {}
    for row, nodes in placed:
        if not row.fuse or not _fuses(engine, row.fuse):
            yield Placed(row, nodes)
        elif row.fuse in waiting:
            first, before = waiting[row.fuse]
            waiting[row.fuse] = Placed(first._replace(n=first.n + row.n), before + nodes)
        else:
            waiting[row.fuse] = Placed(row, nodes)
    yield from waiting.values()


def _join(placed: list[Placed], chosen: list[Placed], kind: str) -> list[Placed]:
    """Rows `chosen` as one kernel of `kind`, after the others."""
    if not chosen:
        return placed
    width = sum(one.row.width for one in chosen)
    nodes = tuple(node for one in chosen for node in one.nodes)
    joined = Placed(chosen[0].row._replace(kind=kind, width=width), nodes)
    return [*_without(placed, chosen), joined]


def _without(placed: list[Placed], left_out: list[Placed]) -> list[Placed]:
    those = set(map(id, left_out))
    return [one for one in placed if id(one) not in those]


def join_rotary(placed: list[Placed], graph: ShardedGraph, engine: EngineProfile) -> list[Placed]:
    """Rotary embeddings of queries and keys as one kernel, with their norms where fused.

    The key of MLA goes with its latent norm and the writes of its cache, where that is fused.
    """
    if graph.model.spec.mla is not None and "mla_kv_norm_rope" in engine.fused:
        shared = [one for one in placed if set(one.nodes) & _MLA_KV]
        placed = _join(placed, [one for one in shared if one.row.kind != "kv_append"], _MLA_KERNEL)
        placed = _without(placed, shared)
    rope = [one for one in placed if one.row.kind == "rope"]
    fused = graph.model.spec.qk_norm == "head" and "qk_norm_rope" in engine.fused
    if graph.model.spec.mla is None:
        writes = [one for one in placed if one.row.kind == "kv_append"]
        if "attention_rope" in engine.fused:
            placed = _without(placed, writes if fused else writes + rope)
            rope = rope if fused else []
        elif "cache_write" in engine.fused:
            placed = _join(placed, writes, "kv_append")
    return _join(placed, rope, "qk_norm_rope" if fused else "rope")


def runs_inside_rotary(node: ShardedOp, graph: ShardedGraph, engine: EngineProfile) -> bool:
    """Whether a node is a per-head norm that runs inside the rotary kernel."""
    op = node.op
    per_head = op is not None and op.kind == "rmsnorm" and op.role in ("heads", "kv_heads")
    return per_head and graph.model.spec.qk_norm == "head" and "qk_norm_rope" in engine.fused


def mark(
    placed: list[Placed],
    graph: ShardedGraph,
    block: ShardedBlock,
    engine: EngineProfile,
    overlap: Overlap,
) -> list[Placed]:
    """The rows with fused collectives and prefetches marked."""
    if "all_reduce_norm" in engine.fused and graph.model.phase == "decode":
        placed = _summed(placed)
    if overlap.fused_collectives and graph.model.phase == "prefill":
        placed = _fused(placed, block)
    if overlap.weight_prefetch:
        placed = _prefetched(placed, graph, block, engine)
    return placed


def _readers(
    block: ShardedBlock, read_by: Mapping[str, Sequence[str]], name: str
) -> Iterator[ShardedOp]:
    """Operators that read a result, past the collectives that move it."""
    for reader in map(block.op, read_by[name]):
        if reader.op is None:
            yield from _readers(block, read_by, reader.name)
        else:
            yield reader


def _linear(node: ShardedOp) -> bool:
    return node.op is not None and node.op.kind == "matmul" and node.op.weight_class == "linear"


def quantized(placed: list[Placed], block: ShardedBlock, engine: EngineProfile) -> list[Placed]:
    """Kernels that only linear products read: norms are marked as theirs, and the products as fed.

    Activations and attention are left as they are: what they write narrower is not priced.
    """
    kinds = {kind for name in engine.fused for kind in _QUANTIZING.get(name, ())}
    if not kinds:
        return placed
    fed: set[str] = set()
    norms: dict[str, WeightGroup] = {}
    read_by = block.readers()
    for row, nodes in placed:
        if row.kind in kinds and len(nodes) == 1:
            readers = list(_readers(block, read_by, nodes[0]))
            groups = {group_of(one.op) for one in readers if one.op is not None}
            if readers and all(map(_linear, readers)) and len(groups) == 1:
                fed |= {reader.name for reader in readers}
                if row.kind in _NORMS:
                    norms[nodes[0]] = groups.pop()
    return [
        Placed(row._replace(quantized=True), nodes)
        if fed.issuperset(nodes) and row.kind == "matmul"
        else Placed(row._replace(weight_class="linear", weight_group=norms[nodes[0]]), nodes)
        if row.kind in _NORMS and norms.keys() >= set(nodes)
        else Placed(row, nodes)
        for row, nodes in placed
    ]


def _summed(placed: list[Placed]) -> list[Placed]:
    """The rows without the norms that all_reduces run."""
    sums = sum(one.row.kind == "all_reduce" and one.row.group == "token" for one in placed)
    norms = [one for one in placed if one.row.kind == "add_rmsnorm"]
    return _without(placed, norms[:sums])


def _fused(placed: list[Placed], block: ShardedBlock) -> list[Placed]:
    """Products whose only reader is an all_reduce, with it."""
    sums = {
        block.op(nodes[0]).inputs[0]: (nodes[0], row)
        for row, nodes in placed
        if row.kind == "all_reduce"
    }
    taken: set[str] = set()
    found = []
    read_by = block.readers()
    for row, nodes in placed:
        last = nodes[-1] if nodes else ""
        alone = last in sums and len(read_by[last]) == 1
        if row.kind == "matmul" and len(nodes) == 1 and alone:
            name, collective = sums[last]
            taken.add(name)
            joined = row._replace(kind="matmul_all_reduce", fused=collective)
            found.append(Placed(joined, nodes))
        else:
            found.append(Placed(row, nodes))
    return [one for one in found if not taken.intersection(one.nodes)]


def _prefetched(
    placed: list[Placed], graph: ShardedGraph, block: ShardedBlock, engine: EngineProfile
) -> list[Placed]:
    """Products that the engine prefetches for, with the kernels that run before them."""
    place: Mapping[str, int] = {name: index for index, name in enumerate(block.order)}
    timed = [one for one in placed if one.nodes]
    order = sorted(timed, key=lambda one: min(place[name] for name in one.nodes))
    marked: dict[tuple[str, ...], Placed] = {}
    for index, one in enumerate(order):
        if _projection(one, graph) in engine.weight_prefetch:
            before = tuple(_before(order, index, wraps=block.name not in _APART))
            behind = tuple(row for row in before if _counts(row, engine))
            marked[one.nodes] = Placed(one.row._replace(behind=behind), one.nodes)
    return [marked.get(one.nodes, one) if one.row.kind in _PRODUCTS else one for one in placed]


_PRODUCTS = ("matmul", "grouped_matmul", "matmul_all_reduce")


def _projection(one: Placed, graph: ShardedGraph) -> str:
    """What the engine profile calls a product; empty for any other row."""
    row, nodes = one
    if row.kind == "grouped_matmul":
        return "experts" if row.fuse == "e_gate_up" else ""
    if row.kind not in _PRODUCTS or (graph.model.spec.moe is not None and row.fuse != "qkv_a"):
        return ""
    return row.fuse or nodes[0]


def _before(order: Sequence[Placed], index: int, *, wraps: bool) -> Iterator[Row]:
    """Rows that run between a row and the product or attention before it."""
    steps = range(1, len(order) if wraps else index + 1)
    for back in steps:
        row = order[index - back].row
        if row.kind in _CUBE or row.fused is not None:
            return
        yield row


def _counts(row: Row, engine: EngineProfile) -> bool:
    kind = "collective" if row.is_collective else "vector"
    return row.group != "attention" and kind in engine.weight_prefetch_behind
