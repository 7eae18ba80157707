"""What `shardplan explain` says, as data."""

from __future__ import annotations

from typing import Any, Literal

from shardplan.search.plan import BreakdownRow, MemoryRow, Performance, StrategyInfo
from shardplan.search.plan_confidence import Part

__all__ = ["Binding", "Difference", "Explanation", "PoolPart", "Rival", "Shadow"]


class Binding(Part):
    """A limit and how near the plan comes to it."""

    name: str
    value: float
    """Seconds, bytes, or requests a second (of a pool or the transfer)."""
    limit: float
    used: float
    """Share of the limit that is used; 1 is the limit itself."""
    binds: bool
    """Whether the next grid point of more slots or tokens a step breaks it first."""


class Shadow(Part):
    """What the best plan would be were one thing of the question different."""

    change: str
    objective: float | None
    """None where nothing is feasible, or the change cannot be made: `note` says why."""
    gain: float | None
    """Objective over the plan's own."""
    strategy: StrategyInfo | None
    """With pools, of a decode instance; `note` tells both."""
    note: str = ""

    @classmethod
    def none(cls, change: str, why: Exception) -> Shadow:
        """Nothing is feasible then, or the change cannot be made."""
        return cls(change=change, objective=None, gain=None, strategy=None, note=str(why))


class Difference(Part):
    """Where a rival spends more (above 0) or less than the plan."""

    what: str
    """decode KIND or prefill KIND in seconds of one step; memory PART in bytes of the fullest rank.
    """
    plan: float
    rival: float

    @property
    def more(self) -> float:
        """The rival's less the plan's."""
        return self.rival - self.plan


class Rival(Part):
    """Another strategy of the same question, priced by the same code."""

    strategy: StrategyInfo
    performance: Performance | None
    """None where it cannot be priced: `broken` says why."""
    broken: tuple[str, ...]
    """Rules, limits or memory that speak against it."""
    ratio: float | None
    """Its objective over the plan's."""
    differences: tuple[Difference, ...]
    words: str = ""
    """What it is, where it is more than one strategy."""
    notes: tuple[str, ...] = ()
    """What the comparison leaves out."""

    @classmethod
    def refused(cls, strategy: StrategyInfo, why: Exception, **told: Any) -> Rival:
        """One that cannot be priced."""
        return cls(
            strategy=strategy,
            performance=None,
            broken=(str(why),),
            ratio=None,
            differences=(),
            **told,
        )


class PoolPart(Part):
    """One pool of a plan of prefill and decode instances."""

    role: Literal["prefill", "decode"]
    instances: int
    cards: int
    """Of all its instances."""
    strategy: StrategyInfo
    memory: tuple[MemoryRow, ...]


class Explanation(Part):
    """Why this plan."""

    model: str
    cluster: str
    strategy: StrategyInfo
    performance: Performance
    objective: str
    bindings: tuple[Binding, ...]
    breakdown: tuple[BreakdownRow, ...]
    memory: tuple[MemoryRow, ...]
    shadows: tuple[Shadow, ...]
    rival: Rival | None = None
    pools: tuple[PoolPart, ...] = ()
    """Where prefill and decode have their own; strategy and memory are then those of decode."""
