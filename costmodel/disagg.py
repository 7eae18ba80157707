"""Disaggregated serving: x instances that compute prompts, y that decode, caches sent between.

A prefill instance runs steps of at most `c` tokens a dp group, of prompts alone. Of a prompt, I'
tokens are computed (those not in the prefix cache):

    n = max(floor(c / I'), 1)            whole prompts a step of one group
    k = ceil(I' / c)                     steps (pieces) of one prompt; n or k is 1
    s, S = slowest stage, sum of stages of such a step, h = host time of a step
    busy    = k (s + h)                  until the next prompts can begin
    service = S + (k - 1) s + k h        one prompt through the pipeline
    mu_P    = g n / busy                 prompts a second of an instance of g groups

Below capacity steps hold fewer prompts, m, and are as much shorter (`disagg_queue`: T and the share
of service).

A decode instance has `b` slots a group and decodes only, at the mean context. Of a request's O
tokens it makes all: it computes the last prompt token again, as vllm-ascend 0.23.0
(MooncakeConnectorV1) and vLLM do once the cache is there. n steps follow: O - 1, or fewer where
tokens are predicted ahead (`ServingInput.decode_steps`):

    t    = max(sum of stages, p * slowest stage) + host time    with b / p sequences a microbatch
    mu_D = g b / ((1 + n) t)

The cache of a prompt, B bytes over all ranks of a decode group, is pulled when the prompt is
done, not layer by layer behind the computation. m prompts of a group are done together. With r
ranks in one group (tp * pp * cp) of either side, v bytes/s of the link between two ranks times the
share that a transfer reaches:

    X    = setup + latency + max(B m / r_P, B / r_D) / v
    mu_X = min(x ranks_P, y ranks_D) v / B

Both together serve as `disagg_serve` has it.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from shardplan.costmodel.forward import Pricer
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.pace import Span
from shardplan.costmodel.step_mix import ServingInput
from shardplan.models.errors import InputError

__all__ = [
    "DecodeTimes",
    "Link",
    "PrefillTimes",
    "decode_times",
    "link_between",
    "link_kind",
    "prefill_times",
    "step_prompts",
    "unbounded_utilisation",
]


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
