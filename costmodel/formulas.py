"""Formulas of the op table's rows that stay on one rank: row and load -> kernel time.

A formula takes the step model (its machine, engine and data-parallel groups), a row and a load,
and asks the kernel formula of the row's kind for the local sizes. Two know more than the kernel:

    matmul   of the weights, what was prefetched into L2 is read there (`overlap`); where the norm
             before it quantizes (`norm_quant`), no kernel of its own does
    norm     a norm that also quantizes writes one byte an element in place of two. Its input side
             keeps the norm's rate; the written byte goes at the rate of the kernel that quantizes:
             norm(elements, bytes - 2) + elements * 1 / (L2 * e_quantize)

Where W ranks share a context (`Row.parts`), each has T / W new tokens of a prompt. The kernel is
that of the last T / W, which see every key, and its body shrinks to the scores of balanced pieces
(zig-zag), T (P + T / 2) / W; without a causal skip (naive) all pieces are alike:

    body = body(T / W, P + T - T / W) (P + T / 2) / (P + T - T / 2 W)

In decode a token sees S / W keys on each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from shardplan.costmodel.kernels.attention import attention_decode, attention_prefill
from shardplan.costmodel.kernels.base import Array, KernelTime
from shardplan.costmodel.kernels.matmul import matmul
from shardplan.costmodel.kernels.mla import mla_decode, mla_prefill
from shardplan.costmodel.kernels.moe import grouped_matmul, routing_draws
from shardplan.costmodel.kernels.pointwise import pointwise
from shardplan.costmodel.kernels.precision import precision_of
from shardplan.costmodel.load import SIXTEEN_BIT, Load, kernel_dtype
from shardplan.costmodel.optable import Group, Row, pointwise_bytes, pointwise_kernel
from shardplan.costmodel.row_stacks import SPECIAL

if TYPE_CHECKING:
    from shardplan.costmodel.step import StepModel

__all__ = [
    "ATTENTION",
    "DTYPES",
    "FORMULAS",
    "dtypes_of",
    "local_tokens",
    "matmul_time",
    "pointwise_time",
]

DTYPES = ("weight_dtype", "kv_dtype", "attention")
"""Choices of a load that are not numbers."""
ATTENTION: tuple[Group, ...] = ("attention", "draft_attention")

_WRITTEN_BYTES = 2.0
"""A 16-bit element that a norm writes, and that a norm which quantizes does not."""


def local_tokens(row: Row, load: Load, groups: int) -> Array:
    """Local tokens of a row: those of all dp groups, cut `ways` ways, rounded up."""
    tokens = _attended(row, load) if row.group == "attention" else load.tokens
    return np.ceil(tokens * groups / row.ways)


def _attended(row: Row, load: Load) -> Array:
    """Tokens of one dp group that an attention row runs over: the new ones, or the context."""
    return load.batch * (load.prefix + load.new if row.context else load.new)


def matmul_time(
    model: StepModel, row: Row, load: Load, warm_bytes: Array | None = None
) -> KernelTime:
    """Time of a product whose weights stream from HBM, but for `warm_bytes` of them in L2."""
    dtype = kernel_dtype(row, load.weight_dtype)
    warm = None
    if warm_bytes is not None:
        warm = np.minimum(warm_bytes / (row.n * row.k * precision_of(dtype).weight_bytes), 1.0)
    return matmul(
        model.machine,
        matmul_rows(model, row, load),
        row.n,
        row.k,
        dtype,
        weights="cold",
        warm=warm,
        quantized=row.quantized,
    )


def matmul_rows(model: StepModel, row: Row, load: Load) -> Array:
    """Rows (tokens) of a product's input on one rank, at least one."""
    if row.group in ATTENTION:
        tokens = _attended(row, load)
    else:
        tokens = local_tokens(row, load, model.groups)
    return np.maximum(tokens, 1.0)


def _matmul(model: StepModel, row: Row, load: Load) -> KernelTime:
    return matmul_time(model, row, load)


def _grouped(model: StepModel, row: Row, load: Load) -> KernelTime:
    tokens = np.maximum(local_tokens(row, load, model.groups), 1.0)
    choices = tokens * routing_draws(model.machine, kernel_dtype(row, load.weight_dtype))
    active = row.experts * (1.0 - (1.0 - row.share / row.experts) ** choices)
    return grouped_matmul(
        model.machine,
        np.maximum(tokens * row.share, active),
        row.experts,
        row.n,
        row.k,
        kernel_dtype(row, load.weight_dtype),
        active=active,
        ep=row.spread,
    )


def pointwise_time(model: StepModel, row: Row, load: Load) -> KernelTime:
    """Time of a kernel that streams."""
    elements = _elements(model, row, load)
    kind = pointwise_kernel(row)
    return pointwise(model.machine, kind, elements, elements * pointwise_bytes(row), SIXTEEN_BIT)


def _elements(model: StepModel, row: Row, load: Load) -> Array:
    return np.maximum(local_tokens(row, load, model.groups) * row.width * row.share, 1.0)


def _norm(model: StepModel, row: Row, load: Load) -> KernelTime:
    """A norm; one that feeds linear layers alone (`weight_class`) quantizes where they do."""
    dtype = kernel_dtype(row, load.weight_dtype)
    if row.weight_class == "none" or not precision_of(dtype).quantizes:
        return pointwise_time(model, row, load)
    elements, kind = _elements(model, row, load), pointwise_kernel(row)
    moved = elements * (pointwise_bytes(row) - _WRITTEN_BYTES)
    norm = pointwise(model.machine, kind, elements, moved, SIXTEEN_BIT)
    static = dtype.endswith("_static")
    own = "quantize_static" if static else "quantize"
    write = pointwise(model.machine, own, elements, elements, SIXTEEN_BIT)
    body = write.compute_s + write.memory_s
    return KernelTime(
        norm.total_s + body,
        norm.compute_s + write.compute_s,
        norm.memory_s + write.memory_s,
        norm.overhead_s,
    )


def _own_queries(row: Row, load: Load) -> tuple[Array, Array, Array]:
    """(new tokens, tokens before them, share of their body) of a prompt on one of its ranks."""
    new, before = load.new / row.parts, load.prefix + load.new * (1.0 - 1.0 / row.parts)
    if load.attention == "naive":
        return new, before, np.ones(())
    mean, last = load.prefix + load.new / 2.0, before + new / 2.0
    return new, before, np.asarray(mean / np.maximum(last, 0.5))


def _balanced(time: KernelTime, share: Array) -> KernelTime:
    """A kernel whose body is a share of what it would be for the last tokens of a prompt."""
    compute, memory = time.compute_s * share, time.memory_s * share
    saved = (time.compute_s + time.memory_s) * (1.0 - share)
    return KernelTime(time.total_s - saved, compute, memory, time.overhead_s)


def _attention(model: StepModel, row: Row, load: Load) -> KernelTime:
    window = int(row.window) or None
    if load.phase == "decode":
        return attention_decode(
            model.machine,
            load.batch,
            (load.prefix + load.new) / row.parts,
            row.heads,
            row.kv_heads,
            row.head_dim,
            new_tokens=load.new,
            kernel=load.attention,
            kv_dtype=load.kv_dtype,
            window=window,
        )
    new, before, share = _own_queries(row, load)
    time = attention_prefill(
        model.machine,
        load.batch,
        new,
        before,
        row.heads,
        row.kv_heads,
        row.head_dim,
        kernel=load.attention,
        kv_dtype=load.kv_dtype,
        window=window,
    )
    return _balanced(time, share)


def _mla_prefill(model: StepModel, row: Row, load: Load) -> KernelTime:
    new, before, share = _own_queries(row, load)
    time = mla_prefill(
        model.machine,
        load.batch,
        new,
        before,
        row.heads,
        row.head_dim,
        row.rope_dim,
        row.value_dim,
        kernel=load.attention,
    )
    return _balanced(time, share)


def _mla_decode(model: StepModel, row: Row, load: Load) -> KernelTime:
    return mla_decode(
        model.machine,
        load.batch,
        (load.prefix + load.new) / row.parts,
        row.heads,
        row.head_dim,
        row.rope_dim,
        new_tokens=load.new,
        kernel=load.attention,
        kv_dtype=load.kv_dtype,
    )


FORMULAS: Mapping[str, Callable[[StepModel, Row, Load], KernelTime]] = {
    "matmul": _matmul,
    "grouped_matmul": _grouped,
    "attention": _attention,
    "mla_attention": _mla_prefill,
    "mla_absorbed": _mla_decode,
    "rmsnorm": _norm,
    "add_rmsnorm": _norm,
}
"""Kind of operator -> formula; every other kind moves bytes (`pointwise_time`)."""


def dtypes_of(row: Row) -> tuple[str, ...]:
    """Fields of a load beside its arrays that the price of a row depends on."""
    if any(getattr(row, name) for name in SPECIAL):
        return DTYPES
    if row.is_collective or row.kind not in FORMULAS:
        return ()
    if row.group in ATTENTION and row.kind != "matmul":
        return ("kv_dtype", "attention")
    return ("weight_dtype",) if kernel_dtype(row, "") == "" else ()
