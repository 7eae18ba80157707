"""A rival of a plan: what a human would have run, priced beside it, and where the difference goes.

A rival is named by its axes, `tp=8,pp=2,batch=32`, or is a configuration that `lint` reads. What is
left out is the plan's own, but for dp (what the cards leave) and, where neither slots nor tokens a
step are given, the best of both for the rival's layout: it is beaten at its best or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from shardplan.models.errors import InputError, LayoutError
from shardplan.models.parallel import Parallelism, balanced_stages
from shardplan.search.asked_again import Known, objective_of
from shardplan.search.build_plan import breakdown, memory_rows, performance
from shardplan.search.configuration import Configuration, whole_number
from shardplan.search.evaluate import LIMITS, LayoutScorer, Question
from shardplan.search.explain import priced
from shardplan.search.explanation import Difference, Rival
from shardplan.search.kept import Kept
from shardplan.search.layouts import base_order
from shardplan.search.legality import broken_rules
from shardplan.search.plan import BreakdownRow, MemoryRow, Plan, StrategyInfo
from shardplan.search.rulebook import Subject, rules
from shardplan.search.seen import seen_names
from shardplan.search.space import Choice, batch_grid, chunk_grid

__all__ = ["memory_differences", "rival_of", "step_differences", "values_of", "words_of"]

_COUNTS = ("tp", "pp", "dp", "ep", "cp", "mtp", "batch", "chunk")
_WORDS = ("exchange", "weight_dtype", "kv_dtype", "attention")
_MOST_SLOTS = 1024
_ALIKE = 1e-9
"""What a plan's file rounds away."""
_MEMORY = (
    "weights_bytes",
    "kv_cache_bytes",
    "activations_bytes",
    "communicators_bytes",
    "reserve_bytes",
)


def words_of(text: str) -> dict[str, Any]:
    """`tp=8,pp=2,sp` as values; `InputError` for what is no axis, or a value that is no number."""
    found: dict[str, Any] = {}
    for part in filter(None, (one.strip() for one in text.split(","))):
        name, _, value = part.partition("=")
        if name == "sp":
            found[name] = value.lower() not in ("0", "off", "false", "no")
        elif name in _COUNTS:
            found[name] = whole_number(name, value, least=0 if name == "mtp" else 1)
        elif name in _WORDS and value:
            found[name] = value
        else:
            raise InputError(
                "a rival is named by its axes",
                got=part[:60],
                hint="try tp=8,pp=2 (also " + ", ".join((*_COUNTS[2:], *_WORDS, "sp")) + ")",
            )
    if not found:
        raise InputError("a rival is named by its axes", got=text[:60], hint="try tp=8,pp=2")
    return found


def values_of(config: Configuration, known: Known) -> dict[str, Any]:
    """The same of a configuration that `lint` reads."""
    ranks = config.tp * config.dp * config.cp
    moe = known.spec.moe is not None
    told = {name: getattr(config, name) for name in ("tp", "pp", "dp", "cp", "mtp", "sp")}
    told["ep"] = (ranks if config.experts_parallel else config.ep) if moe else 1
    told["exchange"] = config.exchange if told["ep"] > 1 else "allgather"
    engine = known.question.engine
    told["batch"] = config.max_num_seqs or engine.max_num_seqs
    told["chunk"] = config.max_num_batched_tokens or engine.max_num_batched_tokens
    types = {"weight_dtype": config.weight_dtype, "kv_dtype": config.kv_dtype}
    return {**told, **{name: one for name, one in types.items() if one is not None}}


def rival_of(known: Known, values: Mapping[str, Any]) -> Rival:
    """A rival of the plan priced on the plan's question."""
    own = known.plan.strategy
    par = _parallel(known, values)
    choice = replace(
        known.choice,
        **{name: values[name] for name in _WORDS[1:] if name in values},
    )
    try:
        scorer = LayoutScorer(known.question, par)
    except LayoutError as error:
        strategy = _strategy(known, par, choice, own.batch, own.chunk)
        return Rival.refused(strategy, error)
    kept = _tuned(known, scorer, choice, values)
    against = (*_rules(known, par, choice), *_limits(kept, known.question))
    return Rival(
        strategy=_strategy(known, par, choice, kept.batch, kept.chunk),
        performance=performance(kept.columns),
        broken=against,
        ratio=kept.columns["objective"] / objective_of(known.plan),
        differences=tuple(_differences(known.plan, scorer, kept)),
    )


def _parallel(known: Known, values: Mapping[str, Any]) -> Parallelism:
    own = known.plan.strategy.parallelism()
    names = {one.name for one in fields(Parallelism)} & set(values)
    tp, pp, cp = (values.get(name, getattr(own, name)) for name in ("tp", "pp", "cp"))
    cards = known.plan.request.cards
    dp = values.get("dp", max(cards // (tp * pp * cp), 1))
    if tp * pp * cp * dp > known.cluster.ranks:
        raise InputError(
            "a rival runs on the plan's cluster",
            got=f"tp={tp}, pp={pp}, dp={dp}, cp={cp}: {tp * pp * cp * dp} ranks of "
            f"{known.cluster.ranks}",
            hint="make an axis smaller",
        )
    changed = {name: values[name] for name in names}
    if "ep" not in values and known.spec.moe is not None and own.ep > 1:
        changed["ep"] = math.gcd(own.ep, tp * dp * cp)
    if changed.get("ep", own.ep) == 1:
        changed["exchange"] = "allgather"
    if tp == 1:
        changed["sp"] = False
    par = replace(own, **{"stage_layers": (), "tp": tp, "pp": pp, "cp": cp, "dp": dp, **changed})
    return replace(par, order=base_order(known.question.engine, par))


def _tuned(known: Known, scorer: LayoutScorer, choice: Choice, values: Mapping[str, Any]) -> Kept:
    """The rival at the slots and step size given, else at its best, else at its smallest.

    Its best breaks at most a percentile, or the TTFT with the queue of the rate.
    """
    work, own = known.question.workload, known.plan.strategy
    if {"batch", "chunk"} & set(values):
        batch, chunk = values.get("batch", own.batch), values.get("chunk", own.chunk)
        return priced(scorer, choice, batch, max(chunk, batch * (1 + scorer.parallel.mtp)))
    batches = batch_grid(work.concurrency or _MOST_SLOTS)
    chunks = chunk_grid(known.question.engine, work.input_len, work.output_len)
    scores = scorer.score(
        choice,
        np.array(batches, dtype=np.float64)[:, None],
        np.array(chunks, dtype=np.float64)[None, :],
    )
    worth = np.where(scores.feasible, scores.columns["objective"], -np.inf)
    if not np.isfinite(worth).any():  # those that break only what is told of the rate
        names = [name for name in seen_names(known.question) if name in scores.columns]
        told = [np.isfinite(scores.columns[name]) for name in names]
        near = np.logical_or.reduce(told) if told else np.zeros(worth.shape, dtype=bool)
        worth = np.where(near, scores.columns["objective"], -np.inf)
    row, column = np.unravel_index(int(np.argmax(worth)), worth.shape)
    if not np.isfinite(worth[row, column]):
        return priced(scorer, choice, batches[0], own.chunk)
    return priced(scorer, choice, batches[row], chunks[column])


def _rules(known: Known, par: Parallelism, choice: Choice) -> Iterator[str]:
    subject = Subject(
        spec=known.spec,
        cluster=known.cluster,
        engine=known.question.engine,
        parallel=par,
        weight_dtype=choice.weight_dtype,
        kv_dtype=choice.kv_dtype,
    )
    for name in broken_rules(subject):
        yield f"{name}: {rules()[name].sentence}"


def _limits(kept: Kept, question: Question) -> Iterator[str]:
    if kept.limit < 0:
        return
    name, rate = LIMITS[kept.limit], question.workload.request_rate
    queue = name == "ttft" and kept.columns["ttft_s"] <= (question.limits.ttft_s or np.inf)
    where = f" with the queue of {rate:g} requests/s" if queue else ""
    yield f"{name}{where} is beyond its limit"


def _strategy(
    known: Known, par: Parallelism, choice: Choice, batch: int, chunk: int
) -> StrategyInfo:
    layers = balanced_stages(known.spec, par) if par.pp <= known.spec.layers else ()
    graph = {one.name: getattr(par, one.name) for one in fields(Parallelism)}
    kinds = {one.name: getattr(choice, one.name) for one in fields(Choice)}
    return StrategyInfo(**{**graph, **kinds, "stage_layers": layers}, batch=batch, chunk=chunk)


def _differences(plan: Plan, scorer: LayoutScorer, kept: Kept) -> Iterator[Difference]:
    """Of a plan and what is priced beside it; with pools their own steps, and decode's memory."""
    yield from step_differences(plan.breakdown, breakdown(scorer, kept))
    yield from memory_differences(plan.memory, memory_rows(scorer, kept))


def step_differences(
    ours: Sequence[BreakdownRow], theirs: Sequence[BreakdownRow]
) -> Iterator[Difference]:
    """Steps by kind of operator; the largest first."""
    for phase in ("decode", "prefill"):
        one, two = _by_kind(ours, phase), _by_kind(theirs, phase)
        kinds = sorted({*one, *two}, key=lambda kind: -abs(two.get(kind, 0) - one.get(kind, 0)))
        for kind in kinds:
            yield from _differs(f"{phase} {kind}", one.get(kind, 0.0), two.get(kind, 0.0))


def memory_differences(
    ours: Sequence[MemoryRow], theirs: Sequence[MemoryRow], what: str = "memory"
) -> Iterator[Difference]:
    """Parts of the memory of the fullest rank."""
    full, other = _fullest(ours), _fullest(theirs)
    for name in _MEMORY:
        words = name.removesuffix("_bytes").replace("_", " ")
        yield from _differs(f"{what} {words}", getattr(full, name), getattr(other, name))


def _differs(what: str, plan: float, rival: float) -> Iterator[Difference]:
    if not math.isclose(plan, rival, rel_tol=_ALIKE):
        yield Difference(what=what, plan=plan, rival=rival)


def _by_kind(rows: Sequence[BreakdownRow], phase: str) -> dict[str, float]:
    return {row.kind: row.total_s for row in rows if row.phase == phase}


def _fullest(rows: Sequence[MemoryRow]) -> MemoryRow:
    return max(rows, key=lambda row: row.total_bytes)
