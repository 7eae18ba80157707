"""What `plan.json` tells of the strategies that were simulated (`search.refine_simulated`)."""

from __future__ import annotations

from pydantic import Field

from shardplan.search.plan_confidence import Part

__all__ = ["Refinement", "SimulatedRun"]


class SimulatedRun(Part):
    """What requests of the workload saw once it ran full."""

    requests: int = Field(ge=0)
    """That count."""
    ttft_s: float
    ttft_p99_s: float
    """Its 99th percentile."""
    tpot_s: float
    tpot_p99_s: float
    """Its 99th percentile."""
    end_to_end_s: float
    output_tokens_per_s: float
    waiting: float = Field(ge=0)
    """Share of those that came which wait at the end of a queue that grows; 0: what comes is
    served."""


class Refinement(Part):
    """The best strategies in the simulator, and the one that was chosen."""

    tried: int = Field(ge=1)
    """Strategies that were simulated."""
    pruned: int = Field(ge=0)
    """Of these, given up early: others did better on as many requests."""
    requests: int = Field(ge=0)
    """Simulated, over all of them."""
    chosen: int = Field(ge=1)
    """Place of the plan's strategy among them, in the order of the steady state."""
    holds: bool
    """Whether it keeps every limit and serves what comes."""
    run: SimulatedRun
    """Of the plan."""
    first: SimulatedRun | None
    """Of the steady state's first choice; None where it cannot hold a request of the workload."""
    first_holds: bool
    """Whether that one does."""
