"""Seconds of a captured graph's operators and of what moves between them, on one rank of a mesh.

An operator costs what the kernel formula of its kind gives for the sizes that are left on a rank,
a redistribution what `kernels.collectives` gives for its message over the tiers that its group
crosses. Every operator is a kernel of its own (no fusion), launched from a captured graph:

    matmul, conv    with a, b, y the elements of the two operands and of the result on a rank
                    k = flop / (2 y)    n = b / (k batch)    m = y / (n batch)
                    batch = size of the loops that a, b and y all run over; above 1 the product is
                    a grouped one (`kernels.moe`) of `batch` groups
    attention       `attention_decode` for up to a fractal of queries on a longer context, else
                    `attention_prefill`; loops b (sequences), h (kv heads), g (queries of one kv
                    head), t (queries), sizes from `attrs`: heads, kv_heads, head_dim, context
    grouped_matmul  y[m, n] = x[m, k] w[e, k, n], rows of all experts; ranks that share e have an
                    equal part of the rows and of the experts
    moe             x, gates and three weights [experts, ..]: `moe_block` with `attrs` topk
    reshape         no time where elements keep their order (a view), else a copy
    all others      a streaming kernel (`kernels.pointwise`) of the bytes read and written

Axes of a mesh number ranks major to minor, the last axis by neighbours. Left out: fusion, overlap
of collectives with compute, several streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.attention import attention_decode, attention_prefill
from shardplan.costmodel.kernels.base import Array, KernelTime, Machine
from shardplan.costmodel.kernels.collectives import CollectiveKind, collective
from shardplan.costmodel.kernels.flash import FRACTAL
from shardplan.costmodel.kernels.matmul import matmul
from shardplan.costmodel.kernels.moe import grouped_matmul, moe_block
from shardplan.costmodel.kernels.pointwise import pointwise
from shardplan.costmodel.kernels.precision import precision_of
from shardplan.costmodel.placement import tiers_crossed
from shardplan.models.errors import InputError
from shardplan.models.opgraph import Access, Operator, Tensor, element_bytes
from shardplan.models.parallel import Mesh

__all__ = ["AUTO_DTYPE", "OperatorPrices"]

AUTO_DTYPE = "auto"
_PRODUCTS = {"bfloat16": "bf16", "float16": "fp16"}
_FLOATS = ("float64", "float32", "bfloat16", "float16")
_WIDE = ("float64", "float32")
_STREAMS: Mapping[str, str] = {
    "norm": "rmsnorm",
    "reduce": "rmsnorm",
    "softmax": "softmax_sample",
    "pointwise": "add",
    "embedding": "embedding",
    "gather": "slice",
    "scatter": "kv_append",
}
"""Kind of operator -> fitted streaming kernel; every other kind is a copy of what it moves."""
_TABLES = ("embedding", "gather")
"""Kinds that read of their first operand only what they write."""
_HEADS = ("heads", "kv_heads", "head_dim", "context")
_EXPERT_READS = 5
"""Tokens, gates, and the weights of gate, up and down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorPrices:
    """Prices operators and redistributions of one mesh on one cluster.

    `dtype`: type of matrix products (`kernels.precision`), which floating tensors are then held
    in; `auto` takes the tensors' own.
    """

    machine: Machine
    cluster: Cluster
    mesh: Mesh
    engine: EngineProfile
    dtype: str
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        cluster: Cluster,
        mesh: Mesh,
        engine: EngineProfile,
        tensors: Mapping[str, Tensor],
        dtype: str = AUTO_DTYPE,
    ) -> OperatorPrices:
        """Raises `UnknownNameError` for a dtype that no product has."""
        if dtype != AUTO_DTYPE:
            precision_of(dtype)
        machine = Machine.of(cluster.device, engine.name)
        return cls(
            machine=machine,
            cluster=cluster,
            mesh=mesh,
            engine=engine,
            dtype=dtype,
            tensors=tensors,
        )

    def width_bytes(self, tensor: Tensor) -> float:
        """Bytes of one element of a tensor as it is held."""
        if self.dtype == AUTO_DTYPE or tensor.dtype not in _FLOATS:
            return float(element_bytes(tensor.dtype))
        matrix = tensor.kind == "parameter" and len(tensor.shape) > 1
        return precision_of(self.dtype).weight_bytes if matrix else 2.0

    def operator(self, op: Operator, chosen: Sequence[Mapping[str, str]]) -> KernelTime:
        """Seconds of an operator under each of several strategies {axis: loop}, `[strategies]`.

        `InputError` where the operator lacks what its formula asks for, or for a type without a
        matrix unit.
        """
        local = _Local(self, op, tuple(chosen))
        if op.kind in ("matmul", "conv") and op.flop > 0.0:
            time = _product(local)
        elif op.kind == "attention":
            time = _attention(local)
        elif op.kind == "grouped_matmul":
            time = _routed(local)
        elif op.kind == "moe":
            time = _experts(local)
        elif op.kind == "reshape" and _is_view(op, self.tensors):
            nothing = np.zeros(len(chosen))
            return KernelTime(nothing, nothing, nothing, nothing)
        else:
            time = _stream(local)
        full = np.broadcast_to
        total, compute, memory, over = (full(part, (len(chosen),)) for part in time)
        gap = self.engine.launch_gap_s
        return KernelTime(total + gap, compute, memory, over + gap)

    def move(self, kind: str, axes: tuple[str, ...], message_bytes: Array) -> Array:
        """Seconds of redistributions of one kind over one group, `[messages]`.

        `message_bytes`: of the full tensor of the group, as `collective` counts; of a slice, what
        is kept.
        """
        gap = self.engine.launch_gap_s
        if kind == "slice":
            kept = np.maximum(message_bytes, 1.0)
            return pointwise(self.machine, "slice", kept / 2.0, kept * 2.0).total_s + gap
        time = collective(
            cast("CollectiveKind", kind),
            tiers_crossed(self.cluster, self.lies(axes)),
            message_bytes,
            self.machine.calibration,
            launch="graph",
            in_service=True,
        )
        return time.total_s + gap

    def lies(self, axes: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
        """(ranks, distance between them) of a group over these axes."""
        mesh = self.mesh
        after = {a: math.prod(mesh.shape[i + 1 :]) for i, a in enumerate(mesh.axes)}
        return tuple((mesh.size((axis,)), after[axis]) for axis in axes)


@dataclass(frozen=True, slots=True)
class _Local:
    """What is left of an operator on a rank, as arrays over strategies."""

    prices: OperatorPrices
    op: Operator
    chosen: tuple[Mapping[str, str], ...]

    def ways(self, *loops: str) -> Array:
        """Ranks that share these loops."""
        size = self.prices.mesh.size
        return np.array(
            [size(tuple(a for a, loop in one.items() if loop in loops)) for one in self.chosen],
            dtype=np.float64,
        )

    def elements(self, access: Access) -> Array:
        """Elements of a tensor that it reads or writes."""
        whole = float(self.prices.tensors[access.tensor].elements)
        return whole / self.ways(*(loop for loop in access.loops if loop))

    def bytes(self, access: Access) -> Array:
        """Bytes of the same."""
        width = self.prices.width_bytes(self.prices.tensors[access.tensor])
        return self.elements(access) * width

    def size(self, access: Access, loop: str) -> int:
        """Elements of the dim of a tensor that runs over a loop."""
        return self.prices.tensors[access.tensor].shape[access.loops.index(loop)]

    def error(self, rule: str, got: str, hint: str = "") -> InputError:
        """An error that names the operator and its place."""
        op = self.op
        return InputError(rule, got=f"{op.name} ({op.kind}) at {op.where}: {got}", hint=hint)

    def number(self, name: str) -> float:
        """A size that the operator says in its attributes."""
        value = self.op.attrs.get(name)
        if not isinstance(value, int | float) or value < 1:
            raise self.error(
                "an operator says the sizes that its price needs",
                f"{name}={value!r}",
                f"its attributes are {', '.join(self.op.attrs) or 'none'}",
            )
        return float(value)

    def product_dtype(self, weight: Tensor) -> str:
        """Type of a matrix product."""
        if self.prices.dtype != AUTO_DTYPE:
            return self.prices.dtype
        if weight.dtype not in _PRODUCTS:
            raise self.error(
                "matrix products are priced in a type of `kernels.precision`",
                f"{weight.name} is {weight.dtype}",
                "give dtype (weight_dtype of a search), for example bf16",
            )
        return _PRODUCTS[weight.dtype]

    def is_held(self, access: Access) -> bool:
        """Whether it reads a parameter."""
        return self.prices.tensors[access.tensor].kind == "parameter"


def _product(local: _Local) -> KernelTime:
    op = local.op
    if len(op.reads) < 2:  # noqa: PLR2004
        raise local.error("a product has two operands", f"{len(op.reads)}")
    first, second, out = op.reads[0], op.reads[1], op.writes[0]
    if local.is_held(first) and not local.is_held(second):
        first, second = second, first
    shared = [n for n in op.loops if all(n in one.loops for one in (first, second, out))]
    batch = math.prod(local.size(second, n) for n in shared) / local.ways(*shared)
    y = local.elements(out)
    k = op.flop / local.ways(*op.loops) / (2.0 * y)
    n = local.elements(second) / (k * batch)
    m = y / (n * batch)
    dtype = local.product_dtype(local.prices.tensors[second.tensor])
    machine, held = local.prices.machine, local.is_held(second)
    if not shared:
        return matmul(machine, m, n, k, dtype, weights="cold" if held else "rotated")
    spread = local.ways(*shared) if held else 1.0
    return grouped_matmul(machine, m * batch, batch, n, k, dtype, active=batch, ep=spread)


def _attention(local: _Local) -> KernelTime:
    op = local.op
    heads, kv, dim, context = (local.number(name) for name in _HEADS)
    out = local.prices.tensors[op.writes[0].tensor].elements
    sequences = float(op.loops["b"].size) if "b" in op.loops else 1.0
    queries = out / (sequences * heads * float(op.attrs.get("value_dim", dim)))
    new = np.maximum(queries / local.ways("t"), 1.0)
    batch, keys = sequences / local.ways("b"), kv / local.ways("h")
    own = heads / local.ways("h", "g")
    if queries <= FRACTAL and queries < context:
        return attention_decode(
            local.prices.machine, batch, context, own, keys, dim,
            new_tokens=new, kernel="flash", kv_dtype="bf16",
        )  # fmt: skip
    seen = context - new / (1.0 if op.attrs.get("causal") else 2.0)
    return attention_prefill(
        local.prices.machine, batch, new, np.maximum(seen, 0.0), own, keys, dim,
        kernel="flash", kv_dtype="bf16",
    )  # fmt: skip


def _routed(local: _Local) -> KernelTime:
    op = local.op
    rows, weights = op.reads[0], op.reads[1]
    expert, k, n = weights.loops
    spread = local.ways(expert)
    return grouped_matmul(
        local.prices.machine,
        local.size(rows, rows.loops[0]) / local.ways(expert, rows.loops[0]),
        local.size(weights, expert) / spread,
        local.size(weights, n) / local.ways(n),
        local.size(weights, k) / local.ways(k),
        local.product_dtype(local.prices.tensors[weights.tensor]),
        ep=spread,
    )


def _experts(local: _Local) -> KernelTime:
    op, tensors = local.op, local.prices.tensors
    weights = [one for one in op.reads if local.is_held(one)]
    if len(op.reads) != _EXPERT_READS or len(weights) != _EXPERT_READS - 2:
        raise local.error(
            "experts read tokens, gates, and weights of gate, up and down", ", ".join(op.inputs)
        )
    down, expert = weights[-1], weights[-1].loops[0]
    experts, hidden = (float(size) for size in tensors[down.tensor].shape[:2])
    spread = local.ways(expert)
    ffn = local.elements(down) * spread / (experts * hidden)
    tokens = local.elements(op.reads[0]) / hidden
    dtype = local.product_dtype(tensors[down.tensor])
    topk = local.number("topk")
    return moe_block(local.prices.machine, tokens, hidden, ffn, experts, topk, spread, dtype)


def _is_view(op: Operator, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a reshape leaves its elements where they are: the same number, in the same order."""
    if len(op.reads) != 1 or len(op.writes) != 1:
        return False
    source, out = op.reads[0], op.writes[0]
    same = tensors[source.tensor].elements == tensors[out.tensor].elements
    order = [[loop for loop in one.loops if loop] for one in (source, out)]
    return same and order[0] == order[1]


def _stream(local: _Local) -> KernelTime:
    op, tensors = local.op, local.prices.tensors
    written = sum((local.bytes(one) for one in op.writes), np.zeros(len(local.chosen)))
    computed = local.elements(op.writes[0])
    reads = list(op.reads)
    if op.kind in _TABLES and reads:
        reads, written = reads[1:], 2.0 * written
    elif reads:
        computed = np.maximum(computed, local.elements(reads[0]))
    moved = sum((local.bytes(one) for one in reads), written)
    wide = local.prices.dtype == AUTO_DTYPE and tensors[op.writes[0].tensor].dtype in _WIDE
    kind = _STREAMS.get(op.kind, "copy")
    return pointwise(local.prices.machine, kind, computed, moved, "fp32" if wide else "bf16")
