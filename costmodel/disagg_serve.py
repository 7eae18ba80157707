"""What x prefill and y decode instances serve together.

The times of instances are those of `disagg`: busy, service, t, n t; M = x mu_P. A request waits for
its prompt's turn (`disagg_queue`: w, T_1, T_n) and, where others decode, for their step to end; at
a rate R, with m prompts a group in steps of T

    A(T, m) = service T / busy + X(m) + t (1 + f / 2)
    TTFT    = min(A(T_1, 1) + f w(x / T_1), A(T_n, n) + f (T_n / 2 + w(M)))
    TPOT    = n t / (O - 1)     latency = TTFT + n t
    rate    = min(prompts, y mu_D, mu_X)

That is the safe side: steps between one prompt and all are those of smaller ones, which the search
has too, and what requests see at a rate is told by `disagg_run`.

  open      f = 1; prompts: the largest R that keeps the limits on TTFT; without one a stated share
            of M
  closed    C requests in flight, R * latency = C. An arriving request meets the C - 1 others:
            f = (C - 1) / C. prompts: the R at which all are in flight; where decode or transfer is
            slower than that, requests wait for it: TTFT = C / R - n t
  offered   rate = R, for the objective latency

A limit on the 99th percentile of TTFT bounds the queue and the slots in use (`disagg_tail`); the
slots, too, a limit on the mean at a rate that is asked.

Left out: bursts beyond random arrivals, length distributions, transfers that queue behind one
another, blocks that a request holds while its cache arrives, the proxy's own time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.disagg import unbounded_utilisation
from shardplan.costmodel.disagg_queue import BEYOND, Filled, Queue, largest_share, waits_in
from shardplan.costmodel.disagg_tail import most_in_slots, ttft_beyond_s
from shardplan.costmodel.kernels.base import Array

__all__ = [
    "BOUNDS",
    "Demand",
    "Passed",
    "Pools",
    "Service",
    "allowed_beside",
    "passed",
    "prompts_bind",
    "serve_pools",
]

_FULL = 1.0 - 1e-9
"""Share of capacity that counts as all of it."""
BOUNDS = ("prefill", "decode", "transfer", "demand")
"""What the rate of a deployment is bound by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of a deployment."""

    in_flight: float | None = None
    offered_per_s: float | None = None
    """Requests a second that come; None: as many as can be served."""
    ttft_s: float | None = None
    ttft_p99_s: float | None = None
    at_rate: bool = False
    """Whether limits hold for requests that come at random, at a rate that is asked."""

    @property
    def finds_slots(self) -> bool:
        """Whether requests that come at random must find a decode slot free (`disagg_tail`)."""
        late = self.ttft_p99_s is not None or (self.at_rate and self.ttft_s is not None)
        return self.in_flight is None and late

    @property
    def mean_ttft_s(self) -> float | None:
        """The most that TTFT may be on average: no percentile limit is below it."""
        given = [one for one in (self.ttft_s, self.ttft_p99_s) if one is not None]
        return min(given, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """x prefill and y decode instances; arrays broadcast. Rates are of all instances."""

    prefill_instances: Array
    prefill_per_s: Array
    busy_s: Array
    one_s: Array
    """Of a step with one prompt a group, as `busy_s` of a full one."""
    prompts: Array
    """Of a group in a full step."""
    service_s: Array
    """Of a prompt in a full step."""
    decode_per_s: Array
    step_s: Array
    later_s: Array
    """All tokens of a request after the first."""
    setup_s: Array
    """Of a transfer."""
    sent_s: Array
    """A rank's part of a prompt's cache, sent."""
    received_s: Array
    transfer_per_s: Array

    @property
    def alone_s(self) -> Array:
        """TTFT of a request that finds nobody."""
        service = self.service_s * self.one_s / self.busy_s
        sent = np.maximum(self.sent_s, self.received_s)
        return np.asarray(service + self.setup_s + sent + self.step_s)

    @property
    def slots(self) -> Array:
        """Of all decode instances."""
        return np.asarray(self.decode_per_s * (self.step_s + self.later_s))

    @property
    def queue(self) -> Queue:
        """Of prompts."""
        return Queue.of(
            self.prefill_instances, self.prefill_per_s, self.busy_s, self.one_s, self.prompts
        )

    def some(self, where: NDArray[np.bool_] | NDArray[np.intp]) -> Pools:
        """Those at places, or where a mask that all broadcast to holds, flat."""
        columns = {one.name: getattr(self, one.name) for one in fields(self)}
        if where.dtype == np.bool_:
            columns = {name: np.broadcast_to(one, where.shape) for name, one in columns.items()}
        return Pools(**{name: one[where] for name, one in columns.items()})


class Passed(NamedTuple):
    """Seconds of a prompt from its start until its cache is where it decodes."""

    service_s: Array
    transfer_s: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """Means in steady state, arrays of the pools' shape."""

    requests_per_s: Array
    ttft_s: Array
    end_to_end_s: Array
    wait_s: Array
    passed: Passed
    bound: NDArray[np.int64]
    """Index into `BOUNDS`."""
    ttft_p99_s: Array | None = None
    """Where it is limited."""


def passed(pools: Pools, steps: Filled) -> Passed:
    """What a prompt takes in steps that are so full."""
    sent = np.maximum(steps.prompts * pools.sent_s, pools.received_s)
    return Passed(pools.service_s * (steps.step_s / pools.busy_s), pools.setup_s + sent)


def _first_s(pools: Pools, steps: Filled, others: float) -> Array:
    """TTFT but for the wait for a prompt's turn (A); `others`: f."""
    service_s, transfer_s = passed(pools, steps)
    return np.asarray(service_s + transfer_s + (1.0 + others / 2.0) * pools.step_s)


def _both(pools: Pools) -> tuple[Filled, Filled]:
    """Steps with one prompt a group, and full ones."""
    return Filled(np.ones(()), pools.one_s), Filled(pools.prompts, pools.busy_s)


class _Mean(NamedTuple):
    """Seconds of both ways to see the queue."""

    first_s: tuple[Array, Array]
    wait_s: tuple[Array, Array]

    @classmethod
    def of(cls, pools: Pools, queue: Queue, rate: Array, others: float) -> _Mean:
        """At a rate; `others`: f."""
        one, full = (_first_s(pools, steps, others) for steps in _both(pools))
        if not others:
            return cls((one, full), (np.zeros(()), np.zeros(())))
        waits = waits_in(queue, rate, pools.busy_s)
        return cls((one, full), (others * waits[0], others * waits[1]))

    @property
    def ttft_s(self) -> Array:
        """The lesser."""
        return np.minimum(*(a + b for a, b in zip(self.first_s, self.wait_s, strict=True)))

    @property
    def singly(self) -> NDArray[np.bool_]:
        """Whether that is of steps with one prompt."""
        one, full = (a + b for a, b in zip(self.first_s, self.wait_s, strict=True))
        return np.asarray(one <= full)


def _late_s(pools: Pools, queue: Queue, demand: Demand, rate: Array) -> Array:
    """By how much random arrivals at a rate break the limits on TTFT; below 0 where they do not."""
    late = np.asarray(-np.inf)
    if demand.mean_ttft_s is not None:
        late = _Mean.of(pools, queue, rate, 1.0).ttft_s - demand.mean_ttft_s
    if demand.ttft_p99_s is not None:
        late = np.maximum(late, _tail_s(pools, queue, rate) - demand.ttft_p99_s)
    return np.asarray(late)


def _tail_s(pools: Pools, queue: Queue, rate: Array) -> Array:
    """99th percentile of TTFT of random arrivals."""
    found = (
        ttft_beyond_s(_first_s(pools, steps, 0.0), pools.step_s, waited)
        for steps, waited in zip(
            _both(pools), waits_in(queue, rate, pools.busy_s, BEYOND), strict=True
        )
    )
    return np.asarray(functools.reduce(np.minimum, found))


def _flight(pools: Pools, queue: Queue, in_flight: float, rate: Array) -> Array:
    """Requests in flight at a rate, of a population of so many, beyond these."""
    others = (in_flight - 1.0) / in_flight
    latency = _Mean.of(pools, queue, rate, others).ttft_s + pools.later_s
    return np.asarray(rate * latency - in_flight)


def _beyond(pools: Pools, queue: Queue, demand: Demand, rate: Array) -> Array:
    """Above 0 where a rate is more than the prompts allow."""
    if demand.in_flight is not None:
        return _flight(pools, queue, demand.in_flight, rate)
    return _late_s(pools, queue, demand, rate)


def _prompt_rate(pools: Pools, demand: Demand) -> Array:
    """Requests a second at which the limits on TTFT are just kept, or all are in flight."""
    shapes = (getattr(pools, one.name).shape for one in fields(pools))
    shape = np.broadcast_shapes(*shapes)
    flat = pools.some(np.ones(shape, dtype=bool))

    def late_of(places: NDArray[np.intp]) -> Callable[[Array], Array]:
        some = flat.some(places)
        queue = some.queue

        def beyond(share: Array) -> Array:
            found = _beyond(some, queue, demand, share * some.prefill_per_s)
            return np.asarray((1.0 - share) * found)

        return beyond

    top = np.ones(flat.busy_s.shape)
    if demand.in_flight is not None:
        alone = flat.prefill_per_s * (flat.alone_s + flat.later_s)
        top = np.minimum(top, demand.in_flight / alone)
    return np.asarray(largest_share(late_of, top) * flat.prefill_per_s).reshape(shape)


def _allowed(pools: Pools, demand: Demand) -> list[Array]:
    """Requests a second that each of `BOUNDS` allows, of prompts whatever TTFT then is."""
    most, decode = pools.prefill_per_s, pools.decode_per_s
    if demand.in_flight is None and demand.mean_ttft_s is None:
        most = unbounded_utilisation() * most
    if demand.finds_slots:
        decode = most_in_slots(pools.slots) / (pools.step_s + pools.later_s)
    offered = np.inf if demand.offered_per_s is None else demand.offered_per_s
    columns = (pools.service_s, pools.later_s, pools.sent_s, pools.received_s)
    return list(np.broadcast_arrays(most, decode, pools.transfer_per_s, offered, *columns)[:4])


def _rest(allowed: list[Array]) -> Array:
    return functools.reduce(np.minimum, allowed[1:])


def allowed_beside(pools: Pools, demand: Demand) -> Array:
    """Requests a second that everything but prompts allows."""
    return _rest(_allowed(pools, demand))


def _prompts_bind(pools: Pools, demand: Demand, allowed: list[Array]) -> NDArray[np.bool_]:
    rest = _rest(allowed)
    if demand.in_flight is None and demand.mean_ttft_s is None:
        return np.asarray(allowed[0] < rest)
    rate = np.minimum(rest, allowed[0] * _FULL)
    beyond = _beyond(pools, pools.queue, demand, rate)
    return np.asarray((beyond > 0.0) | (rest > rate))


def prompts_bind(pools: Pools, demand: Demand) -> NDArray[np.bool_]:
    """Whether prompts, and limits on TTFT, allow less than everything else does.

    More prefill instances, or fewer decode instances, never make it so.
    """
    return _prompts_bind(pools, demand, _allowed(pools, demand))


def _limits(pools: Pools, demand: Demand, worth: Array | None) -> list[Array]:
    """Requests a second that each of `BOUNDS` allows; inf where another allows less."""
    allowed = _allowed(pools, demand)
    if demand.in_flight is None and demand.mean_ttft_s is None:
        return allowed
    bound = _prompts_bind(pools, demand, allowed)
    prompts = np.full(bound.shape, np.inf)
    if worth is not None:
        less = bound & (np.minimum(allowed[0], _rest(allowed)) < worth)
        prompts[less] = 0.0
        bound &= ~less
    if bound.any():
        prompts[bound] = _prompt_rate(pools.some(bound), demand)
    return [prompts, *allowed[1:]]


def serve_pools(pools: Pools, demand: Demand, worth: Array | None = None) -> Service:
    """Steady state of many deployments at once (the formulas above).

    `worth`: requests a second; of those that cannot serve as many a rate of 0 is told.
    """
    limits = _limits(pools, demand, worth)
    rate, bound = limits[0], np.zeros(limits[0].shape, dtype=np.int64)
    for index, limit in enumerate(limits[1:], start=1):
        bound = np.where(limit < rate, index, bound)
        rate = np.minimum(rate, limit)
    others, queue = 1.0, pools.queue
    if demand.in_flight is not None:
        others = (demand.in_flight - 1.0) / demand.in_flight
    mean = _Mean.of(pools, queue, rate, others)
    singly = mean.singly
    first, wait = (np.where(singly, *ways) for ways in (mean.first_s, mean.wait_s))
    if demand.in_flight is not None:
        with np.errstate(divide="ignore"):
            wait = np.maximum(demand.in_flight / rate - pools.later_s - first, 0.0)
    late = None
    if demand.ttft_p99_s is not None:
        late = _ttft_p99_s(pools, demand, rate, wait, first)
    return Service(
        requests_per_s=rate,
        ttft_s=wait + first,
        end_to_end_s=wait + first + pools.later_s,
        wait_s=wait,
        passed=_picked(singly, *(passed(pools, steps) for steps in _both(pools))),
        bound=bound,
        ttft_p99_s=late,
    )


def _picked(singly: NDArray[np.bool_], one: Passed, full: Passed) -> Passed:
    return Passed(
        np.where(singly, one.service_s, full.service_s),
        np.where(singly, one.transfer_s, full.transfer_s),
    )


def _ttft_p99_s(pools: Pools, demand: Demand, rate: Array, wait_s: Array, first_s: Array) -> Array:
    """99th percentile of TTFT, no less than its mean, whose parts are told."""
    if demand.in_flight is None:
        return np.maximum(_tail_s(pools, pools.queue, rate), first_s + wait_s)
    others = (demand.in_flight - 1.0) / demand.in_flight
    waited = wait_s + _closed_beyond_s(pools, demand, demand.in_flight)
    alone = first_s - others / 2.0 * pools.step_s
    found = ttft_beyond_s(alone, pools.step_s, waited)
    return np.asarray(np.maximum(found, first_s + wait_s))


def _closed_beyond_s(pools: Pools, demand: Demand, in_flight: float) -> Array:
    """What the 99th percentile of the wait has beyond its mean, where all are in flight.

    Of the rate at which the prompts alone let them be: no more decode instances raise it.
    """
    rate, queue = _prompt_rate(pools, demand), pools.queue
    prompts = pools.prefill_per_s * pools.busy_s
    most = np.ceil((in_flight - 1.0) / prompts - 1e-9) * pools.busy_s
    late, mean = (
        functools.reduce(np.minimum, waits_in(queue, rate, pools.busy_s, beyond))
        for beyond in (BEYOND, None)
    )
    return np.asarray(np.maximum(np.minimum(late, most) - mean, 0.0))
