"""Corrections of a calibration by measurements of one machine: what a device profile holds.

A kernel's time is a body (compute and memory) and an overhead (floor, launch, quantization). A
correction scales both, the body by a factor that may change with its own seconds:

    body'     = body * exp(f(ln body))     f linear between the knots, constant outside them
    overhead' = overhead * floor_factor
    total'    = body' + overhead'

`factors` (the values exp(f)) and `floor_factor` are without unit, `knots_s` are bodies in seconds;
one knot is one factor. Outside the knots the correction stays what the nearest measurement said,
and f falls by less than ln body rises, which keeps the time of a larger kernel the larger one.

Corrections are named like calibration sections (`matmul.bf16`); `all` stands for every section
without one of its own (a single end-to-end number). A section whose coefficients are those of
another one (fp16 those of bf16) takes that one's correction with them. Without a correction a
price is what it was, bit for bit.

Left out: corrections of memory, of an engine's host time, of one shape.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from shardplan.costmodel.errors import DataFileError

__all__ = ["ALL", "MAX_FACTOR", "Correction", "read_corrections"]

ALL = "all"
"""Name of the correction of every section without one of its own."""
MAX_FACTOR = 20.0
"""A kernel further off than this is not the kernel that was meant."""
_STEEPEST = 0.95
Kind = Literal["fitted", "derived"]
_MOST = sys.float_info.max
_LISTS = ("knots_s", "factors")
_COUNTS = ("rows_fitted", "rows_held_out")
_ERRORS = ("median_error_before", "p90_error_before", "median_error", "p90_error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What measurements say about one section, with where they come from."""

    name: str
    floor_factor: float
    knots_s: tuple[float, ...]
    factors: tuple[float, ...]
    kind: Kind
    """fitted: from the kernel's own rows; derived: spread from an end-to-end number."""
    source: str
    rows_fitted: int
    rows_held_out: int
    median_error_before: float = field(compare=False)
    """Median relative error of the uncorrected price on held-out rows; nan where none, which would
    make a correction another one than itself."""
    p90_error_before: float = field(compare=False)
    median_error: float = field(compare=False)
    """The same after the correction."""
    p90_error: float = field(compare=False)

    @property
    def factor(self) -> float:
        """The factors' geometric mean."""
        return math.exp(math.fsum(math.log(one) for one in self.factors) / len(self.factors))


def read_corrections(table: Mapping[str, object], where: str) -> Mapping[str, Correction]:
    """The `[correction."<section>"]` tables of a profile; `DataFileError` for one that is wrong."""
    out: dict[str, Correction] = {}
    for name, entry in table.items():
        if not isinstance(entry, Mapping):
            raise DataFileError("a correction is a table", got=f"{where}: correction.{name}")
        out[name] = _correction(name, entry, f'{where}: correction."{name}"')
    return out


def _correction(name: str, entry: Mapping[str, Any], where: str) -> Correction:
    needed = {"floor_factor", *_LISTS, *_COUNTS, "kind", "source"}
    wrong = {"unknown": set(entry) - needed - set(_ERRORS), "missing": needed - set(entry)}
    if any(wrong.values()):
        said = ", ".join(f"{what} {sorted(keys)}" for what, keys in wrong.items() if keys)
        raise DataFileError("a correction has unknown or missing keys", got=f"{where}: {said}")
    if entry["kind"] not in ("fitted", "derived"):
        raise DataFileError(
            "`kind` must be fitted or derived", got=f"{where}: {str(entry['kind'])[:40]!r}"
        )
    if not isinstance(entry["source"], str) or not entry["source"].strip():
        raise DataFileError("a correction needs its source", got=where)
    floor = _number(entry["floor_factor"], "floor_factor", where)
    knots_s, factors = (_numbers(entry[key], key, where) for key in _LISTS)
    _check_range(floor, knots_s, factors, where)
    errors = {key: _error(entry.get(key), key, where) for key in _ERRORS}
    counts = {key: _count(entry[key], key, where) for key in _COUNTS}
    return Correction(
        name=name,
        kind=entry["kind"],
        source=entry["source"],
        rows_fitted=counts["rows_fitted"],
        rows_held_out=counts["rows_held_out"],
        floor_factor=floor,
        knots_s=knots_s,
        factors=factors,
        **errors,
    )


def _number(value: object, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MOST:
        raise DataFileError("a finite number is needed", got=f"{where}: {key} = {value!r}"[:120])
    return float(value)


def _numbers(value: object, key: str, where: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not value:
        raise DataFileError("a list of numbers is needed", got=f"{where}: {key} = {value!r}"[:120])
    return tuple(_number(one, key, where) for one in value)


def _error(value: object, key: str, where: str) -> float:
    return math.nan if value is None else _number(value, key, where)


def _count(value: object, key: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataFileError("a count is needed", got=f"{where}: {key} = {value!r}"[:120])
    return value


def _check_range(
    floor: float, knots_s: tuple[float, ...], factors: tuple[float, ...], where: str
) -> None:
    for one in (floor, *factors):
        if not 1.0 / MAX_FACTOR <= one <= MAX_FACTOR:
            raise DataFileError(
                f"a factor must lie between {1.0 / MAX_FACTOR:g} and {MAX_FACTOR:g}",
                got=f"{where}: {one:g}",
            )
    if len(knots_s) != len(factors):
        raise DataFileError(
            "`knots_s` and `factors` must be as many",
            got=f"{where}: {len(knots_s)} and {len(factors)}",
        )
    if knots_s[0] <= 0.0:
        raise DataFileError("`knots_s` must be above 0", got=f"{where}: {knots_s[0]:g}")
    for (low, high), (first, second) in zip(pairwise(knots_s), pairwise(factors), strict=True):
        if high <= low:
            raise DataFileError("`knots_s` must ascend", got=f"{where}: {low:g}, {high:g}")
        if math.log(second / first) < -_STEEPEST * math.log(high / low):
            raise DataFileError(
                "a factor must not fall as fast as the body rises",
                got=f"{where}: {first:g} at {low:g} s, {second:g} at {high:g} s",
            )
