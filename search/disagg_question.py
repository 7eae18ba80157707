"""What deployments of two pools are scored against, and how one does: limits, losses, objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.disagg import Link
from shardplan.costmodel.disagg_serve import (
    Demand,
    Pools,
    Service,
    allowed_beside,
    prompts_bind,
    serve_pools,
)
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.search.disagg_space import Pool
from shardplan.search.plan import Limits
from shardplan.search.spare import Spare, instances_lost

__all__ = [
    "POOL_LIMITS",
    "DisaggQuestion",
    "broken_limits",
    "deployments",
    "most_beside",
    "objective_of",
    "prefill_binds",
    "rate_beside",
]

POOL_LIMITS = ("", "ttft", "rate", "ttft_p99")
_ROOM = 1.0 + 4e-9
"""A limit that is met but for rounding is met."""
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DisaggQuestion:
    """What deployments of two pools are scored against."""

    prefill: Pool
    decode: Pool
    shared: bool
    """Both pools take their cards from the same ones."""
    link: Link
    limits: Limits
    objective: str
    prices: tuple[float, float] = (1.0, 1.0)
    """Of a prefill and of a decode card: the fewest cards are those that cost least."""
    spare: Spare | None = None
    """What may be lost while the instances left still serve the rate."""

    def spent(self, prefill: Array, decode: Array) -> Array:
        """Cards of both pools by their price."""
        return np.asarray(self.prices[0] * prefill + self.prices[1] * decode)

    def lost(self, pool: Pool, cards: ArrayLike) -> Counts:
        """Instances of a role that may be lost, of instances of so many cards."""
        ranks = as_array(cards)
        if self.spare is None:
            return np.zeros(ranks.shape, dtype=np.int64)
        lost = instances_lost(ranks, pool.cluster.ranks_per_node, self.spare)
        return np.asarray(lost, dtype=np.int64)

    @property
    def cards(self) -> int:
        """Cards of both pools together."""
        return self.decode.cards + (0 if self.shared else self.prefill.cards)

    @property
    def demand(self) -> Demand:
        """What is asked; the lowest latency of no given load is that of one request at a time."""
        work = self.decode.workload
        latency = self.objective == "latency"
        alone = latency and work.concurrency is None and work.request_rate is None
        return Demand(
            in_flight=1.0 if alone else work.concurrency,
            offered_per_s=work.request_rate if latency else None,
            ttft_s=self.limits.ttft_s,
            ttft_p99_s=self.limits.ttft_p99_s,
            at_rate=work.request_rate is not None,
        )

    @property
    def finds_slots(self) -> bool:
        """Whether requests that come at random must find a decode slot free."""
        return self.demand.finds_slots

    @property
    def most_s(self) -> tuple[float, float]:
        """What an instance of either role may take: one prompt alone, and a token.

        With every slot in use steps are alike: no percentile of TPOT is above its mean.
        """
        ttft, tpot = self.demand.mean_ttft_s, [self.limits.tpot_s, self.limits.tpot_p99_s]
        tokens = min((one for one in tpot if one is not None), default=np.inf)
        return np.inf if ttft is None else ttft, tokens


def _pools(
    question: DisaggQuestion,
    pools: tuple[Mapping[str, Array], Mapping[str, Array]],
    x: Counts,
    y: Counts,
) -> Pools:
    """x prefill and y decode instances, as the cost model takes them."""
    prefill, decode = pools
    link = question.link
    ranks = np.minimum(x * prefill["cards"], y * decode["cards"])
    return Pools(
        prefill_instances=as_array(x),
        prefill_per_s=x * prefill["rate"],
        busy_s=prefill["busy_s"],
        one_s=prefill["one_s"],
        prompts=prefill["prompts"],
        service_s=prefill["service_s"],
        decode_per_s=y * decode["rate"],
        step_s=decode["step_s"],
        later_s=decode["later_s"],
        setup_s=as_array(link.latency_s),
        sent_s=decode["bytes"] * prefill["sent"] / link.bytes_per_s,
        received_s=decode["received"] / link.bytes_per_s,
        transfer_per_s=ranks * link.bytes_per_s / decode["bytes"],
    )


def deployments(
    question: DisaggQuestion,
    pools: tuple[Mapping[str, Array], Mapping[str, Array]],
    x: Counts,
    y: Counts,
    worth: Array | None = None,
) -> tuple[Service, Pools]:
    """x prefill and y decode instances; the pools' columns and the counts broadcast.

    `worth`: requests a second; of those that cannot serve as many a rate of 0 is told.
    """
    given = _pools(question, pools, x, y)
    return serve_pools(given, question.demand, worth), given


def prefill_binds(
    question: DisaggQuestion,
    pools: tuple[Mapping[str, Array], Mapping[str, Array]],
    x: Counts,
    y: Counts,
) -> NDArray[np.bool_]:
    """Whether x prefill instances allow less than y decode instances and the links do."""
    return prompts_bind(_pools(question, pools, x, y), question.demand)


def rate_beside(
    question: DisaggQuestion,
    pools: tuple[Mapping[str, Array], Mapping[str, Array]],
    x: Counts,
    y: Counts,
) -> Array:
    """Requests a second that y decode instances and the links allow."""
    return allowed_beside(_pools(question, pools, x, y), question.demand)


def most_beside(question: DisaggQuestion, cards: Array, x: Counts, prefill: ArrayLike) -> Counts:
    """The most decode instances of `cards` each beside x prefill instances; they broadcast."""
    left = question.decode.cards - (x * as_array(prefill) if question.shared else 0.0 * x)
    return np.asarray(np.floor(left / cards), dtype=np.int64)


def _broken(question: DisaggQuestion, service: Service) -> Counts:
    """Index into `POOL_LIMITS` of the limit that a deployment breaks, 0 for none."""
    rate = question.decode.workload.request_rate or 0.0
    ttft = question.limits.ttft_s or np.inf
    late = service.ttft_s > ttft * _ROOM
    few = (service.requests_per_s * _ROOM < rate) | (service.requests_per_s <= 0.0)
    found = np.where(late, 1, np.where(few, 2, 0))
    if service.ttft_p99_s is None:
        return found
    tail = service.ttft_p99_s > (question.limits.ttft_p99_s or np.inf) * _ROOM
    return np.where(tail & ~late, POOL_LIMITS.index("ttft_p99"), found)


def broken_limits(
    question: DisaggQuestion,
    service: Service,
    pools: tuple[Mapping[str, Array], Mapping[str, Array]],
    x: Counts,
    y: Counts,
) -> Counts:
    """The same, of what is left when what may be lost of either role is."""
    if question.spare is None:
        return _broken(question, service)
    sides = (question.prefill, question.decode), pools, (x, y)
    left = [
        np.maximum(count - question.lost(pool, columns["cards"]), 1)
        for pool, columns, count in zip(*sides, strict=True)
    ]
    return _broken(question, deployments(question, pools, left[0], left[1])[0])


def objective_of(question: DisaggQuestion, service: Service) -> Array:
    """What is to be large."""
    if question.objective == "latency":
        return np.asarray(1.0 / service.end_to_end_s)
    return np.asarray(service.requests_per_s * question.decode.workload.output_len)
