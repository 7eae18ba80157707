"""What hccl_test prints: a collective over growing sizes, launched by the host.

    data_size(Bytes): | aveg_time(us): | alg_bandwidth(GB/s): | check_result:
    8192              | 43.70          | 0.18746              | success

`data_size` is the gathered buffer (all_gather), one rank's buffer (all_to_all) or the whole tensor,
which is what a message is here. alg_bandwidth = data_size / aveg_time holds in every row (to 2 %),
which tells milliseconds from microseconds; rows whose check failed are refused. Which collective
and how many ranks stand in the command line (`all_reduce_test ... -p 8`) where the log or the
file's name has it; `--ranks` otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from shardplan.costmodel.profiler_files.measurement import (
    MIN_ROWS,
    Measurement,
    ReadOptions,
    Tally,
    positive_seconds,
    refuse,
)

__all__ = ["header_line", "read_hccl_log"]

_KINDS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
}
_TEST = re.compile("|".join(_KINDS))
_RANKS = re.compile(r"(?:^|\s)(?:-n|-np|-p|--npus)\s+([0-9]{1,6})(?!\d)")
_HEAD = re.compile(r"data_size.*aveg_time.*alg_bandwidth", re.IGNORECASE)
_SPLIT = re.compile(r"[|\s]+")
_MICRO = 1e-6
_GIGA = 1e9
_TOLERANCE = 0.02
_CELLS = 3


def header_line(lines: Sequence[str]) -> int | None:
    """Index of the line with the column names; None where there is none."""
    return next((index for index, line in enumerate(lines) if _HEAD.search(line)), None)


def read_hccl_log(
    path: Path, lines: Sequence[str], head: int, options: ReadOptions
) -> tuple[int, Tally]:
    """Rows read and what they measure. `DataFileError` for a row that breaks the format."""
    kind = _kind(path, lines[:head])
    ranks = _ranks(path, lines[:head], options)
    tally = Tally()
    rows = 0
    for line, text in enumerate(lines[head + 1 :], head + 2):
        cells = [cell for cell in _SPLIT.split(text.strip()) if cell]
        if not cells or not cells[0].isdigit():
            continue
        rows += 1
        size, seconds = _row(cells, path, line)
        tally.add(
            Measurement(
                op=kind,
                dtype="",
                sizes=(("message_bytes", size), ("ranks", float(ranks))),
                seconds=seconds,
                count=1,
                file=path.name,
                line=line,
                kernel=f"hccl_test {kind}",
                launch="host",
            )
        )
    if rows < MIN_ROWS:
        raise refuse("a benchmark needs more than one row", path, head + 1, f"{rows} rows")
    return rows, tally


def _kind(path: Path, lines: Sequence[str]) -> str:
    for text in (*lines, path.name.lower()):
        found = _TEST.search(text)
        if found:
            return _KINDS[found.group()]
    raise refuse(
        "the log must say which collective it tests", path, 1, hint="name it in the file's name"
    )


def _ranks(path: Path, lines: Sequence[str], options: ReadOptions) -> int:
    found = next((match for text in lines if (match := _RANKS.search(text))), None)
    if found is None and options.ranks is None:
        raise refuse("the log must say how many ranks it ran on", path, 1, hint="give --ranks")
    ranks = options.ranks if found is None else int(found.group(1))
    if ranks is None or ranks <= 1:
        raise refuse("a collective needs two ranks or more", path, 1, f"{ranks}")
    return ranks


def _row(cells: Sequence[str], path: Path, line: int) -> tuple[float, float]:
    if len(cells) < _CELLS:
        raise refuse("a row needs size, time and bandwidth (the file may be truncated)", path, line)
    size = positive_seconds(cells[0], 1.0, path, line, "data_size")
    seconds = positive_seconds(cells[1], _MICRO, path, line, "aveg_time")
    rate = positive_seconds(cells[2], _GIGA, path, line, "alg_bandwidth")
    if len(cells) > _CELLS and cells[3].lower() not in ("success", "null"):
        raise refuse("the benchmark's own check failed", path, line, cells[3][:40])
    shown = 0.5 * 10.0 ** -len(cells[2].partition(".")[2]) * _GIGA
    if abs(size / seconds - rate) > _TOLERANCE * rate + shown:
        raise refuse(
            "alg_bandwidth must be data_size / aveg_time, in GB/s and us",
            path,
            line,
            f"{cells[0]} bytes, {cells[1]} us, {cells[2]} GB/s",
            hint="is the time in ms?",
        )
    return size, seconds
