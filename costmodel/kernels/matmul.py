"""Time of one dense matrix product y[m, n] = x[m, k] @ w[k, n] on one rank.

    total   = floor + quantize + body
    body    = (compute^4 + memory^4)^(1/4) * exp(surface(m, n, k))
    compute = waves * cores * tile_m * tile_n * k' * 2 / (peak * e_compute)
    memory  = max(hbm, l2)
    hbm     = cold * b_w*n*k / (HBM * e_hbm) + (warm * b_w*n*k + b_x*m*k + 2*m*n) / (L2 * e_l2)
    l2      = (b_x * ceil(n/tile_n) * m*k + b_w' * ceil(m/tile_m) * k*n) / (L2 * e_l2)
    quantize = row_s * (m / vector_cores)^alpha + (2 + 1)*m*k / (HBM * e_quant)

m rows (tokens), n output features, k input features; sizes padded to the 16 x 16 fractal
before tiling. peak in FLOP/s, HBM and L2 in bytes/s are the device's; b_w and b_x are bytes per
weight and activation, b_w' those of the weight as the cube unit reads it. Three tile shapes of
`tile_elements` outputs (what L0C holds in fp32) compete; the cheapest is taken. `waves` is
the rounds in which all cores work one tile each. The e_* are fractions of peak, and `surface` is a
correction of log(time), linear between the logs of its knots and constant outside them: all of
it is without unit and moves to a device with other core counts and rates. Weights quantized for
a wider product (w8a16, w4a16, w4a8) also pay
    unpack  = n*k * max(vector_flop_per_weight / vector rate, passes * b_w' / (L2 * e_l2))
as a third limit of the body: vector cores unpack beside the cube, through L2 (passes = 1) or
in registers (0).

`warm` is the share of the weights found in L2. `rotated` weights are those of the benchmark
the coefficients come from, which cycles through `copies` of them:
warm = 1 / (1 + (copies * b_w*n*k / L2 bytes)^8), steep because a cyclic walk over more than
a cache holds finds nothing in it. `cold` weights (a whole model streams between
two uses) have warm = 0.

The body counts as compute where `compute` exceeds one pass over the operands (`hbm`): fetching
tiles again from L2 is part of feeding the cube.

Sources of the coefficients: the calibration's own `matmul.*` sections. Left out: bank
conflicts of particular strides, biases, transposes, fused all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

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
)
from shardplan.costmodel.kernels.surface import surface_of

__all__ = ["MATMUL_FAMILY", "WeightState", "matmul", "matmul_with"]

WeightState = Literal["rotated", "cold"]
MATMUL_FAMILY = "matmul"
_FRACTAL = 16.0
_OUTPUT_BYTES = 2.0
_CHUNK = 1 << 14


def _pad(size: Array) -> Array:
    return np.ceil(size / _FRACTAL) * _FRACTAL


def _fourth(seconds: Array) -> Array:
    square = seconds * seconds
    return np.asarray(square * square, dtype=np.float64)


def _memory_s(
    sizes: tuple[Array, Array, Array],
    coef: Mapping[str, float],
    device: Device,
    rule: Precision,
    state: WeightState,
) -> Array:
    """Seconds of each operand read or written once: weights from HBM or L2, the rest in L2."""
    m, n, k = sizes
    weight = n * k * rule.weight_bytes
    if state == "cold":
        cold: Array | float = 1.0
    else:
        load = _fourth(weight * (coef["copies"] / device.l2_bytes))
        load *= load
        cold = load / (1.0 + load)
    rest = m * (k * rule.input_bytes + n * _OUTPUT_BYTES) + weight * (1.0 - cold)
    hbm_s = weight * cold / (device.hbm_bytes_per_s * coef["hbm"])
    return np.asarray(hbm_s + rest / (device.l2_bytes_per_s * coef["l2"]), dtype=np.float64)


def _unpack_s(
    n: Array, k: Array, coef: Mapping[str, float], device: Device, rule: Precision
) -> Array:
    """Seconds in which the vector cores widen the weights, through L2."""
    vector_s = coef["vector_flop_per_weight"] / device.vector_flop_per_s
    l2_s = coef["unpack_passes"] * rule.cube_bytes / (device.l2_bytes_per_s * coef["l2"])
    return np.asarray(n * k * max(vector_s, l2_s), dtype=np.float64)


def _body(
    sizes: tuple[Array, Array, Array],
    coef: Mapping[str, float],
    device: Device,
    rule: Precision,
    state: WeightState,
) -> tuple[Array, Array]:
    """Seconds of the cheapest tile shape, and where arithmetic binds rather than memory."""
    m, n, k = sizes
    memory_s = _memory_s(sizes, coef, device, rule, state)
    side = math.sqrt(coef["tile_elements"] / 2.0)
    cube_flop_s = 2.0 * device.cube_cores / (peak_flop_per_s(device, rule) * coef["compute"])
    l2_byte_s = 1.0 / (device.l2_bytes_per_s * coef["l2"])
    unpack_s = _unpack_s(n, k, coef, device, rule) if rule.unpacks else None
    mp, np_, kp = _pad(m), _pad(n), _pad(k)
    sums: list[Array] = []
    bound: list[NDArray[np.bool_]] = []
    for tile_m, tile_n in ((side, 2.0 * side), (2.0 * side, side), (side / 2.0, 2.0 * side)):
        rows, columns = np.ceil(mp / tile_m), np.ceil(np_ / tile_n)
        waves = np.ceil(rows * columns / device.cube_cores)
        cube_s = waves * _pad(mp / rows) * _pad(np_ / columns) * (kp * cube_flop_s)
        if unpack_s is not None:
            cube_s = np.maximum(cube_s, unpack_s)
        l2_s = columns * (m * rule.input_bytes) + rows * (n * rule.cube_bytes)
        moved_s = np.maximum(memory_s, l2_s * (k * l2_byte_s))
        sums.append(_fourth(cube_s) + _fourth(moved_s))
        bound.append(cube_s >= memory_s)
    least = np.minimum(np.minimum(sums[0], sums[1]), sums[2])
    compute = np.where(sums[0] == least, bound[0], np.where(sums[1] == least, bound[1], bound[2]))
    return np.sqrt(np.sqrt(least)), np.asarray(compute, dtype=np.bool_)


def _quantize_s(
    m: Array, k: Array, coef: Mapping[str, float], device: Device, rule: Precision
) -> Array | float:
    """Seconds of the kernel that quantizes the input rows before the product."""
    if not rule.quantizes or "quantize" not in coef:
        return 0.0
    cores = device.vector_cores or device.cube_cores
    moved_s = m * k * (2.0 + rule.input_bytes) / (device.hbm_bytes_per_s * coef["quantize"])
    rows_s = coef["quantize_row_s"] * (m / cores) ** coef["quantize_power"]
    return np.asarray(moved_s + rows_s, dtype=np.float64)


def matmul_with(
    coef: Mapping[str, float],
    device: Device,
    sizes: tuple[Array, Array, Array],
    rule: Precision,
    state: WeightState = "rotated",
) -> KernelTime:
    """`matmul` with given coefficients; `sizes` = m, n, k of any shapes that broadcast."""
    surface = surface_of(coef)
    places = [surface.coordinate(axis, size) for axis, size in enumerate(sizes)]
    shape = np.broadcast_shapes(*(size.shape for size in sizes))
    flat = [np.broadcast_to(item, shape).ravel() for item in (*sizes, *places)]
    total, compute, memory, overhead = (np.empty(flat[0].size) for _ in range(4))
    for start in range(0, flat[0].size, _CHUNK):
        part = slice(start, start + _CHUNK)
        m, n, k = flat[0][part], flat[1][part], flat[2][part]
        body, bound = _body((m, n, k), coef, device, rule, state)
        body *= np.exp(surface.at([item[part] for item in flat[3:]]))
        over = coef["floor_s"] + _quantize_s(m, k, coef, device, rule)
        compute[part] = np.where(bound, body, 0.0)
        memory[part] = body - compute[part]
        overhead[part] = over
        total[part] = body + over
    return KernelTime(*(item.reshape(shape) for item in (total, compute, memory, overhead)))


def matmul(
    machine: Machine,
    m: ArrayLike,
    n: ArrayLike,
    k: ArrayLike,
    dtype: str,
    *,
    weights: WeightState = "rotated",
) -> KernelTime:
    """Seconds of y[m, n] = x[m, k] @ w[k, n].

    m, n, k: sizes >= 1, arrays that broadcast; the result has their shape. dtype: bf16, fp16,
    w8a16, w4a16, w8a8 (dynamic: the per-token quantization kernel is in the time, as
    overhead), w8a8_static, w4a8, fp8. weights: `rotated` as in the benchmark fitted, `cold`
    for weights that no cache holds, as inside a model. Raises `UnknownNameError` (dtype),
    `InputError` (the device has no unit for it), `CalibrationError` (no coefficients).
    """
    rule = precision_of(dtype)
    coef = merged_coefficients(machine.calibration, MATMUL_FAMILY, rule)
    sizes = (as_array(m), as_array(n), as_array(k))
    time = matmul_with(coef, machine.device, sizes, rule, weights)
    return as_measured(
        time, machine.calibration, *lenders(machine.calibration, MATMUL_FAMILY, rule)
    )
