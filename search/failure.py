"""When nothing is feasible: which limit binds, by how much, and the nearest change that helps.

A hint is made of options that can be typed as they stand; following it gives a feasible question:
  context   the longest prompt, or else output, that the model still takes
  rate, SLO the values that the nearest strategy reaches, for every limit that it breaks, and for
            a rate the cards that would serve it if throughput grew with their number
  memory    the fewest cards that hold the model, and the cheapest change of a type that fits
Cards are tried from  parameters * bytes of a weight / capacity  on: fewer cannot hold the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from shardplan.costmodel.catalog import cluster_names, load_cluster
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.attention import kv_element_bytes
from shardplan.costmodel.ledger import weight_element_bytes
from shardplan.models.counts import parameter_count
from shardplan.models.errors import InfeasibleError
from shardplan.search.evaluate import LayoutScorer, Question, context_tokens
from shardplan.search.exact import Kept, Outcome
from shardplan.search.plan import Workload
from shardplan.search.request import Resolved
from shardplan.search.space import Choice, build_space

__all__ = ["context_message", "nothing_feasible"]

_GIB = 2.0**30
_MOST_TRIED = 8
"""Card counts and types that are priced for a hint."""


def _least(question: Question, choice: Choice, chunk: int) -> tuple[float, float]:
    """(bytes, capacity) of the layout that needs the least memory for one slot."""
    space = build_space(
        question.spec,
        question.cluster,
        question.engine,
        cards=question.cards,
        choices=(choice,),
        batches=(1,),
        chunks=(chunk,),
    )
    best = (math.inf, 1.0)
    for par in space.layouts:
        if par.dp > 1 and question.spec.moe is None:
            continue
        scorer = LayoutScorer(question, par)
        one = np.ones(1)
        need = float(scorer.memory(choice, one, one * chunk)[0])
        if need < best[0]:
            best = (need, scorer.ledger.capacity_bytes)
    return best


def _weights_alone(question: Question, choice: Choice) -> float:
    """Bytes that all cards together hold at least."""
    return parameter_count(question.spec) * weight_element_bytes(choice.weight_dtype)


def _counts(cluster: Cluster, least: float) -> Iterator[int]:
    """Numbers of cards that a job may have, ascending, from `least` on."""
    per_node = cluster.ranks_per_node
    yield from (count for count in cluster.rank_counts if count >= least)
    first = max(2, math.ceil(least / per_node))
    yield from range(first * per_node, cluster.max_nodes * per_node + 1, per_node)


def _widened(question: Question, cards: int) -> Question | None:
    """The same question on `cards` cards; None where a file's cluster would need more nodes."""
    cluster = question.cluster
    nodes = -(-cards // cluster.ranks_per_node)
    if nodes > cluster.nodes:
        if cluster.name not in cluster_names():
            return None
        cluster = load_cluster(cluster.name, nodes=nodes, device=cluster.device)
    return replace(question, cluster=cluster, cards=cards)


def _cards_option(cluster: Cluster, cards: int) -> str:
    nodes = -(-cards // cluster.ranks_per_node)
    return f"--cards {cards}" + (f" --nodes {nodes}" if nodes > cluster.nodes else "")


def _smallest_cards(question: Question, choice: Choice, chunk: int, capacity: float) -> str:
    """The option of the fewest cards that hold the model, "" if none of those tried do."""
    least = max(question.cards + 1, _weights_alone(question, choice) / capacity)
    for _, cards in zip(range(_MOST_TRIED), _counts(question.cluster, least), strict=False):
        wider = _widened(question, cards)
        if wider is None:
            break
        need, room = _least(wider, choice, chunk)
        if need <= room:
            return _cards_option(question.cluster, cards)
    return ""


def _narrower(question: Question, choice: Choice) -> list[Choice]:
    """The same with other types of weights or cache that hold less, the widest first."""
    device, weight, cache = question.cluster.device, choice.weight_dtype, choice.kv_dtype
    own_weight, own_cache = weight_element_bytes(weight), kv_element_bytes(cache)
    weights = [one for one in device.weight_dtypes if weight_element_bytes(one) < own_weight]
    caches = [one for one in device.kv_dtypes if kv_element_bytes(one) < own_cache]
    pairs = [(w, c) for w in (weight, *weights) for c in (cache, *caches)][1:]
    pairs.sort(key=lambda pair: (-weight_element_bytes(pair[0]), -kv_element_bytes(pair[1])))
    return [replace(choice, weight_dtype=w, kv_dtype=c) for w, c in pairs]


def _cheapest_type(question: Question, choice: Choice, chunk: int, capacity: float) -> str:
    """The options of the widest types that fit on the same cards, "" if none does."""
    room = capacity * question.cards
    able = [one for one in _narrower(question, choice) if _weights_alone(question, one) <= room]
    for other in able[:_MOST_TRIED]:
        if _least(question, other, chunk)[0] <= capacity:
            return (
                f"--weight-dtype {other.weight_dtype} --kv-dtype {other.kv_dtype} on as many cards"
            )
    return ""


def _memory_message(resolved: Resolved, question: Question, outcome: Outcome) -> InfeasibleError:
    choice, chunk = resolved.choices[0], outcome.space.chunks[0]
    need, capacity = _least(question, choice, chunk)
    tries = (
        _smallest_cards(question, choice, chunk, capacity),
        _cheapest_type(question, choice, chunk, capacity),
    )
    found = " or ".join(option for option in tries if option)
    return InfeasibleError(
        f"{question.spec.name} does not fit on {question.cards} "
        f"{'card' if question.cards == 1 else 'cards'} of {question.cluster.name}",
        got=f"memory binds: the leanest strategy needs {need / _GIB:.1f} GiB a card for one "
        f"request of {context_tokens(question.workload)} tokens, {capacity / _GIB:.1f} GiB may "
        "be used",
        hint=f"try {found}" if found else "try a smaller model: no cards that were tried hold it",
    )


def _floor(value: float) -> float:
    """Three digits, rounded down: what is reached stays reached."""
    scale = 10.0 ** (2 - math.floor(math.log10(value)))
    return math.floor(value * scale) / scale


def _reached(near: Kept, question: Question) -> list[str]:
    """An option for each limit that a strategy breaks, at the value that it reaches."""
    options = []
    for name in ("ttft", "tpot"):
        value, allowed = near.columns[f"{name}_s"], getattr(question.limits, f"{name}_s")
        if allowed is not None and value > allowed:
            options.append(f"--{name}-ms {math.ceil(value * 1e3)}")
    rate, asked = near.columns["requests_per_s"], question.workload.request_rate
    if asked is not None and rate < asked:
        options.append(f"--rate {_floor(rate):g}")
    return options


def _time_message(name: str, near: Kept, question: Question) -> InfeasibleError:
    value = near.columns[f"{name}_s"]
    allowed = getattr(question.limits, f"{name}_s")
    return InfeasibleError(
        f"no strategy meets the {name.upper()} limit",
        got=f"{name} binds: the nearest has {value * 1e3:.1f} ms, {allowed * 1e3:.4g} ms allowed, "
        f"{value / allowed:.3g} times too slow, with {near.parallel.describe()} and "
        f"batch {near.batch}",
        hint=f"try {' '.join(_reached(near, question))}, more cards, or quantized weights",
    )


def _rate_message(near: Kept, question: Question) -> InfeasibleError:
    most, asked = near.columns["requests_per_s"], question.workload.request_rate or 0.0
    enough = next(_counts(question.cluster, question.cards * asked / most), None)
    wider = "" if enough is None else f" or about {_cards_option(question.cluster, enough)}"
    return InfeasibleError(
        "no strategy serves the request rate",
        got=f"rate binds: the most is {_floor(most):g} requests/s, {asked:g} asked, "
        f"on {question.cards} cards",
        hint=f"try {' '.join(_reached(near, question))}{wider}",
    )


def context_message(work: Workload, longest: int) -> InfeasibleError:
    """Prompt and output are longer than the `longest` context that the model takes."""
    rest = longest - work.output_len
    option = f"--input-len {rest}" if rest > 0 else f"--output-len {longest - work.input_len}"
    if max(rest, longest - work.input_len) <= 0:
        option = f"--input-len {longest - 1} --output-len 1"
    return InfeasibleError(
        "a request must fit the model's context",
        got=f"context binds: input {work.input_len} + output {work.output_len} tokens, "
        f"{longest} allowed",
        hint=f"try {option}",
    )


def nothing_feasible(resolved: Resolved, question: Question, outcome: Outcome) -> InfeasibleError:
    """The error that says why, for the (last) space that was searched."""
    longest = question.spec.max_context
    if longest and context_tokens(question.workload) > longest:
        return context_message(question.workload, longest)
    if not outcome.space.layouts:
        rules = ", ".join(f"{rule} ({count})" for rule, count in outcome.space.broken.items())
        return InfeasibleError(
            f"no layout of {question.cards} cards is legal for {question.spec.name}",
            got=f"rules that removed them: {rules}",
            hint="try another number of cards or another engine profile",
        )
    nearest = outcome.tally.nearest
    if "rate" in nearest:
        return _rate_message(nearest["rate"], question)
    for name in ("tpot", "ttft"):
        if name in nearest:
            return _time_message(name, nearest[name], question)
    return _memory_message(resolved, question, outcome)
