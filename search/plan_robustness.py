"""How robust a plan is against errors of its prices, as `plan.json` tells it (`search.robust`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardplan.search.plan_confidence import Part

if TYPE_CHECKING:
    from shardplan.search.plan import StrategyInfo

__all__ = ["PARTS", "Flip", "GroupRobustness", "RobustChoice", "Robustness"]


class Flip(Part):
    """The smallest change of a cost group in one direction at which another strategy wins."""

    factor: float
    """On the time of the group."""
    within_band: bool | None
    """Whether the calibration's band of the group holds it; None where no band is known."""
    strategy: StrategyInfo
    """The runner-up that wins there, its slots and step size tuned to it; of pools, of decode."""
    prefill: StrategyInfo | None = None
    """Of pools, the strategy of its prefill instances."""
    prefill_instances: int = 0
    decode_instances: int = 0
    objective: float
    """Of the runner-up there."""
    plan_objective: float | None
    """Of the plan's layout there, tuned to it; None where it meets the limits no more."""


class GroupRobustness(Part):
    """One cost group."""

    group: str
    share: float
    """Of the plan's average step now; of pools, of a request that waits for nothing."""
    band_low: float | None
    """The calibration's band of the group's time, as factors; None where none is known."""
    band_high: float | None
    slower: Flip | None
    """None: nothing else wins up to the largest factor that was tried."""
    faster: Flip | None
    limit_factor: float | None
    """Factor at which the plan as it stands, not tuned again, breaks a limit; None: none does."""
    limit: str
    """The limit that it breaks."""


class RobustChoice(Part):
    """The strategy of least worst-case regret: one minus its objective over the best one there."""

    scenarios: int
    """Scenarios that some strategy meets the limits in."""
    left_out: int
    """Scenarios that no strategy does."""
    nominal_strategy: StrategyInfo
    """The best at the prices as they are; of pools, of its decode instances."""
    nominal_prefill: StrategyInfo | None = None
    nominal_prefill_instances: int = 0
    nominal_decode_instances: int = 0
    nominal_objective: float
    nominal_regret: float
    """Its worst; 1 where it breaks a limit."""
    nominal_breaks: int
    """Scenarios in which it breaks a limit."""
    nominal_worst: str
    """The scenario of its worst regret."""
    robust_strategy: StrategyInfo
    robust_prefill: StrategyInfo | None = None
    robust_prefill_instances: int = 0
    robust_decode_instances: int = 0
    robust_objective: float
    """At the prices as they are."""
    robust_regret: float
    robust_worst: str
    given_up: float
    """Share of the nominal objective that the robust strategy gives up."""


class Robustness(Part):
    """How wrong each cost group may be before another strategy would be the better one."""

    method: str
    """What was varied, tried and tuned, in one sentence."""
    contenders: int
    """Other layouts and choices that were priced again."""
    most_factor: float
    """Factors from its inverse to it were tried."""
    resolution: float
    """Of the factors that are told, relative."""
    level: float
    """Share of true times that the bands are made to hold."""
    groups: tuple[GroupRobustness, ...]
    choice: RobustChoice | None = None
    """Only of a search for the robust plan."""


PARTS = (Flip, GroupRobustness, RobustChoice, Robustness)
"""Each names `StrategyInfo`, which `search.plan` completes them with."""
