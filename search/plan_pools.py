"""What `plan.json` tells of disaggregated serving beside its strategies (`costmodel.disagg`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardplan.search.plan_confidence import Part

__all__ = ["PoolTimes", "ServingRow", "Transfer"]

Bound = Literal["prefill", "decode", "transfer", "demand"]


class PoolTimes(Part):
    """One instance of a pool, and how far the pool is used."""

    requests_per_s: float
    """Most requests that one instance serves."""
    used: float
    """Rate of the deployment over that of all instances."""
    step_s: float
    """Decode: one step of all slots. Prefill: until the next prompts can begin."""
    service_s: float
    """Prefill: a prompt in a full step. Decode: all tokens of one request."""
    one_s: float | None = None
    """Prefill: as `step_s`, where no group has more than one prompt; None: not told."""


class Transfer(Part):
    """The caches of prompts on their way from prefill to decode instances."""

    tier: str
    """Tier of the interconnect that joins the pools."""
    link_bytes_per_s: float
    """From one rank to one other, as far as a transfer reaches it."""
    request_bytes: float
    """Cache of one prompt, over all ranks that decode it."""
    request_s: float
    """With as many prompts as are done together at the deployment's rate."""
    setup_s: float = 0.0
    """Of `request_s`, what does not grow with the cache."""
    used: float
    """Rate of the deployment over what all links carry."""
    overlapped: bool
    """Whether layers are sent while others are computed."""
    bound: Bound
    """What binds the rate: a pool, the transfer, or what is asked (demand)."""
    basis: str
    """What its seconds rest on: measured, derived, assumed."""


class ServingRow(Part):
    """The best plan of one way of serving."""

    serving: Literal["agg", "disagg"]
    words: str
    """Its strategy in one line, or why there is none."""
    objective: float | None
    """Output tokens/s, one over the seconds of a request, or cards; None where nothing serves."""
    gain: float | None
    """How good it is over the chosen plan."""
    cards: int = Field(ge=0)
    ttft_s: float | None
    tpot_s: float | None
