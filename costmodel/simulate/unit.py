"""Engines that step together, and the time that their steps take.

A unit is one engine, or the data-parallel groups that share experts: each step of theirs begins
and ends together. If one of them computes a prompt the step is a mixed one for all, and it is
priced at the largest load among them, as batches are padded; a group without work waits along.
Where prompts go first, one of any group stops the decoding of all.

    p = 1     end = start + sum of stages + host
    p > 1     batches pass the stages one behind another: a stage begins when it is free and the
              stage before it is done; the host's time follows each batch's last stage

Decode steps in a row that hold the same sequences are taken at once. Their price is a straight
line in the mean context, so k of them take k (first + last) / 2; a request that comes meanwhile and
could be admitted ends them at the first step that ends after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from shardplan.costmodel.simulate.batch import Batch
from shardplan.costmodel.simulate.prices import StepPrices
from shardplan.costmodel.simulate.scheduler import Engine

__all__ = ["Lane", "Unit"]

_AT_ONCE = 64
"""Decode steps that are taken at once at most: over these a price is a line but for its knots."""
_ROUNDING = 1e-9


class Lane:
    """One batch of every engine of a unit, and the step that they run."""

    __slots__ = ("batches", "begin_s", "busy", "each_s", "end_s", "slope_s", "steps", "version")

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.busy = False
        self.steps, self.version = 0, 0
        self.begin_s = self.end_s = self.each_s = self.slope_s = 0.0

    def after_s(self, steps: int) -> float:
        """When so many of its steps are over."""
        return self.begin_s + steps * self.each_s + self.slope_s * (steps * (steps - 1) / 2.0)

    def cut(self, now_s: float) -> bool:
        """End with the step that runs at this time; whether that changes anything."""
        if self.steps == 1 or self.end_s <= now_s:
            return False
        past = now_s - self.begin_s
        half = self.slope_s / 2.0
        linear = self.each_s - half
        inside = max(linear * linear + 4.0 * half * past, 0.0)
        root = 2.0 * past / (linear + math.sqrt(inside))
        steps = min(max(math.ceil(root - _ROUNDING), 1), self.steps)
        if steps < self.steps and self.after_s(steps) < now_s:
            steps += 1
        if steps == self.steps:
            return False
        self.steps, self.end_s = steps, self.after_s(steps)
        self.version += 1
        return True


class Unit:
    """Engines whose steps run together, priced by one table."""

    def __init__(self, number: int, engines: Sequence[Engine], prices: StepPrices) -> None:
        self.number, self.engines, self.prices = number, list(engines), prices
        count = len(self.engines[0].batches)
        self.lanes = [Lane([one.batches[k] for one in self.engines]) for k in range(count)]
        self._free_s = [0.0] * len(prices.which)

    def start(self, lane: Lane, now_s: float) -> bool:
        """Begin the lane's next step; whether there is one."""
        works = False
        for engine, batch in zip(self.engines, lane.batches, strict=True):
            works |= engine.fill(batch)
        lane.busy = works
        if not works:
            return False
        lane.version += 1
        lane.begin_s, lane.steps, lane.slope_s = now_s, 1, 0.0
        prompts = any(batch.fed for batch in lane.batches)
        if prompts and self.engines[0].policy.prompts_first:
            for batch in lane.batches:
                batch.active = 0
        if prompts:
            stages, host_s = self._mixed(lane.batches), self.prices.prompt_host_s
        else:
            stages, host_s = self._decode(lane.batches, 0), self.prices.decode_host_s
        if len(self.lanes) > 1:
            lane.end_s = self._through(stages, now_s) + host_s
            lane.each_s = lane.end_s - now_s
            return True
        lane.each_s = self._sum(stages) + host_s
        if not prompts:
            self._repeat(lane, host_s)
        lane.end_s = lane.after_s(lane.steps)
        return True

    def _repeat(self, lane: Lane, host_s: float) -> None:
        """As many decode steps as are alike."""
        steps = _AT_ONCE
        for engine, batch in zip(self.engines, lane.batches, strict=True):
            if batch.active:
                steps = engine.alike(batch, steps)
        if steps > 1:
            last_s = self._sum(self._decode(lane.batches, steps - 1)) + host_s
            lane.slope_s = (last_s - lane.each_s) / (steps - 1)
            lane.steps = steps

    def complete(self, lane: Lane, now_s: float) -> None:
        """The lane's step is over."""
        lane.busy = False
        for engine, batch in zip(self.engines, lane.batches, strict=True):
            engine.complete(batch, lane.steps, now_s)

    def _sum(self, stages: list[float]) -> float:
        return sum(stages[kind] for kind in self.prices.which)

    def _through(self, stages: list[float], now_s: float) -> float:
        """When a batch has passed all stages."""
        free_s = self._free_s
        for place, kind in enumerate(self.prices.which):
            now_s = max(now_s, free_s[place]) + stages[kind]
            free_s[place] = now_s
        return now_s

    def _cached(self, batches: list[Batch], later: int) -> list[list[float]]:
        """Attention of the decoding sequences of each batch, so many steps later."""
        cached = self.prices.cached
        return [
            [
                cached(kind, one.active, (one.context + later * one.growth) / one.active)
                for kind in self.prices.kinds
            ]
            for one in batches
            if one.active
        ]

    def _decode(self, batches: list[Batch], later: int) -> list[float]:
        found = self._cached(batches, later)
        most = found[0] if len(found) == 1 else [max(kind) for kind in zip(*found, strict=True)]
        return self.prices.decode_s(max(one.active for one in batches), most)

    def _mixed(self, batches: list[Batch]) -> list[float]:
        most = [0.0 for _ in self.prices.kinds]
        for one in batches:
            own = [0.0 for _ in most]
            if one.fed:
                own = self.prices.prompts(len(one.fed), one.tokens, one.pairs)
            if one.active:
                beside = self._cached([one], 0)[0]
                own = [a + b for a, b in zip(own, beside, strict=True)]
            most = [max(a, b) for a, b in zip(most, own, strict=True)]
        widest = max(batches, key=self._width)
        active = max(one.active for one in batches)
        return self.prices.mixed_s(
            widest.tokens, widest.active, len(widest.fed), most, beside=active > 0
        )

    def _width(self, batch: Batch) -> int:
        own = batch.active * self.prices.width * self.prices.context_ranks
        return own + batch.tokens
