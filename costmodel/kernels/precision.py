"""What a dtype of a matrix product means: bytes moved, matrix unit used, whose coefficients.

A name says weights and activations: `w4a16` = 4-bit weights, 16-bit activations. Scales and
zero points are not counted (under 2 % of the weights at a group of 128), but for the microscaling
types (`mxfp8`, `mxfp4`, `w4a8_mxfp`), whose scale of one byte for 32 elements is streamed with
them. `w8a8sc` holds sparse 8-bit weights compressed; a unit of the 310P expands them as the cube
reads, and its quantization scale is static.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from shardplan.costmodel.calibration import Calibration
from shardplan.costmodel.hardware import Device
from shardplan.models.errors import InputError, UnknownNameError

__all__ = [
    "Precision",
    "lenders",
    "merged_coefficients",
    "peak_flop_per_s",
    "precision_of",
    "unpack_s_per_weight",
]


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
    listed: bool = False
    """Only devices that list it among their weight dtypes can run it, whatever their units."""

    @property
    def unpacks(self) -> bool:
        """Whether vector cores widen the weights before the matrix unit reads them."""
        return self.weight_bytes < self.cube_bytes


def _precision(
    name: str,
    like: str,
    sizes: tuple[float, float, float],
    *units: str,
    quantizes: bool = False,
    listed: bool = False,
) -> Precision:
    return Precision(
        name=name,
        like=like,
        weight_bytes=sizes[0],
        input_bytes=sizes[1],
        cube_bytes=sizes[2],
        units=units,
        quantizes=quantizes,
        listed=listed,
    )


_MX_SCALE = 1.0 / 32.0
"""Bytes of block scale an element: one byte for 32 (OCP Microscaling Formats 1.0)."""
_MX8, _MX4 = 1.0 + _MX_SCALE, 0.5 + _MX_SCALE
_COMPRESSED = 0.75
"""Bytes a weight of `w8a8sc`. Assumed: no published ratio; it depends on how sparse a layer is."""
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
            _precision("mxfp8", "fp8", (_MX8, _MX8, _MX8), "fp8", quantizes=True, listed=True),
            _precision("mxfp4", "fp8", (_MX4, _MX4, _MX4), "fp4", quantizes=True, listed=True),
            _precision("w4a8_mxfp", "w4a8", (_MX4, _MX8, _MX8), "fp8", quantizes=True, listed=True),
            _precision(
                "w8a8sc", "w8a8_static", (_COMPRESSED, 1, 1), "int8", quantizes=True, listed=True
            ),
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
    if rule.listed and rule.name not in device.weight_dtypes:
        raise InputError(
            "the device cannot run weights of this dtype",
            got=f"device={device.name}, dtype={rule.name}",
            hint="it runs " + ", ".join(device.weight_dtypes),
        )
    for unit in rule.units:
        if unit in device.flop_per_s:
            return device.flop_per_s[unit]
    raise InputError(
        "the device has no matrix unit for this dtype",
        got=f"device={device.name}, dtype={rule.name}",
        hint="it has " + ", ".join(sorted(device.flop_per_s)),
    )


def unpack_s_per_weight(
    device: Device, rule: Precision, coef: Mapping[str, float]
) -> tuple[float, float]:
    """Seconds in which vector cores widen one weight: beside the cube, and before it.

    Separate vector cores work beside the cube and hand the weights over through L2
    (`unpack_passes` times) or in registers; where one core holds both units (910A, 310P) the
    cube waits. (0, 0) for a dtype that is not unpacked.
    """
    if not rule.unpacks:
        return 0.0, 0.0
    vector_s = coef["vector_flop_per_weight"] / device.vector_flop_per_s
    if device.vector_cores == 0 and device.vendor == "ascend":
        return 0.0, vector_s
    l2_s = coef["unpack_passes"] * rule.cube_bytes / (device.l2_bytes_per_s * coef["l2"])
    return max(vector_s, l2_s), 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Same:
    """A calibration as a cache key: equal only to the very same object."""

    calibration: Calibration

    def __hash__(self) -> int:
        return id(self.calibration)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.calibration is self.calibration


def merged_coefficients(
    calibration: Calibration, family: str, rule: Precision
) -> Mapping[str, float]:
    """Coefficients of `family.dtype`, those it leaves out taken from the dtype it is like.

    A section that holds `compute` stands alone. The same object for the same calibration, so that
    what is derived from it is derived once. `CalibrationError` if a section is missing.
    """
    return _merged(_Same(calibration), family, rule.name)


@functools.lru_cache(maxsize=512)
def _merged(key: _Same, family: str, dtype: str) -> Mapping[str, float]:
    own: dict[str, float] = {}
    for name in _lenders(key, family, dtype):
        own = {**key.calibration.section(name).coefficients, **own}
    return MappingProxyType(own)


@functools.lru_cache(maxsize=512)
def _lenders(key: _Same, family: str, dtype: str) -> tuple[str, ...]:
    names: list[str] = []
    rule = precision_of(dtype)
    name = f"{family}.{rule.name}"
    while name not in names:
        names.append(name)
        if "compute" in key.calibration.section(name).coefficients:
            break
        rule = precision_of(rule.like)
        name = f"{family}.{rule.name}"
    return tuple(names)


def lenders(calibration: Calibration, family: str, rule: Precision) -> tuple[str, ...]:
    """Sections that `merged_coefficients` draws on, the dtype's own first."""
    return _lenders(_Same(calibration), family, rule.name)
