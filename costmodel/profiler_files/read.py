"""Tell a profiler file's format from its first lines and read it."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

from shardplan.costmodel.errors import DataFileError
from shardplan.costmodel.profiler_files.communication import (
    is_communication,
    parse_json,
    read_communication,
)
from shardplan.costmodel.profiler_files.hccl_log import header_line, read_hccl_log
from shardplan.costmodel.profiler_files.kernel_table import (
    KERNEL_DETAILS,
    OP_SUMMARY,
    is_kernel_table,
    read_kernel_table,
)
from shardplan.costmodel.profiler_files.measurement import (
    ReadFile,
    ReadOptions,
    Tally,
    decoded_lines,
    refuse,
)
from shardplan.costmodel.profiler_files.own_csv import is_own_csv, read_own_csv

__all__ = ["FORMATS", "read_profile", "read_profiles"]

FORMATS = ("kernel_details", "op_summary", "communication", "hccl_test", "profile")


def read_profile(path: Path, options: ReadOptions | None = None) -> ReadFile:
    """What one file measures. `DataFileError` with file, line and reason when it is refused."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataFileError(
            "a profiler file must be readable", got=f"{path}: {error.strerror}"
        ) from None
    lines = decoded_lines(path, data)
    name, rows, tally = _read(path, lines, options or ReadOptions())
    return ReadFile(
        file=path.name,
        format=name,
        rows=rows,
        sha256=hashlib.sha256(data).hexdigest(),
        measurements=tuple(tally.medians()),
        skipped=tally.skips(),
    )


def _read(path: Path, lines: list[str], options: ReadOptions) -> tuple[str, int, Tally]:
    first = next(line for line in lines if line.strip())
    if first.lstrip()[0] in "{[":
        value = parse_json(path, lines)
        if is_communication(value):
            return "communication", *read_communication(path, lines, value, options)
        raise _foreign(path, "JSON without steps and their collectives")
    head = header_line(lines)
    if head is not None:
        return "hccl_test", *read_hccl_log(path, lines, head, options)
    header = [cell.strip() for cell in next(csv.reader([first]), [])]
    if is_own_csv(header):
        return "profile", *read_own_csv(path, lines, options)
    for name, columns in (("kernel_details", KERNEL_DETAILS), ("op_summary", OP_SUMMARY)):
        if is_kernel_table(header, columns):
            return name, *read_kernel_table(path, lines, columns, options)
    raise _foreign(path, f"the first line is {first[:60]!r}")


def _foreign(path: Path, got: str) -> DataFileError:
    return refuse(
        "a profiler file must be one of " + ", ".join(FORMATS),
        path,
        1,
        got,
        hint="give kernel_details.csv, op_summary_*.csv, communication.json or a hccl_test log",
    )


def read_profiles(paths: Sequence[Path], options: ReadOptions) -> tuple[ReadFile, ...]:
    """All files; the same contents given twice are refused."""
    found: dict[str, ReadFile] = {}
    for path in paths:
        one = read_profile(path, options)
        if one.sha256 in found:
            raise refuse(
                "a file must not be given twice", path, 1, f"{found[one.sha256].file} is the same"
            )
        found[one.sha256] = one
    return tuple(found.values())
