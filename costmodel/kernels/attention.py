"""Attention of one rank: prefill and decode, FlashAttention or the naive sequence of kernels.

Flash: the formulas of `flash`, with the coefficients `attention.prefill` and `attention.decode`,
and the correction `nearby.grid_factor` of either that has one: over batch times query heads and the
context in prefill, over batch times kv heads and the context in decode.

Naive. The operators that eager attention launches (Hugging Face transformers,
`eager_attention_forward` of models/llama/modeling_llama.py): no causal skip, and every
intermediate goes through HBM at its own bytes. For N = B H T S scores:

    kernel     bytes a score     arithmetic
    QK^T       2 written         2 N d FLOP of the cube
    scale      2 read 2 written  N vector FLOP
    mask       2 read 2 written  N vector FLOP
    softmax    2 read 4 written  N softmax_flop vector FLOP (computed in fp32)
    cast       4 read 2 written  N vector FLOP
    PV         2 read            2 N d FLOP of the cube
    repeat_kv  keys and values read, written G times wider (two kernels, grouped heads only)

    total = kernels x launch floor + sum over kernels of max(bytes / (R e_hbm), FLOP / (F e))

so that what FlashAttention gains is the traffic and the launches it saves, not a constant. Left
out: L2 hits of a small score matrix (naive is then too slow here), kernels that a graph compiler
fuses, paging.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from shardplan.costmodel.kernels.base import (
    Array,
    ArrayLike,
    KernelTime,
    Machine,
    as_array,
    as_measured,
    scaled,
)
from shardplan.costmodel.kernels.flash import (
    ELEMENT_BYTES,
    FRACTAL,
    DecodeWork,
    PrefillWork,
    flash_decode,
    flash_prefill,
    matrix_flop_per_s,
    split_time,
    tile_rows,
)
from shardplan.costmodel.nearby import grid_factor
from shardplan.models.errors import InputError

__all__ = [
    "AttentionKernel",
    "attention_decode",
    "attention_prefill",
    "attention_workspace_bytes",
    "check_kernel",
    "kv_element_bytes",
    "naive_attention",
]

AttentionKernel = Literal["flash", "naive"]
NAIVE_BYTES_PER_SCORE = (2.0, 4.0, 4.0, 6.0, 6.0, 2.0)
"""QK^T, scale, mask, fp32 softmax, cast, PV: bytes moved a score."""


def kv_element_bytes(kv_dtype: str) -> float:
    """Bytes of one stored key or value element; `InputError` for an unknown type."""
    sizes = {"bf16": 2.0, "fp16": 2.0, "int8": 1.0, "fp8": 1.0}
    if kv_dtype not in sizes:
        raise InputError(
            "`kv_dtype` must be one of " + ", ".join(sizes), got=f"kv_dtype={kv_dtype!r}"
        )
    return sizes[kv_dtype]


def check_kernel(kernel: str) -> None:
    """`InputError` unless the kernel is one that is priced."""
    if kernel not in ("flash", "naive"):
        raise InputError("`kernel` must be flash or naive", got=f"kernel={kernel!r}")


def attention_prefill(
    machine: Machine,
    batch: ArrayLike,
    new_tokens: ArrayLike,
    prefix_tokens: ArrayLike,
    heads: ArrayLike,
    kv_heads: ArrayLike,
    head_dim: ArrayLike,
    *,
    kernel: AttentionKernel,
    kv_dtype: str,
    window: int | None = None,
) -> KernelTime:
    """Causal attention of `[batch, new_tokens, heads, head_dim]` over prefix and new tokens.

    Sizes broadcast; `heads` and `kv_heads` are those of one rank; tokens are a sequence's. A
    `window` bounds the context that a query sees (the naive kernel masks it, saving nothing).
    `InputError` for an unknown kernel or `kv_dtype`; `CalibrationError` without coefficients.
    """
    check_kernel(kernel)
    work = PrefillWork(
        batch=as_array(batch),
        new_tokens=as_array(new_tokens),
        prefix_tokens=as_array(prefix_tokens),
        heads=as_array(heads),
        kv_heads=as_array(kv_heads),
        qk_dim=as_array(head_dim),
        v_dim=as_array(head_dim),
        kv_bytes=kv_element_bytes(kv_dtype),
        window=window,
    )
    if kernel == "naive":
        return naive_attention(machine, work)
    section = machine.calibration.section("attention.prefill")
    tasks, context = work.batch * work.heads, work.new_tokens + work.prefix_tokens
    time = flash_prefill(machine, section, work)
    time = scaled(time, grid_factor(section.coefficients, tasks, context))
    return as_measured(time, machine.calibration, "attention.prefill")


def naive_attention(machine: Machine, work: PrefillWork) -> KernelTime:
    """Time of the kernels of eager attention, every intermediate through HBM, no causal skip.

    Keys and values stream no faster than the fused decode kernel streams them.
    """
    device = machine.device
    section = machine.calibration.section("attention.naive")
    context = work.new_tokens + work.prefix_tokens
    sequences = work.batch * work.heads
    scores = sequences * work.new_tokens * context
    hbm = device.hbm_bytes_per_s * section["hbm_efficiency"]
    streamed = section["hbm_efficiency"] / section["kv_efficiency"]
    cube = matrix_flop_per_s(device) * section["cube_efficiency"]
    vector = device.vector_flop_per_s * section["vector_efficiency"]
    row_scores = FRACTAL / np.minimum(work.new_tokens, FRACTAL)
    write, scale, mask, softmax, cast, read = (scores * b for b in NAIVE_BYTES_PER_SCORE)
    kv_elements = work.batch * context * (work.qk_dim + work.v_dim)
    repeats = np.where(work.heads > work.kv_heads, 1.0, 0.0)
    copied = kv_elements * (work.kv_heads * work.kv_bytes + repeats * work.heads * ELEMENT_BYTES)
    stored = np.where((repeats > 0.0) | (work.kv_bytes < ELEMENT_BYTES), copied, 0.0)
    ends = sequences * work.new_tokens * ELEMENT_BYTES
    keys = sequences * context * ELEMENT_BYTES * streamed
    steps = (
        (write + (ends + keys) * work.qk_dim, 2.0 * scores * work.qk_dim * row_scores, 0.0),
        (scale, 0.0, scores),
        (mask, 0.0, scores),
        (softmax, 0.0, scores * section["softmax_flop"]),
        (cast, 0.0, scores),
        (read + (ends + keys) * work.v_dim, 2.0 * scores * work.v_dim * row_scores, 0.0),
        (stored, 0.0, 0.0),
    )
    compute, memory, body = as_array(0.0), as_array(0.0), as_array(0.0)
    for moved, flop, vector_flop in steps:
        arithmetic = flop / cube + vector_flop / vector
        traffic = moved / hbm
        compute = compute + arithmetic
        memory = memory + traffic
        body = body + np.maximum(arithmetic, traffic)
    copies = 2.0 * np.where(stored > 0.0, 1.0, 0.0)
    floor = 2.0 * section["matmul_floor_s"] + (4.0 + copies) * section["vector_floor_s"]
    return as_measured(
        split_time(floor, compute, memory, body), machine.calibration, "attention.naive"
    )


def attention_decode(
    machine: Machine,
    batch: ArrayLike,
    kv_tokens: ArrayLike,
    heads: ArrayLike,
    kv_heads: ArrayLike,
    head_dim: ArrayLike,
    *,
    new_tokens: ArrayLike = 1.0,
    kernel: AttentionKernel,
    kv_dtype: str,
    window: int | None = None,
) -> KernelTime:
    """New tokens of each sequence, `[batch, new_tokens, heads, head_dim]`, over its cache.

    `kv_tokens` are those that the last of them sees, itself with them. Sizes broadcast; `heads`
    and `kv_heads` are those of one rank. `InputError` for an unknown kernel or `kv_dtype`;
    `CalibrationError` without coefficients.
    """
    check_kernel(kernel)
    kv_bytes = kv_element_bytes(kv_dtype)
    sequences, queries, keys, dim = map(as_array, (batch, heads, kv_heads, head_dim))
    tokens, new = as_array(kv_tokens), as_array(new_tokens)
    seen = tokens if window is None else np.minimum(tokens, float(window))
    if kernel == "naive":
        naive = PrefillWork(
            batch=sequences,
            new_tokens=new,
            prefix_tokens=np.maximum(seen - new, 0.0),
            heads=queries,
            kv_heads=keys,
            qk_dim=dim,
            v_dim=dim,
            kv_bytes=kv_bytes,
        )
        return naive_attention(machine, naive)
    group = queries / keys * new
    elements = 2.0 * sequences * keys * seen * dim
    work = DecodeWork(
        batch=sequences,
        tasks=sequences * keys,
        stream_bytes=elements * kv_bytes,
        elements=elements if kv_bytes < ELEMENT_BYTES else np.zeros_like(elements),
        cube_flop=2.0 * elements * np.maximum(group, FRACTAL),
        scores=sequences * queries * new * seen,
        group=group,
        streams_per_token=keys,
        kv_tokens=seen,
    )
    section = machine.calibration.section("attention.decode")
    time = flash_decode(machine, section, work)
    time = scaled(time, grid_factor(section.coefficients, work.tasks, seen))
    return as_measured(time, machine.calibration, "attention.decode")


def attention_workspace_bytes(
    machine: Machine,
    batch: ArrayLike,
    new_tokens: ArrayLike,
    context_tokens: ArrayLike,
    heads: ArrayLike,
    head_dim: ArrayLike,
    *,
    kernel: AttentionKernel,
) -> Array:
    """HBM bytes that a kernel needs beside its inputs and output, for the heads of one rank.

    naive: 16-bit scores and their fp32 softmax live together, 2 + 4 bytes a score of
    `[batch, heads, new_tokens, context_tokens]`. flash: the fp32 partial results of one query
    tile a core, `rows x (head_dim + 2)` (output, running maximum and sum), twice for its two
    buffers; scores stay on chip.
    """
    check_kernel(kernel)
    sequences = as_array(batch) * as_array(heads)
    if kernel == "naive":
        return np.asarray(6.0 * sequences * as_array(new_tokens) * as_array(context_tokens))
    rows = tile_rows(machine.device)
    tile = 2.0 * 4.0 * rows * (as_array(head_dim) + 2.0)
    tiles = sequences * np.ceil(as_array(new_tokens) / rows)
    shape = np.broadcast(tiles, tile, as_array(context_tokens)).shape
    return np.broadcast_to(np.minimum(tiles, machine.device.cube_cores) * tile, shape)
