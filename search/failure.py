"""When nothing is feasible: which limit binds, by how much, and the nearest change that helps."""

from __future__ import annotations

import numpy as np

from shardplan.models.errors import InfeasibleError
from shardplan.search.evaluate import LayoutScorer, Question, context_tokens
from shardplan.search.exact import Kept, Outcome
from shardplan.search.request import Resolved
from shardplan.search.space import Choice, build_space

__all__ = ["nothing_feasible"]

_GIB = 2.0**30


def _least(question: Question, choice: Choice, cards: int, chunk: int) -> tuple[float, float]:
    """(bytes, capacity) of the layout over `cards` that needs the least memory for one slot."""
    space = build_space(
        question.spec,
        question.cluster,
        question.engine,
        cards=cards,
        choices=(choice,),
        batches=(1,),
        chunks=(chunk,),
    )
    best = (np.inf, 1.0)
    for par in space.layouts:
        if par.dp > 1 and question.spec.moe is None:
            continue
        scorer = LayoutScorer(question, par)
        one = np.ones(1)
        need = float(scorer.memory(choice, one, one * chunk)[0])
        if need < best[0]:
            best = (need, scorer.ledger.capacity_bytes)
    return best


def _card_counts(question: Question) -> list[int]:
    """Legal card counts above those asked for, up to what one can add by doubling."""
    node = question.cluster.ranks_per_node
    counts = [c for c in question.cluster.rank_counts if c > question.cards]
    return counts + [node * n for n in (2, 4, 8, 16, 32) if node * n > question.cards]


def _smallest_cards(resolved: Resolved, question: Question, choice: Choice, chunk: int) -> str:
    from dataclasses import replace

    from shardplan.costmodel.catalog import load_cluster

    for cards in _card_counts(question):
        nodes = -(-cards // question.cluster.ranks_per_node)
        if nodes > question.cluster.max_nodes:
            break
        cluster = question.cluster
        if nodes > cluster.nodes:
            if cluster.name not in _shipped():
                break
            cluster = load_cluster(cluster.name, nodes=nodes, device=cluster.device)
        wider = replace(question, cluster=cluster, cards=cards)
        need, capacity = _least(wider, choice, cards, chunk)
        if need <= capacity:
            return f"{cards} cards hold it"
    return ""


def _shipped() -> tuple[str, ...]:
    from shardplan.costmodel.catalog import cluster_names

    return cluster_names()


def _memory_message(resolved: Resolved, question: Question, outcome: Outcome) -> InfeasibleError:
    choice = resolved.choices[0]
    chunk = outcome.space.chunks[0]
    need, capacity = _least(question, choice, question.cards, chunk)
    tries = [_smallest_cards(resolved, question, choice, chunk)]
    for other in resolved.beside:
        less, _ = _least(question, other, question.cards, chunk)
        if less <= capacity:
            tries.append(
                f"--weight-dtype {other.weight_dtype} --kv-dtype {other.kv_dtype} fits on "
                f"{question.cards} cards"
            )
            break
    hint = "; or ".join(t for t in tries if t)
    return InfeasibleError(
        f"{question.spec.name} does not fit on {question.cards} cards of {question.cluster.name}",
        got=f"memory binds: the leanest strategy needs {need / _GIB:.1f} GiB a card for one "
        f"request of {context_tokens(question.workload)} tokens, {capacity / _GIB:.1f} GiB may "
        "be used",
        hint=hint or "no number of cards that was tried holds it",
    )


def _time_message(name: str, near: Kept, question: Question) -> InfeasibleError:
    column = f"{name}_s"
    value = near.columns[column]
    allowed = getattr(question.limits, column)
    return InfeasibleError(
        f"no strategy meets the {name.upper()} limit",
        got=f"{name} binds: the nearest has {value * 1e3:.1f} ms, {allowed * 1e3:.1f} ms allowed, "
        f"{value / allowed:.2f} times too slow, with {near.parallel.describe()} and "
        f"batch {near.batch}",
        hint=f"--{name}-ms {np.ceil(value * 1e3):.0f}, more cards, or quantized weights",
    )


def nothing_feasible(resolved: Resolved, question: Question, outcome: Outcome) -> InfeasibleError:
    """The error that says why, for the (last) space that was searched."""
    tally = outcome.tally
    work, longest = question.workload, question.spec.max_context
    if longest and context_tokens(work) > longest:
        return InfeasibleError(
            "a request must fit the model's context",
            got=f"input {work.input_len} + output {work.output_len} tokens, {longest} allowed",
            hint=f"shorten it to {longest} tokens in all",
        )
    if not outcome.space.layouts:
        rules = ", ".join(f"{rule} ({count})" for rule, count in outcome.space.broken.items())
        return InfeasibleError(
            f"no layout of {question.cards} cards is legal for {question.spec.name}",
            got=f"rules that removed them: {rules}",
            hint="try another number of cards or another engine profile",
        )
    for name in ("rate", "tpot", "ttft"):
        near = tally.nearest.get(name)
        if near is None:
            continue
        if name != "rate":
            return _time_message(name, near, question)
        most = near.columns["requests_per_s"]
        return InfeasibleError(
            "no strategy serves the request rate",
            got=f"rate binds: the most is {most:.3g} requests/s, {work.request_rate:.3g} asked, "
            f"on {question.cards} cards",
            hint=f"--rate {most:.3g}, or about "
            f"{int(np.ceil(question.cards * (work.request_rate or 0) / most))} cards",
        )
    return _memory_message(resolved, question, outcome)
