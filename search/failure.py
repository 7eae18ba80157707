"""When nothing is feasible: which limit binds, by how much, and the nearest change that helps.

A hint is made of options that can be typed as they stand; following it gives a feasible question:
  context   the longest prompt, or else output, that the model still takes
  rate, SLO the values that the nearest strategy reaches, for every limit that it breaks, and for
            a rate the cards that would serve it if throughput grew with their number
  rules     the number of cards nearest to the asked one that has a legal layout, and the engines
            that have one on as many cards
  memory    the fewest cards that hold the model, and the cheapest change of a type that fits
Cards are tried from  parameters * bytes of a weight / capacity  on: fewer cannot hold the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from shardplan.costmodel.catalog import cluster_names, load_cluster
from shardplan.costmodel.engines import EngineProfile, load_engine
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.attention import kv_element_bytes
from shardplan.costmodel.ledger import weight_element_bytes
from shardplan.models.counts import parameter_count
from shardplan.models.errors import InfeasibleError
from shardplan.search.at_rate import Point, most_within, run_at
from shardplan.search.evaluate import LIMITS, LayoutScorer, Question, context_tokens
from shardplan.search.kept import QUEUE, Kept, Outcome
from shardplan.search.legality import unsupported_format
from shardplan.search.only import only_words
from shardplan.search.plan import Workload
from shardplan.search.request import Resolved
from shardplan.search.rulebook import rules
from shardplan.search.seen import AT_RATE, TAILS, seen_names
from shardplan.search.space import Choice, Space, build_space

__all__ = ["context_message", "no_legal_layout", "nothing_feasible", "out_of_time"]

_GIB = 2.0**30
_MOST_TRIED = 8
"""Card counts and types that are priced for a hint."""
_TIMES = ("ttft", "tpot", "ttft_p99", "tpot_p99")
"""Limits on time, in the order in which they are checked."""
_BUSY = 0.9
"""Of what is served a hint names no more where a queue is limited."""
_MOST_COUNTED = 64
"""Card counts whose layouts are checked for a hint."""


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


def _grown(cluster: Cluster, cards: int) -> Cluster | None:
    """The cluster with nodes for `cards` cards; None where a file's cluster would need more."""
    nodes = -(-cards // cluster.ranks_per_node)
    if nodes <= cluster.nodes:
        return cluster
    if cluster.name not in cluster_names():
        return None
    return load_cluster(cluster.name, nodes=nodes, device=cluster.device)


def _widened(question: Question, cards: int) -> Question | None:
    """The same question on `cards` cards; None where a file's cluster would need more nodes."""
    cluster = _grown(question.cluster, cards)
    return None if cluster is None else replace(question, cluster=cluster, cards=cards)


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
    subject = (question.spec, question.cluster, question.engine)
    pairs = [pair for pair in pairs if unsupported_format(*subject, *pair) is None]
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


def _left(question: Question, one: Kept) -> float:
    """Requests a second of the replicas that are left when what may be lost is."""
    return one.columns["requests_per_s"] * question.share_left(one.parallel)


def _served(near: Kept, question: Question) -> float | None:
    """The rate that a hint names: as asked, else what the strategy serves, with room for a queue
    where times at the rate are limited; None where none is asked."""
    asked, most = question.workload.request_rate, _left(question, near)
    if asked is None or most > asked:
        return asked
    return _floor(most * (_BUSY if seen_names(question) else 1.0)) if most else None


def _times(near: Kept, question: Question, rate: float | None) -> dict[str, float]:
    """What each limit on time is held against, of a strategy at a rate."""
    columns, names = near.columns, seen_names(question)
    found = {name: columns[f"{name}_s"] for name in ("ttft", "tpot")}
    if not names or not question.share_left(near.parallel):
        return found
    point = Point(LayoutScorer(question, near.parallel), near.choice, near.batch, near.chunk)
    run = run_at(point, np.array([rate or math.inf]), point.scorer.left)
    if AT_RATE in names:
        found["ttft"] = max(found["ttft"], float(run.ttft_mean_s[0]))
    late = {name.removesuffix("_s"): float(getattr(run, name)[0]) for name in TAILS}
    return {**found, **(late if question.limits.has_tails else {})}


def _reached(near: Kept, question: Question) -> list[str]:
    """An option for each limit that a strategy breaks, at the value that it reaches."""
    options, rate = [], _served(near, question)
    times = _times(near, question, rate)
    for name in _TIMES:
        value, allowed = times.get(name, math.nan), getattr(question.limits, f"{name}_s")
        if allowed is not None and value > allowed:
            options.append(f"--{name.replace('_', '-')}-ms {math.ceil(value * 1e3)}")
    if rate is not None and rate != question.workload.request_rate:
        options.append(f"--rate {rate:g}")
    return options


def _slower(near: Kept, question: Question) -> str:
    """The rate at which the queue keeps the limits, "" where none does."""
    point = Point(LayoutScorer(question, near.parallel), near.choice, near.batch, near.chunk)
    most = most_within(point, question.workload.request_rate or 0.0, point.scorer.left)
    return f" or --rate {_floor(most):g}" if most else ""


def _queue_message(limit: str, near: Kept, question: Question) -> InfeasibleError:
    """A limit on time that is broken at the rate, with its queue."""
    name, column = ("ttft", AT_RATE) if limit == QUEUE else (limit, f"{limit}_s")
    load = f" with the queue of {question.workload.request_rate:g} requests/s"
    return _too_slow(name, near, question, near.columns[column], load, _slower(near, question))


def _time_message(name: str, near: Kept, question: Question) -> InfeasibleError:
    """A limit on time that is broken as it is, in a closed loop."""
    load = "" if question.workload.request_rate is None else " with all slots in use"
    return _too_slow(name, near, question, near.columns[f"{name}_s"], load, "")


def _too_slow(
    name: str, near: Kept, question: Question, value: float, load: str, slower: str
) -> InfeasibleError:
    allowed = getattr(question.limits, f"{name}_s")
    return InfeasibleError(
        f"no strategy meets the {name.upper().replace('_P', ' p')} limit",
        got=f"{name} binds: the nearest has {value * 1e3:.1f} ms{load}, {allowed * 1e3:.4g} ms "
        f"allowed, {value / allowed:.3g} times too slow, with {near.parallel.describe()} and "
        f"batch {near.batch}",
        hint=f"try {' '.join(_reached(near, question))}{slower}, more cards, or quantized weights",
    )


def _rate_message(question: Question, outcome: Outcome) -> InfeasibleError:
    slow = [one for one in outcome.kept if one.limit == LIMITS.index("rate")]
    near = max((*slow, outcome.tally.nearest["rate"]), key=lambda one: _left(question, one))
    most, asked = _left(question, near), question.workload.request_rate or 0.0
    spare = question.spare
    lost = "" if spare is None else f" with {spare.words} lost"
    if not most:
        return InfeasibleError(
            "nothing is left to serve the request rate",
            got=f"rate binds: saturated at 0 requests/s{lost}, {asked:g} asked: no layout of "
            f"{question.cards} cards has a replica that stays",
            hint="try more cards, or a smaller --spare",
        )
    enough = next(_counts(question.cluster, question.cards * asked / most), None)
    wider = "" if enough is None else f" or about {_cards_option(question.cluster, enough)}"
    return InfeasibleError(
        "no strategy serves the request rate",
        got=f"rate binds: saturated at {_floor(most):g} requests/s{lost}, {asked:g} asked, "
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


def _any_legal(space: Space) -> bool:
    """Whether some layout keeps every rule with some choice."""
    return any(
        space.broken_switch(par, choice) is None
        for par in space.layouts
        for choice in space.choices
    )


def _broken(outcome: Outcome) -> Iterator[tuple[str, int]]:
    """(rule, strategies) of every rule that removed some."""
    for reason, count in outcome.tally.pruned_by.items():
        if reason.startswith("rule "):
            yield reason.removeprefix("rule "), count


def _opens(space: Space, cards: int, engine: EngineProfile) -> bool:
    """Whether the same choices have a legal layout on other cards or under another engine."""
    cluster = _grown(space.cluster, cards)
    return cluster is not None and _any_legal(
        build_space(
            space.spec,
            cluster,
            engine,
            cards=cards,
            choices=space.choices,
            batches=(1,),
            chunks=(1,),
        )
    )


def no_legal_layout(space: Space, broken: Mapping[str, int]) -> InfeasibleError:
    """The error of a space that rules empty: which, how many strategies each, what would help.

    `broken`: strategies by the rule that removed them.
    """
    cluster, known = space.cluster, rules()
    counts = sorted(set(_counts(cluster, 1)), key=lambda count: (abs(count - space.cards), count))
    near = [count for count in counts[:_MOST_COUNTED] if count != space.cards]
    cards = next((count for count in near if _opens(space, count, space.engine)), None)
    engines = [
        name
        for name in cluster.device.engine_profiles
        if name != space.engine.name and _opens(space, space.cards, load_engine(name))
    ]
    tries = [] if cards is None else [_cards_option(cluster, cards)]
    tries += [f"--engine-profile {name}" for name in engines]
    held = only_words(space.reach.only)
    tries += ["other sizes of --only"] if held else []
    named = "; ".join(
        f"{name} ({known[name].sentence}): {count:,} strategies"
        if name in known
        else f"{name}: {count:,}"
        for name, count in sorted(broken.items(), key=lambda item: (-item[1], item[0]))
    )
    return InfeasibleError(
        f"no layout of {space.cards} cards is legal for {space.spec.name} under "
        f"{space.engine.name} on {cluster.device.name}",
        got="; ".join(filter(None, (held, named and f"rules that removed them: {named}"))),
        hint=f"try {' or '.join(tries)}" if tries else "try another cluster or --device",
    )


def out_of_time(limit_s: float, evaluated: int) -> InfeasibleError:
    """The error of a search that ended before it found anything."""
    return InfeasibleError(
        "nothing that satisfies the question was found within the time limit",
        got=f"time_limit={limit_s:g} s, {evaluated:,} strategies priced",
        hint="try a larger --time-limit, or none",
    )


def nothing_feasible(resolved: Resolved, question: Question, outcome: Outcome) -> InfeasibleError:
    """The error that says why, for the (last) space that was searched."""
    longest = question.spec.max_context
    limit = resolved.time_limit_s
    if limit is not None and not outcome.complete:
        return out_of_time(limit, outcome.tally.evaluated)
    if longest and context_tokens(question.workload) > longest:
        return context_message(question.workload, longest)
    if not _any_legal(outcome.space):
        return no_legal_layout(outcome.space, dict(_broken(outcome)))
    nearest = outcome.tally.nearest
    if question.workload.request_rate is not None:
        for name in (QUEUE, *TAILS):
            what = name.removesuffix("_s")
            if what in nearest:
                return _queue_message(what, nearest[what], question)
    if "rate" in nearest:
        return _rate_message(question, outcome)
    for name in reversed(_TIMES):
        if name in nearest:
            return _time_message(name, nearest[name], question)
    return _memory_message(resolved, question, outcome)
