"""The oracle's formulas of the queues of prefill and decode pools: bisections and plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from shardplan.search.plan import Workload

__all__ = ["Prompts", "largest", "late", "later_steps"]


@dataclass(frozen=True)
class Prompts:
    """x prefill instances: steps of up to `held` prompts in each of `groups`."""

    count: int
    groups: int
    held: int
    full_s: float
    """A full step, and one with a prompt a group."""
    one_s: float
    service_s: float

    @property
    def most(self) -> float:
        """Prompts a second."""
        return self.count * self.groups * self.held / self.full_s

    def waits_s(self, rate: float, beyond: float | None = None) -> tuple[float, float]:
        """The mean, or what all but a share wait at most: in turn, or for a full step and then
        together."""
        alone = self._of(rate, self.count / self.one_s, beyond)
        runs = self.full_s * (0.5 if beyond is None else 1.0)
        return alone, runs + self._of(rate, self.most, beyond)

    def _of(self, rate: float, capacity: float, beyond: float | None = None) -> float:
        """One way to see the queue."""
        used = rate / capacity
        if used >= 1.0:
            return math.inf
        share = math.exp(math.log(max(used, 1e-300)) * (math.sqrt(2 * self.count + 2) - 1))
        each = 1 / (2 * capacity * (1 - used))
        if beyond is None:
            return share * each
        return math.log(max(share / beyond, 1.0)) * each


def largest(most: float, able: Callable[[float], bool]) -> float:
    """The largest number up to `most` that is able, by bisection; 0 where none is."""
    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if able(middle) else (low, middle)
    return low if able(low) and low > most * 1e-17 else 0.0


def late(first: float, step: float, wait: float) -> float:
    """TTFT of one that waits so long: the step that runs is half over, or just began."""
    return first + max(wait + step / 2, 0.99 * step)


def later_steps(work: Workload, depth: int) -> float:
    """Steps after the first token: at least one where there is a token."""
    kept = work.mtp_acceptance or 0.0
    gained = 1 + sum(kept**place for place in range(1, depth + 1))
    later = work.output_len - 1
    return max(later / gained, min(later, 1))
