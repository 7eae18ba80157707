"""Disaggregated serving: x instances that compute prompts, y that decode, caches sent between.

A prefill instance runs steps of at most `c` tokens a dp group, of prompts alone. Of a prompt, I'
tokens are computed (those not in the prefix cache):

    n = max(floor(c / I'), 1)            whole prompts a step of one group
    k = ceil(I' / c)                     steps (pieces) of one prompt; n or k is 1
    s, S = slowest stage, sum of stages of such a step, h = host time of a step
    busy    = k (s + h)                  until the next prompts can begin
    service = S + (k - 1) s + k h        one prompt through the pipeline
    mu_P    = g n / busy                 prompts a second of an instance of g groups

A decode instance has `b` slots a group and decodes only, at the mean context. Of a request's O
tokens it makes all: it computes the last prompt token again, as vllm-ascend 0.23.0
(MooncakeConnectorV1) and vLLM do once the cache is there. n steps follow: O - 1, or fewer where
tokens are predicted ahead (`ServingInput.decode_steps`):

    t    = max(sum of stages, p * slowest stage) + host time    with b / p sequences a microbatch
    mu_D = g b / ((1 + n) t)

The cache of a prompt, B bytes over all ranks of a decode group, is pulled when the prompt is
done, not layer by layer behind the computation. n prompts of a group are done together. With r
ranks in one group (tp * pp * cp) of either side, v bytes/s of the link between two ranks times the
share that a transfer reaches:

    X    = setup + latency + max(B n / r_P, B / r_D) / v
    mu_X = min(x ranks_P, y ranks_D) v / B

Deployment, M = x mu_P, utilisation rho = rate / M, A = service + X + t:

    wait = f rho busy / (2 (1 - rho))         M/D/1, whose server takes a step's prompts at once
    TTFT = wait + A     TPOT = n t / (O - 1)     latency = TTFT + n t
    rate = min(rho_max M, y mu_D, mu_X)

  open      f = 1; a limit L on TTFT gives rho_max = 2 w / (busy + 2 w), w = L - A; without one
            rho_max is a stated number
  closed    C requests in flight, rate * latency = C. An arriving request meets the C - 1 others:
            f = (C - 1) / C. Of  rho^2 M (f busy / 2 - a) + rho (M a + C) - C = 0  with
            a = A + n t the root in (0, 1] is rho_max; where decode or transfer is slower
            than that, requests wait for it: TTFT = C / rate - n t
  offered   rate = R, for the objective latency

A limit on the 99th percentile of TTFT bounds the queue and the slots in use (`disagg_tail`).

Left out: bursts beyond M/D/1, length distributions, idle groups of a step, transfers that queue
behind one another, blocks that a request holds while its cache arrives, the proxy's own time.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.disagg_tail import (
    Queue,
    most_in_slots,
    most_rate,
    ttft_beyond_s,
    wait_s,
)
from shardplan.costmodel.forward import Pricer
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.pace import Span
from shardplan.costmodel.step_mix import ServingInput
from shardplan.models.errors import InputError

__all__ = [
    "BOUNDS",
    "DecodeTimes",
    "Demand",
    "Link",
    "Pools",
    "PrefillTimes",
    "Service",
    "decode_times",
    "link_between",
    "link_kind",
    "prefill_times",
    "serve_pools",
    "step_prompts",
    "transfer_s",
    "unbounded_utilisation",
]

BOUNDS = ("prefill", "decode", "transfer", "demand")
"""What the rate of a deployment is bound by."""


@functools.cache
def _data() -> Mapping[str, Any]:
    file = resources.files("shardplan.costmodel") / "data" / "disagg.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _number(name: str) -> float:
    return float(_data()[name]["value"])


def unbounded_utilisation() -> float:
    """How far prefill instances are loaded where nothing bounds their queue."""
    return _number("unbounded_utilisation")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTimes:
    """One prefill instance, arrays over its step sizes."""

    prompts: Array
    """Whole prompts a step of one dp group."""
    busy_s: Array
    service_s: Array
    prompts_per_s: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTimes:
    """One decode instance, arrays over its slots."""

    step_s: Array
    later_s: Array
    """All tokens of a request after the first."""
    tpot_s: Array
    requests_per_s: Array


def step_prompts(chunk: Array, prompt: Array) -> tuple[Array, Array, Array]:
    """(prompts a step n, pieces a prompt k, tokens of a step) for steps of at most `chunk`."""
    prompts = np.maximum(np.floor(chunk / prompt), 1.0)
    pieces = np.maximum(np.ceil(prompt / chunk), 1.0)
    return prompts, pieces, np.where(pieces > 1.0, prompt / pieces, prompts * prompt)


def prefill_times(
    model: Pricer, step: Span, *, groups: int, prompts: Array, pieces: Array
) -> PrefillTimes:
    """Times of an instance whose steps take so long over its stages."""
    host = model.host_s("prefill")
    busy = pieces * (step.slowest_s + host)
    return PrefillTimes(
        prompts=prompts,
        busy_s=busy,
        service_s=step.total_s + (pieces - 1.0) * step.slowest_s + pieces * host,
        prompts_per_s=groups * prompts / busy,
    )


def decode_times(
    model: Pricer, span: Span, *, stages: int, groups: int, slots: Array, given: ServingInput
) -> DecodeTimes:
    """Times of an instance whose steps take so long over its `stages`.

    `given`: lengths, and the tokens that are predicted ahead.
    """
    step = np.maximum(span.total_s, span.slowest_s * stages) + model.host_s("decode")
    steps = given.decode_steps
    return DecodeTimes(
        step_s=step,
        later_s=steps * step,
        tpot_s=given.steps_per_token * step,
        requests_per_s=groups * slots / ((1.0 + steps) * step),
    )


def link_kind() -> str:
    """What the rate of a transfer rests on."""
    return str(_data()["link_efficiency"]["kind"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What joins a rank of one pool to a rank of the other."""

    tier: str
    bytes_per_s: float
    """One rank's rate to one other that a transfer of a cache reaches."""
    latency_s: float
    """Setup of a transfer and the way to the other rank."""


def link_between(prefill: Cluster, decode: Cluster, cards: int, *, same: bool) -> Link:
    """The link between pools: of one cluster the innermost tier that joins its `cards`.

    Two clusters meet over RoCE, at the rate of the slower. `InputError` where one has none.
    """
    if same:
        tier = next(one for one in prefill.tiers if one.ranks >= min(cards, prefill.ranks))
        tiers = [tier]
    else:
        tiers = [tier for one in (prefill, decode) for tier in one.tiers if tier.topology == "roce"]
        lacking = [one.name for one in (prefill, decode) if not _has_roce(one)]
        if lacking:
            raise InputError(
                "pools on two clusters are joined by RoCE, a tier of both",
                got=f"no roce tier: {', '.join(lacking)}",
                hint="name a cluster with a roce tier, or run both pools on one cluster",
            )
    slowest = min(tiers, key=lambda one: one.link_bytes_per_s)
    return Link(
        tier=slowest.name,
        bytes_per_s=slowest.link_bytes_per_s * _number("link_efficiency"),
        latency_s=_number("setup_us") * 1e-6 + max(one.latency_s for one in tiers),
    )


def _has_roce(cluster: Cluster) -> bool:
    return any(tier.topology == "roce" for tier in cluster.tiers)


def transfer_s(link: Link, sent_bytes: Array, received_bytes: Array) -> Array:
    """Seconds from a prompt's end until its cache is there.

    `sent_bytes`: what one prefill rank sends of the prompts that end together (B n / r_P);
    `received_bytes`: what one decode rank takes of a prompt (B / r_D).
    """
    return link.latency_s + np.maximum(sent_bytes, received_bytes) / link.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of a deployment."""

    in_flight: float | None = None
    offered_per_s: float | None = None
    """Requests a second that come; None: as many as can be served."""
    ttft_s: float | None = None
    ttft_p99_s: float | None = None

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
    service_s: Array
    decode_per_s: Array
    step_s: Array
    later_s: Array
    """All tokens of a request after the first."""
    transfer_s: Array
    transfer_per_s: Array

    @property
    def first_s(self) -> Array:
        """TTFT of a request that does not wait."""
        return np.asarray(self.service_s + self.transfer_s + self.step_s)

    @property
    def slots(self) -> Array:
        """Of all decode instances."""
        return np.asarray(self.decode_per_s * (self.step_s + self.later_s))

    @property
    def queue(self) -> Queue:
        """Of prompts."""
        return Queue(self.prefill_instances, self.prefill_per_s, self.busy_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """Means in steady state, arrays of the pools' shape."""

    requests_per_s: Array
    ttft_s: Array
    end_to_end_s: Array
    wait_s: Array
    bound: NDArray[np.int64]
    """Index into `BOUNDS`."""
    ttft_p99_s: Array | None = None
    """Where it is limited."""


def _closed(pools: Pools, demand: Demand, alone_s: Array, in_flight: float) -> Array:
    """Utilisation of the prefill pool at which a closed population is all in flight."""
    most = pools.prefill_per_s
    wait = (in_flight - 1.0) / in_flight * pools.busy_s / 2.0
    square = most * (wait - alone_s)
    linear = most * alone_s + in_flight
    inside = np.maximum(linear * linear + 4.0 * square * in_flight, 0.0)
    return np.asarray(2.0 * in_flight / (linear + np.sqrt(inside)))


def _closed_beyond_s(pools: Pools, filled: Array, in_flight: float) -> Array:
    """What the 99th percentile of the wait has beyond its mean, where all are in flight.

    Of the rate at which the prompts alone let them be: no more decode instances raise it.
    """
    rate = filled * pools.prefill_per_s
    mean = filled * pools.busy_s / (2.0 * np.maximum(1.0 - filled, 1e-300))
    prompts = pools.prefill_per_s * pools.busy_s
    most = np.ceil((in_flight - 1.0) / prompts - 1e-9) * pools.busy_s
    return np.maximum(np.minimum(wait_s(pools.queue, rate), most) - mean, 0.0)


def _limits(pools: Pools, demand: Demand, filled: Array) -> list[Array]:
    """Requests a second that each of `BOUNDS` allows, of one shape."""
    prompts, decode = pools.prefill_per_s * filled, pools.decode_per_s
    if demand.ttft_p99_s is not None and demand.in_flight is None:
        left_s = demand.ttft_p99_s - pools.first_s
        prompts = np.minimum(prompts, most_rate(pools.queue, left_s, pools.step_s))
        decode = most_in_slots(pools.slots) / (pools.step_s + pools.later_s)
    offered = np.inf if demand.offered_per_s is None else demand.offered_per_s
    return list(np.broadcast_arrays(prompts, decode, pools.transfer_per_s, offered))


def serve_pools(pools: Pools, demand: Demand) -> Service:
    """Steady state of many deployments at once (the formulas above)."""
    first, most_s = pools.first_s, demand.mean_ttft_s
    if demand.in_flight is not None:
        filled = _closed(pools, demand, first + pools.later_s, demand.in_flight)
    elif most_s is not None:
        room = np.maximum(most_s - first, 0.0)
        filled = 2.0 * room / (pools.busy_s + 2.0 * room)
    else:
        filled = np.full((), unbounded_utilisation())
    limits = _limits(pools, demand, filled)
    rate, bound = limits[0], np.zeros(limits[0].shape, dtype=np.int64)
    for index, limit in enumerate(limits[1:], start=1):
        bound = np.where(limit < rate, index, bound)
        rate = np.minimum(rate, limit)
    used = rate / pools.prefill_per_s
    with np.errstate(divide="ignore", invalid="ignore"):
        wait = used * pools.busy_s / (2.0 * np.maximum(1.0 - used, 1e-300))
        if demand.in_flight is not None:
            wait = np.maximum(demand.in_flight / rate - pools.later_s - first, 0.0)
    late = None
    if demand.ttft_p99_s is not None:
        late = _ttft_p99_s(pools, demand, rate, wait, filled)
    return Service(
        requests_per_s=rate,
        ttft_s=wait + first,
        end_to_end_s=wait + first + pools.later_s,
        wait_s=wait,
        bound=bound,
        ttft_p99_s=late,
    )


def _ttft_p99_s(pools: Pools, demand: Demand, rate: Array, mean_s: Array, filled: Array) -> Array:
    """99th percentile of TTFT, no less than its mean; `mean_s`: of the wait."""
    waited = wait_s(pools.queue, rate)
    if demand.in_flight is not None:
        waited = mean_s + _closed_beyond_s(pools, filled, demand.in_flight)
    found = ttft_beyond_s(pools.first_s, pools.step_s, waited)
    return np.maximum(found, pools.first_s + mean_s)
