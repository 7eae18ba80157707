"""What `plan.json` tells of requests that come at the asked rate (`search.at_rate`)."""

from __future__ import annotations

from pydantic import Field

from shardplan.search.plan_confidence import Part

__all__ = ["AtRate", "SpreadTimes"]


class SpreadTimes(Part):
    """How a time is spread over requests."""

    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float


class AtRate(Part):
    """The deployment at the rate, whose requests come at random and may wait for a slot.

    `performance` is that of all slots in use.
    """

    requests_per_s: float = Field(gt=0)
    used: float
    """The rate over what all slots serve; near 1 the queue grows."""
    concurrency: float
    """Requests in flight, over the whole deployment."""
    ttft: SpreadTimes
    """The wait for a slot included."""
    tpot: SpreadTimes
    end_to_end_s: float
    """Mean of a request."""
