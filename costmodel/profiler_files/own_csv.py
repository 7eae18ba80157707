"""The CSV of `shardplan profile`: one row an operator and shape, in the words of `estimate`.

Columns that are read: op, dtype, m, n, k, batch, tokens, heads, kv_heads, head_dim, hidden, ffn,
experts, topk, ranks, message_bytes, time_s_median, mode, backend. Not used are rows that time what
no engine runs: with the host's launches (mode eager; collectives are then host-launched ones),
streaming kernels as a sequence of calls (backend torch), experts in a loop, and the bare int8
product, whose price includes a quantization pass. Of an operator that several backends ran, the
one that is faster on most shapes of both counts: PyTorch would run that. A shape that stands twice
on one backend is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

from shardplan.costmodel.profiler_files.kernel_table import NOT_PRICED, table_rows
from shardplan.costmodel.profiler_files.measurement import (
    MIN_ROWS,
    MOST_SIZE,
    Measurement,
    ReadOptions,
    Tally,
    positive_seconds,
    refuse,
)

__all__ = ["is_own_csv", "read_own_csv"]

_MARKS = {"op", "dtype", "time_s_median", "mode", "device_name", "backend"}
_TIMES = ("time_s_median", "time_s_min", "repeats")
_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
_SIZES: Mapping[str, tuple[str, ...]] = {
    "matmul": ("m", "n", "k"),
    "attention_prefill": ("batch", "tokens", "heads", "kv_heads", "head_dim"),
    "attention_decode": ("batch", "tokens", "heads", "kv_heads", "head_dim"),
    "moe": ("tokens", "hidden", "ffn", "experts", "topk"),
    **dict.fromkeys(_COLLECTIVES, ("message_bytes", "ranks")),
}
_STREAMING: Mapping[str, str] = {
    "add_rmsnorm": "hidden",
    "rmsnorm": "hidden",
    "swiglu": "ffn",
    "rope": "head_dim",
    "copy": "message_bytes",
}
"""Streaming kernels and the column that holds the elements of a row."""
_NO_ENGINE: Mapping[str, str] = {
    "torch": "a sequence of calls, which no engine runs",
    "expert_loop": "experts in a loop, which no engine runs",
}
_DTYPES = ("bf16", "fp16", "w8a8", "w8a8_static", "w8a16", "w4a16", "fp8")


def is_own_csv(header: Sequence[str]) -> bool:
    """Whether a header is that of `shardplan profile`."""
    return set(header) >= _MARKS


def read_own_csv(path: Path, lines: Sequence[str], _options: ReadOptions) -> tuple[int, Tally]:
    """Rows read and what they measure. `DataFileError` for a row that breaks the format."""
    tally = Tally()
    seen: dict[tuple[str, ...], int] = {}
    rows = list(table_rows(path, lines))
    slower = _slower(cells for _, cells in rows)
    for line, cells in rows:
        point = tuple(value for name, value in cells.items() if name not in _TIMES)
        if point in seen:
            raise refuse("a shape is measured twice", path, line, f"first in line {seen[point]}")
        seen[point] = line
        seconds = positive_seconds(cells["time_s_median"], 1.0, path, line, "time_s_median")
        op, dtype, mode = (cells[name].strip() for name in ("op", "dtype", "mode"))
        if mode not in ("graph", "eager"):
            raise refuse("`mode` must be graph or eager", path, line, repr(mode[:40]))
        if op not in _SIZES and op not in _STREAMING:
            tally.skip(op, NOT_PRICED)
        elif mode == "eager" and op not in _COLLECTIVES:
            tally.skip(op, "timed with the host's launches (mode eager)")
        elif cells["backend"].strip() in _NO_ENGINE and op != "copy":
            tally.skip(op, _NO_ENGINE[cells["backend"].strip()])
        elif (op, cells["backend"].strip()) in slower:
            tally.skip(f"{op} {cells['backend'].strip()}", "another backend is faster")
        elif op in ("matmul", "moe") and dtype not in _DTYPES:
            tally.skip(f"{op} {dtype}", "an element type that is not priced")
        else:
            launch: Literal["graph", "host"] = "graph" if mode == "graph" else "host"
            _add(tally, path, line, cells, (op, dtype, seconds, launch))
    if len(seen) < MIN_ROWS:
        raise refuse("a profile needs more than one row", path, 1, f"{len(seen)} rows")
    return len(seen), tally


def _slower(rows: Iterable[Mapping[str, str]]) -> set[tuple[str, str]]:
    """(operator, backend) pairs that another backend beats on most shapes that both ran."""
    times: dict[str, dict[tuple[str, ...], dict[str, float]]] = {}
    for cells in rows:
        op, backend = cells["op"].strip(), cells["backend"].strip()
        try:
            seconds = float(cells["time_s_median"])
        except ValueError:
            continue  # refused with its line when it is read
        if backend not in _NO_ENGINE and op in _SIZES:
            point = tuple(v for name, v in cells.items() if name not in (*_TIMES, "backend"))
            times.setdefault(op, {}).setdefault(point, {})[backend] = seconds
    found: set[tuple[str, str]] = set()
    for op, points in times.items():
        backends = sorted({name for known in points.values() for name in known})
        for one, two in combinations(backends, 2):
            both = [known for known in points.values() if one in known and two in known]
            ahead = sum(1 if known[one] < known[two] else -1 for known in both)
            if both:
                found.add((op, two if ahead > 0 else one))
    return found


def _add(
    tally: Tally,
    path: Path,
    line: int,
    cells: Mapping[str, str],
    what: tuple[str, str, float, Literal["graph", "host"]],
) -> None:
    op, dtype, seconds, launch = what
    plain = op in _STREAMING or op in _COLLECTIVES
    call = Measurement(
        op=op,
        dtype="bf16" if op in _STREAMING else "" if plain else dtype,
        sizes=_sizes_of(op, cells, path, line),
        seconds=seconds,
        count=1,
        file=path.name,
        line=line,
        kernel=f"{op} {cells['backend']}".strip(),
        launch=launch,
    )
    tally.add(call)


def _sizes_of(
    op: str, cells: Mapping[str, str], path: Path, line: int
) -> tuple[tuple[str, float], ...]:
    """Sizes by name; the file's all_to_all counts the buffers of all ranks together."""
    if op in _STREAMING:
        width = _size(cells, _STREAMING[op], path, line)
        rows = 0.5 if op == "copy" else _size(cells, "tokens", path, line)
        if op == "rope":
            rows *= _size(cells, "heads", path, line) + _size(cells, "kv_heads", path, line)
        return ("rows", rows), ("width", width), ("elements", rows * width)
    sizes = {name: _size(cells, name, path, line) for name in _SIZES[op]}
    if op == "all_to_all":
        sizes["message_bytes"] /= sizes["ranks"]
    if op == "moe":
        sizes["ep"] = 1.0
    return tuple(sizes.items())


def _size(cells: Mapping[str, str], name: str, path: Path, line: int) -> float:
    try:
        value = float(cells.get(name, ""))
    except ValueError:
        value = 0.0
    if name == "kv_heads" and value == 0.0:
        return _size(cells, "heads", path, line)
    if not 1.0 <= value <= MOST_SIZE or value != int(value):
        raise refuse(
            "a size must be a whole number of 1 or more",
            path,
            line,
            f"{name}={cells.get(name, '')[:40]!r}",
        )
    return value
