"""Pipeline cuts: which layers each stage holds, exact under several limits at once.

A cut gives stage s the layers [c_s, c_(s+1)). Whatever a stage costs is a sum over its layers plus
what stands at its ends (embedding or receive, LM head or send):

    cost(i, j, s) = max over parts of P[j] - P[i] + end_s      P: prefix sums over layers

with all terms >= 0; a row has several parts where the larger of two sums counts (the time that
kernels take, the time that the host takes to launch them).

A step of p microbatches over p stages takes p times its slowest stage, and the fullest stage must
fit, so of a cut only the largest cost of any stage counts, once for each of several *rows*
(decode step, mixed step, each with its launch floor, memory). Because every row grows with the
layers of a stage, filling each stage as far as all limits allow is exact: if any cut keeps within
the limits, this one does (by induction over stages it never holds fewer layers so far).

    least      the smallest possible largest cost of one row under limits on the others: start
               from a cut that keeps within them and ask for a strictly smaller one until there
               is none; every answer is a cut, so the last is the optimum, with no tolerance
    fronts     all cuts that no other beats in both of two rows, by walking one row down

The number of cuts of L layers into p stages is C(L - 1, p - 1).
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.models.parallel import Parallelism, balanced_stages
from shardplan.models.spec import ModelSpec

__all__ = [
    "CostRow",
    "cut_count",
    "fill",
    "front",
    "least",
    "least_of_many",
    "near_even_cuts",
    "row_max",
]

Array = NDArray[np.float64]
Cut = tuple[int, ...]
"""Layers of each stage."""


_HALVINGS = 12
_NEAR = 4
_TWO = 2
_LESS = 1.0 - 1e-12
"""Asks for strictly less; beyond that costs are equal but for rounding."""


class _Part(NamedTuple):
    """One sum: prefix sums over layers `[L + 1]`, and what each stage's ends cost `[p]`."""

    prefix: tuple[float, ...]
    ends: tuple[float, ...]

    def stage(self, first: int, last: int, index: int) -> float:
        return self.prefix[last] - self.prefix[first] + self.ends[index]


@dataclass(frozen=True, slots=True)
class CostRow:
    """A cost of stages: the largest of its parts."""

    parts: tuple[_Part, ...]

    @classmethod
    def of(cls, *sums: tuple[Sequence[float], Sequence[float]]) -> CostRow:
        """From the cost of each layer and of each stage's ends, for every part."""
        return cls(tuple(_Part((0.0, *accumulate(each)), tuple(ends)) for each, ends in sums))

    @property
    def layers(self) -> int:
        """Layers to be cut."""
        return len(self.parts[0].prefix) - 1

    @property
    def stages(self) -> int:
        """Stages to cut them into."""
        return len(self.parts[0].ends)

    @property
    def mean(self) -> float:
        """What the dearest stage costs at least: the mean over stages."""
        return max((part.prefix[-1] + sum(part.ends)) / len(part.ends) for part in self.parts)

    def stage(self, first: int, last: int, index: int) -> float:
        """Cost of stage `index` with layers [first, last)."""
        return max(part.stage(first, last, index) for part in self.parts)


def cut_count(layers: int, stages: int) -> int:
    """Ways to give each of `stages` stages at least one of `layers` layers in a row."""
    return math.comb(layers - 1, stages - 1) if 1 <= stages <= layers else 0


@functools.cache
def near_even_cuts(spec: ModelSpec, par: Parallelism) -> tuple[Cut, ...]:
    """Cuts whose first and last stage hold up to four layers fewer than even; () is the even one.

    The layers they leave go to the stages between, or of two stages to the other.
    """
    even = balanced_stages(spec, par)
    found: dict[Cut, None] = {(): None}
    if par.pp == 1:
        return tuple(found)
    for fewer in product(range(_NEAR + 1), repeat=2):
        first, last = (size - less for size, less in zip((even[0], even[-1]), fewer, strict=True))
        between = spec.layers - first - last
        if par.pp == _TWO:
            first, last = even[0] - fewer[0] + fewer[1], even[-1] - fewer[1] + fewer[0]
            middle: Cut = ()
        else:
            each, extra = divmod(between, par.pp - 2)
            middle = tuple(each + (stage < extra) for stage in range(par.pp - 2))
        cut = (first, *middle, last)
        if min(cut) > 0 and cut != even:
            found[cut] = None
    return tuple(found)


def row_max(row: CostRow, cut: Cut) -> float:
    """Largest cost of any stage of a cut."""
    return max(row.stage(first, last, index) for index, first, last in _stages(cut))


def _stages(cut: Cut) -> Iterator[tuple[int, int, int]]:
    """(index, first, last) of each stage."""
    first = 0
    for index, count in enumerate(cut):
        yield index, first, first + count
        first += count


def fill(rows: Sequence[CostRow], limits: Sequence[float], strict: Sequence[bool]) -> Cut | None:
    """A cut within every limit (below it where `strict`), or None where there is none.

    Each stage takes as many layers as all limits allow, but leaves one for each that follows. That
    fails wrongly only where a stage has no room for the one layer that it must start with; then
    every place where a stage may end is tried.
    """
    first, cut = 0, []
    for index in range(rows[0].stages):
        last = _reach_all(rows, limits, strict, first, index)
        if last <= first:
            return _fill_any(rows, limits, strict)
        cut.append(last - first)
        first = last
    return tuple(cut) if first == rows[0].layers else None


def _reach_all(
    rows: Sequence[CostRow],
    limits: Sequence[float],
    strict: Sequence[bool],
    first: int,
    index: int,
) -> int:
    """Largest end of a stage that starts at `first` and keeps within all limits."""
    last = rows[0].layers - (rows[0].stages - 1 - index)
    for row, limit, below in zip(rows, limits, strict, strict=True):
        last = min(last, _reach(row, limit, first, index, last, strict=below))
    return last


def _fill_any(
    rows: Sequence[CostRow], limits: Sequence[float], strict: Sequence[bool]
) -> Cut | None:
    """As `fill`, by all places where each stage may end: its start is kept for each of them."""
    starts: list[dict[int, int]] = []
    places = [0]
    for index in range(rows[0].stages):
        found: dict[int, int] = {}
        for first in places:
            last = _reach_all(rows, limits, strict, first, index)
            found |= {end: first for end in range(first + 1, last + 1) if end not in found}
        starts.append(found)
        places = sorted(found)
    end, cut = rows[0].layers, []
    for found in reversed(starts):
        if end not in found:
            return None
        cut.append(end - found[end])
        end = found[end]
    return tuple(reversed(cut))


def _reach(row: CostRow, limit: float, first: int, index: int, most: int, *, strict: bool) -> int:
    """Largest end of a stage that starts at `first` and keeps within the limit; `first` if none."""
    last = most
    for part in row.parts:
        target = limit - part.ends[index] + part.prefix[first]
        last = min(last, bisect_right(part.prefix, target, first, most + 1) - 1)
    last = max(last, first)

    def over(end: int) -> bool:
        cost = row.stage(first, end, index)
        return cost >= limit if strict else cost > limit

    while last < most and not over(last + 1):
        last += 1
    while last > first and over(last):
        last -= 1
    return max(last, first)


def least(rows: Sequence[CostRow], limits: Sequence[float], row: int) -> Cut | None:
    """A cut with the smallest possible largest cost of `rows[row]` within the other limits.

    `limits[row]` is an upper limit, too. None where nothing keeps within the limits.
    """
    bounds = list(limits)
    below = [False] * len(rows)
    best = fill(rows, bounds, below)
    low = rows[row].mean
    for _ in range(_HALVINGS if best is not None else 0):
        high = row_max(rows[row], best or ())
        if high <= low:
            break
        bounds[row] = (low + high) / 2.0
        better = fill(rows, bounds, below)
        best, low = (best, bounds[row]) if better is None else (better, low)
    while best is not None:
        bounds[row] = row_max(rows[row], best)
        below[row] = True
        better = fill(rows, bounds, below)
        if better is None:
            return best
        best = better
    return None


def least_of_many(parts: Sequence[tuple[Array, Array]], start: Array) -> Array:
    """What the dearest stage of any cut costs at least, at each of many points `[n]`.

    `parts`: costs of each layer `[n, L]` and of each stage's ends `[n, p]` of every part of a
    row. `start`: what some cut reaches. Stages may be empty here, which makes the filling exact
    and the answer at most the least of all cuts: below it only where single layers differ so much
    that a stage's one layer decides. Halving comes near, asking for less makes it exact.
    """
    sums = [(np.pad(np.cumsum(each, axis=1), ((0, 0), (1, 0))), ends) for each, ends in parts]
    mean = [(total[:, -1] + ends.sum(axis=1)) / ends.shape[1] for total, ends in sums]
    low, high = functools.reduce(np.maximum, mean), np.array(start, dtype=np.float64)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        reached = _fill_many(sums, middle)
        high, low = np.minimum(high, reached), np.where(reached <= middle, low, middle)
    while True:
        reached = _fill_many(sums, high * _LESS)
        if not (reached < high).any():
            return high
        high = np.minimum(high, reached)


def _fill_many(sums: Sequence[tuple[Array, Array]], limit: Array) -> Array:
    """Largest cost of a stage of the cuts that fill up to a limit `[n]`; inf where none does."""
    points = np.arange(limit.size)
    layers, stages = sums[0][0].shape[1] - 1, sums[0][1].shape[1]
    first, worst = np.zeros(limit.size, dtype=np.int64), np.zeros(limit.size)
    for index in range(stages):
        last = np.full(limit.size, layers)
        for prefix, ends in sums:
            target = limit - ends[:, index] + prefix[points, first]
            last = np.minimum(last, (prefix <= target[:, None]).sum(axis=1) - 1)
        worst = np.where(last < first, np.inf, worst)
        last = np.maximum(last, first)
        for prefix, ends in sums:
            cost = prefix[points, last] - prefix[points, first] + ends[:, index]
            worst = np.maximum(worst, cost)
        first = last
    return np.where(first == layers, worst, np.inf)


def front(rows: Sequence[CostRow], limits: Sequence[float], one: int, two: int) -> Iterator[Cut]:
    """Cuts that no other beats in both rows within the limits; least of row `one` first."""
    bounds = list(limits)
    last = math.inf
    while True:
        cut = least(rows, bounds, one)
        if cut is None:
            return
        kept = list(bounds)
        kept[one] = row_max(rows[one], cut)
        best = least(rows, kept, two)
        cut = cut if best is None else best
        reached = row_max(rows[two], cut)
        if reached >= last:
            return
        last = reached
        yield cut
        bounds[two] = math.nextafter(reached, -math.inf)
