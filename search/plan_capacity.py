"""What `plan.json` tells of headroom and losses (`search.capacity`). Units are in the names."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardplan.search.plan_confidence import Part

__all__ = ["Capacity", "LossRow", "Replanned"]


class Replanned(Part):
    """The best plan on the cards that are left, in place of what is left of the plan."""

    cards: int = Field(ge=1)
    """The most that a job may have of those left."""
    words: str
    """Its strategy in one line."""
    requests_per_s: float
    """Most that it serves within the limits."""
    holds: bool
    """Whether it serves the rate within the limits."""
    ttft_s: float | None
    """At the rate, by the plan that serves it soonest where none keeps the limits; None where none
    serves it at all."""
    tpot_s: float | None


class LossRow(Part):
    """What is left of the plan when something is lost, and what the service level then is."""

    lost: str
    replicas_left: int = Field(ge=0)
    """Of pools: instances of the role that loses some."""
    requests_per_s: float
    """Most that is served within the limits."""
    holds: bool
    """Whether the rate is served within the limits."""
    ttft_s: float | None
    """At the rate; None where it is not served: the queue grows."""
    tpot_s: float | None
    again: Replanned | None
    """None where what is left holds, or nothing is legal on it."""


class Capacity(Part):
    """The rate, what may be lost, and what is left after a loss."""

    requests_per_s: float
    """The rate that is to be served: as asked, else the plan's own."""
    spare: int = Field(ge=0)
    """So many may be lost at once with the rate still served within the limits; 0: none asked."""
    spare_unit: Literal["card", "node"]
    replicas: int = Field(ge=1)
    """That serve apart: copies of the model, or instances of pools."""
    cards: int = Field(ge=1)
    headroom: float
    """Most that is served within the limits, over the rate."""
    losses: tuple[LossRow, ...]
    """Nothing, a card, a node, and what may be lost, in that order."""
