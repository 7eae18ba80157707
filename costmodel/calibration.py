"""Fitted coefficients: how far a real kernel stays from the ideal machine.

A calibration is a folder `data/calibrations/<name>/`, one TOML file a family of kernels
(`matmul.toml`, `moe.toml`, `attention.toml`, `mla.toml`, `pointwise.toml`, `collectives.toml`).
Each file holds tables; each table is one kernel's section:

    [matmul.bf16]
    kind = "fitted"                 # measured | fitted | derived | assumed
    source = "..."                  # which measurements, which revision
    rows_fitted = 734               # 0 where nothing was fitted
    rows_held_out = 183
    median_error = 0.031            # on the held-out rows, relative
    p90_error = 0.11
    [matmul.bf16.coefficients]
    floor_s = 5.1e-6
    ...

Coefficients are plain numbers; times in seconds, rates in units a second, the rest without unit.

A folder may stand on another one: `extends.toml` holds `base = "<name>"` and a `source` that says
why; sections that the folder lacks are the base's, as `derived`. A folder inside it, named like
an engine profile (`h200/torch-graph/`), holds the sections that this engine's own kernels have; the
engine's machines are priced with them and with the folder's other sections. A file
`matmul_shapes.csv` in either holds what was measured of single shapes beyond the formula of
`matmul.bf16` (`nearby.ShapeTable`; coefficient `shapes_reach`).
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Any, Literal

from shardplan.costmodel.correction import ALL, Correction
from shardplan.costmodel.errors import CalibrationError, DataFileError
from shardplan.costmodel.nearby import ShapeTable
from shardplan.models.errors import UnknownNameError

__all__ = [
    "Calibration",
    "Section",
    "borrowed",
    "calibration_engines",
    "calibration_names",
    "corrected",
    "load_calibration",
]

Kind = Literal["measured", "fitted", "derived", "assumed"]
_EXTENDS = "extends.toml"
_SHAPES = "matmul_shapes.csv"
_SHAPES_SECTION = "matmul.bf16"
_KINDS = ("measured", "fitted", "derived", "assumed")
_KEYS = {
    "kind",
    "source",
    "rows_fitted",
    "rows_held_out",
    "median_error",
    "p90_error",
    "coefficients",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One kernel's coefficients with their provenance and their error."""

    name: str
    kind: Kind
    source: str
    rows_fitted: int
    rows_held_out: int
    median_error: float = field(compare=False)
    """Median relative error on rows kept out of the fit; nan where there were none."""
    p90_error: float = field(compare=False)
    coefficients: Mapping[str, float]

    def __getitem__(self, key: str) -> float:
        try:
            return self.coefficients[key]
        except KeyError:
            raise CalibrationError(
                "a calibration section lacks a coefficient", got=f"{self.name}.{key}"
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """All sections of one calibration, by dotted name (`matmul.bf16`)."""

    name: str
    sections: Mapping[str, Section]
    corrections: Mapping[str, Correction] = field(default_factory=dict)
    """By section name: what measurements of one machine change (`correction`)."""
    shapes: ShapeTable | None = None
    """What was measured of single 16-bit products beyond their formula."""

    def correction(self, *names: str) -> Correction | None:
        """The first correction among sections, that of all sections, or None."""
        if not self.corrections:
            return None
        found = next((self.corrections[name] for name in names if name in self.corrections), None)
        return found if found is not None else self.corrections.get(ALL)

    def section(self, name: str) -> Section:
        """The section of one kernel; `CalibrationError` if there is none."""
        try:
            return self.sections[name]
        except KeyError:
            raise CalibrationError(
                "a calibration has no section for this kernel",
                got=f"calibration={self.name}, kernel={name}",
                hint="it has " + ", ".join(sorted(self.sections)),
            ) from None


def corrected(calibration: Calibration, corrections: Mapping[str, Correction]) -> Calibration:
    """The calibration with corrections; a corrected section rests on what corrects it.

    `CalibrationError` for a correction of a section that the calibration does not have.
    """
    sections = dict(calibration.sections)
    for name, change in corrections.items():
        if name == ALL:
            continue
        sections[name] = replace(
            calibration.section(name),
            kind=change.kind,
            source=change.source,
            rows_fitted=change.rows_fitted,
            rows_held_out=change.rows_held_out,
            median_error=change.median_error,
            p90_error=change.p90_error,
        )
    return replace(
        calibration,
        sections=MappingProxyType(sections),
        corrections=MappingProxyType({**corrections}),
    )


def borrowed(calibration: Calibration) -> Calibration:
    """The same coefficients on another device: what was measured or fitted is derived there."""
    sections = {
        name: replace(section, kind="derived")
        if section.kind in ("measured", "fitted")
        else section
        for name, section in calibration.sections.items()
    }
    return replace(calibration, sections=MappingProxyType(sections))


def _root() -> Traversable:
    return resources.files("shardplan.costmodel") / "data" / "calibrations"


def calibration_names() -> tuple[str, ...]:
    """Names of the calibrations that ship."""
    return tuple(sorted(entry.name for entry in _root().iterdir() if entry.is_dir()))


def _section(name: str, table: Mapping[str, Any], where: str) -> Section:
    unknown = set(table) - _KEYS
    missing = {"kind", "source", "coefficients"} - set(table)
    if unknown or missing:
        raise DataFileError(
            "a calibration section has unknown or missing keys",
            got=f"{where}: [{name}] unknown={sorted(unknown)} missing={sorted(missing)}",
        )
    if table["kind"] not in _KINDS:
        raise DataFileError(
            "`kind` must be one of " + ", ".join(_KINDS), got=f"{where}: [{name}] {table['kind']!r}"
        )
    nan = float("nan")
    return Section(
        name=name,
        kind=table["kind"],
        source=str(table["source"]),
        rows_fitted=int(table.get("rows_fitted", 0)),
        rows_held_out=int(table.get("rows_held_out", 0)),
        median_error=float(table.get("median_error", nan)),
        p90_error=float(table.get("p90_error", nan)),
        coefficients=MappingProxyType({k: float(v) for k, v in table["coefficients"].items()}),
    )


def _collect(prefix: str, table: Mapping[str, Any], where: str, out: dict[str, Section]) -> None:
    for key, value in table.items():
        name = f"{prefix}.{key}" if prefix else key
        if not isinstance(value, Mapping):
            raise DataFileError("a calibration file holds sections only", got=f"{where}: {name}")
        if "coefficients" in value:
            out[name] = _section(name, value, where)
        else:
            _collect(name, value, where, out)


def _read_folder(folder: Traversable, where: str) -> dict[str, Section]:
    """The sections of the TOML files of one folder."""
    sections: dict[str, Section] = {}
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".toml") and entry.name != _EXTENDS:
            table = tomllib.loads(entry.read_text(encoding="utf-8"))
            _collect("", table, f"{where}/{entry.name}", sections)
    return sections


def _read_shapes(folder: Traversable, section: Section, where: str) -> ShapeTable | None:
    """The measured shapes of one folder; None where it has none."""
    file = folder / _SHAPES
    if not file.is_file():
        return None
    if "shapes_reach" not in section.coefficients:
        raise DataFileError(
            "measured shapes need [matmul.bf16] with `shapes_reach`", got=f"{where}/{_SHAPES}"
        )
    text = file.read_text(encoding="utf-8")
    return ShapeTable.read(text, section["shapes_reach"], f"{where}/{_SHAPES}")


def _base_of(folder: Traversable, where: str) -> str:
    """Name of the calibration that a folder extends; "" where it stands alone."""
    file = folder / _EXTENDS
    if not file.is_file():
        return ""
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    if set(table) != {"base", "source"}:
        raise DataFileError(
            "a calibration that extends another names its `base` and a `source`",
            got=f"{where}/{_EXTENDS}: {sorted(table)}",
        )
    return str(table["base"])


def calibration_engines(name: str) -> tuple[str, ...]:
    """Engine profiles for which a calibration holds sections of their own."""
    return tuple(sorted(entry.name for entry in (_root() / name).iterdir() if entry.is_dir()))


@functools.cache
def load_calibration(name: str, engine: str = "") -> Calibration:
    """Read a shipped calibration, with an engine's own sections where it has them.

    `UnknownNameError` if there is none of that name.
    """
    if name not in calibration_names():
        raise UnknownNameError("calibration", name, calibration_names())
    folder = _root() / name
    base = _base_of(folder, name)
    sections: dict[str, Section] = {}
    shapes = None
    if base:
        lender = load_calibration(base)
        sections.update(borrowed(lender).sections)
        shapes = lender.shapes
    folders = [(folder, name)]
    if engine and engine in calibration_engines(name):
        folders.append((folder / engine, f"{name}/{engine}"))
    for place, where in folders:
        own = _read_folder(place, where)
        sections.update(own)
        if _SHAPES_SECTION in own:
            shapes = _read_shapes(place, own[_SHAPES_SECTION], where)
    return Calibration(name=name, sections=MappingProxyType(sections), shapes=shapes)
