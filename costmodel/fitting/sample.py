"""Writes the small cited samples of measured figures that `shardplan validate` prices.

    python -m shardplan.costmodel.fitting.sample DATA_DIR results/profiles \
        --out costmodel/data/validation

DATA_DIR holds the tables as published, the second folder the project's own profiles. Of a table
whose fit keeps rows back only those rows are drawn from. They are ordered by their time and cut
into as many equal runs as figures are wanted; of each run the shape with the smallest hash is
taken: from the fastest call to the slowest, whatever the order of the table.

`held_out` says whether the coefficients that ship were fitted without the row: a fit may judge
itself on a fifth of the rows and then be made again with all of them.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from shardplan.costmodel.calibration import load_calibration
from shardplan.costmodel.fitting.sample_serving import serving_rows
from shardplan.costmodel.fitting.sample_tables import Family, families

__all__ = ["FIGURES", "main", "pick", "sample"]

FIGURES = 32
"""Figures of a family at most."""
_LEAD = ("source", "group", "held_out", "note")
_TAIL = ("measured_s", "measured_ttft_s", "measured_tpot_s")
Row = Mapping[str, str]


def _mark(shape: Sequence[object]) -> bytes:
    return hashlib.blake2b(repr(tuple(shape)).encode(), digest_size=8).digest()


def pick(shapes: Sequence[Sequence[object]], seconds: Sequence[float], wanted: int) -> list[int]:
    """Places of at most `wanted` rows, spread over the times: the smallest hash of each run."""
    order = sorted(range(len(shapes)), key=lambda place: (seconds[place], _mark(shapes[place])))
    runs = np.array_split(np.asarray(order, dtype=np.int64), max(1, min(wanted, len(order))))
    chosen = [min(run.tolist(), key=lambda place: _mark(shapes[place])) for run in runs if run.size]
    return sorted(chosen, key=lambda place: (seconds[place], _mark(shapes[place])))


def _unseen(family: Family) -> bool:
    """Whether the section that prices the family was fitted without its kept-back rows."""
    if family.section is None:
        return family.held_out
    section = load_calibration(family.calibration, family.engine).sections[family.section]
    base = load_calibration(family.calibration).sections[family.section]
    if family.engine and section.source == base.source:
        return True  # the engine has no section of its own: nobody has fitted its table
    rows = len(family.shapes)
    return 0 < section.rows_held_out <= rows - section.rows_fitted


def sample(family: Family, wanted: int = FIGURES) -> list[dict[str, str]]:
    """Rows of a family as cells of its file."""
    places = [place for place, keep in enumerate(family.keep) if keep]
    shapes = [family.shapes[place] for place in places]
    chosen = pick(shapes, [family.seconds[place] for place in places], wanted)
    lead = {
        "source": family.source,
        "group": family.group,
        "held_out": "true" if _unseen(family) else "false",
        "note": family.note,
    }
    found = []
    for place in (places[one] for one in chosen):
        sizes = zip(family.columns, family.shapes[place], strict=True)
        cells = {name: f"{value:.15g}" for name, value in sizes}
        time = {"measured_s": f"{family.seconds[place]:.6g}"}
        found.append({**lead, **family.fixed, **cells, **time})
    return found


def table_text(rows: Sequence[Row]) -> str:
    """CSV of rows; a column for each name that any row has, sources first, measurements last."""
    middle = [name for row in rows for name in row if name not in (*_LEAD, *_TAIL)]
    measured = [name for name in _TAIL if any(name in row for row in rows)]
    names = list(dict.fromkeys([*_LEAD, *middle, *measured]))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: write every sampled file."""
    parser = argparse.ArgumentParser(prog="python -m shardplan.costmodel.fitting.sample")
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("profiles", type=Path, metavar="PROFILES")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    files: dict[str, list[dict[str, str]]] = {}
    for family in families(options.data, options.profiles):
        files.setdefault(family.file, []).extend(sample(family))
    files["hopper_serving.csv"] = serving_rows(options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (options.out / name).write_text(table_text(rows), encoding="utf-8")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
