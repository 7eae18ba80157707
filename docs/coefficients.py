"""docs/coefficients.md, made from the data files; `python -m docs` writes it.

Every section of every calibration with its source and error, and every fact of devices, clusters
and engines that is an assumption.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from docs.reference import markdown_table

from shardplan.costmodel.calibration import (
    Section,
    calibration_engines,
    calibration_names,
    load_calibration,
)
from shardplan.costmodel.catalog import cluster_names, load_cluster
from shardplan.costmodel.devices import device_names, load_device
from shardplan.costmodel.engines import engine_names, load_engine
from shardplan.costmodel.hardware import Fact

__all__ = ["PAGE", "coefficients"]

PAGE = Path(__file__).resolve().parent / "coefficients.md"
_HEAD = """# Where the coefficients come from

Written by `python -m docs` from `costmodel/data/`; not by hand. How they are used:
[cost-model.md](cost-model.md).

A section is the coefficients of one kernel's formula. `fitted`: to measurements, with the error on
rows that the fit did not see (median and 90th percentile of the relative error). `measured`: a
figure taken as it is. `derived`: carried over from another section, part or engine. `assumed`:
neither. The last column is a number of the list below the table. An engine's own kernels, where
they were measured, stand below those of its device.
"""
Facts = Mapping[str, Mapping[str, Fact]]
_ASSUMED = """## Assumed facts

What devices, clusters and engine profiles say without a measurement, a datasheet or a derivation. A
file of your own in place of one that ships replaces it.
"""


def coefficients() -> str:
    """The whole page, as `PAGE` must be."""
    parts = [_HEAD]
    for name in calibration_names():
        common = load_calibration(name).sections
        parts += [f"## Calibration {name}\n", _sections(common.values())]
        for engine in calibration_engines(name):
            every = load_calibration(name, engine).sections
            own = [one for key, one in every.items() if one != common.get(key)]
            parts += [f"### Of {engine} on {name}\n", _sections(own)]
    rows = [row for what, files in _files() for row in _assumed(what, files)]
    parts += [_ASSUMED, markdown_table(("file", "fact", "why"), rows)]
    return "\n".join(parts)


def _sections(sections: Iterable[Section]) -> str:
    """A table of sections, and their sources, each once."""
    head = ("section", "kind", "rows", "unseen", "median", "p90", "source")
    rows = []
    sources: dict[str, int] = {}
    for section in sections:
        counts = (section.rows_fitted or "", section.rows_held_out or "")
        errors = (_percent(section.median_error), _percent(section.p90_error))
        number = sources.setdefault(" ".join(section.source.split()), len(sources) + 1)
        rows.append((f"`{section.name}`", section.kind, *counts, *errors, number))
    listed = "\n".join(f"{number}. {source}" for source, number in sources.items())
    return f"{markdown_table(head, rows)}\n{listed}\n"


def _percent(error: float) -> str:
    return "" if math.isnan(error) else f"{error:.1%}"


def _files() -> Iterator[tuple[str, Facts]]:
    """The facts of the files of each folder."""
    yield "devices", {name: load_device(name).facts for name in device_names()}
    yield "clusters", {name: load_cluster(name).facts for name in cluster_names()}
    yield "engines", {name: load_engine(name).facts for name in engine_names()}


def _assumed(what: str, files: Facts) -> Iterator[tuple[str, str, str]]:
    """File, fact and source of each assumption among the files of a folder."""
    for name, facts in files.items():
        for key, fact in facts.items():
            if fact.kind == "assumed":
                yield f"{what}/{name}", f"`{key}`", fact.source
