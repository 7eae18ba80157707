"""`communication.json` of the Ascend PyTorch profiler: collectives of one rank with what they sent.

    {"step1": {"p2p": {...}, "collective": {"hcom_allReduce__501_0@group": {
        "Communication Time Info": {"Elapse Time(ms)": ..., "Synchronization Time(ms)": ...},
        "Communication Bandwidth Info": {"HCCS": {"Transit Size(MB)": ...}, ...}}}}}

The time is Elapse less Synchronization: from when the last rank has arrived. The message is what
follows from the bytes that the rank sent over all its links (MB = 1e6 bytes), for p ranks:

    all_gather, reduce_scatter, all_to_all   sent p / (p - 1)
    all_reduce                               half of that

which holds for the algorithms that send every byte once (mesh, ring, halving, NHR); p is not in
the file (`--ranks`). Entries without bytes (vector-core kernels report none) are skipped, as are
totals ("Total Op Info") and sends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardplan.costmodel.profiler_files.kernel_table import NO_RANKS, NOT_PRICED
from shardplan.costmodel.profiler_files.measurement import (
    MIN_ROWS,
    MOST_SIZE,
    Measurement,
    ReadOptions,
    Tally,
    positive_seconds,
    refuse,
)
from shardplan.costmodel.profiler_files.names import collective_kind

__all__ = ["is_communication", "parse_json", "read_communication"]

_TIMES, _SENT = "Communication Time Info", "Communication Bandwidth Info"
_MILLI = 1e-3
_MEGA = 1e6
_TOTAL = "Total Op Info"


def parse_json(path: Path, lines: list[str]) -> Any:
    """The value of a JSON file; refused with the line where it breaks off."""
    try:
        return json.loads("\n".join(lines))
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise refuse("a profiler file must be whole JSON", path, line, str(error)) from None
    except RecursionError:
        raise refuse("a profiler file must be whole JSON", path, 1, "nested too deep") from None


def is_communication(value: Any) -> bool:
    """Whether a parsed file has steps with collectives."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(step, dict) and "collective" in step for step in value.values())
    )


def read_communication(
    path: Path, lines: list[str], value: Mapping[str, Any], options: ReadOptions
) -> tuple[int, Tally]:
    """Entries read and what they measure. `DataFileError` for one that breaks the format."""
    tally = Tally()
    rows = 0
    for name, entry in _entries(value, path):
        if name == _TOTAL:
            continue
        rows += 1
        line = _line_of(lines, name)
        seconds = _seconds(entry, path, line)
        kind = collective_kind(name)
        sent = _sent_bytes(entry, path, line)
        label = name.split("__")[0]
        if kind is None:
            tally.skip(label, NOT_PRICED)
        elif options.ranks is None:
            tally.skip(label, NO_RANKS)
        elif sent <= 0.0:
            tally.skip(label, "it reports no bytes sent")
        else:
            message = sent * _message_share(kind, options.ranks)
            sizes = (("message_bytes", float(round(message))), ("ranks", float(options.ranks)))
            tally.add(
                Measurement(
                    op=kind,
                    dtype="",
                    sizes=sizes,
                    seconds=seconds,
                    count=1,
                    file=path.name,
                    line=line,
                    kernel=label,
                )
            )
    if rows < MIN_ROWS:
        raise refuse("a profiler file needs more than one collective", path, 1, f"{rows} entries")
    return rows, tally


def _entries(value: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    for step in value.values():
        for group in ("collective", "p2p"):
            found = step.get(group, {})
            if not isinstance(found, dict):
                raise refuse("collectives of a step are a table", path, 1, str(found)[:40])
            yield from found.items()


def _line_of(lines: list[str], name: str) -> int:
    return next((number for number, line in enumerate(lines, 1) if f'"{name}"' in line), 1)


def _part(entry: Any, key: str, path: Path, line: int) -> Mapping[str, Any]:
    found = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(found, dict):
        raise refuse("a collective lacks a table", path, line, key)
    return found


def _seconds(entry: Any, path: Path, line: int) -> float:
    times = _part(entry, _TIMES, path, line)
    elapse = positive_seconds(
        str(times.get("Elapse Time(ms)", "")), _MILLI, path, line, "Elapse Time(ms)"
    )
    late = str(times.get("Synchronization Time(ms)", "0")).strip()
    if late in ("0", "0.0"):
        return elapse
    waited = positive_seconds(late, _MILLI, path, line, "Synchronization Time(ms)")
    if waited >= elapse:
        raise refuse("`Synchronization Time(ms)` must be below `Elapse Time(ms)`", path, line, late)
    return elapse - waited


def _sent_bytes(entry: Any, path: Path, line: int) -> float:
    """Bytes over all links; SDMA is the sum of the links inside a node and is not added."""
    links = _part(entry, _SENT, path, line)
    total = 0.0
    for link, info in links.items():
        if link == "SDMA" and any(other in links for other in ("HCCS", "PCIE", "SIO")):
            continue
        size = info.get("Transit Size(MB)", 0.0) if isinstance(info, dict) else 0.0
        if isinstance(size, bool) or not isinstance(size, int | float):
            raise refuse("`Transit Size(MB)` must be a number", path, line, str(size)[:40])
        if not 0.0 <= size <= MOST_SIZE / _MEGA:
            raise refuse("`Transit Size(MB)` must be a size", path, line, str(size)[:40])
        total += float(size) * _MEGA
    return total


def _message_share(kind: str, ranks: int) -> float:
    """Message bytes for one byte that a rank sends."""
    share = ranks / (ranks - 1.0)
    return share / 2.0 if kind == "all_reduce" else share
