"""Attention: FlashAttention and the naive sequence of kernels, prefill and decode.

Symbols: B batch, T new tokens, P prefix tokens, S = P + T context, H query heads, K kv heads,
G = H / K, d head dim, b bytes of a kv element, C cores, q and k the query and key tile.

Scores a causal prefill computes for one sequence and head (a query sees the prefix and itself):

    A(T, P) = T P + T (T + t) / 2          t = min(T, k), the tile granularity of the diagonal
    with a window W: sum_i min(P + i, W) plus a key tile a query row, at most T S

Flash prefill. Each query tile costs its scores and `fill_keys` more keys (the pipeline of cube and
vector stages fills and drains once a tile):

    X      = B H (A + ceil(T / q) q fill_keys)          scores with the fill
    cube   = 2 X (d_qk + d_v) / F                       F peak FLOP/s of the element type
    vector = X softmax_flop / V                         V vector FLOP/s
    l2     = B H ceil(T / q) S_seen (d_qk + d_v) b / R2 keys and values re-read once a query tile
    hbm    = (queries + outputs + keys + values) / R    re-reads too where C heads outgrow the L2
    body   = max(cube, vector, l2, hbm), cube + vector where one core does both
    total  = floor_s + (body + tail longest tile) / e

q is the power of two at which q x 2q fp32 scores fill L0C; k = 2 q. e, the efficiency, is the
exponential of a quadratic in ln S and ln(query tiles / C), both clipped to the fitted range, with
three terms for grouped heads (G > 1). All coefficients but the floor are dimensionless, so a
device without measurements of its own takes them with its own rates.

Flash decode. Keys and values are streamed once, from L2 where all of them fit it:

    stream = 2 B K S d b / (R e)    tasks = B K task_s / C    compute = cube + vector as above
    total  = floor_s + batch_s ln B + (stream^4 + tasks^4 + compute^4)^(1/4)

with G padded to 16 rows (one fractal) in the cube. int8 and fp8 keys and values are one byte and
cost two vector operations an element to widen.

Naive. The operators that Hugging Face `eager_attention_forward` (transformers 4.5x,
models/llama/modeling_llama.py) launches, no causal skip, every intermediate through HBM at its own
bytes: QK^T writes 2 bytes a score; scale and mask each read 2 and write 2; the fp32 softmax reads 2
and writes 4; the cast reads 4 and writes 2; PV reads 2; and keys and values are repeated G times.
Its time is the sum of the kernels, each the larger of its traffic and its arithmetic.

Left out: L2 hits of the naive score matrix, paging of the cache, scales of int8 keys and values,
dropout, and the waves of whole tiles over cores (`tail` stands for them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shardplan.costmodel.calibration import Section
from shardplan.costmodel.hardware import Device
from shardplan.costmodel.kernels.base import Array, ArrayLike, KernelTime, Machine, as_array
from shardplan.models.errors import InputError

__all__ = [
    "AttentionKernel",
    "DecodeWork",
    "PrefillWork",
    "attention_decode",
    "attention_prefill",
    "attention_workspace_bytes",
    "causal_scores",
    "flash_decode",
    "flash_prefill",
    "kv_element_bytes",
    "matrix_flop_per_s",
    "naive_attention",
]

AttentionKernel = Literal["flash", "naive"]
ELEMENT_BYTES = 2.0
"""Queries, outputs and scores are 16-bit."""
FRACTAL = 16.0
"""Rows of one cube fractal: fewer query rows cost as much."""
NAIVE_BYTES_PER_SCORE = (2.0, 4.0, 4.0, 6.0, 6.0, 2.0)
"""QK^T, scale, mask, fp32 softmax, cast, PV: bytes moved a score."""
WIDEN_FLOP = 2.0
"""Vector operations that turn one int8 or fp8 element into 16 bits: convert and scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillWork:
    """Sizes of a prefill attention call; arrays broadcast against one another."""

    batch: Array
    new_tokens: Array
    prefix_tokens: Array
    heads: Array
    kv_heads: Array
    qk_dim: Array
    v_dim: Array
    kv_bytes: float
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWork:
    """What one decode attention call moves and computes; arrays broadcast."""

    batch: Array
    tasks: Array
    """Independent streams of keys and values: batch times kv heads."""
    stream_bytes: Array
    elements: Array
    """Key and value elements to widen when they are stored in 8 bits, else 0."""
    cube_flop: Array
    scores: Array
    group: Array
    """Query heads a stream."""
    streams_per_token: Array
    """kv heads; 1 for a latent cache."""
    kv_tokens: Array


def kv_element_bytes(kv_dtype: str) -> float:
    """Bytes of one stored key or value element; `InputError` for an unknown type."""
    sizes = {"bf16": 2.0, "fp16": 2.0, "int8": 1.0, "fp8": 1.0}
    if kv_dtype not in sizes:
        raise InputError(
            "`kv_dtype` must be one of " + ", ".join(sizes), got=f"kv_dtype={kv_dtype!r}"
        )
    return sizes[kv_dtype]


def matrix_flop_per_s(device: Device) -> float:
    """Peak 16-bit matrix rate, FLOP/s: bf16, or fp16 on devices without it."""
    rates = device.flop_per_s
    return rates["bf16"] if "bf16" in rates else rates["fp16"]


def _check_kernel(kernel: str) -> None:
    if kernel not in ("flash", "naive"):
        raise InputError("`kernel` must be flash or naive", got=f"kernel={kernel!r}")


def _tile_rows(device: Device) -> float:
    """Query rows of a tile: the power of two at which rows x 2 rows fp32 scores fill L0C."""
    return float(2 ** int(math.log2(math.sqrt(device.l0c_bytes / 8.0))))


def causal_scores(
    new_tokens: Array, prefix_tokens: Array, window: int | None, tile_keys: float
) -> Array:
    """Scores one head computes for one sequence, tile granularity included: tokens squared."""
    context = new_tokens + prefix_tokens
    edge = new_tokens * np.minimum(new_tokens, tile_keys) * 0.5
    if window is None:
        exact = new_tokens * prefix_tokens + 0.5 * new_tokens * new_tokens
        return exact + edge
    growing = np.clip(window - prefix_tokens, 0.0, new_tokens)
    exact = growing * prefix_tokens + 0.5 * growing * growing + (new_tokens - growing) * window
    full = new_tokens * prefix_tokens + 0.5 * new_tokens * new_tokens + edge
    return np.minimum(exact + 2.0 * edge, full)


def _efficiency(section: Section, keys: Array, tiles: Array, grouped: Array) -> Array:
    x = np.log(np.clip(keys, section["keys_min"], section["keys_max"]) / 1024.0)
    y = np.log(np.clip(tiles, section["tiles_min"], section["tiles_max"]))
    exponent = (
        section["e"]
        + x * (section["e_x"] + section["e_xx"] * x)
        + y * (section["e_y"] + section["e_yy"] * y + section["e_xy"] * x)
        + grouped * (section["e_g"] + x * (section["e_gx"] + section["e_gxx"] * x))
    )
    return np.asarray(np.exp(np.clip(exponent, -3.0, 1.0)), dtype=np.float64)


def _parts(floor_s: Array | float, compute_s: Array, memory_s: Array, body_s: Array) -> KernelTime:
    """Split a body into compute or memory, whichever of the two binds."""
    bound = compute_s >= memory_s
    compute = np.where(bound, body_s, 0.0)
    memory = np.where(bound, 0.0, body_s)
    overhead = np.broadcast_to(as_array(floor_s), body_s.shape)
    return KernelTime(overhead + compute + memory, compute, memory, overhead)


def _arithmetic(device: Device, section: Section, flop: Array, vector_flop: Array) -> Array:
    cube = flop / matrix_flop_per_s(device)
    vector = vector_flop / device.vector_flop_per_s
    if device.vector_cores == 0 and device.vendor == "ascend":
        return cube + vector
    return np.maximum(cube, vector)


def flash_prefill(machine: Machine, section: Section, work: PrefillWork) -> KernelTime:
    """Time of a flash kernel over new tokens and prefix; see the module for the formula."""
    device = machine.device
    rows = _tile_rows(device)
    context = work.new_tokens + work.prefix_tokens
    seen = context if work.window is None else np.minimum(context, work.window + rows)
    query_tiles = np.ceil(work.new_tokens / rows)
    sequences = work.batch * work.heads
    scores = causal_scores(work.new_tokens, work.prefix_tokens, work.window, 2.0 * rows)
    filled = sequences * (scores + query_tiles * rows * section["fill_keys"])
    row_bytes = (work.qk_dim + work.v_dim) * work.kv_bytes
    reread = sequences * query_tiles * seen * row_bytes * 0.5
    once = work.batch * work.kv_heads * context * row_bytes
    queries = sequences * work.new_tokens * (work.qk_dim + work.v_dim) * ELEMENT_BYTES
    resident = np.minimum(device.cube_cores, work.batch * work.kv_heads) * seen * row_bytes
    kv_bytes = np.where(resident <= device.l2_bytes, once, np.maximum(once, reread))
    memory = np.maximum((queries + kv_bytes) / device.hbm_bytes_per_s, reread / device.l2_bytes_per_s)
    widen = 0.0 if work.kv_bytes > 1.0 else WIDEN_FLOP * once / work.kv_bytes
    flop_per_score = 2.0 * (work.qk_dim + work.v_dim)
    compute = _arithmetic(
        device, section, filled * flop_per_score, filled * section["softmax_flop"] + widen
    )
    tiles = sequences * query_tiles
    longest = np.minimum(rows, work.new_tokens) * (seen + section["fill_keys"])
    tail = section["tail"] * longest * (device.cube_cores - 1.0) / filled
    body = np.maximum(compute, memory) * (1.0 + tail)
    share = tiles / device.cube_cores
    grouped = np.where(work.heads > work.kv_heads, 1.0, 0.0)
    efficiency = _efficiency(section, seen, share, grouped)
    return _parts(section["floor_s"], compute, memory, body / efficiency)


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
    _check_kernel(kernel)
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
    return flash_prefill(machine, machine.calibration.section("attention.prefill"), work)


def naive_attention(machine: Machine, work: PrefillWork) -> KernelTime:
    """Time of the kernels of eager attention, every intermediate through HBM, no causal skip."""
    device = machine.device
    section = machine.calibration.section("attention.naive")
    context = work.new_tokens + work.prefix_tokens
    sequences = work.batch * work.heads
    scores = sequences * work.new_tokens * context
    hbm = device.hbm_bytes_per_s * section["hbm_efficiency"]
    cube = matrix_flop_per_s(device) * section["cube_efficiency"]
    vector = device.vector_flop_per_s * section["vector_efficiency"]
    row_scores = FRACTAL / np.minimum(work.new_tokens, FRACTAL)
    write, scale, mask, softmax, cast, read = (scores * b for b in NAIVE_BYTES_PER_SCORE)
    kv_elements = work.batch * context * (work.qk_dim + work.v_dim)
    repeats = np.where(work.heads > work.kv_heads, 1.0, 0.0)
    copied = kv_elements * (work.kv_heads * work.kv_bytes + repeats * work.heads * ELEMENT_BYTES)
    stored = np.where((repeats > 0.0) | (work.kv_bytes < ELEMENT_BYTES), copied, 0.0)
    ends = sequences * work.new_tokens * ELEMENT_BYTES
    keys = sequences * context * ELEMENT_BYTES
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
    kernels = 6.0 + 2.0 * np.where(stored > 0.0, 1.0, 0.0)
    return _parts(kernels * device.launch_s, compute, memory, body)


def flash_decode(machine: Machine, section: Section, work: DecodeWork) -> KernelTime:
    """Time of a kernel that streams a cache once and computes on it; see the module."""
    device = machine.device
    fill = work.stream_bytes / device.l2_bytes
    low, high = section["l2_full"], section["l2_none"]
    missed = np.clip((fill - low) / (high - low), 0.0, 1.0)
    x = np.log(np.clip(work.kv_tokens, section["keys_min"], section["keys_max"]) / 1024.0)
    g = np.log(np.clip(work.group, 1.0, section["group_max"]))
    k = np.log(np.clip(work.streams_per_token, 1.0, section["streams_max"]))
    grouped = np.where(work.group > 1.0, 1.0, 0.0)
    n = np.log(np.clip(work.batch, 1.0, section["batch_max"]))
    exponent = (
        section["e"]
        + x * (section["e_x"] + section["e_xx"] * x)
        + g * (section["e_g"] + section["e_gg"] * g)
        + k * (section["e_k"] + section["e_gk"] * g)
        + grouped * (section["e_grouped"] + section["e_gx"] * x)
    )
    efficiency = np.exp(np.clip(exponent, -3.0, 0.5))
    near = work.stream_bytes / (device.l2_bytes_per_s * section["l2_efficiency"] * efficiency)
    far = work.stream_bytes / (device.hbm_bytes_per_s * efficiency)
    hidden = section["floor_hidden"] * section["floor_s"]
    stream = near + missed * np.maximum(far - near - hidden, 0.0)
    share = work.tasks / device.cube_cores
    parts = np.maximum(np.floor(1.0 / share), 1.0)
    waves = np.ceil(share * parts) / (share * parts)
    uneven = grouped * section["wave_share"] * (waves - 1.0)
    stream = stream * (1.0 + uneven)
    widen = work.elements * WIDEN_FLOP
    compute = _arithmetic(
        device, section, work.cube_flop, work.scores * section["softmax_flop"] + widen
    ) / section["compute_efficiency"]
    tasks = section["task_s"] * share
    tasks = tasks * (1.0 + section["task_g"] * g)
    body = np.sqrt(np.sqrt(stream**4 + tasks**4 + compute**4))
    floor = section["floor_s"] + section["batch_s"] * n * n
    floor = floor + section["keys_s"] * (x - math.log(section["keys_min"] / 1024.0))
    return _parts(floor, np.maximum(compute, tasks), stream, body)


def attention_decode(
    machine: Machine,
    batch: ArrayLike,
    kv_tokens: ArrayLike,
    heads: ArrayLike,
    kv_heads: ArrayLike,
    head_dim: ArrayLike,
    *,
    kernel: AttentionKernel,
    kv_dtype: str,
    window: int | None = None,
) -> KernelTime:
    """One new token a sequence, `[batch, heads, head_dim]`, over `kv_tokens` cached ones each.

    Sizes broadcast; `heads` and `kv_heads` are those of one rank. `InputError` for an unknown
    kernel or `kv_dtype`; `CalibrationError` without coefficients.
    """
    _check_kernel(kernel)
    kv_bytes = kv_element_bytes(kv_dtype)
    sequences, queries, keys, dim = map(as_array, (batch, heads, kv_heads, head_dim))
    tokens = as_array(kv_tokens)
    seen = tokens if window is None else np.minimum(tokens, float(window))
    if kernel == "naive":
        one = np.ones_like(seen)
        naive = PrefillWork(
            batch=sequences,
            new_tokens=one,
            prefix_tokens=seen - one,
            heads=queries,
            kv_heads=keys,
            qk_dim=dim,
            v_dim=dim,
            kv_bytes=kv_bytes,
        )
        return naive_attention(machine, naive)
    group = queries / keys
    elements = 2.0 * sequences * keys * seen * dim
    work = DecodeWork(
        batch=sequences,
        tasks=sequences * keys,
        stream_bytes=elements * kv_bytes,
        elements=elements if kv_bytes < ELEMENT_BYTES else np.zeros_like(elements),
        cube_flop=2.0 * elements * np.maximum(group, FRACTAL),
        scores=sequences * queries * seen,
        group=group,
        streams_per_token=keys,
        kv_tokens=seen,
    )
    return flash_decode(machine, machine.calibration.section("attention.decode"), work)


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
    _check_kernel(kernel)
    sequences = as_array(batch) * as_array(heads)
    if kernel == "naive":
        return np.asarray(6.0 * sequences * as_array(new_tokens) * as_array(context_tokens))
    rows = _tile_rows(machine.device)
    tile = 2.0 * 4.0 * rows * (as_array(head_dim) + 2.0)
    tiles = sequences * np.ceil(as_array(new_tokens) / rows)
    shape = np.broadcast(tiles, tile, as_array(context_tokens)).shape
    return np.broadcast_to(np.minimum(tiles, machine.device.cube_cores) * tile, shape)
