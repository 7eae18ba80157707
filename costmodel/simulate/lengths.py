"""Lengths of prompts and outputs: fixed, lognormal, or a histogram. Tokens, whole, at least 1.

512
{ mean = 1024, cv = 1.0, min = 1, max = 8192 }      lognormal; cv: deviation over the mean.
                                                    mean and cv are those before min and max cut
{ edges = [1, 512, 2048, 8192], weights = [5, 3, 2] }    evenly from each edge to the next
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from shardplan.models.errors import InputError

__all__ = ["Fixed", "Histogram", "Lengths", "Lognormal", "mean_tokens", "read_lengths"]

_MOST = 2**24
_DRAWS = 65536
_HINT = "write 512, { mean = 1024, cv = 1.0 } or { edges = [1, 512, 2048], weights = [3, 1] }"
Tokens = NDArray[np.int64]
Shares = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Fixed:
    """All alike."""

    tokens: int

    @property
    def most(self) -> int:
        """The longest that can be drawn."""
        return self.tokens

    def draw(self, luck: np.random.Generator, count: int) -> Tokens:
        """So many lengths `[count]`."""
        return np.full(count, self.tokens, dtype=np.int64)

    def below(self, tokens: Tokens) -> Shares:
        """Share of lengths that are at most so many tokens, of the same shape."""
        return (tokens >= self.tokens).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """The logarithm is normally distributed."""

    mean: float
    variation: float
    least: int
    most: int

    def draw(self, luck: np.random.Generator, count: int) -> Tokens:
        """So many lengths `[count]`."""
        square = math.log1p(self.variation**2)
        centre = math.log(self.mean) - square / 2.0
        drawn = np.rint(luck.lognormal(centre, math.sqrt(square), count))
        return np.clip(drawn, self.least, self.most).astype(np.int64)

    def below(self, tokens: Tokens) -> Shares:
        """Share of lengths that are at most so many tokens, of the same shape."""
        square = math.log1p(self.variation**2)
        centre, spread = math.log(self.mean) - square / 2.0, math.sqrt(square)
        away = np.log(np.maximum(tokens, 0) + 0.5) - centre
        if spread:
            scaled = (away / (spread * math.sqrt(2.0))).ravel().tolist()
            found = np.array([0.5 + 0.5 * math.erf(one) for one in scaled]).reshape(away.shape)
        else:
            found = (away >= 0.0).astype(np.float64)
        return np.where(tokens < self.least, 0.0, np.where(tokens >= self.most, 1.0, found))


@dataclass(frozen=True, slots=True)
class Histogram:
    """Every bin holds its edge and what is below the next edge."""

    edges: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def most(self) -> int:
        """The longest that can be drawn."""
        return self.edges[-1] - 1

    def draw(self, luck: np.random.Generator, count: int) -> Tokens:
        """So many lengths `[count]`."""
        shares = np.asarray(self.weights) / sum(self.weights)
        bins = luck.choice(len(shares), count, p=shares)
        edges = np.asarray(self.edges, dtype=np.int64)
        return luck.integers(edges[bins], edges[bins + 1], dtype=np.int64)

    def below(self, tokens: Tokens) -> Shares:
        """Share of lengths that are at most so many tokens, of the same shape."""
        sums = np.cumsum([0.0, *self.weights])
        return np.asarray(np.interp(tokens + 1.0, self.edges, sums / sums[-1]))


Lengths = Fixed | Lognormal | Histogram


def mean_tokens(lengths: Lengths) -> float:
    """The mean length, of a good many draws."""
    return float(lengths.draw(np.random.default_rng(0), _DRAWS).mean())


def _refuse(name: str, rule: str, value: object) -> InputError:
    return InputError(f"`{name}` {rule}", got=f"{name}={str(value)[:80]}", hint=_HINT)


def _whole(value: object, least: int, most: int = _MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: object, most: float) -> bool:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and 0 < cast("float", value) <= most


def read_lengths(name: str, value: object) -> Lengths:
    """Lengths as a workload file or an option gives them; `InputError` where a rule is broken."""
    if isinstance(value, Mapping):
        if "edges" in value or "weights" in value:
            return _histogram(name, value)
        return _lognormal(name, value)
    if not _whole(value, 1):
        raise _refuse(name, f"is a whole number from 1 to {_MOST:,}, or a distribution", value)
    return Fixed(cast("int", value))


def _histogram(name: str, table: Mapping[str, object]) -> Histogram:
    edges, weights = table.get("edges"), table.get("weights")
    if set(table) != {"edges", "weights"} or not all(
        isinstance(one, Sequence) and not isinstance(one, str) for one in (edges, weights)
    ):
        raise _refuse(name, "is a histogram of edges and weights alone", dict(table))
    edges, weights = list(cast("Sequence[object]", edges)), list(cast("Sequence[object]", weights))
    if not weights or len(edges) != len(weights) + 1:
        raise _refuse(name, "has one edge more than weights", dict(table))
    if not all(_whole(one, 1) for one in edges):
        raise _refuse(name, f"has whole edges from 1 to {_MOST:,}", edges)
    known = cast("list[int]", edges)
    if any(b <= a for a, b in itertools.pairwise(known)):
        raise _refuse(name, "has edges that grow", edges)
    if not all(one == 0 or _number(one, 1e12) for one in weights) or not any(weights):
        raise _refuse(name, "has weights from 0 up, not all of them 0", weights)
    return Histogram(tuple(known), tuple(float(cast("float", one)) for one in weights))


def _lognormal(name: str, table: Mapping[str, object]) -> Lognormal:
    unknown = set(table) - {"mean", "cv", "min", "max"}
    if unknown or not _number(table.get("mean"), _MOST):
        raise _refuse(name, "is a lognormal of mean, cv, min and max", dict(table))
    spread, least, most = table.get("cv", 1.0), table.get("min", 1), table.get("max", _MOST)
    if spread != 0 and not _number(spread, 100):
        raise _refuse(name, "has a cv from 0 to 100", spread)
    if not _whole(least, 1) or not _whole(most, cast("int", least)):
        raise _refuse(name, "has whole min and max, 1 <= min <= max", dict(table))
    return Lognormal(
        float(cast("float", table["mean"])),
        float(cast("float", spread)),
        cast("int", least),
        cast("int", most),
    )
