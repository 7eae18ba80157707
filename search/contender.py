"""What a study of robustness asks of a contender: its points, priced with cost groups scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array
from shardplan.search.plan import StrategyInfo

__all__ = ["Answers", "Contender", "Deployed", "Tuned"]

Bands = Mapping[str, tuple[float, float]]


class Tuned(NamedTuple):
    """The best point of a contender at each factor."""

    objective: Array
    """`[factors]`; minus infinity where no point meets the limits."""
    point: NDArray[np.int64]

    @classmethod
    def of(cls, objectives: Array) -> Tuned:
        """Of objectives `[factors, points]`; the first of equal points."""
        count, points = objectives.shape
        if not points:
            return cls(np.full(count, -np.inf), np.zeros(count, dtype=np.int64))
        point = np.argmax(objectives, axis=1)
        return cls(objectives[np.arange(count), point], point)


class Deployed(NamedTuple):
    """A strategy, or those of both pools with the counts of their instances."""

    strategy: StrategyInfo
    prefill: StrategyInfo | None = None
    prefill_instances: int = 0
    decode_instances: int = 0


class Answers(NamedTuple):
    """How one strategy answers to factors `[factors]`."""

    limit: NDArray[np.int64]
    """Index into the contender's `limits` of the one that it breaks, -1 for none."""
    seconds: Array
    """What shares are of: an average step, or a request that waits for nothing."""


class Contender(Protocol):
    """One way of deploying, whose slots, step sizes and counts are its points.

    Points are those whose limits depend on times alone: memory does not.
    """

    @property
    def limits(self) -> tuple[str, ...]:
        """Names of limits."""

    @property
    def groups(self) -> set[str]:
        """Cost groups that it spends time in."""

    def objectives(self, factors: Mapping[str, Array]) -> Array:
        """`[factors, points]`; minus infinity where a limit is broken."""

    def tuned(self, factors: Mapping[str, Array]) -> Tuned:
        """Its best point at each of the factors `[factors]`."""

    def own(self, factors: Mapping[str, Array]) -> Array:
        """Objective `[factors]` of the strategy that the search found, as it is."""

    def answers(self, factors: Mapping[str, Array]) -> Answers:
        """Of the strategy that the search found."""

    def deployed(self, point: int | None) -> Deployed:
        """A point as the plan writes it; None: the strategy that the search found."""

    def bands(self) -> Bands:
        """Of the strategy that the search found, the calibration's band of each cost group."""
