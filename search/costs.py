"""Cost of a plan at given prices of a card and hour: currency, or kW for energy.

    cost a token = sum over pools of (cards * price) / 3600 / output tokens a second

at the rate that is asked, else at the most that is served. No price or power ships with a device:
none that could be cited is public.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardplan.models.errors import InputError
from shardplan.search.plan_cost import Cost
from shardplan.search.workload import positive, shown

if TYPE_CHECKING:
    from shardplan.search.asked import Asked
    from shardplan.search.plan import Plan

__all__ = ["Prices", "cost_of", "read_prices"]

_MOST_PRICE = 1e9
_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Of an hour of a card."""

    card: float
    prefill: float | None = None
    """Of the prefill pool's own cluster; None: as the others."""

    @property
    def pair(self) -> tuple[float, float]:
        """Of a prefill and of a decode card."""
        return self.card if self.prefill is None else self.prefill, self.card


def read_prices(asked: Asked, rate: float | None) -> Prices | None:
    """What was given; None without. `InputError` for what is no price, or lacks one."""
    own, other = asked.card_price, asked.prefill_card_price
    if own is None:
        if other is not None or asked.objective == "cost":
            raise InputError(
                "cost is that of a price of every card",
                got=f"card_price=None, prefill_card_price={shown(other)}, "
                f"objective={asked.objective}",
                hint="add --card-price with what a card costs an hour, or its power in kW",
            )
        return None
    price = positive("card_price", own, _MOST_PRICE, try_="2.5")
    if other is not None and asked.prefill_cluster is None:
        raise InputError(
            "a prefill pool has a price of its own where it has a cluster of its own",
            got=f"prefill_card_price={shown(other)}, prefill_cluster=None",
            hint="add --prefill-cluster, or leave --prefill-card-price out",
        )
    if asked.objective == "cost" and asked.serving != "agg" and rate is None:
        raise InputError(
            "the cost of pools is that of a rate",
            got=f"objective=cost, serving={asked.serving}, rate=None",
            hint="add --rate 4, or use --serving agg",
        )
    prefill = None
    if other is not None:
        prefill = positive("prefill_card_price", other, _MOST_PRICE, try_="2.5")
    return Prices(card=price, prefill=prefill)


def cost_of(plan: Plan, prices: Prices) -> Cost:
    """What the plan costs."""
    used = [pool.cards for pool in plan.pools] or [0, plan.cards]
    an_hour = sum(cards * price for cards, price in zip(used, prices.pair, strict=True))
    most, work = plan.performance.output_tokens_per_s, plan.request.workload
    rate = most if work.request_rate is None else work.request_rate * work.output_len
    each = an_hour / _HOUR_S * 1e6
    return Cost(
        card_price=prices.card,
        prefill_card_price=prices.prefill,
        per_hour=an_hour,
        per_million_tokens=each / min(rate, most),
        per_million_tokens_full=each / most,
    )
