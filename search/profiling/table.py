"""The CSV of a profile: written row by row, taken up again where a run was cut off.

One file holds one device. The identity of a row is its point (operator, sizes, dtype, mode,
backend); a row that is there is not measured again.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from shardplan.models.errors import InputError
from shardplan.search.profiling.points import SIZES, Point

__all__ = ["COLUMNS", "Row", "Table", "read_rows"]

COLUMNS = (
    "op",
    "dtype",
    *SIZES,
    "time_s_median",
    "time_s_min",
    "repeats",
    "mode",
    "device_name",
    "driver",
    "torch_version",
    "backend",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement: seconds of one call."""

    point: Point
    median_s: float
    min_s: float
    repeats: int
    device_name: str
    driver: str
    torch_version: str

    def cells(self) -> list[str]:
        """The row in the order of `COLUMNS`; a size that the operator lacks is empty."""
        sizes = [str(getattr(self.point, name) or "") for name in SIZES]
        times = [f"{self.median_s:.6g}", f"{self.min_s:.6g}", str(self.repeats)]
        machine = [self.device_name, self.driver, self.torch_version]
        return [self.point.op, self.point.dtype, *sizes, *times, self.point.mode, *machine,
                self.point.backend]  # fmt: skip


def _row(cells: list[str], where: str) -> Row:
    if len(cells) != len(COLUMNS):
        raise InputError("a profile row has one cell a column", got=f"{where}: {len(cells)} cells")
    named = dict(zip(COLUMNS, cells, strict=True))
    try:
        sizes = {name: int(named[name] or 0) for name in SIZES}
        times = (float(named["time_s_median"]), float(named["time_s_min"]))
        repeats = int(named["repeats"])
    except ValueError as error:
        raise InputError("a profile holds numbers", got=f"{where}: {error}") from None
    if not 0.0 < times[1] <= times[0] < float("inf"):
        raise InputError(
            "times of a profile are above 0, the minimum at most the median", got=where
        )
    names = {name: named[name] for name in ("op", "dtype", "mode", "backend")}
    return Row(
        point=Point(**names, **sizes),  # type: ignore[arg-type]  # names are str, sizes are int
        median_s=times[0],
        min_s=times[1],
        repeats=repeats,
        device_name=named["device_name"],
        driver=named["driver"],
        torch_version=named["torch_version"],
    )


def read_rows(path: Path) -> tuple[list[Row], int]:
    """(rows of a profile, bytes that they take); a last line that was cut off is not counted.

    Raises `InputError` for a file that is no profile.
    """
    try:
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        lines = list(csv.reader(io.StringIO(whole.decode("utf-8"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError("the profile cannot be read", got=f"{path}: {error}") from None
    if not lines:
        if raw and not ",".join(COLUMNS).startswith(raw.decode("utf-8", "replace")):
            raise InputError("`--out` holds something else than a profile", got=str(path))
        return [], 0
    if tuple(lines[0]) != COLUMNS:
        raise InputError(
            "`--out` holds something else than a profile of this version",
            got=f"{path}: other columns in line 1",
            hint="take another file name",
        )
    rows = [_row(cells, f"{path}, line {at}") for at, cells in enumerate(lines[1:], start=2)]
    return rows, len(whole)


class Table:
    """A profile open for appending; `rows` are those that it holds."""

    def __init__(self, path: Path, device_name: str) -> None:
        """Open or start the file. `InputError` if it is no profile, or of another device."""
        self.rows: list[Row] = []
        end = 0
        if path.exists():
            self.rows, end = read_rows(path)
        other = {row.device_name for row in self.rows} - {device_name}
        if other:
            raise InputError(
                "one profile holds one device",
                got=f"{path} is of {sorted(other)[0]}, this is {device_name}",
                hint="take another file name",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("r+" if path.exists() else "x", encoding="utf-8", newline="")
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not end:
            self._write(COLUMNS)

    def _write(self, cells: Iterable[str]) -> None:
        self._writer.writerow(cells)
        self._file.flush()

    def add(self, row: Row) -> None:
        """Append a row; it is on its way to the disk when this returns."""
        self._write(row.cells())
        self.rows.append(row)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Table:
        """The table itself; `close` runs at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()
