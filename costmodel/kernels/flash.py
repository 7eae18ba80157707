"""FlashAttention on a device: a query tile at a time, keys and values streamed past it.

Symbols: B batch, T new tokens, P prefix tokens, S = P + T context, H query heads, K kv heads,
G = H / K, d head dim (d_qk of keys, d_v of values), b bytes of a kv element, C cores.

Scores a causal prefill computes for one sequence and head (a query sees the prefix and itself):

    A(T, P) = T P + T (T + t) / 2          t = min(T, k), the tile granularity of the diagonal
    with a window W: sum_i min(P + i, W) and a granule at either edge, at most A without it

Prefill. Each query tile costs its scores and `fill_keys` more keys (the pipeline of cube and
vector stages fills and drains once a tile):

    X      = B H (A + ceil(T / q) q fill_keys)          scores with the fill
    cube   = 2 X (d_qk + d_v) / F                       F peak 16-bit FLOP/s
    vector = X softmax_flop / V                         V vector FLOP/s
    l2     = B H ceil(T / q) (S / 2) (d_qk + d_v) b / R2   re-reads, once a query tile
    hbm    = (queries + outputs + keys + values) / R    re-reads too where C heads outgrow the L2
    body   = max(cube, vector, l2, hbm), cube + vector where one core does both
    total  = floor_s + body (1 + tail longest tile (C - 1) / X) / e

q is `tile_scale` times the power of two at which q x 2q fp32 scores fill L0C; k = 2 q. The
efficiency e is the exponential of a quadratic in ln S and ln(query tiles / C), both clipped to the
fitted range, with three terms for grouped heads (G > 1) and one in ln(d_qk / 128).

Decode. Keys and values are streamed once, from L2 while all of them fit it:

    near   = bytes / (R2 l2_efficiency e) - hidden    hidden: the part that overlaps the floor
    far    = bytes (1 + hbm_waves u) / (R e) + shift  shift = hbm_shift floor_s
    stream = near + m max(far - near, 0)              m from 0 at l2_full to 1 at l2_none times L2
             or min(near, far) where shift > 0: small caches are then the slow ones
    tasks  = B K task_s (1 + task_g ln G) / C
    total  = floor_s (1 + floor_g if grouped) + batch_s ln^2 B + keys_s ln(S / keys_min)
             + (stream^4 + tasks^4 + compute^4)^(1/4)
             all times exp(surface(B, S, K)) where the section has one (`kernels.surface`)

Several new tokens of a sequence (a step that verifies tokens predicted ahead) share one read of
its keys and values: they are further query rows of a stream, so G stands for G T there, and scores
and cube work grow with T (the fused kernel merges both dims of the queries; T up to 16).

u = waves over cores above an even share, for grouped heads; for others e falls with the share of
the cores that have a task (e_t). e is an exponential as above, of ln S, ln G and ln K. hidden =
floor_s (l2_hidden + l2_hidden_g if grouped). Compute as in prefill, with G padded to 16 rows (one
fractal of the cube). 8-bit keys and values cost two vector operations an element to widen.

Sources: the tiling and the L0C, L1, L2 sizes are those of the platform files that CANN ships; the
coefficients are fitted (see the calibration files and `fitting.attention`). All of them but the
floors and `task_s` are dimensionless, so a device without measurements takes them with its own
rates. Left out: paging of the cache, scales of 8-bit keys and values, dropout, whole waves of
query tiles (`tail` stands for them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shardplan.costmodel.calibration import Section
from shardplan.costmodel.hardware import Device
from shardplan.costmodel.kernels.base import Array, KernelTime, Machine, as_array
from shardplan.costmodel.kernels.surface import surface_of

__all__ = [
    "ELEMENT_BYTES",
    "FRACTAL",
    "DecodeWork",
    "PrefillWork",
    "causal_scores",
    "flash_decode",
    "flash_prefill",
    "matrix_flop_per_s",
    "split_time",
    "tile_rows",
]

ELEMENT_BYTES = 2.0
"""Queries, outputs and scores are 16-bit."""
FRACTAL = 16.0
"""Rows of one cube fractal: fewer query rows cost as much."""
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
    """Query rows a stream: heads times new tokens."""
    streams_per_token: Array
    """kv heads; 1 for a latent cache."""
    kv_tokens: Array


def matrix_flop_per_s(device: Device) -> float:
    """Peak 16-bit matrix rate, FLOP/s: bf16, or fp16 on devices without it."""
    rates = device.flop_per_s
    return rates["bf16"] if "bf16" in rates else rates["fp16"]


def tile_rows(device: Device) -> float:
    """Query rows of a tile: the power of two at which rows x 2 rows fp32 scores fill L0C."""
    return float(2 ** int(math.log2(math.sqrt(device.l0c_bytes / 8.0))))


def causal_scores(
    new_tokens: Array, prefix_tokens: Array, window: int | None, tile_keys: float
) -> Array:
    """Scores one head computes for one sequence, tile granularity included: tokens squared."""
    edge = new_tokens * np.minimum(new_tokens, tile_keys) * 0.5
    if window is None:
        exact = new_tokens * prefix_tokens + 0.5 * new_tokens * new_tokens
        return exact + edge
    growing = np.clip(window - prefix_tokens, 0.0, new_tokens)
    exact = growing * prefix_tokens + 0.5 * growing * growing + (new_tokens - growing) * window
    full = new_tokens * prefix_tokens + 0.5 * new_tokens * new_tokens + edge
    return np.minimum(exact + 2.0 * edge, full)


def _efficiency(
    section: Section, keys: Array, tiles: Array, grouped: Array, qk_dim: Array
) -> Array:
    x = np.log(np.clip(keys, section["keys_min"], section["keys_max"]) / 1024.0)
    y = np.log(np.clip(tiles, section["tiles_min"], section["tiles_max"]))
    exponent = (
        section["e"]
        + x * (section["e_x"] + section["e_xx"] * x)
        + y * (section["e_y"] + section["e_yy"] * y + section["e_xy"] * x)
        + grouped * (section["e_g"] + x * (section["e_gx"] + section["e_gxx"] * x))
        + section["e_d"] * np.log(qk_dim / 128.0)
    )
    return np.asarray(np.exp(np.clip(exponent, -3.0, 1.0)), dtype=np.float64)


def split_time(
    floor_s: Array | float, compute_s: Array, memory_s: Array, body_s: Array
) -> KernelTime:
    """Split a body into compute or memory, whichever of the two binds."""
    bound = compute_s >= memory_s
    compute = np.where(bound, body_s, 0.0)
    memory = np.where(bound, 0.0, body_s)
    overhead = np.broadcast_to(as_array(floor_s), body_s.shape)
    return KernelTime(overhead + compute + memory, compute, memory, overhead)


def _arithmetic(device: Device, flop: Array, vector_flop: Array) -> Array:
    cube = flop / matrix_flop_per_s(device)
    vector = vector_flop / device.vector_flop_per_s
    if device.vector_cores == 0 and device.vendor == "ascend":
        return cube + vector
    return np.maximum(cube, vector)


def flash_prefill(machine: Machine, section: Section, work: PrefillWork) -> KernelTime:
    """Time of a flash kernel over new tokens and prefix; see the module for the formula."""
    device = machine.device
    rows = tile_rows(device) * section["tile_scale"]
    context = work.new_tokens + work.prefix_tokens
    seen = context if work.window is None else np.minimum(context, work.window + rows)
    query_tiles = np.ceil(work.new_tokens / rows)
    sequences = work.batch * work.heads
    scores = causal_scores(
        work.new_tokens, work.prefix_tokens, work.window, 2.0 * tile_rows(device)
    )
    filled = sequences * (scores + query_tiles * rows * section["fill_keys"])
    row_bytes = (work.qk_dim + work.v_dim) * work.kv_bytes
    reread = sequences * query_tiles * seen * row_bytes * 0.5
    once = work.batch * work.kv_heads * context * row_bytes
    queries = sequences * work.new_tokens * (work.qk_dim + work.v_dim) * ELEMENT_BYTES
    resident = np.minimum(device.cube_cores, work.batch * work.kv_heads) * seen * row_bytes
    kv_bytes = np.where(resident <= device.l2_bytes, once, np.maximum(once, reread))
    memory = np.maximum(
        (queries + kv_bytes) / device.hbm_bytes_per_s, reread / device.l2_bytes_per_s
    )
    widen = 0.0 if work.kv_bytes > 1.0 else WIDEN_FLOP * once / work.kv_bytes
    flop_per_score = 2.0 * (work.qk_dim + work.v_dim)
    compute = _arithmetic(device, filled * flop_per_score, filled * section["softmax_flop"] + widen)
    tiles = sequences * query_tiles
    longest = np.minimum(rows, work.new_tokens) * (seen + section["fill_keys"])
    tail = section["tail"] * longest * (device.cube_cores - 1.0) / filled
    body = np.maximum(compute, memory) * (1.0 + tail)
    share = tiles / device.cube_cores
    grouped = np.where(work.heads > work.kv_heads, 1.0, 0.0)
    efficiency = _efficiency(section, seen, share, grouped, work.qk_dim)
    return split_time(section["floor_s"], compute, memory, body / efficiency)


def _decode_efficiency(section: Section, work: DecodeWork, grouped: Array, share: Array) -> Array:
    x = np.log(np.clip(work.kv_tokens, section["keys_min"], section["keys_max"]) / 1024.0)
    g = np.log(np.clip(work.group, 1.0, section["group_max"]))
    t = np.log(np.clip(share, section["share_min"], 1.0))
    k = np.log(np.clip(work.streams_per_token, 1.0, section["streams_max"]))
    exponent = (
        section["e"]
        + x * (section["e_x"] + section["e_xx"] * x)
        + g * (section["e_g"] + section["e_gg"] * g)
        + k * (section["e_k"] + section["e_gk"] * g)
        + grouped * (section["e_grouped"] + section["e_gx"] * x)
        + (1.0 - grouped) * section["e_t"] * t
    )
    return np.asarray(np.exp(np.clip(exponent, -3.0, 0.5)), dtype=np.float64)


def _stream_s(device: Device, section: Section, work: DecodeWork, grouped: Array) -> Array:
    low, high = section["l2_full"], section["l2_none"]
    missed = np.clip((work.stream_bytes / device.l2_bytes - low) / (high - low), 0.0, 1.0)
    share = work.tasks / device.cube_cores
    efficiency = _decode_efficiency(section, work, grouped, share)
    parts = np.maximum(np.floor(1.0 / share), 1.0)
    uneven = grouped * (np.ceil(share * parts) / (share * parts) - 1.0)
    near = work.stream_bytes / (device.l2_bytes_per_s * section["l2_efficiency"] * efficiency)
    far = work.stream_bytes / (device.hbm_bytes_per_s * efficiency)
    far = far * (1.0 + section["hbm_waves"] * uneven)
    overlap = section["l2_hidden"] + grouped * section["l2_hidden_g"]
    near = np.maximum(near - overlap * section["floor_s"], 0.0)
    shift = section["hbm_shift"] * section["floor_s"]
    change = far + shift - near
    moved = missed * np.maximum(change, 0.0) if shift <= 0.0 else np.minimum(change, 0.0)
    return np.asarray(near + moved, dtype=np.float64)


def flash_decode(machine: Machine, section: Section, work: DecodeWork) -> KernelTime:
    """Time of a kernel that streams a cache once and computes on it; see the module."""
    device = machine.device
    stream = _stream_s(device, section, work, np.where(work.group > 1.0, 1.0, 0.0))
    vector_flop = work.scores * section["softmax_flop"] + work.elements * WIDEN_FLOP
    compute = _arithmetic(device, work.cube_flop, vector_flop)
    compute = compute / section["compute_efficiency"]
    group = np.log(np.clip(work.group, 1.0, section["group_max"]))
    tasks = section["task_s"] * work.tasks / device.cube_cores * (1.0 + section["task_g"] * group)
    body = np.sqrt(np.sqrt(stream**4 + tasks**4 + compute**4))
    batch = np.log(np.clip(work.batch, 1.0, section["batch_max"]))
    keys = np.clip(work.kv_tokens, section["keys_min"], section["keys_max"]) / section["keys_min"]
    grouped = np.where(work.group > 1.0, section["floor_g"], 0.0)
    floor = section["floor_s"] * (1.0 + grouped) + section["batch_s"] * batch * batch
    floor = floor + section["keys_s"] * np.log(keys)
    surface = surface_of(section.coefficients)
    if surface.whole:
        factor = surface.factor(
            np.broadcast_arrays(work.batch, work.kv_tokens, work.streams_per_token)
        )
        floor, body = floor * factor, body * factor
    return split_time(floor, np.maximum(compute, tasks), stream, body)
