"""Prefill and decode pools for `bench_agreement`: deployments, and what either model says."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from agreement_cases import (  # type: ignore[import-not-found]  # beside this script
    Case,
    Kept,
    Seen,
    instance,
    scorer,
    settled,
)

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.disagg import (
    Link,
    decode_times,
    link_between,
    prefill_times,
    step_prompts,
)
from shardplan.costmodel.disagg_run import DecodeSteps, run_pools
from shardplan.costmodel.disagg_serve import Pools
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.pace import Span, stage_times
from shardplan.costmodel.simulate.deploy import units_of
from shardplan.costmodel.simulate.events import Sending, Simulation
from shardplan.costmodel.simulate.lengths import Fixed
from shardplan.costmodel.simulate.workload import Demand, requests
from shardplan.costmodel.step_mix import ServingInput
from shardplan.costmodel.steps import decode_stages, prompt_stages
from shardplan.search.evaluate import LayoutScorer
from shardplan.search.space import Choice

REQUESTS = 12_000


class PoolsCase(NamedTuple):
    """x prefill instances and y decode instances of one cluster, and lengths."""

    model: str
    cluster: str
    dtype: str
    engine: str
    prefill: dict[str, int]
    chunk: int
    x: int
    decode: dict[str, int]
    slots: int
    y: int
    input_len: int
    output_len: int

    @property
    def name(self) -> str:
        """Model, instances and axes."""
        sides = (
            f"{count}{letter} {' '.join(f'{name}{size}' for name, size in axes.items())}"
            for letter, count, axes in (("P", self.x, self.prefill), ("D", self.y, self.decode))
        )
        return f"{self.model} {' + '.join(sides)}"

    @property
    def lengths(self) -> str:
        """Prompt and output."""
        return f"{self.input_len}/{self.output_len}"

    def side(self, axes: dict[str, int], slots: int, chunk: int) -> Case:
        """One pool's instance."""
        lengths = self.input_len, self.output_len
        return Case(self.model, self.cluster, axes, self.dtype, slots, chunk, *lengths)


_L8 = ("llama-3.1-8b", "atlas-800t-a2", "bf16")
_Q30 = ("qwen3-30b-a3b", "atlas-800t-a2", "bf16")
_Q32 = ("qwen3-32b", "atlas-800i-a2", "w8a8")
_DS = ("deepseek-v3", "atlas-800i-a3", "w8a8")
_EP4 = {"tp": 1, "dp": 4, "ep": 4}
_EP16 = {"tp": 4, "dp": 4, "ep": 16}
_EP32 = {"tp": 1, "dp": 32, "ep": 32}
CASES = (
    PoolsCase(*_L8, "vllm-ascend", {"tp": 2}, 4096, 1, {"tp": 2}, 64, 1, 2048, 128),
    PoolsCase(*_L8, "vllm-ascend", {"tp": 1}, 2048, 3, {"tp": 1}, 48, 2, 2048, 128),
    PoolsCase(*_L8, "vllm-ascend", {"tp": 1}, 8192, 2, {"tp": 1}, 64, 4, 512, 256),
    PoolsCase(*_Q32, "mindie", {"tp": 4}, 8192, 4, {"tp": 4}, 64, 4, 3000, 256),
    PoolsCase(*_Q30, "vllm-ascend", _EP4, 4096, 2, _EP4, 64, 1, 1024, 256),
    PoolsCase(*_DS, "vllm-ascend", _EP16, 4096, 3, _EP32, 24, 1, 3500, 512),
    PoolsCase(*_DS, "vllm-ascend", _EP16, 8192, 3, _EP32, 48, 1, 1000, 512),
    PoolsCase(*_L8, "mindie", {"tp": 1}, 16384, 4, {"tp": 2}, 96, 2, 1000, 200),
)
LOADS = (0.5, 0.8, 0.9)
_DRAWN = (
    (_L8, ({"tp": 1}, {"tp": 2}), ({"tp": 1}, {"tp": 2})),
    (_Q32, ({"tp": 4}, {"tp": 8}), ({"tp": 4},)),
    (_Q30, ({"tp": 2}, _EP4), ({"tp": 2}, _EP4)),
    (_DS, (_EP16,), (_EP32,)),
)


def drawn_pools(count: int, seed: int) -> list[tuple[PoolsCase, float]]:
    """Pools and loads at random, of those that fit: nobody chose them."""
    luck = random.Random(seed)
    found: list[tuple[PoolsCase, float]] = []
    while len(found) < count:
        base, firsts, lasts = luck.choice(_DRAWN)
        engine, load = luck.choice(["vllm-ascend", "mindie"]), luck.uniform(0.3, 0.85)
        prompt, output = round(2 ** luck.uniform(7, 12.5)), round(2 ** luck.uniform(6, 9.6))
        chunk, slots = luck.choice([2048, 4096, 8192, 16384]), luck.choice([16, 32, 64, 96])
        x, y = luck.choice([1, 2, 3, 4, 6]), luck.choice([1, 2, 3])
        if prompt > chunk:
            continue
        sides = luck.choice(firsts), chunk, x, luck.choice(lasts), slots, y
        case = PoolsCase(*base, engine, *sides, prompt, output)
        made = scorer(_last(case), engine)
        held = made.memory(_choice(case), np.array([float(slots)]), np.array([float(slots)]))
        if float(held[0]) <= made.ledger.capacity_bytes:
            found.append((case, load))
    return found


def _choice(case: PoolsCase) -> Choice:
    return Choice(attention="flash", weight_dtype=case.dtype, kv_dtype="bf16")


def _first(case: PoolsCase) -> Case:
    held = max(case.chunk // case.input_len, 1) * case.prefill.get("pp", 1)
    return case.side(case.prefill, 2 * held, case.chunk)


def _last(case: PoolsCase) -> Case:
    return case.side(case.decode, case.slots, case.slots)


def _given(case: PoolsCase) -> ServingInput:
    return ServingInput(
        batch=np.ones(()),
        chunk=np.ones(()),
        input_len=float(case.input_len),
        output_len=float(case.output_len),
        weight_dtype=case.dtype,
    )


def _prompt_span(case: PoolsCase, made: LayoutScorer, tokens: Array) -> Span:
    stages = prompt_stages(
        made.model,
        _given(case),
        piece=tokens,
        prompt=np.asarray(float(case.input_len)),
        sequences=np.zeros(()),
    )
    return stage_times(made.model, stages, "prefill")


class Both(NamedTuple):
    """A deployment as either model takes it."""

    pools: Pools
    steps: DecodeSteps
    layouts: tuple[LayoutScorer, LayoutScorer]
    link: Link

    @property
    def most_per_s(self) -> float:
        """Requests a second that both pools serve."""
        return float(min(self.pools.prefill_per_s, self.pools.decode_per_s))


def both_of(case: PoolsCase) -> Both:
    """Instances priced by their step models."""
    first, last = scorer(_first(case), case.engine), scorer(_last(case), case.engine)
    given, prompt = _given(case), np.asarray(float(case.input_len))
    held, pieces, tokens = step_prompts(np.asarray(float(case.chunk)), prompt)
    times = prefill_times(
        first.model,
        _prompt_span(case, first, tokens),
        groups=first.model.groups,
        prompts=held,
        pieces=pieces,
    )
    one_s = times.busy_s
    if held > 1.0:
        alone = _prompt_span(case, first, prompt).slowest_s + first.model.host_s("prefill")
        one_s = np.clip(alone, times.busy_s / held, times.busy_s)
    sizes = np.unique(np.round(np.geomspace(1.0, case.slots, 24)))
    stages = decode_stages(last.model, given, np.maximum(np.ceil(sizes / last.model.stages), 1.0))
    decode = decode_times(
        last.model,
        stage_times(last.model, stages, "decode"),
        stages=last.model.stages,
        groups=last.model.groups,
        slots=sizes,
        given=given,
    )
    ranks = case.x * first.parallel.ranks + case.y * last.parallel.ranks
    cluster = load_cluster(
        case.cluster, nodes=-(-ranks // load_cluster(case.cluster).ranks_per_node)
    )
    link = link_between(cluster, cluster, ranks, same=True)
    taker = instance(_last(case), last)
    cache = taker.token_bytes * math.ceil(case.input_len / taker.block_tokens) * taker.block_tokens
    sender = instance(_first(case), first)
    pools = Pools(
        prefill_instances=np.asarray(float(case.x)),
        prefill_per_s=np.asarray(case.x * times.prompts_per_s),
        busy_s=times.busy_s,
        one_s=np.asarray(one_s),
        prompts=held,
        service_s=times.service_s,
        decode_per_s=case.y * decode.requests_per_s[-1],
        step_s=decode.step_s[-1],
        later_s=decode.later_s[-1],
        setup_s=np.asarray(link.latency_s),
        sent_s=np.asarray(cache / sender.ranks / link.bytes_per_s),
        received_s=np.asarray(cache / taker.ranks / link.bytes_per_s),
        transfer_per_s=np.asarray(math.inf),
    )
    steps = DecodeSteps(
        sequences=sizes,
        step_s=decode.step_s,
        instances=case.y,
        groups=case.y * last.model.groups,
        passes=1.0 + float(given.decode_steps),
        per_token=float(given.steps_per_token),
    )
    return Both(pools, steps, (first, last), link)


def pools_told(both: Both, rate: float) -> Seen:
    """What the formulas say at a rate."""
    run = run_pools(both.pools, both.steps, rate)
    return Seen(rate, run.tpot_s[0], run.ttft_s[0], run.ttft_s[1], run.ttft_s[3])


def pools_simulated(case: PoolsCase, both: Both, rate: float, count: int = REQUESTS) -> Seen:
    """What the simulator says."""
    demand = Demand(
        input_len=Fixed(case.input_len),
        output_len=Fixed(case.output_len),
        concurrency=None,
        rate=rate,
        count=count,
    )
    kept = Kept()
    run = Simulation(requests(demand), kept)
    sender = replace(instance(_first(case), both.layouts[0]), sends=True)
    taker = instance(_last(case), both.layouts[1])
    first = units_of(sender, run, count=case.x)
    last = units_of(
        taker,
        run,
        count=case.y,
        first=sum(len(unit.engines) for unit in first),
        first_unit=len(first),
    )
    sending = Sending(
        link=both.link,
        token_bytes=taker.token_bytes,
        senders=sender.ranks,
        receivers=taker.ranks,
    )
    run.serve_with(first, "least-load", decode=last, sending=sending)
    run.run()
    return settled(kept.ended, None)
