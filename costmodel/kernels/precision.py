"""What a dtype of a matrix product means: bytes moved, matrix unit used, whose coefficients.

A name says weights and activations: `w4a16` = 4-bit weights, 16-bit activations. Scales and
zero points are not counted (under 2 % of the weights at a group of 128).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from shardplan.costmodel.calibration import Calibration
from shardplan.costmodel.hardware import Device
from shardplan.models.errors import InputError, UnknownNameError

__all__ = ["Precision", "lenders", "merged_coefficients", "peak_flop_per_s", "precision_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Bytes of one element and where the arithmetic runs."""

    name: str
    like: str
    """The dtype whose coefficients stand in for those its own section leaves out."""
    weight_bytes: float
    input_bytes: float
    cube_bytes: float
    """Bytes of a weight as the matrix unit reads it, after unpacking."""
    units: tuple[str, ...]
    """Matrix units that can run it, first choice first (keys of `Device.flop_per_s`)."""
    quantizes: bool
    """A kernel before the product quantizes its input."""

    @property
    def unpacks(self) -> bool:
        """Whether vector cores widen the weights before the matrix unit reads them."""
        return self.weight_bytes < self.cube_bytes


def _precision(
    name: str, like: str, sizes: tuple[float, float, float], *units: str, quantizes: bool = False
) -> Precision:
    return Precision(
        name=name,
        like=like,
        weight_bytes=sizes[0],
        input_bytes=sizes[1],
        cube_bytes=sizes[2],
        units=units,
        quantizes=quantizes,
    )


_PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            _precision("bf16", "fp16", (2, 2, 2), "bf16", "fp16"),
            _precision("fp16", "bf16", (2, 2, 2), "fp16", "bf16"),
            _precision("w8a16", "bf16", (1, 2, 2), "bf16", "fp16"),
            _precision("w4a16", "bf16", (0.5, 2, 2), "bf16", "fp16"),
            _precision("w8a8", "fp8", (1, 1, 1), "int8", quantizes=True),
            _precision("w8a8_static", "w8a8", (1, 1, 1), "int8", quantizes=True),
            _precision("w4a8", "w8a8", (0.5, 1, 1), "int8", quantizes=True),
            _precision("fp8", "w8a8", (1, 1, 1), "fp8", quantizes=True),
        )
    }
)


def precision_of(dtype: str) -> Precision:
    """The rule of a dtype name; `UnknownNameError` for any other."""
    try:
        return _PRECISIONS[dtype]
    except KeyError:
        raise UnknownNameError("matmul dtype", dtype, _PRECISIONS) from None


def peak_flop_per_s(device: Device, rule: Precision) -> float:
    """Peak matrix rate of the device for the dtype; `InputError` where it has no such unit."""
    for unit in rule.units:
        if unit in device.flop_per_s:
            return device.flop_per_s[unit]
    raise InputError(
        "the device has no matrix unit for this dtype",
        got=f"device={device.name}, dtype={rule.name}",
        hint="it has " + ", ".join(sorted(device.flop_per_s)),
    )


def merged_coefficients(
    calibration: Calibration, family: str, rule: Precision
) -> Mapping[str, float]:
    """Coefficients of `family.dtype`, those it leaves out taken from the dtype it is like.

    A section that holds `compute` stands alone. `CalibrationError` if a section is missing.
    """
    own: dict[str, float] = {}
    seen: set[str] = set()
    while rule.name not in seen:
        seen.add(rule.name)
        own = {**calibration.section(f"{family}.{rule.name}").coefficients, **own}
        if "compute" in own:
            break
        rule = precision_of(rule.like)
    return own


def lenders(calibration: Calibration, family: str, rule: Precision) -> tuple[str, ...]:
    """Sections that `merged_coefficients` draws on, the dtype's own first."""
    names: list[str] = []
    name = f"{family}.{rule.name}"
    while name not in names:
        names.append(name)
        if "compute" in calibration.section(name).coefficients:
            break
        rule = precision_of(rule.like)
        name = f"{family}.{rule.name}"
    return tuple(names)
