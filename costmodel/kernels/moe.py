"""Time of grouped matrix products: the routed experts of one rank.

    active  = groups * (1 - (1 - 1/groups)^rows)          experts with at least one row
    again   = max(0, min(u - 1/2, 5 * (u - 0.9)))         u = rows * imbalance / active / tile_rows
    compute = 2 * (rows * imbalance + 8 * active) * n * k / (peak * e_compute)
    memory  = active * (1 + reread * again) * b_w*n*k / (HBM * e_hbm) * max(1, n*k / 2^24)^size
              + rows * (b_x*k + 2*n) / (L2 * e_l2)
    total   = floor + quantize + (compute^p + memory^p)^(1/p)

rows routed rows that reach the rank, over its `groups` local experts; n output and k input
features of one expert; peak in FLOP/s, HBM and L2 in bytes/s are the device's; b_w and b_x are
bytes per weight and activation, e_* fractions of peak, p the blend of the two limits. An
expert's rows are padded to 16, half of it wasted on average. Measured weights of wide experts
stream slower: `size` (`hbm_size`, 0 where a section has none). `again` is how many further passes
over its weights an expert needs on average, one for each `tile_rows` of its rows: with a mean of
one tile half of the experts have more, and a Poisson spread of 128 rows is 9 % of them; a further
pass costs `reread` of the first. `imbalance` (>= 1, and 1 without expert parallelism) is how many
rows a rank of an expert-parallel group computes over the mean of the group. `quantize` is the
pass that narrows the rows, (2 + b_x) bytes an element at e_quant of HBM; weights that vector
cores unpack add their time as `kernels.matmul` has it.

The block of `moe_block` is gate and up as one grouped product, SwiGLU, and down, as measured:

    rows   = tokens * topk / ep         groups = experts / ep
    active = groups * (1 - (1 - topk/experts)^tokens)     topk distinct experts a token

The formula is fitted to whole blocks and both products share its coefficients. Left out:
routing, permutation, dispatch and combine (their own kernels), the tail of a very uneven
routing inside one rank (tiles are spread over cores whatever expert they belong to).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shardplan.costmodel.hardware import Device
from shardplan.costmodel.kernels.base import (
    Array,
    ArrayLike,
    KernelTime,
    Machine,
    as_array,
    as_measured,
)
from shardplan.costmodel.kernels.precision import (
    Precision,
    lenders,
    merged_coefficients,
    peak_flop_per_s,
    precision_of,
    unpack_s_per_weight,
)

__all__ = [
    "MOE_FAMILY",
    "expected_active",
    "grouped_matmul",
    "moe_block",
    "moe_block_with",
    "routing_draws",
]

MOE_FAMILY = "moe"
_OUTPUT_BYTES = 2.0
_PADDING_ROWS = 8.0
_EXPERT_WEIGHTS = 2.0**24
_TINY = float(np.finfo(np.float64).tiny)


def routing_draws(machine: Machine, dtype: str) -> float:
    """Independent choices of experts that a token of a served batch makes (`draws`, 1 by default).

    Below 1 tokens of a batch choose alike and fewer experts are read than even routing says; far
    above 1 a kernel reads experts that nobody chose.
    """
    coef = merged_coefficients(machine.calibration, MOE_FAMILY, precision_of(dtype))
    return coef.get("draws", 1.0)


def expected_active(rows: ArrayLike, groups: ArrayLike) -> Array:
    """Expected number of `groups` experts that `rows` uniformly routed rows touch."""
    spread = as_array(groups)
    miss = np.maximum(1.0 - 1.0 / spread, 0.0)
    return np.asarray(spread * (1.0 - miss ** as_array(rows)), dtype=np.float64)


def _imbalance(ep: Array, coef: Mapping[str, float]) -> Array:
    return np.where(ep > 1.0, coef["imbalance"], 1.0)


def _body(
    shape: tuple[Array, Array, Array, Array],
    coef: Mapping[str, float],
    device: Device,
    rule: Precision,
) -> tuple[Array, Array]:
    """Compute and memory seconds of one grouped product; shape = rows, active, n, k."""
    busy, active, n, k = shape
    computed = busy + active * _PADDING_ROWS
    compute_s = computed * n * k * (2.0 / (peak_flop_per_s(device, rule) * coef["compute"]))
    l2_byte_s = 1.0 / (device.l2_bytes_per_s * coef["l2"])
    weight_s = n * k * (rule.weight_bytes / (device.hbm_bytes_per_s * coef["hbm"]))
    if coef.get("hbm_size", 0.0) > 0.0:
        weight_s = weight_s * np.maximum(n * k / _EXPERT_WEIGHTS, 1.0) ** coef["hbm_size"]
    if rule.unpacks:
        beside_s, before_s = unpack_s_per_weight(device, rule, coef)
        weights = active * n * k
        compute_s = np.maximum(compute_s, weights * beside_s) + weights * before_s
    moved = busy * (k * rule.input_bytes + n * _OUTPUT_BYTES)
    tiles = busy / np.maximum(active, _TINY) / coef["tile_rows"]
    again = np.maximum(0.0, np.minimum(tiles - 0.5, 5.0 * (tiles - 0.9)))
    memory_s = active * (1.0 + coef["reread"] * again) * weight_s + moved * l2_byte_s
    return np.asarray(compute_s, dtype=np.float64), np.asarray(memory_s, dtype=np.float64)


def _blend(compute_s: Array, memory_s: Array, power: float) -> Array:
    larger = np.maximum(compute_s, memory_s)
    ratio = np.minimum(compute_s, memory_s) / np.maximum(larger, _TINY)
    return np.asarray(larger * (1.0 + ratio**power) ** (1.0 / power), dtype=np.float64)


def _overhead_s(
    rows: Array, k: Array, coef: Mapping[str, float], device: Device, rule: Precision
) -> Array:
    """The launch floor, and the kernel that quantizes the rows."""
    if not rule.quantizes:
        return np.asarray(coef["floor_s"] + 0.0 * rows * k, dtype=np.float64)
    moved = rows * k * (2.0 + rule.input_bytes)
    return np.asarray(
        coef["floor_s"] + moved / (device.hbm_bytes_per_s * coef["quantize"]), dtype=np.float64
    )


def _time(
    shape: tuple[Array, Array, Array, Array],
    coef: Mapping[str, float],
    device: Device,
    rule: Precision,
) -> KernelTime:
    compute_s, memory_s = _body(shape, coef, device, rule)
    body = _blend(compute_s, memory_s, coef["blend"])
    over = np.broadcast_to(_overhead_s(shape[0], shape[3], coef, device, rule), body.shape).copy()
    compute = np.where(compute_s >= memory_s, body, 0.0)
    return KernelTime(body + over, compute, body - compute, over)


def grouped_matmul(
    machine: Machine,
    rows: ArrayLike,
    groups: ArrayLike,
    n: ArrayLike,
    k: ArrayLike,
    dtype: str,
    *,
    active: ArrayLike | None = None,
    ep: ArrayLike = 1,
) -> KernelTime:
    """Seconds of y[r, n] = x[r, k] @ w[expert of r][k, n] for the rows of one rank.

    rows: routed rows on this rank (may be a fraction: an expectation), >= 0. groups: local
    experts. n, k: one expert's features. active: experts with at least one row, by
    default what uniform routing expects. ep: ranks that share the experts. All
    broadcast; the result has their shape. dtype as for `matmul`. Raises
    `UnknownNameError`, `InputError`, `CalibrationError` as `matmul` does.
    """
    rule = precision_of(dtype)
    peak_flop_per_s(machine.device, rule)
    coef = merged_coefficients(machine.calibration, MOE_FAMILY, rule)
    touched = expected_active(rows, groups) if active is None else as_array(active)
    busy = as_array(rows) * _imbalance(as_array(ep), coef)
    arrays = np.broadcast_arrays(busy, touched, as_array(n), as_array(k))
    time = _time((arrays[0], arrays[1], arrays[2], arrays[3]), coef, machine.device, rule)
    return as_measured(time, machine.calibration, *lenders(machine.calibration, MOE_FAMILY, rule))


def moe_block_with(
    coef: Mapping[str, float],
    device: Device,
    sizes: tuple[Array, Array, Array, Array, Array, Array],
    rule: Precision,
) -> KernelTime:
    """`moe_block` with given coefficients; sizes = tokens, hidden, ffn, experts, topk, ep."""
    tokens, hidden, ffn, experts, topk, ep = np.broadcast_arrays(*sizes)
    rows = tokens * topk / ep * _imbalance(ep, coef)
    miss = np.maximum(1.0 - topk / experts, 0.0)
    active = experts / ep * (1.0 - miss**tokens)
    first = _time((rows, active, 2.0 * ffn, hidden), coef, device, rule)
    second = _time((rows, active, hidden, ffn), coef, device, rule)
    moved = rows * ffn * (3.0 * _OUTPUT_BYTES)
    act = np.asarray(moved / (device.l2_bytes_per_s * coef["l2"]), dtype=np.float64)
    return KernelTime(
        first.total_s + second.total_s + act,
        first.compute_s + second.compute_s,
        first.memory_s + second.memory_s + act,
        first.overhead_s + second.overhead_s,
    )


def moe_block(
    machine: Machine,
    tokens: ArrayLike,
    hidden: ArrayLike,
    ffn: ArrayLike,
    experts: ArrayLike,
    topk: ArrayLike,
    ep: ArrayLike,
    dtype: str,
) -> KernelTime:
    """Seconds of one rank's routed experts: gate and up, SwiGLU, down.

    tokens: tokens of the whole expert-parallel group, each sent to `topk` of `experts` experts
    that `ep` ranks share evenly. hidden, ffn: features. All broadcast. dtype as for
    `matmul`. Raises as `matmul` does.
    """
    rule = precision_of(dtype)
    peak_flop_per_s(machine.device, rule)
    coef = merged_coefficients(machine.calibration, MOE_FAMILY, rule)
    sizes = (tokens, hidden, ffn, experts, topk, ep)
    arrays = tuple(as_array(size) for size in sizes)
    tokens_, hidden_, ffn_, experts_, topk_, ep_ = arrays
    packed = (tokens_, hidden_, ffn_, experts_, topk_, ep_)
    time = moe_block_with(coef, machine.device, packed, rule)
    return as_measured(time, machine.calibration, *lenders(machine.calibration, MOE_FAMILY, rule))
