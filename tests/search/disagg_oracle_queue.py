"""The oracle's formulas of the queues of prefill and decode pools: bisections and plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

from shardplan.search.plan import Workload

__all__ = ["filled", "largest", "late", "later_steps", "wait_of"]


def filled(most: float, busy: float, alone: float, in_flight: float) -> float:
    """The utilisation at which `in_flight` requests are in flight, by bisection."""
    low, high = 0.0, 1.0
    others = (in_flight - 1.0) / in_flight
    for _ in range(200):
        used = (low + high) / 2.0
        wait = others * used * busy / (2.0 * max(1.0 - used, 1e-300))
        low, high = (used, high) if used * most * (wait + alone) < in_flight else (low, used)
    return low


def largest(most: float, able: Callable[[float], bool]) -> float:
    """The largest number up to `most` that is able, by bisection; 0 where none is."""
    low, high = 0.0, most
    for _ in range(200):
        middle = (low + high) / 2.0
        low, high = (middle, high) if able(middle) else (low, middle)
    return low if able(low) and low > most * 1e-40 else 0.0


def wait_of(queue: tuple[int, float, float], rate: float) -> float:
    """What 99 of 100 prompts wait at most: in turn, or for the running step and then together."""
    count, most, busy = queue

    def of(capacity: float) -> float:
        used = rate / capacity
        if used >= 1.0:
            return math.inf
        share = used ** (math.sqrt(2 * count + 2) - 1)
        return math.log(max(share / 0.01, 1.0)) / (2 * capacity * (1 - used))

    return min(of(count / busy), busy + of(most))


def late(first: float, step: float, wait: float) -> float:
    """TTFT of one that waits so long: the step that runs is half over, or just began."""
    return first + max(wait + step / 2, 0.99 * step)


def later_steps(work: Workload, depth: int) -> float:
    """Steps after the first token: at least one where there is a token."""
    kept = work.mtp_acceptance or 0.0
    gained = 1 + sum(kept**place for place in range(1, depth + 1))
    later = work.output_len - 1
    return max(later / gained, min(later, 1))
