"""Figures of millions of values in bounded memory: percentiles, and a course over time.

percentiles   counts of values by their logarithm: cells 0.1 % wide, so that a percentile is
              within 0.05 % of the value of its rank; least, most and mean are exact
course        means weighted by time in cells of equal width, which doubles when they run out
"""

from __future__ import annotations

import math

__all__ = ["Course", "Spread"]

_LOG_WIDTH = math.log1p(1e-3)
_LEAST = 1e-9
_CELLS = 1024


class Spread:
    """Count, mean, extremes and percentiles of numbers from 0 up."""

    __slots__ = ("_counts", "count", "least", "most", "square", "total")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count, self.total, self.square = 0, 0.0, 0.0
        self.least, self.most = math.inf, 0.0

    def add(self, value: float) -> None:
        """One more value."""
        self.count += 1
        self.total += value
        self.square += value * value
        self.least = min(self.least, value)
        self.most = max(self.most, value)
        cell = math.floor(math.log(value) / _LOG_WIDTH) if value > _LEAST else -(1 << 30)
        self._counts[cell] = self._counts.get(cell, 0) + 1

    @property
    def mean(self) -> float:
        """NaN where there are none."""
        return self.total / self.count if self.count else math.nan

    @property
    def variation(self) -> float:
        """Standard deviation over the mean; NaN where there is no mean."""
        if not self.count or not self.total:
            return math.nan
        mean = self.mean
        return math.sqrt(max(self.square / self.count - mean * mean, 0.0)) / mean

    def percentile(self, share: float) -> float:
        """The value that a share of all does not exceed; NaN where there are none."""
        if not self.count:
            return math.nan
        rank, seen = max(math.ceil(share * self.count), 1), 0
        for cell in sorted(self._counts):
            seen += self._counts[cell]
            if seen >= rank:
                value = math.exp((cell + 0.5) * _LOG_WIDTH) if cell > -(1 << 30) else 0.0
                return min(max(value, self.least), self.most)
        return self.most

    def figures(self) -> dict[str, float]:
        """Mean, percentiles and extremes by name."""
        if not self.count:
            return dict.fromkeys(("mean", "p50", "p90", "p99", "min", "max"), math.nan)
        shares = {f"p{share}": self.percentile(share / 100.0) for share in (50, 90, 99)}
        return {"mean": self.mean, **shares, "min": self.least, "max": self.most}


class Course:
    """A quantity over time, from time 0."""

    __slots__ = ("_sums", "last_s", "width_s")

    def __init__(self, width_s: float = 1e-3) -> None:
        self.width_s = width_s
        self.last_s = 0.0
        self._sums = [0.0] * _CELLS

    def add(self, begin_s: float, end_s: float, value: float) -> None:
        """`value` from `begin_s` to `end_s`, on top of what others add there."""
        self.last_s = max(self.last_s, end_s)
        while end_s > _CELLS * self.width_s:
            pairs = [a + b for a, b in zip(self._sums[::2], self._sums[1::2], strict=True)]
            self._sums = pairs + [0.0] * (_CELLS // 2)
            self.width_s *= 2.0
        width = self.width_s
        first, last = int(begin_s / width), min(int(end_s / width), _CELLS - 1)
        if first == last:
            self._sums[first] += value * (end_s - begin_s)
            return
        for cell in range(first, last + 1):
            part = min(end_s, (cell + 1) * width) - max(begin_s, cell * width)
            self._sums[cell] += value * max(part, 0.0)

    def means(self) -> list[tuple[float, float]]:
        """(beginning of a cell, mean in it) up to the last time that was told."""
        cells = min(math.ceil(self.last_s / self.width_s), _CELLS)
        found = []
        for cell in range(cells):
            begin = cell * self.width_s
            length = min(self.width_s, self.last_s - begin)
            found.append((begin, self._sums[cell] / length if length > 0.0 else 0.0))
        return found
