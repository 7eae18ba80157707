"""Tables of device kernels: `kernel_details.csv` (Ascend PyTorch profiler) and `op_summary_*.csv`.

One row a call; op_summary names the same columns otherwise. What is special about these files:
start times are quoted with a trailing TAB, shapes are quoted twice, older versions say Block Dim
for Block Num (not needed here), and a collective may stand twice, once without and once with a
hardware stream, with the same start and duration: it is counted once. Any other kernel that
starts twice at the same time on the same stream is a copied row and refused.

Collectives: the shape of their input is a rank's buffer (the shard of an all_gather, the whole
tensor of the others), and the number of ranks is not in the file (`--ranks`).

A quantized product is priced with the pass that quantizes its input, so the time of that pass,
the one on as many rows and features, is added to it; without one it is not used.

Left out: counters (PMU columns), waiting times, the order of kernels.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shardplan.costmodel.profiler_files.measurement import (
    MIN_ROWS,
    Measurement,
    ReadOptions,
    Tally,
    positive_seconds,
    refuse,
)
from shardplan.costmodel.profiler_files.names import collective_kind, dtype_of, kernel_named
from shardplan.costmodel.profiler_files.recognise import NO_DTYPE, NO_SHAPE, recognise
from shardplan.costmodel.profiler_files.shapes import Shape, parse_list, parse_shapes

__all__ = ["KERNEL_DETAILS", "OP_SUMMARY", "is_kernel_table", "read_kernel_table", "table_rows"]

Columns = Mapping[str, str]
KERNEL_DETAILS: Columns = {
    "type": "Type",
    "name": "Name",
    "start": "Start Time(us)",
    "duration": "Duration(us)",
    "stream": "Stream ID",
    "shapes": "Input Shapes",
    "dtypes": "Input Data Types",
    "outputs": "Output Shapes",
}
OP_SUMMARY: Columns = {
    **KERNEL_DETAILS,
    "type": "OP Type",
    "name": "Op Name",
    "start": "Task Start Time(us)",
    "duration": "Task Duration(us)",
}
_MICRO = 1e-6
_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0, "int8": 1.0}
NO_RANKS = "the number of ranks is not in the file (give --ranks)"
NOT_PRICED = "not a kernel that is priced"
NO_PASS = "no quantization kernel of the same rows and features, which its price includes"


def is_kernel_table(header: Sequence[str], columns: Columns) -> bool:
    """Whether a header is that of a format: the columns that tell it from other tables."""
    return {columns["type"], columns["name"], columns["duration"]} <= set(header)


def table_rows(path: Path, lines: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, cells by column) of a CSV; refused where a row has other cells than the header."""
    reader = csv.reader((line + "\n" for line in lines), strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not header:
                header = [cell.strip() for cell in cells]
            elif len(cells) == len(header):
                yield reader.line_num, dict(zip(header, cells, strict=True))
            elif cells:
                raise refuse(
                    "a row must have as many cells as the header (the file may be truncated)",
                    path,
                    reader.line_num,
                    f"{len(cells)} of {len(header)}",
                )
    except csv.Error as error:
        raise refuse("a profiler table must be CSV", path, reader.line_num, str(error)) from None


def read_kernel_table(
    path: Path, lines: Sequence[str], columns: Columns, options: ReadOptions
) -> tuple[int, Tally]:
    """Rows read and what they measure. `DataFileError` for a row that breaks the format."""
    tally = Tally()
    seen: dict[tuple[str, str, str, str], int] = {}
    rows = 0
    for line, cells in table_rows(path, lines):
        row = {key: cells.get(column, "").strip() for key, column in columns.items()}
        rows += 1
        seconds = positive_seconds(row["duration"], _MICRO, path, line, columns["duration"])
        collective = row["type"].lower().startswith("hcom_") or row["name"].startswith("hcom_")
        stream = "" if collective else row["stream"]
        key = (row["name"], stream, row["start"], row["duration"])
        if row["start"] and key in seen:
            if not collective:
                raise refuse("a kernel is listed twice", path, line, f"first in line {seen[key]}")
            tally.skip(row["type"], "listed a second time, with its hardware stream")
            continue
        seen[key] = line
        call = Measurement(
            op="",
            dtype="",
            sizes=(),
            seconds=seconds,
            count=1,
            file=path.name,
            line=line,
            kernel=row["type"],
        )
        _count(call, row, tally, options)
    if rows < MIN_ROWS:
        raise refuse("a profiler file needs more than one row", path, 1, f"{rows} rows")
    _join_quantization(tally)
    return rows, tally


def _count(call: Measurement, row: Mapping[str, str], tally: Tally, options: ReadOptions) -> None:
    """Add one call to the tally, or the reason why it is not used."""
    shapes = parse_shapes(row["shapes"])
    dtypes = [dtype_of(part) for part in parse_list(row["dtypes"])]
    if row["type"].lower().startswith("hcom_") or row["name"].startswith("hcom_"):
        _count_collective(call, row, shapes, dtypes, tally, options)
        return
    name = kernel_named(row["type"])
    if name is None:
        tally.skip(row["type"], NOT_PRICED)
        return
    if shapes is None:
        tally.skip(row["type"], NO_SHAPE)
        return
    outputs = parse_shapes(row["outputs"]) or [()]
    found = recognise(name, shapes, dtypes, outputs[0] or None, options)
    if isinstance(found, str):
        tally.skip(row["type"], found)
    else:
        tally.add(replace(call, op=found[0], dtype=found[1], sizes=found[2]))


def _count_collective(
    call: Measurement,
    row: Mapping[str, str],
    shapes: Sequence[Shape] | None,
    dtypes: Sequence[str | None],
    tally: Tally,
    options: ReadOptions,
) -> None:
    kind = collective_kind(row["name"]) or collective_kind(row["type"])
    width = _BYTES.get(dtypes[0] or "") if dtypes else None
    if kind is None:
        tally.skip(row["type"], NOT_PRICED)
    elif not shapes or not shapes[0]:
        tally.skip(row["type"], "the message size is not in the row (see communication.json)")
    elif width is None:
        tally.skip(row["type"], NO_DTYPE)
    elif options.ranks is None:
        tally.skip(row["type"], NO_RANKS)
    else:
        whole = options.ranks if kind == "all_gather" else 1
        message = math.prod(shapes[0]) * width * whole
        sizes = (("message_bytes", message), ("ranks", float(options.ranks)))
        tally.add(replace(call, op=kind, dtype="", sizes=sizes))


def _join_quantization(tally: Tally) -> None:
    """Add to each quantized product the pass that quantizes its input; drop those without one."""
    passes: dict[tuple[str, float, float], Measurement] = {}
    for one in tally.medians():
        if one.op in ("quantize", "quantize_static"):
            passes[(one.op, one.size("rows"), one.size("width"))] = one
    for key, calls in list(tally.calls.items()):
        first = calls[0]
        if first.dtype not in ("w8a8", "w8a8_static", "w4a8"):
            continue
        rows = first.size("m" if first.op == "matmul" else "rows")
        wanted = "quantize_static" if first.dtype == "w8a8_static" else "quantize"
        found = passes.get((wanted, rows, first.size("k")))
        if found is None:
            tally.skip(first.kernel, NO_PASS, len(tally.calls.pop(key)))
            continue
        tally.calls[key] = [replace(call, seconds=call.seconds + found.seconds) for call in calls]
