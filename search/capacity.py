"""What is left of a plan when a card or a node is lost, and what the service level then is.

Left as it is: the replicas that lost nothing go on at their own slots (`search.spare`), and share
the rate. At an asked rate requests come at random: TTFT and TPOT are means with the queue, and the
most that is served is the largest rate that keeps the limits (`at_rate`). Without one the rate is
the plan's own, a closed loop: of all loads up to the slots the smallest that serves it tells TTFT
and TPOT. Above the rate of full slots the queue grows, the deployment is saturated. Of pools the
instances that are left serve as `costmodel.disagg_serve` has it.

Planned again, where that does not hold: the search once more on the most cards that a job may have
of those left, within the limits; where that serves too little, once more without them for the least
latency at the rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shardplan.costmodel.disagg_serve import Demand, serve_pools
from shardplan.costmodel.hardware import Cluster
from shardplan.models.errors import InfeasibleError, InputError
from shardplan.search.at_rate import Point, most_within, run_at
from shardplan.search.disagg_at_rate import pools_of
from shardplan.search.disagg_request import resolve_sides
from shardplan.search.evaluate import LayoutScorer, Question
from shardplan.search.plan import Plan
from shardplan.search.plan_capacity import Capacity, LossRow, Replanned
from shardplan.search.request import Asked, Resolved
from shardplan.search.space import Choice
from shardplan.search.spare import Spare, instances_lost, replicas_lost

if TYPE_CHECKING:
    from shardplan.search.api import SearchResult

__all__ = ["with_capacity"]

Searched = Callable[[Asked], "SearchResult"]
_FREE_MS = 1e9
"""A limit that nothing breaks."""
_ROOM = 1.0 + 4e-9
"""A rate that is met but for rounding is met."""


class _Served(NamedTuple):
    """What a deployment does: the most within the limits, and times at the rate (None: queue)."""

    most: float
    ttft_s: float | None
    tpot_s: float | None


@dataclass(frozen=True, slots=True)
class _Loss:
    """One kind of loss: in words, what is left in number, how that serves, which cards are left."""

    lost: str
    left: int
    served: _Served
    asked: Asked | None
    """The question on the cards that are left; None where none are."""


def with_capacity(
    found: SearchResult, asked: Asked, resolved: Resolved, searched: Searched
) -> SearchResult:
    """The result with losses in its plan; `searched`: answers a question."""
    start = time.perf_counter()
    plan = found.plan
    rate = plan.request.workload.request_rate or plan.performance.requests_per_s
    spare = resolved.spare
    kinds = [Spare(count=1, unit="card"), Spare(count=1, unit="node")]
    if spare is not None and spare not in kinds:
        kinds.append(spare)
    losses = _pool_losses if plan.pools else _replica_losses
    none, *rows = losses(plan, asked, resolved, rate, kinds)
    part = Capacity(
        requests_per_s=rate,
        spare=0 if spare is None else spare.count,
        spare_unit="card" if spare is None else spare.unit,
        replicas=none.left,
        cards=plan.cards,
        headroom=none.served.most / rate,
        losses=tuple(_row(one, plan, rate, searched) for one in (none, *rows)),
    )
    spent = time.perf_counter() - start
    timing = {**found.timing, "losses_s": spent}
    timing["total_s"] += spent
    return replace(found, plan=plan.model_copy(update={"capacity": part}), timing=timing)


def _row(loss: _Loss, plan: Plan, rate: float, searched: Searched) -> LossRow:
    holds = loss.served.most * _ROOM >= rate
    asked = None if holds else loss.asked
    again = None if asked is None else _again(asked, plan, rate, searched)
    return LossRow(
        lost=loss.lost,
        replicas_left=loss.left,
        requests_per_s=loss.served.most,
        holds=holds,
        ttft_s=loss.served.ttft_s,
        tpot_s=loss.served.tpot_s,
        again=again,
    )


def _replica_losses(
    plan: Plan, asked: Asked, resolved: Resolved, rate: float, kinds: list[Spare]
) -> Iterator[_Loss]:
    """First that of nothing."""
    par, per_node = plan.strategy.parallelism(), resolved.cluster.ranks_per_node
    served = _serves(plan, resolved, rate)
    yield _Loss("nothing", par.replicas, served(1.0), None)
    for one in kinds:
        left = par.replicas - replicas_lost(par, per_node, one)
        cards = par.ranks - one.count * (per_node if one.unit == "node" else 1)
        count = _most_cards(resolved.cluster, cards)
        again = None if count is None else replace(asked, cards=count)
        yield _Loss(one.words, left, served(left / par.replicas), again)


def _serves(plan: Plan, resolved: Resolved, rate: float) -> Callable[[float], _Served]:
    """What a share of the replicas does at a rate."""
    question = Question.of(
        plan.request,
        resolved.spec,
        resolved.cluster,
        resolved.engine,
        cards=plan.strategy.ranks,
    )
    way = plan.strategy
    scorer, choice = LayoutScorer(question, way.parallelism()), Choice.of(way)
    if question.workload.request_rate is not None:
        point = Point(scorer, choice, way.batch, way.chunk)
        return lambda share: _queued(point, rate, share)
    slots = np.arange(1.0, way.batch + 1.0)
    chunk = np.full(slots.shape, float(way.chunk))
    loads = dict(scorer.score(choice, slots, chunk).columns)
    return lambda share: _served(plan, loads, rate, share)


def _queued(one: Point, rate: float, share: float) -> _Served:
    """Of random arrivals."""
    if not share:
        return _Served(0.0, None, None)
    run = run_at(one, np.array([rate]), share)
    most = most_within(one, rate, share)
    if float(run.capacity_requests_per_s[0]) * _ROOM < rate:
        return _Served(most, None, None)
    return _Served(most, float(run.ttft_mean_s[0]), float(run.tpot_mean_s[0]))


def _served(plan: Plan, loads: dict[str, np.ndarray], rate: float, share: float) -> _Served:
    most = plan.performance.requests_per_s * share
    able = np.flatnonzero(loads["requests_per_s"] * share * _ROOM >= rate)
    if not able.size:
        return _Served(most, None, None)
    return _Served(most, *(float(loads[name][able[0]]) for name in ("ttft_s", "tpot_s")))


def _most_cards(cluster: Cluster, cards: int) -> int | None:
    """The largest job on so many cards, None where there is none."""
    whole = cards // cluster.ranks_per_node * cluster.ranks_per_node
    inside = [count for count in cluster.rank_counts if count <= cards]
    return max([*inside, whole], default=None) or None


def _pool_losses(
    plan: Plan, asked: Asked, resolved: Resolved, rate: float, kinds: list[Spare]
) -> Iterator[_Loss]:
    """First that of nothing, then of each role."""
    whole = sum(pool.instances for pool in plan.pools)
    yield _Loss("nothing", whole, _pools_served(plan, (0, 0), rate), None)
    sides = resolve_sides(asked, resolved)
    for one in kinds:
        for place, (pool, side) in enumerate(
            zip(plan.pools, (sides.prefill, sides.decode), strict=True)
        ):
            per_node = side.cluster.ranks_per_node
            stops = instances_lost(np.array(float(pool.strategy.ranks)), per_node, one)
            lost = min(int(stops), pool.instances)
            gone = (lost, 0) if place == 0 else (0, lost)
            cards = one.count * (per_node if one.unit == "node" else 1)
            yield _Loss(
                f"{one.words} of {pool.role}",
                pool.instances - lost,
                _pools_served(plan, gone, rate),
                _without(plan, asked, side.cluster, place, cards),
            )


def _without(plan: Plan, asked: Asked, cluster: Cluster, place: int, gone: int) -> Asked | None:
    """The question with fewer cards where they are lost."""
    apart = asked.prefill_cluster is not None
    own = [pool.cards for pool in plan.pools]
    count = _most_cards(cluster, (own[place] if apart else sum(own)) - gone)
    if count is None:
        return None
    if apart and place == 0:
        return replace(asked, prefill_cards=count)
    return replace(asked, cards=count)


def _pools_served(plan: Plan, gone: tuple[int, int], rate: float) -> _Served:
    """Pools that have lost so many instances of each role."""
    pools = pools_of(plan, gone)
    if pools is None:
        return _Served(0.0, None, None)
    flight = plan.request.workload.concurrency
    limit = Demand(
        in_flight=flight,
        ttft_s=plan.request.limits.ttft_s,
        ttft_p99_s=plan.request.limits.ttft_p99_s,
        at_rate=plan.request.workload.request_rate is not None,
    )
    most = float(serve_pools(pools, limit).requests_per_s)
    given = serve_pools(pools, Demand(in_flight=flight, offered_per_s=rate))
    if float(given.requests_per_s) * _ROOM < rate:
        return _Served(most, None, None)
    return _Served(most, float(given.ttft_s), plan.performance.tpot_s)


def _again(asked: Asked, plan: Plan, rate: float, searched: Searched) -> Replanned | None:
    """The best plan on fewer cards; None where none is legal or fits."""
    work, limits, way = plan.request.workload, plan.request.limits, plan.strategy
    base = replace(
        asked,
        workload=None,
        input_len=work.input_len,
        output_len=work.output_len,
        concurrency=work.concurrency,
        prefix_hit=work.prefix_hit,
        mtp_acceptance=work.mtp_acceptance,
        weight_dtype=way.weight_dtype,
        kv_dtype=way.kv_dtype,
        spare=None,
        spare_unit="card",
        robust=False,
    )
    times: dict[str, Any] = {
        f"{name}_ms": _FREE_MS if value is None else value * 1e3
        for name, value in (("ttft", limits.ttft_s), ("tpot", limits.tpot_s))
    }
    within = _tried(replace(base, objective="throughput", rate=None, **times), searched)
    most = 0.0 if within is None else within.performance.requests_per_s
    at_rate = replace(base, objective="latency", rate=rate)
    found = _tried(replace(at_rate, **times), searched) if most * _ROOM >= rate else None
    holds = found is not None
    if found is None:
        free: dict[str, Any] = dict.fromkeys((*times, "ttft_p99_ms", "tpot_p99_ms"))
        found = _tried(replace(at_rate, **free), searched)
    shown = found if found is not None else within
    if shown is None:
        return None
    from shardplan.search.tables_disagg import instances_words

    ttft_s, tpot_s = _times(found)
    return Replanned(
        cards=shown.cards,
        words=instances_words(shown) or shown.strategy.parallelism().describe(),
        requests_per_s=most,
        holds=holds,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
    )


def _times(plan: Plan | None) -> tuple[float | None, float | None]:
    """(TTFT, TPOT) of a plan at its rate."""
    if plan is None:
        return None, None
    if plan.at_rate is not None:
        return plan.at_rate.ttft.mean_s, plan.at_rate.tpot.mean_s
    return plan.performance.ttft_s, plan.performance.tpot_s


def _tried(asked: Asked, searched: Searched) -> Plan | None:
    try:
        return searched(asked).plan
    except (InfeasibleError, InputError):
        return None
