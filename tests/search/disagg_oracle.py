"""The oracle of disaggregated search: every pair of instances and every count by plain loops.

It prices single points through the step model of each whole layout (never templates), has its own
enumeration, its own legality and its own formulas of the queue (a bisection where the search has
a root).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from tests.search.disagg_oracle_layouts import VLLM, layouts
from tests.search.disagg_oracle_queue import Prompts, largest, late, later_steps

from shardplan.costmodel.disagg import unbounded_utilisation
from shardplan.costmodel.load import Parts
from shardplan.costmodel.serving import ServingInput
from shardplan.costmodel.step import StepModel
from shardplan.costmodel.steps import decode_stages, prompt_stages
from shardplan.models.errors import LayoutError
from shardplan.models.parallel import Parallelism
from shardplan.search.disagg_question import DisaggQuestion
from shardplan.search.disagg_space import Pool
from shardplan.search.evaluate import LayoutScorer, Question
from shardplan.search.space import Choice

__all__ = ["Deployment", "best_deployment", "every_deployment", "space_size"]

_EPS = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prefill:
    parallel: Parallelism
    prompts: int
    busy_s: float
    one_s: float
    service_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decode:
    parallel: Parallelism
    rate: float
    step_s: float
    later_s: float
    tpot_s: float
    request_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What the oracle knows of one deployment."""

    objective: float
    cards: int
    spent: float
    """Cards by their price."""
    rate: float
    ttft_s: float
    tpot_s: float


def _scorer(question: DisaggQuestion, pool: Pool, par: Parallelism) -> LayoutScorer | None:
    """The scorer of a layout; None where it cannot be applied or the engine forbids it."""
    if (par.sp and par.tp == 1) or par.tp > pool.cluster.ranks_per_node:
        return None
    vllm = "vllm" in pool.engine.name
    places = [VLLM.index(axis) for axis in par.order if getattr(par, axis) > 1]
    if vllm and places != sorted(places):
        return None
    if vllm and (par.ep not in (1, par.tp * par.dp * par.cp) or par.cp > 1 < par.dp):
        return None
    if pool.engine.name == "vllm-ascend" and par.mtp and par.pp > 1 and pool.role == "decode":
        return None
    work = pool.workload
    if pool.role == "prefill":
        work = work.model_copy(update={"output_len": 1})
    try:
        return LayoutScorer(
            Question(
                spec=pool.spec,
                cluster=pool.cluster,
                engine=pool.engine,
                workload=work,
                limits=question.limits,
                objective="throughput",
                cards=par.ranks,
            ),
            par,
        )
    except LayoutError:
        return None


def _given(pool: Pool, choice: Choice, mtp: int) -> ServingInput:
    work = pool.workload
    return ServingInput(
        batch=np.ones(()),
        chunk=np.ones(()),
        input_len=work.input_len,
        output_len=work.output_len,
        prefix_hit=work.prefix_hit,
        weight_dtype=choice.weight_dtype,
        kv_dtype=choice.kv_dtype,
        attention=choice.attention,
        mtp=mtp,
    )


def _prefills(question: DisaggQuestion) -> Iterator[_Prefill]:
    pool = question.prefill
    prompt = math.ceil(pool.workload.input_len * (1 - pool.workload.prefix_hit))
    for par in layouts(pool):
        scorer = _scorer(question, pool, par)
        if scorer is None:
            continue
        for choice in pool.choices:
            for chunk in pool.grid:
                count, pieces = max(chunk // prompt, 1), math.ceil(prompt / chunk)
                held = np.array([2.0 * count * par.pp])
                memory = scorer.memory(choice, held, np.array([float(chunk)]))[0]
                if memory > scorer.ledger.capacity_bytes:
                    continue
                model = scorer.model_for(choice)
                stages = _prompt_stages(pool, model, choice, par, prompt / pieces * count)
                times = [float(one) for one in model.step_s(stages, "prefill")]
                host = model.host_s("prefill")
                whole, one = (
                    _slowest_s(question, pool, par, choice, tokens) + host
                    for tokens in (prompt / pieces * count, prompt)
                )
                busy = pieces * (max(times) + host)
                yield _Prefill(
                    parallel=par,
                    prompts=count,
                    busy_s=busy,
                    one_s=busy * min(max(one / whole, 1 / count), 1.0) if count > 1 else busy,
                    service_s=sum(times) + (pieces - 1) * max(times) + pieces * host,
                )


def _slowest_s(
    question: DisaggQuestion, pool: Pool, par: Parallelism, choice: Choice, tokens: float
) -> float:
    """The slowest stage of the layout with its layers cut evenly."""
    even = replace(par, stage_layers=())
    scorer = _scorer(question, pool, even)
    assert scorer is not None
    model = scorer.model_for(choice)
    stages = _prompt_stages(pool, model, choice, even, tokens)
    return max(float(one) for one in model.step_s(stages, "prefill"))


def _prompt_stages(
    pool: Pool, model: StepModel, choice: Choice, par: Parallelism, tokens: float
) -> list[Parts]:
    """A step of so many prompt tokens a group."""
    work = pool.workload
    prompt = math.ceil(work.input_len * (1 - work.prefix_hit))
    return prompt_stages(
        model,
        _given(pool, choice, par.mtp),
        piece=np.asarray(float(tokens)),
        prompt=np.asarray(float(prompt)),
        sequences=np.zeros(()),
    )


def _decodes(question: DisaggQuestion) -> Iterator[_Decode]:
    pool = question.decode
    work, block = pool.workload, pool.engine.kv_block_tokens
    for par in layouts(pool):
        scorer = _scorer(question, pool, par)
        if scorer is None:
            continue
        for choice in pool.choices:
            held = (
                par.tp
                * par.cp
                * sum(
                    scorer.ledger.kv_bytes_per_token(stage, choice.kv_dtype)
                    for stage in scorer.ledger.graph.stages
                )
            )
            for slots in pool.grid:
                at = np.array([float(slots)])
                if scorer.memory(choice, at, at * (1 + par.mtp))[0] > scorer.ledger.capacity_bytes:
                    continue
                model = scorer.model_for(choice)
                sequences = np.asarray(float(math.ceil(slots / par.pp)))
                stages = decode_stages(model, _given(pool, choice, par.mtp), sequences)
                times = [float(one) for one in model.step_s(stages, "decode")]
                step = max(sum(times), max(times) * par.pp) + model.host_s("decode")
                later = later_steps(work, par.mtp)
                tokens = work.output_len - 1
                yield _Decode(
                    parallel=par,
                    rate=par.dp * slots / ((1 + later) * step),
                    step_s=step,
                    later_s=later * step,
                    tpot_s=later / tokens * step if tokens else step,
                    request_bytes=held * math.ceil(work.input_len / (block * par.cp)) * block,
                )


def _legal_pair(question: DisaggQuestion, one: Parallelism, other: Parallelism) -> bool:
    if (one.mtp > 0) != (other.mtp > 0):
        return False
    if question.decode.engine.name != "vllm-ascend":
        return True
    if any(par.pp > 1 and par.cp > 1 for par in (one, other)):
        return False
    return one.tp >= other.tp and one.tp % other.tp == 0 and other.pp == 1


def _deployment(
    question: DisaggQuestion, one: _Prefill, other: _Decode, x: int, y: int
) -> Deployment | None:
    """One deployment; None where it breaks a limit."""
    work, limits, link = question.decode.workload, question.limits, question.link
    p, d, later = one.parallel, other.parallel, other.later_s
    queue = Prompts(x, p.dp, one.prompts, one.busy_s, one.one_s, one.service_s)
    latency, tail = question.objective == "latency", limits.ttft_p99_s
    in_flight = work.concurrency
    if latency and in_flight is None and work.request_rate is None:
        in_flight = 1
    others = 1.0 if in_flight is None else (in_flight - 1) / in_flight

    def first(full: bool, share: float) -> float:
        prompts = one.prompts if full else 1
        sent = prompts * other.request_bytes / (p.tp * p.pp * p.cp)
        taken = other.request_bytes / (d.tp * d.pp * d.cp)
        service = one.service_s if full else one.service_s * one.one_s / one.busy_s
        moved = link.latency_s + max(sent, taken) / link.bytes_per_s
        return service + moved + other.step_s * (1 + share / 2)

    def ways(rate: float) -> list[tuple[float, float]]:
        """(all but the wait, the wait) in steps of one prompt, and in full ones."""
        waits = queue.waits_s(rate)
        return [
            (first(bool(at), others), others * wait if others else 0.0)
            for at, wait in enumerate(waits)
        ]

    def mean(rate: float) -> float:
        return min(sum(way) for way in ways(rate))

    def late_at(rate: float) -> float:
        waits = queue.waits_s(rate, 0.01)
        return min(late(first(bool(at), 0), other.step_s, wait) for at, wait in enumerate(waits))

    decoded = y * other.rate
    most = queue.most
    if in_flight is not None:
        flight = in_flight
        prompts = largest(most, lambda rate: rate * (mean(rate) + later) <= flight)
    elif (bound := min(limits.ttft_s or 1e99, tail or 1e99)) < 1e99:
        prompts = largest(most, lambda rate: mean(rate) <= bound)
        if tail is not None:
            prompts = min(prompts, largest(most, lambda rate: late_at(rate) <= tail))
        if tail is not None or (limits.ttft_s is not None and work.request_rate is not None):
            span = other.step_s + later
            slots = decoded * span
            decoded = largest(slots, lambda n: n + 2.326 * math.sqrt(n) <= slots) / span
    else:
        prompts = unbounded_utilisation() * most
    sent = min(x * p.ranks, y * d.ranks) * link.bytes_per_s / other.request_bytes
    rate = min(prompts, decoded, sent)
    if latency and work.request_rate is not None:
        rate = min(rate, work.request_rate)
    if rate <= 0 or rate * (1 + 4e-9) < (work.request_rate or 0.0):
        return None
    alone, wait = min(ways(rate), key=sum)
    if in_flight is not None:
        wait = max(in_flight / rate - later - alone, 0.0)
    ttft = alone + wait
    if limits.ttft_s is not None and ttft > limits.ttft_s * (1 + 4e-9):
        return None
    if tail is not None and in_flight is not None:
        steps = math.ceil((in_flight - 1) / (x * p.dp * one.prompts) - 1e-9)
        longest = min(*queue.waits_s(prompts, 0.01), steps * one.busy_s)
        beyond = longest - min(queue.waits_s(prompts))
        least = alone - other.step_s * others / 2
        found = late(least, other.step_s, wait + max(beyond, 0.0))
        if max(found, ttft) > tail * (1 + 4e-9):
            return None
    if limits.tpot_p99_s is not None and other.tpot_s > limits.tpot_p99_s:
        return None
    if limits.tpot_s is not None and other.tpot_s > limits.tpot_s:
        return None
    return Deployment(
        objective=1 / (ttft + later) if latency else rate * work.output_len,
        cards=x * p.ranks + y * d.ranks,
        spent=x * p.ranks * question.prices[0] + y * d.ranks * question.prices[1],
        rate=rate,
        ttft_s=ttft,
        tpot_s=other.tpot_s,
    )


def _survives(question: DisaggQuestion, one: _Prefill, other: _Decode, x: int, y: int) -> bool:
    """Whether the limits hold with what may be lost lost of either role, one after the other."""
    spare, lost = question.spare, []
    if spare is None:
        return True
    for pool, par in ((question.prefill, one.parallel), (question.decode, other.parallel)):
        node = max(pool.cluster.ranks_per_node // par.ranks, 1)
        lost.append((node if spare.unit == "node" else 1) * spare.count)
    left = (x - lost[0], y), (x, y - lost[1])
    return all(min(two) > 0 and _deployment(question, one, other, *two) for two in left)


def _counts(question: DisaggQuestion, one: int, other: int) -> Iterator[tuple[int, int]]:
    prefill, decode = question.prefill.cards, question.decode.cards
    for x in range(1, prefill // one + 1):
        for y in range(1, decode // other + 1):
            if not question.shared or x * one + y * other <= decode:
                yield x, y


def every_deployment(question: DisaggQuestion) -> Iterator[Deployment]:
    """Every deployment that satisfies all limits."""
    decodes = list(_decodes(question))
    for one in _prefills(question):
        for other in decodes:
            if not _legal_pair(question, one.parallel, other.parallel):
                continue
            for x, y in _counts(question, one.parallel.ranks, other.parallel.ranks):
                found = _deployment(question, one, other, x, y)
                if found is not None and _survives(question, one, other, x, y):
                    yield found


def best_deployment(question: DisaggQuestion) -> Deployment | None:
    """The largest objective, or the least spent on cards and then the largest objective."""

    def worth(one: Deployment) -> tuple[float, float]:
        return (-one.spent if question.objective == "cards" else 0.0), one.objective

    return max(every_deployment(question), key=worth, default=None)


def space_size(question: DisaggQuestion) -> int:
    """Combinations of the space, legal or not, counted one layout at a time."""
    total = 0
    for one in layouts(question.prefill):
        for other in layouts(question.decode):
            counts = sum(1 for _ in _counts(question, one.ranks, other.ranks))
            total += counts * question.prefill.per_cut * question.decode.per_cut
    return total
