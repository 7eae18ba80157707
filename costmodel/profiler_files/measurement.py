"""What a reader gives: measured operators by shape, what it skipped, and how it refuses a file.

Calls of one operator with one shape in one file are one `Measurement`, their median time. Sizes
are named as in `shardplan estimate`:

    matmul            m n k                          grouped_matmul    rows groups n k
    attention_prefill batch tokens heads kv_heads head_dim
    attention_decode  the same, tokens cached ones   mla_decode        batch tokens heads
    moe               tokens hidden ffn experts topk ep
    pointwise         rows width elements            collectives       message_bytes ranks
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from shardplan.costmodel.errors import DataFileError

__all__ = [
    "MOST_SIZE",
    "Measurement",
    "ReadFile",
    "ReadOptions",
    "Skipped",
    "Tally",
    "decoded_lines",
    "positive_seconds",
    "refuse",
]

MIN_ROWS = 2
MOST_SIZE = 2**53
"""Largest size, of elements or bytes, that is taken: whole numbers up to it are floats, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """What the files do not say and the user does."""

    ranks: int | None = None
    """Ranks of the groups behind collectives."""
    context: int | None = None
    """Tokens of each sequence behind attention kernels on packed sequences or a paged cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One operator with one shape, as measured."""

    op: str
    dtype: str
    """Weights and activations (matmul, moe) or cache (attention); bf16 for the rest."""
    sizes: tuple[tuple[str, float], ...]
    seconds: float
    """Median over the calls."""
    count: int
    """Calls of the same shape."""
    file: str
    line: int
    """Of the first call."""
    kernel: str
    """As the file names it."""
    launch: Literal["graph", "host"] = "graph"

    def size(self, name: str) -> float:
        """One of the sizes."""
        return dict(self.sizes)[name]

    @property
    def shape(self) -> tuple[object, ...]:
        """What a fit may split on: equal for all repeats of one shape."""
        return (self.op, self.dtype, *self.sizes)

    @property
    def where(self) -> str:
        """File and line."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """Kernels that were read and not used."""

    kernel: str
    reason: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFile:
    """One file: its format, its rows, what they measure."""

    file: str
    format: str
    rows: int
    sha256: str
    measurements: tuple[Measurement, ...]
    skipped: tuple[Skipped, ...]


@dataclass(slots=True)
class Tally:
    """Calls as they are read, by shape; and what was skipped."""

    calls: dict[tuple[object, ...], list[Measurement]] = field(default_factory=dict)
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, call: Measurement) -> None:
        """Count one call."""
        key = (*call.shape, call.kernel, call.launch)
        self.calls.setdefault(key, []).append(call)

    def skip(self, kernel: str, reason: str, count: int = 1) -> None:
        """Count a row that is not used."""
        self.skipped[(kernel[:60], reason)] += count

    def medians(self) -> Iterator[Measurement]:
        """One measurement a shape, in the order of first appearance."""
        for calls in self.calls.values():
            seconds = statistics.median(call.seconds for call in calls)
            yield replace(calls[0], seconds=seconds, count=sum(call.count for call in calls))

    def skips(self) -> tuple[Skipped, ...]:
        """What was skipped, most first."""
        return tuple(
            Skipped(kernel=kernel, reason=reason, count=count)
            for (kernel, reason), count in sorted(
                self.skipped.items(), key=lambda item: (-item[1], item[0])
            )
        )


def refuse(rule: str, path: Path, line: int, got: str = "", hint: str = "") -> DataFileError:
    """An error that names the file and the line."""
    said = f": {got}" if got else ""
    return DataFileError(rule, got=f"{path.name}:{line}{said}"[:300], hint=hint)


def decoded_lines(path: Path, data: bytes) -> list[str]:
    """Lines of a text file in UTF-8, with or without its mark; refused with the line otherwise."""
    if not data.strip():
        raise refuse("a profiler file must not be empty", path, 1)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise refuse(
            "a profiler file must be UTF-8 text", path, line, f"byte {error.start}"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise refuse("a profiler file must be text", path, line, "a zero byte")
    return text.splitlines()


def positive_seconds(text: str, scale: float, path: Path, line: int, column: str) -> float:
    """A duration in seconds; zero, negative and non-numeric ones are refused with the line."""
    try:
        value = float(text.strip()) * scale
    except ValueError:
        raise refuse(f"`{column}` must be a number", path, line, repr(text[:40])) from None
    if not math.isfinite(value) or value <= 0.0:
        raise refuse(f"`{column}` must be above 0", path, line, text.strip()[:40])
    return value
