"""Time of one dense matrix product y[m, n] = x[m, k] @ w[k, n] on one rank.

    total   = floor + quantize + body
    body    = (compute^4 + memory^4)^(1/4)
    compute = waves * cores * tile_m * tile_n * k' * 2 / (peak * e_compute)
    memory  = max(hbm, l2)
    hbm     = cold * b_w*n*k / (HBM * e_hbm) + (warm * b_w*n*k + b_x*m*k + 2*m*n) / (L2 * e_l2)
    l2      = (b_x * ceil(n/tile_n) * m*k + b_w' * ceil(m/tile_m) * k*n) / (L2 * e_l2)
    quantize = launch_s + row_s * (m / vector_cores)^alpha + (2 + 1)*m*k / (HBM * e_quant)

m rows (tokens), n output features, k input features; sizes padded to the 16 x 16 fractal
before tiling. peak in FLOP/s, HBM and L2 in bytes/s are the device's; b_w and b_x are bytes per
weight and activation, b_w' those of the weight as the cube unit reads it. Three tile shapes of
`tile_elements` outputs (by default what L0C holds in fp32) compete; the cheapest is taken. `waves`
is the rounds in which all cores work one tile each; with `split_k`, up to so many idle cores share
a tile: waves = max(tiles / cores, 1 / split_k) where that is under one. The e_* are fractions of
peak, without unit: they move to a device with other core counts and rates.

A section may correct this by exp(surface(m, n, k)) (`kernels.surface`): the body, or the whole time
where the surface is factored. In the second case it says what the benchmark measured, and `cold`
weights cost what the formula adds for them:
    body^4 = (benchmark's body with surface)^4 + max(0, memory(cold)^4 - memory(benchmark)^4)
and no product runs faster than e_compute of the peak. With cold weights more rows do not cost less:
up to 32 rows may be padded (`surface.padded_surface_of`), and the surface is raised where a device
that borrows it would gain from more rows.

Weights quantized for a wider product (w8a16, w4a16, w4a8, w4a8_mxfp) also pay
    unpack  = n*k * max(vector_flop_per_weight / vector rate, passes * b_w' / (L2 * e_l2))
as a third limit of the body: vector cores unpack beside the cube, through L2 (passes = 1) or
in registers (0). Where one core holds both units (910A, 310P) the cube waits for them.

`warm` is the share of the weights found in L2. `rotated` weights are those of the benchmark
the coefficients come from, which cycles through `copies` of them:
warm = 1 / (1 + (copies * b_w*n*k / L2 bytes)^8), steep because a cyclic walk over more than
a cache holds finds nothing in it. `cold` weights (a whole model streams between
two uses) have warm = 0, or the share that was prefetched into L2.

The body counts as compute where `compute` exceeds one pass over the operands (`hbm`): fetching
tiles again from L2 is part of feeding the cube.

Where a section has `scale_s`, its benchmark finds the scale of every input before it quantizes:
    quantize += scale_s + 2*m*k / (HBM * e_quant)
Inside a model (`cold`) fp8 weights come with scales of their inputs, and no kernel looks for them.

Sources of the coefficients: the calibration's own `matmul.*` sections. Left out: bank
conflicts of particular strides, biases, transposes, fused all-reduce.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    near_shapes,
)
from shardplan.costmodel.kernels.precision import (
    Precision,
    lenders,
    merged_coefficients,
    peak_flop_per_s,
    precision_of,
    unpack_s_per_weight,
)
from shardplan.costmodel.kernels.surface import Surface, padded_surface_of, surface_of

__all__ = ["MATMUL_FAMILY", "WeightState", "matmul", "matmul_with"]

WeightState = Literal["rotated", "cold"]
Sizes = tuple[Array, Array, Array]
"""m, n, k."""
MATMUL_FAMILY = "matmul"
_FRACTAL = 16.0
_OUTPUT_BYTES = 2.0
_READ_BYTES = 2.0
_SUM_BYTES = 4.0
_TILE_ROWS = np.asarray([1.0, 2.0, 0.5])
_TILE_COLUMNS = np.asarray([2.0, 1.0, 2.0])
"""Sides of the competing tiles, in units of the square root of half their area."""
_CHUNK = 1 << 12
"""Elements priced at once, so that intermediate arrays stay in the processor's cache."""


def _pad(size: Array) -> Array:
    return np.ceil(size / _FRACTAL) * _FRACTAL


def _fourth(seconds: Array) -> Array:
    square = seconds * seconds
    return np.asarray(square * square, dtype=np.float64)


def _memory_s(
    sizes: Sizes,
    coef: Mapping[str, float],
    device: Device,
    rule: Precision,
    state: WeightState,
    warm: Array | None,
) -> Array:
    """Seconds of each operand read or written once: weights from HBM or L2, the rest in L2."""
    m, n, k = sizes
    weight = n * k * rule.weight_bytes
    if state == "cold":
        cold: Array | float = 1.0 if warm is None else 1.0 - warm
    else:
        load = _fourth(weight * (coef["copies"] / device.l2_bytes))
        load *= load
        cold = load / (1.0 + load)
    rest = m * (k * rule.input_bytes + n * _OUTPUT_BYTES) + weight * (1.0 - cold)
    hbm_s = weight * cold / (device.hbm_bytes_per_s * coef["hbm"])
    return np.asarray(hbm_s + rest / (device.l2_bytes_per_s * coef["l2"]), dtype=np.float64)


def _body(
    sizes: Sizes,
    coef: Mapping[str, float],
    device: Device,
    rule: Precision,
    memory_s: Array,
) -> tuple[Array, NDArray[np.bool_]]:
    """Seconds of the cheapest tile shape, and where arithmetic binds rather than memory."""
    m, n, k = sizes
    side = math.sqrt(coef.get("tile_elements", device.l0c_bytes / _SUM_BYTES) / 2.0)
    cube_flop_s = 2.0 * device.cube_cores / (peak_flop_per_s(device, rule) * coef["compute"])
    l2_byte_s = 1.0 / (device.l2_bytes_per_s * coef["l2"])
    beside_s, before_s = unpack_s_per_weight(device, rule, coef)
    splits = coef.get("split_k", 1.0)
    mp, np_, kp = _pad(m), _pad(n), _pad(k)
    beside = (-1, *(1 for _ in range(max(size.ndim for size in sizes))))
    tile_m, tile_n = (side * tile.reshape(beside) for tile in (_TILE_ROWS, _TILE_COLUMNS))
    rows, columns = np.ceil(mp / tile_m), np.ceil(np_ / tile_n)
    tiles = rows * columns
    waves = np.ceil(tiles / device.cube_cores)
    if splits > 1.0:
        shared = np.maximum(tiles / device.cube_cores, 1.0 / splits)
        waves = np.where(waves > 1.0, waves, shared)
        area = np.minimum(mp, tile_m) * np.minimum(np_, tile_n)
    else:
        area = _pad(mp / rows) * _pad(np_ / columns)
    cube_s = waves * area * (kp * cube_flop_s)
    if rule.unpacks:
        cube_s = np.maximum(cube_s, n * k * beside_s) + n * k * before_s
    l2_s = columns * (m * rule.input_bytes) + rows * (n * rule.cube_bytes)
    moved_s = np.maximum(memory_s, l2_s * (k * l2_byte_s))
    sums = _fourth(cube_s) + _fourth(moved_s)
    least = np.minimum(np.minimum(sums[0], sums[1]), sums[2])
    third = np.where(sums[1] == least, cube_s[1], cube_s[2])
    bound = np.where(sums[0] == least, cube_s[0], third) >= memory_s
    return np.sqrt(np.sqrt(least)), np.asarray(bound, dtype=np.bool_)


def _quantize_s(
    sizes: Sizes,
    coef: Mapping[str, float],
    device: Device,
    rule: Precision,
    state: WeightState,
) -> Array | float:
    """Seconds of the kernels that quantize the input rows before the product."""
    if not rule.quantizes or "quantize" not in coef:
        return 0.0
    m, _, k = sizes
    cores = device.vector_cores or device.cube_cores
    element_bytes, launch_s = _READ_BYTES + rule.input_bytes, coef.get("quantize_floor_s", 0.0)
    if "scale_s" in coef and not (state == "cold" and rule.name == "fp8"):
        element_bytes, launch_s = element_bytes + _READ_BYTES, launch_s + coef["scale_s"]
    moved_s = m * k * element_bytes / (device.hbm_bytes_per_s * coef["quantize"])
    rows_s = coef["quantize_row_s"] * (m / cores) ** coef["quantize_power"]
    return np.asarray(moved_s + rows_s + launch_s, dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pricing:
    """What stays the same over the elements of a call."""

    coef: Mapping[str, float]
    device: Device
    rule: Precision
    state: WeightState
    surface: Surface

    def parts(self, sizes: Sizes, warm: Array | None) -> tuple[Array, Array, Array]:
        """Compute, memory and overhead in seconds of sizes of as many dims, which broadcast."""
        coef, device, rule = self.coef, self.device, self.rule
        apart = self.surface.whole and self.state == "cold"
        given_s = _memory_s(sizes, coef, device, rule, self.state, warm)
        least_s, further = given_s, None
        if apart:
            bench_s = _memory_s(sizes, coef, device, rule, "rotated", None)
            further = np.maximum(_fourth(given_s) - _fourth(bench_s), 0.0)
            least_s = np.minimum(bench_s, given_s)
        body, bound = _body(sizes, coef, device, rule, least_s)
        factor = self.surface.factor(sizes)
        body *= factor
        over = coef["floor_s"] + _quantize_s(sizes, coef, device, rule, self.state)
        if self.surface.whole:
            over = over * factor
            rate = peak_flop_per_s(device, rule) * coef["compute"]
            body = np.maximum(body, sizes[0] * sizes[1] * sizes[2] * (2.0 / rate))
        if further is not None:
            body = np.where(further > 0.0, np.sqrt(np.sqrt(_fourth(body) + further)), body)
            bound = np.logical_and(bound, body >= given_s)
        compute = np.where(bound, body, 0.0)
        return compute, body - compute, np.broadcast_to(over, body.shape)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Kernel:
    """What a surface is corrected for, as a cache key: equal only for the very same objects."""

    coef: Mapping[str, float]
    device: Device
    rule: Precision

    def __hash__(self) -> int:
        return hash((id(self.coef), id(self.device), self.rule))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Kernel):
            return False
        same = other.coef is self.coef and other.device is self.device
        return same and other.rule == self.rule


@functools.lru_cache(maxsize=256)
def _cold_surface(kernel: _Kernel) -> Surface:
    """The padded surface, raised at its knots to where no fewer rows cost more on the device."""
    surface = padded_surface_of(kernel.coef)
    axes = np.meshgrid(*(np.exp2(knots) for knots in surface.knots), indexing="ij")
    pricing = _Pricing(
        coef=kernel.coef, device=kernel.device, rule=kernel.rule, state="rotated", surface=surface
    )
    parts = pricing.parts(_three([axis.ravel() for axis in axes]), None)
    times = (parts[0] + parts[1] + parts[2]).reshape(axes[0].shape)
    raised = np.log(np.maximum.accumulate(times, axis=0) / times)
    return dataclasses.replace(surface, values=surface.values + raised.ravel())


def matmul_with(
    coef: Mapping[str, float],
    device: Device,
    sizes: Sizes,
    rule: Precision,
    state: WeightState = "rotated",
    warm: Array | None = None,
) -> KernelTime:
    """`matmul` with given coefficients; `sizes` = m, n, k of any shapes that broadcast."""
    surface = surface_of(coef)
    if surface.whole and state == "cold":
        surface = _cold_surface(_Kernel(coef=coef, device=device, rule=rule))
    pricing = _Pricing(coef=coef, device=device, rule=rule, state=state, surface=surface)
    given = sizes if warm is None else (*sizes, warm)
    shape = np.broadcast_shapes(*(size.shape for size in given))
    dims = max(len(shape), 1)
    alike = [size.reshape((1,) * (dims - size.ndim) + size.shape) for size in given]
    step = max(_CHUNK // max(math.prod(shape[1:]), 1), 1)
    if not shape or shape[0] <= step:
        compute, memory, over = pricing.parts(_three(alike), None if warm is None else alike[3])
    else:
        compute, memory, over = (np.empty(shape) for _ in range(3))
        for start in range(0, shape[0], step):
            part = slice(start, start + step)
            own = [one if one.shape[0] == 1 else one[part] for one in alike]
            compute[part], memory[part], over[part] = pricing.parts(
                _three(own), None if warm is None else own[3]
            )
    total = compute + memory + over
    return KernelTime(*(item.reshape(shape) for item in (total, compute, memory, over)))


def _three(arrays: Sequence[Array]) -> Sizes:
    return arrays[0], arrays[1], arrays[2]


def matmul(
    machine: Machine,
    m: ArrayLike,
    n: ArrayLike,
    k: ArrayLike,
    dtype: str,
    *,
    weights: WeightState = "rotated",
    warm: Array | None = None,
    quantized: bool = False,
) -> KernelTime:
    """Seconds of y[m, n] = x[m, k] @ w[k, n].

    m, n, k: sizes >= 1, arrays that broadcast; the result has their shape. dtype: bf16, fp16,
    w8a16, w4a16, w8a8 (dynamic: the per-token quantization kernel is in the time, as
    overhead), w8a8_static, w4a8, fp8, or where the device lists them mxfp8, mxfp4, w4a8_mxfp and
    w8a8sc. weights: `rotated` as in the benchmark fitted, `cold`
    for weights that no cache holds, as inside a model; of those, `warm` is the share (0 to 1, an
    array of the result's shape) that a prefetch brought into L2. quantized: the input comes in
    the product's own type, no kernel quantizes it. Raises `UnknownNameError` (dtype),
    `InputError` (the device has no unit for it), `CalibrationError` (no coefficients).
    """
    rule = precision_of(dtype)
    peak_flop_per_s(machine.device, rule)
    coef = merged_coefficients(machine.calibration, MATMUL_FAMILY, rule)
    sizes = (as_array(m), as_array(n), as_array(k))
    own = dataclasses.replace(rule, quantizes=False) if quantized else rule
    time = matmul_with(coef, machine.device, sizes, own, weights, warm)
    time = near_shapes(time, machine.calibration, rule.name, sizes)
    return as_measured(
        time, machine.calibration, *lenders(machine.calibration, MATMUL_FAMILY, rule)
    )
