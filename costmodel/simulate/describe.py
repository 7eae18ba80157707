"""What a workload is like, from one pass over it in bounded memory.

Prefix reuse is that of a cache without end: the share of prompt tokens that stand in leading parts
whose ids have come before. Ids are remembered in a bitmap of 2**28 places, by id modulo its size:
exact for ids below that, as published traces have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from shardplan.costmodel.simulate.request import Asked
from shardplan.costmodel.simulate.sketch import Spread
from shardplan.costmodel.simulate.traces import PART_TOKENS
from shardplan.costmodel.simulate.workload import Demand

__all__ = ["describe"]

_IDS = 1 << 28
_TOLD = 10_000


class _Seen:
    """Ids that have come; the bitmap grows as they do."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, one: int) -> bool:
        """Whether it had come before."""
        place, bit = (one % _IDS) >> 3, 1 << (one & 7)
        if place >= len(self._bits):
            self._bits.extend(bytes(place + 1 + len(self._bits) // 2 - len(self._bits)))
        known = bool(self._bits[place] & bit)
        self._bits[place] |= bit
        return known


def describe(
    asked: Iterable[Asked], demand: Demand, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Counts, rates, percentiles of lengths and gaps, prefix reuse; times in seconds.

    `progress` is told how many requests were seen.
    """
    prompts, outputs, gaps, seen = Spread(), Spread(), Spread(), _Seen()
    told = found = count = 0
    last = 0.0
    for count, one in enumerate(asked, start=1):
        prompts.add(float(one.input_len))
        outputs.add(float(one.output_len))
        if count > 1:
            gaps.add(one.arrival_s - last)
        last = one.arrival_s
        if one.prefix:
            told += 1
            found += _reused(one, seen)
        if progress is not None and count % _TOLD == 0:
            progress(count)
    tokens = {"input_tokens": int(prompts.total), "output_tokens": int(outputs.total)}
    about: dict[str, Any] = {
        "requests": count,
        **tokens,
        "input_len": prompts.figures(),
        "output_len": outputs.figures(),
        "prefix": {
            "requests_with_ids": told,
            "reused_tokens": found,
            "reused_share": found / prompts.total if prompts.total else 0.0,
        },
    }
    if demand.concurrency is not None:
        return {**about, "arrivals": {"kind": "closed loop", "concurrency": demand.concurrency}}
    span = last if last > 0.0 else None
    return {
        **about,
        "arrivals": {
            "kind": "trace" if demand.own_times else "open loop",
            "duration_s": last,
            "requests_per_s": None if span is None else (count - 1) / span,
            "input_tokens_per_s": None if span is None else prompts.total / span,
            "output_tokens_per_s": None if span is None else outputs.total / span,
            "gap_s": gaps.figures(),
            "gap_cv": gaps.variation,
        },
    }


def _reused(one: Asked, seen: _Seen) -> int:
    """Tokens of a prompt's leading parts that had come before."""
    leading, count = True, 0
    for place in one.prefix[: one.input_len // PART_TOKENS]:
        leading = seen.add(place) and leading
        count += leading
    return count * PART_TOKENS
