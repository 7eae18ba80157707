"""The page: head, summary tiles, then one section a question, in the order a reader asks them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from shardplan.search.plan import Plan
from shardplan.search.predicted import Predicted
from shardplan.search.report.at_rate import at_rate_section
from shardplan.search.report.batching import batching_section
from shardplan.search.report.block import block_section
from shardplan.search.report.breakdown import breakdown_section
from shardplan.search.report.capacity import capacity_section
from shardplan.search.report.cluster import cluster_section
from shardplan.search.report.emitting import next_section
from shardplan.search.report.frame import (
    Section,
    document,
    notes_section,
    page_header,
    pairs,
    proof_badge,
    proof_section,
    tiles,
)
from shardplan.search.report.how_sure import confidence_section
from shardplan.search.report.markup import Html, table, tag
from shardplan.search.report.memory import memory_section
from shardplan.search.report.pools import pools_section, servings_section
from shardplan.search.report.robust import robustness_section
from shardplan.search.report.timeline import timeline_section
from shardplan.search.report.tradeoffs import (
    alternatives_section,
    quantization_section,
    switches_section,
    tradeoff_section,
)
from shardplan.search.report.words import (
    certificate_sentences,
    command,
    count_text,
    limit_time,
    number,
    percent,
    pool_sentences,
    strategy_sentences,
    time,
)
from shardplan.search.tables_capacity import cost_words
from shardplan.search.trial_table import TrialTable

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["page"]

_PROOFS = {
    0: "Level 0: shapes, ownership of every weight, bytes and collectives.",
    1: "Level 1: the sharded graph, shrunk with its ratios kept, computes what the whole one does.",
    2: "Level 2: the graphs of the real model classes, run in lock step.",
    3: "Level 3: real processes.",
}


def page(plan: Plan, trials: TrialTable | DataFrame, steps: Sequence[Predicted] = ()) -> str:
    """The whole HTML document; `steps` are drawn over time."""
    title = f"{plan.model.name} on {plan.cluster.name}: deployment plan"
    return document(title, _header(plan), _sections(plan, TrialTable.of(trials), steps))


def _sections(plan: Plan, trials: TrialTable, steps: Sequence[Predicted]) -> Iterator[Section]:
    """In the order of the page; empty ones are left out of it."""
    yield "summary", "Summary", _summary_section(plan)
    yield "rate", "At the rate", at_rate_section(plan)
    yield "pools", "Pools", pools_section(plan)
    yield "servings", "Ways of serving", servings_section(plan)
    yield "certificate", "Why this one", _certificate_section(plan)
    yield "cluster", "Ranks", cluster_section(plan)
    yield "memory", "Memory", memory_section(plan)
    yield "time", "Time", breakdown_section(plan)
    yield "steps", "One step", timeline_section(plan, steps)
    yield "layer", "One layer", block_section(plan)
    yield "tradeoffs", "Trade-offs", tradeoff_section(plan, trials)
    yield "others", "Next best", alternatives_section(plan)
    yield "dtypes", "Other dtypes", quantization_section(plan)
    yield "switches", "Switches", switches_section(plan)
    yield "robustness", "Robustness", robustness_section(plan)
    yield "confidence", "Confidence", confidence_section(plan)
    yield "batching", "Graph sizes", batching_section(plan)
    yield "capacity", "Losses", capacity_section(plan)
    yield "proof", "Proof", proof_section(plan.proof, _level(plan.proof.level))
    yield "deploy", "Deploy", next_section(plan)
    yield "notes", "Notes", notes_section(plan.notes)
    yield "made", "How made", _making_section(plan)


def _header(plan: Plan) -> Html:
    """Which model on which machine, and the two things that make the plan worth trusting."""
    gap = plan.certificate.gap
    if gap == 0:
        badges = [tag("span", "proven best in its space", class_="badge good")]
    elif gap is not None:
        badges = [tag("span", f"within {percent(gap)} of the bound", class_="badge")]
    else:
        badges = [tag("span", "sampled, no bound", class_="badge")]
    badges.append(proof_badge(plan.proof))
    return page_header("shardplan deployment plan", plan.model.name, plan.cluster.title, badges)


def _summary_section(plan: Plan) -> Html:
    """What the deployment does and how it is split."""
    does, asked = plan.performance, plan.request
    limits = asked.limits
    ttft = "" if limits.ttft_s is None else f"limit {limit_time(limits.ttft_s)}"
    tpot = "" if limits.tpot_s is None else f"limit {limit_time(limits.tpot_s)}"
    found = (
        ("Output tokens/s", number(does.output_tokens_per_s), "whole deployment"),
        ("Tokens/s per card", number(does.output_tokens_per_s_per_card), "output tokens"),
        ("Time to first token", time(does.ttft_s), ttft),
        ("Time per output token", time(does.tpot_s), tpot),
        ("End to end", time(does.end_to_end_s), "mean of one request"),
        ("Requests/s", number(does.requests_per_s), f"{does.concurrency:,.0f} in flight"),
    )
    return tag(
        "section",
        tiles((name, value, note or "no limit") for name, value, note in found),
        tag("h2", "The strategy"),
        *_strategy(plan),
        _facts(plan),
    )


def _strategy(plan: Plan) -> Iterator[Html]:
    """The strategy in sentences, a paragraph a pool where there are pools."""
    if not plan.pools:
        yield tag("p", " ".join(strategy_sentences(plan)))
    for pool in plan.pools:
        name = tag("b", f"{pool.role.capitalize()}: ")
        yield tag("p", name, " ".join(pool_sentences(pool)))


def _facts(plan: Plan) -> Html:
    """Workload, model and machine as short pairs."""
    work, model, cluster = plan.request.workload, plan.model, plan.cluster
    lengths = f"{work.input_len:,} tokens in, {work.output_len:,} out"
    load = [lengths]
    if work.concurrency is not None:
        load.append(f"{work.concurrency:,} requests in flight")
    if work.request_rate is not None:
        load.append(f"{number(work.request_rate)} requests/s")
    if work.prefix_hit:
        load.append(f"{percent(work.prefix_hit)} of the prompt cached")
    parameters = f"{model.parameters / 1e9:,.1f} billion parameters"
    if model.active_parameters != model.parameters:
        parameters += f" ({model.active_parameters / 1e9:,.1f} billion active)"
    nodes = f"{cluster.nodes:,} nodes" if cluster.nodes > 1 else "1 node"
    machine = f"{nodes} of {cluster.ranks_per_node} {cluster.device}"
    if plan.pools:
        machine += f"; {plan.cards:,} used"
    facts: tuple[tuple[str, str], ...] = (
        ("Workload", ", ".join(load)),
        ("Model", f"{model.architecture}, {model.layers:,} layers, {parameters}"),
        ("Machine", f"{machine}, {cluster.hbm_bytes / 2**30:,.0f} GiB each"),
        ("Engine", f"{plan.request.engine_profile}, objective {plan.request.objective}"),
    )
    if plan.cost is not None:
        facts += (("Cost", cost_words(plan.cost)),)
    return pairs(facts)


def _certificate_section(plan: Plan) -> Html:
    space, pruned = plan.certificate.space, plan.certificate.pruned_by
    rows = [(name, _values(values)) for name, values in space.items()]
    reasons = [(name, count_text(count)) for name, count in pruned.items() if count]
    return tag(
        "section",
        tag("h2", "Why this one"),
        tag("p", " ".join(certificate_sentences(plan))),
        tag(
            "details",
            tag("summary", "The space that was searched"),
            table("Values of each dimension", ("Dimension", "Values"), rows, words=2),
        )
        if rows
        else "",
        tag(
            "details",
            tag("summary", "Strategies ruled out unpriced, by reason"),
            table("Strategies ruled out unpriced", ("Reason", "Strategies"), reasons),
        )
        if reasons
        else "",
    )


def _values(values: list[object]) -> str:
    names = {True: "on", False: "off"}
    return ", ".join(names[value] if isinstance(value, bool) else str(value) for value in values)


def _level(level: int) -> str:
    return _PROOFS.get(level, f"Level {level}.")


def _making_section(plan: Plan) -> Html:
    """The command that makes the plan again, and what it is bound to."""
    facts = (
        ("Made by", f"shardplan {plan.shardplan_version}"),
        ("Model from", plan.model.source),
        ("Model digest", plan.model.digest),
    )
    words = [tag("span", words, class_="option") for words in command(plan)]
    line = tag("pre", tag("code", Html(" ".join(words))))
    parts = [tag("h2", "How it was made"), line, pairs(facts)]
    if plan.request.workload.prefix_hit:
        hit = percent(plan.request.workload.prefix_hit)
        parts.append(
            tag("p", f"The prefix hit of {hit} comes from a workload file.", class_="soft")
        )
    return tag("section", *parts)
