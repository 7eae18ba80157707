"""What a plan costs at the prices that were given (`search.costs`). Units are in the names."""

from __future__ import annotations

from pydantic import Field

from shardplan.search.plan_confidence import Part

__all__ = ["Cost"]


class Cost(Part):
    """In the unit of the given prices: a currency, or kWh where the price is a power in kW."""

    card_price: float = Field(gt=0)
    """Of an hour of one card."""
    prefill_card_price: float | None = Field(default=None, gt=0)
    """Of one card of the prefill pool, where it has a cluster of its own."""
    per_hour: float
    """All cards in use."""
    per_million_tokens: float
    """Output tokens: at the rate that is asked, else at the most that is served."""
    per_million_tokens_full: float
    """At the most that is served within the limits."""
