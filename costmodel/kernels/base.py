"""What every kernel formula takes and gives.

A formula takes numpy arrays that broadcast against one another (one strategy or a million: the
same code) and gives a `KernelTime` of that shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.calibration import (
    Calibration,
    borrowed,
    corrected,
    load_calibration,
)
from shardplan.costmodel.correction import ALL, Correction
from shardplan.costmodel.hardware import Device

__all__ = [
    "Array",
    "ArrayLike",
    "KernelTime",
    "Machine",
    "as_array",
    "as_measured",
    "near_shapes",
    "scaled",
]

_SIXTEEN_BIT = ("bf16", "fp16")
Array = NDArray[np.float64]
ArrayLike = float | int | Array | NDArray[np.int64]


class KernelTime(NamedTuple):
    """Seconds of one call. `compute_s + memory_s + overhead_s == total_s`, element by element.

    The body of a kernel is counted as compute where the matrix or vector units bind and as
    memory where HBM or L2 bind; floors and launches are overhead.
    """

    total_s: Array
    compute_s: Array
    memory_s: Array
    overhead_s: Array


@dataclass(frozen=True, slots=True)
class Machine:
    """A device and the coefficients that its kernels are priced with."""

    device: Device
    calibration: Calibration

    @classmethod
    def of(cls, device: Device, engine: str = "") -> Machine:
        """The device with the calibration it names and its own corrections of it.

        `engine`: name of the engine profile whose own kernels count where the calibration knows
        them. A device that borrows its calibration (its fact says `derived`) is priced with
        derived sections. Corrections measured against one engine's own kernels leave those of
        another engine alone.
        """
        calibration = load_calibration(device.calibration, engine)
        fact = device.facts.get("calibration")
        if fact is not None and fact.kind == "derived":
            calibration = borrowed(calibration)
        if device.corrections:
            calibration = corrected(calibration, _applicable(device, calibration))
        return cls(device, calibration)


def _applicable(device: Device, calibration: Calibration) -> dict[str, Correction]:
    """Corrections of the sections that the measured engine and this one share."""
    measured = load_calibration(device.calibration, device.corrected_engine).sections
    return {
        name: change
        for name, change in device.corrections.items()
        if name == ALL or measured[name].coefficients == calibration.section(name).coefficients
    }


def as_array(value: ArrayLike) -> Array:
    """The value as a float64 array."""
    return np.asarray(value, dtype=np.float64)


def scaled(time: KernelTime, factor: Array | float) -> KernelTime:
    """The time with all its parts times a factor; the same object where the factor is 1."""
    if isinstance(factor, float) and factor == 1.0:
        return time
    return KernelTime(*(as_array(part * factor) for part in time))


def near_shapes(
    time: KernelTime, calibration: Calibration, dtype: str, sizes: tuple[Array, Array, Array]
) -> KernelTime:
    """The time of a product (m, n, k) after what was measured of shapes like it (`nearby`).

    The same object where the calibration holds no shapes, or for a dtype that is not 16-bit.
    """
    if calibration.shapes is None or dtype not in _SIXTEEN_BIT:
        return time
    return scaled(time, calibration.shapes.factor(*sizes))


def as_measured(time: KernelTime, calibration: Calibration, *sections: str) -> KernelTime:
    """The time after the calibration's correction of the first of these sections that has one.

    The same object where there is none; the formula is in `costmodel.correction`.
    """
    change = calibration.correction(*sections)
    if change is None:
        return time
    factor: Array | float = change.factors[0]
    if len(change.factors) > 1:
        body = np.maximum(time.compute_s + time.memory_s, change.knots_s[0])
        factor = np.exp(np.interp(np.log(body), np.log(change.knots_s), np.log(change.factors)))
    compute, memory = time.compute_s * factor, time.memory_s * factor
    overhead = time.overhead_s * change.floor_factor
    parts = (compute + memory + overhead, compute, memory, overhead)
    return KernelTime(*(as_array(part) for part in parts))
