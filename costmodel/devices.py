"""Devices by name or from a TOML file: the loader of `data/devices`.

A file holds facts (`shardplan.costmodel.datafile`): value, kind, source, with the vendor's unit in
the key. Conversions done here and nowhere else:

    GB = 1e9 bytes    GiB = 2**30    MiB = 2**20    KiB = 2**10    TFLOP = 1e12    us = 1e-6 s

`weight_dtypes` may name only dtypes for which the matrix unit has a rate: w8a8 needs int8, w8a16
and w4a16 a 16-bit type, fp8 needs fp8.

A device that is `like` another one, shipped or in a file beside it, states its own name, title and
the facts in which they differ; the others are the other one's, with their sources.

A profile (`shardplan calibrate`) is a file too: it names the device it is `base`d on, the
`cluster` that it was measured in and the `engine_profile` whose kernels it timed, and holds
`[correction]` tables (`costmodel.correction`) and a `[provenance]` table for people. The base is a
shipped device or a file beside the profile.

Left out: power, clocks under load, ECC; a calibration holds how far kernels stay from these peaks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from shardplan.costmodel.calibration import corrected, load_calibration
from shardplan.costmodel.correction import read_corrections
from shardplan.costmodel.datafile import (
    Field,
    check_keys,
    is_file_name,
    label,
    mapping,
    number,
    read_facts,
    read_shipped,
    read_toml,
    shipped_names,
    words,
)
from shardplan.costmodel.errors import DataFileError
from shardplan.costmodel.hardware import Device, Fact

__all__ = [
    "DEVICE_FIELDS",
    "device_from_table",
    "device_names",
    "device_summary",
    "fact_summary",
    "is_profile",
    "load_device",
    "profiled_device",
]

_KIB, _MIB, _GIB = 2.0**10, 2.0**20, 2.0**30
_RATES = {
    "fp32": "fp32_tflop_per_s",
    "fp16": "fp16_tflop_per_s",
    "bf16": "bf16_tflop_per_s",
    "int8": "int8_top_per_s",
    "int4": "int4_top_per_s",
    "fp8": "fp8_tflop_per_s",
    "fp4": "fp4_tflop_per_s",
}
_NEEDS = {
    "fp32": ("fp32",),
    "fp16": ("fp16",),
    "bf16": ("bf16",),
    "w8a16": ("fp16", "bf16"),
    "w4a16": ("fp16", "bf16"),
    "w8a8": ("int8",),
    "w8a8_static": ("int8",),
    "w8a8sc": ("int8",),
    "w4a8": ("int8",),
    "fp8": ("fp8",),
    "mxfp8": ("fp8",),
    "mxfp4": ("fp4",),
    "w4a8_mxfp": ("fp8",),
}
"""Weight dtype -> element types of which the matrix unit must have one."""
_KV_DTYPES = ("bf16", "fp16", "int8", "fp8")
_PROFILE_KEYS = ("name", "title", "base", "correction", "provenance")
_DEVICE_LABELS = ("name", "title", "vendor")
DEVICE_FIELDS: Mapping[str, Field] = {
    "cube_cores": number("cube_cores", low=1, high=4096, whole=True),
    "vector_cores": number("vector_cores", low=0, high=8192, whole=True),
    "clock_mhz": number("clock_hz", low=1, high=2e4, scale=1e6),
    **{
        key: number(f"flop_per_s.{dtype}", low=1e-3, high=1e6, scale=1e12, optional=dtype != "fp16")
        for dtype, key in _RATES.items()
    },
    "vector_tflop_per_s": number("vector_flop_per_s", low=1e-3, high=1e5, scale=1e12),
    "hbm_gib": number("hbm_bytes", low=0.125, high=16384, scale=_GIB),
    "hbm_gb_per_s": number("hbm_bytes_per_s", low=1, high=1e6, scale=1e9),
    "l2_mib": number("l2_bytes", low=0.125, high=65536, scale=_MIB),
    "l2_gb_per_s": number("l2_bytes_per_s", low=1, high=1e7, scale=1e9),
    "l1_kib": number("l1_bytes", low=1, high=2**20, scale=_KIB),
    "l0a_kib": number("l0a_bytes", low=1, high=2**20, scale=_KIB),
    "l0b_kib": number("l0b_bytes", low=1, high=2**20, scale=_KIB),
    "l0c_kib": number("l0c_bytes", low=1, high=2**20, scale=_KIB),
    "ub_kib": number("ub_bytes", low=1, high=2**20, scale=_KIB),
    "launch_us": number("launch_s", low=0, high=1e6, scale=1e-6),
    "host_launch_us": number("host_launch_s", low=0, high=1e6, scale=1e-6),
    "calibration": Field(target="calibration", shape="word"),
    "weight_dtypes": words("weight_dtypes", choices=tuple(_NEEDS)),
    "kv_dtypes": words("kv_dtypes", choices=_KV_DTYPES),
    "engine_profiles": words("engine_profiles"),
}
"""Facts of a device file, beside its labels and `soc_versions`."""


def device_names() -> tuple[str, ...]:
    """Names of the devices that ship, sorted."""
    return shipped_names("devices")


def load_device(name_or_path: str | Path) -> Device:
    """A shipped device by name (case ignored), or one from a TOML file.

    `UnknownNameError` for a name that does not ship, `DataFileError` for a file that breaks a rule.
    """
    if is_file_name(name_or_path):
        path = Path(name_or_path)
        table = read_toml(path, "device")
        if is_profile(table):
            return profiled_device(table, str(path), folder=path.parent)
        return device_from_table(table, str(path), folder=path.parent)
    return _shipped_device(str(name_or_path).lower())


@functools.cache
def _shipped_device(name: str) -> Device:
    return device_from_table(read_shipped("devices", "device", name), f"devices/{name}.toml")


def is_profile(table: Mapping[str, object]) -> bool:
    """Whether a parsed file corrects a device rather than describing one."""
    return "base" in table


def profiled_device(table: Mapping[str, object], where: str, *, folder: Path) -> Device:
    """The base device of a parsed profile with the profile's corrections.

    A base path is relative to `folder`. `DataFileError` for a profile that breaks a rule,
    `CalibrationError` for a correction of a section that the base's calibration lacks.
    """
    check_keys(table, _PROFILE_KEYS, ["cluster", "engine_profile"], where)
    name = label(table, "base", where)
    if is_file_name(name) and is_profile(read_toml(folder / name, "device")):
        raise DataFileError(
            "a profile must be based on a device", got=f"{where}: {name} is a profile itself"
        )
    base = load_device(folder / name if is_file_name(name) else name)
    mapping(table["provenance"], f"{where}: provenance")
    changes = read_corrections(mapping(table["correction"], f"{where}: correction"), where)
    engine = label(table, "engine_profile", where) if "engine_profile" in table else ""
    corrected(load_calibration(base.calibration, engine), changes)
    return replace(
        base,
        name=label(table, "name", where),
        title=label(table, "title", where),
        corrections=MappingProxyType(dict(changes)),
        corrected_engine=engine,
    )


def device_from_table(
    table: Mapping[str, object], where: str, *, folder: Path | None = None
) -> Device:
    """The device that a parsed file describes; `where` names the file in errors.

    A file that it is `like` is relative to `folder`.
    """
    if "like" in table:
        table = _completed(table, where, folder or Path())
    optional = [key for key, field in DEVICE_FIELDS.items() if field.optional]
    required = [*_DEVICE_LABELS, *(key for key in DEVICE_FIELDS if key not in optional)]
    check_keys(table, required, [*optional, "soc_versions"], where)
    read = read_facts(table, DEVICE_FIELDS, where)
    values: dict[str, Any] = dict(read.values)
    rates = {
        dtype: values.pop(target) for dtype in _RATES if (target := f"flop_per_s.{dtype}") in values
    }
    _check_dtypes(values["weight_dtypes"], rates, where)
    facts = dict(read.facts)
    soc_versions: tuple[str, ...] = ()
    if "soc_versions" in table:
        soc = read_facts(table, {"soc_versions": words("soc_versions")}, where)
        soc_versions = cast("tuple[str, ...]", soc.values["soc_versions"])
        facts.update(soc.facts)
    return Device(
        name=label(table, "name", where),
        title=label(table, "title", where),
        vendor=cast("Any", label(table, "vendor", where, ("ascend", "nvidia"))),
        soc_versions=soc_versions,
        flop_per_s=MappingProxyType(rates),
        facts=MappingProxyType(facts),
        **values,
    )


def _completed(table: Mapping[str, object], where: str, folder: Path) -> Mapping[str, object]:
    """A device's own entries over those of the device that it is like."""
    own = {key: value for key, value in table.items() if key != "like"}
    name = label(table, "like", where)
    if is_file_name(name):
        base = read_toml(folder / name, "device")
    else:
        base = read_shipped("devices", "device", name.lower())
    if is_profile(base) or "like" in base:
        raise DataFileError(
            "a device is `like` one that states every fact itself",
            got=f"{where}: like={name!r}",
            hint="name the device that this one is like or based on",
        )
    check_keys(own, ("name", "title"), [*DEVICE_FIELDS, "vendor", "soc_versions"], where)
    return {**base, **own}


def _check_dtypes(dtypes: tuple[str, ...], rates: Mapping[str, float], where: str) -> None:
    for dtype in dtypes:
        if not any(element in rates for element in _NEEDS[dtype]):
            keys = " or ".join(_RATES[element] for element in _NEEDS[dtype])
            raise DataFileError(
                "a weight dtype needs a matrix rate of its element type",
                got=f"{where}: weight_dtypes has {dtype}",
                hint=f"add {keys}",
            )


def fact_summary(value: object, fact: Fact) -> dict[str, object]:
    """The value (SI) with its kind and source."""
    shown = list(value) if isinstance(value, tuple) else value
    return {"value": shown, "kind": fact.kind, "source": fact.source}


def device_summary(name_or_path: str | Path) -> dict[str, object]:
    """A device for a JSON listing: labels plain, each fact as value (SI), kind and source."""
    device = load_device(name_or_path)
    out: dict[str, object] = {}
    for field in fields(device):
        if field.name == "facts":
            continue
        value = getattr(device, field.name)
        if field.name == "corrected_engine" and not value:
            continue
        if field.name == "corrections":
            if value:
                out[field.name] = {name: asdict(change) for name, change in value.items()}
            continue
        if isinstance(value, Mapping):
            out[field.name] = {
                key: fact_summary(item, device.facts[f"{field.name}.{key}"])
                for key, item in value.items()
            }
        elif field.name in device.facts:
            out[field.name] = fact_summary(value, device.facts[field.name])
        else:
            out[field.name] = list(value) if isinstance(value, tuple) else value
    return out
