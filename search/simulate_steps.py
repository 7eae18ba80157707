"""Batches that decode together in a simulated run, counted step by step."""

from __future__ import annotations

from collections import defaultdict

from shardplan.costmodel.simulate.request import Request
from shardplan.costmodel.simulate.unit import Lane, Unit

__all__ = ["Running"]


class Running:
    """Decode steps by the sequences of the largest group that steps; told a run as it happens.

    Only steps without prompts count, on engines that decode: they alone replay a decode graph, and
    groups that step together replay one of the same size.
    """

    def __init__(self) -> None:
        self.counts: defaultdict[int, int] = defaultdict(int)
        """Steps by sequences."""

    def step(self, unit: Unit, lane: Lane) -> None:
        """A step, or decode steps in a row, that ends."""
        most = max(batch.active for batch in lane.batches)
        mixed = any(batch.tokens for batch in lane.batches)
        if most and not mixed and not unit.engines[0].policy.sends:
            self.counts[most] += lane.steps

    def request(self, request: Request) -> None:
        """A request that has ended."""
