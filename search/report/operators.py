"""`report.html` of a plan of operators: one page, as that of a deployment (`page`).

What it says beside the plan comes from its graph (the picture of a layer) and from the price of
splits that are known (`oplevel.against`).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from shardplan.models.atomic import write_atomically
from shardplan.models.opgraph import OpGraph
from shardplan.search.oplevel.against import OperatorRival
from shardplan.search.oplevel.plan import OperatorPlan, OperatorRequest, layout_words
from shardplan.search.report.frame import (
    Section,
    commands,
    document,
    notes_section,
    page_header,
    pairs,
    proof_badge,
    proof_section,
    tiles,
)
from shardplan.search.report.markup import Html, table, tag
from shardplan.search.report.operator_costs import memory_section, rivals_section, time_section
from shardplan.search.report.operator_layer import layer_section
from shardplan.search.report.rows import size_text
from shardplan.search.report.words import count_text, percent, signed_percent, time

__all__ = ["operators_page", "write_operator_report"]

_MOST_ROWS = 40
_BILLIONS = 10**8
"""Parameters that are told in billions from here on."""
_LEVELS = {
    0: "Level 0: every tensor lies as it is read; seconds, moves and memory are the cost model's.",
    1: "Level 1: all ranks in lock step compute what the graph, its sizes shortened, computes.",
}


def write_operator_report(
    plan: OperatorPlan, graph: OpGraph, rivals: Sequence[OperatorRival], path: Path
) -> None:
    """Write the report, whole or not at all. The same plan and rivals give the same bytes.

    `InputError` where the file cannot be written.
    """
    write_atomically(path, operators_page(plan, graph, rivals))


def operators_page(plan: OperatorPlan, graph: OpGraph, rivals: Sequence[OperatorRival]) -> str:
    """The whole HTML document."""
    title = f"{plan.graph} on {plan.cluster.name}: operator plan"
    return document(title, _header(plan), _sections(plan, graph, rivals))


def _sections(
    plan: OperatorPlan, graph: OpGraph, rivals: Sequence[OperatorRival]
) -> Iterator[Section]:
    """In the order of the page; empty ones are left out of it."""
    yield "summary", "Summary", _summary_section(plan, rivals)
    yield "certificate", "Why this one", _certificate_section(plan)
    yield "rivals", "Beside others", rivals_section(plan, rivals)
    yield "time", "Time", time_section(plan, rivals)
    yield "memory", "Memory", memory_section(plan)
    yield "layer", "The graph", layer_section(plan, graph)
    yield "splits", "Splits", _splits_section(plan)
    yield "moves", "Collectives", _moves_section(plan)
    if plan.proof is not None:
        yield "proof", "Proof", proof_section(plan.proof, _LEVELS[plan.proof.level])
    yield "next", "Next", _next_section(plan)
    yield "notes", "Notes", notes_section(plan.notes)
    yield "made", "How made", _making_section(plan)


def _header(plan: OperatorPlan) -> Html:
    """Which graph on which machine, and what makes the plan worth trusting."""
    gap = plan.certificate.gap
    if gap == 0:
        badges = [tag("span", "proven fastest in its space", class_="badge good")]
    else:
        badges = [tag("span", f"within {percent(gap)} of the bound", class_="badge")]
    if plan.proof is not None:
        badges.append(proof_badge(plan.proof))
    if not plan.fits:
        badges.append(tag("span", "does not fit", class_="badge bad"))
    return page_header("shardplan operator plan", plan.graph, plan.cluster.title, badges)


def _summary_section(plan: OperatorPlan, rivals: Sequence[OperatorRival]) -> Html:
    """What a run takes, how much of a rank it fills, how it is split."""
    split = sum(one.times for one in plan.operators if one.split)
    total = sum(one.times for one in plan.operators)
    moves = sum(one.times for one in plan.moves)
    used = max(plan.stages, key=lambda one: one.total_bytes / one.capacity_bytes)
    collective_s = sum(one.collective_s for one in plan.costs)
    share = collective_s / plan.total_s if plan.total_s else 0.0
    found = [
        ("One run", time(plan.total_s), "the whole graph"),
        ("Collectives", time(collective_s), f"{percent(share)} of the run"),
        ("Memory of a rank", size_text(used.total_bytes), _filled(used.total_bytes, plan)),
        ("Operators split", f"{split:,}", f"of {total:,}"),
    ]
    if len(plan.stages) > 1:
        slowest = ("Slowest stage", time(plan.slowest_stage_s), f"of {len(plan.stages)} stages")
        found.insert(1, slowest)
    for rival in rivals:
        if rival.ratio is not None:
            note = f"{time(rival.total_s)}{'' if rival.fits else ', does not fit'}"
            found.append((rival.name.capitalize(), signed_percent(rival.ratio - 1.0), note))
    return tag(
        "section",
        tiles(found),
        tag("h2", "The plan"),
        tag("p", *_sentences(plan, moves)),
        pairs(_facts(plan)),
    )


def _filled(total_bytes: float, plan: OperatorPlan) -> str:
    capacity_bytes = plan.stages[0].capacity_bytes
    return f"{percent(total_bytes / capacity_bytes)} of {size_text(capacity_bytes)}"


def _sentences(plan: OperatorPlan, moves: int) -> Iterator[str]:
    mesh = " and ".join(f"{size:,} along {axis}" for axis, size in plan.mesh.items())
    ranks = 1
    for size in plan.mesh.values():
        ranks *= size
    stages = len(plan.stages)
    yield f"The mesh has {ranks:,} ranks: {mesh}. "
    if stages > 1:
        layers = " + ".join(str(one.layers) for one in plan.stages)
        yield f"{stages} pipeline stages of a mesh each hold {layers} layers. "
    if moves:
        many = f"{moves:,} moves bring tensors to the layouts in which they are read."
        yield many if moves > 1 else "One move brings a tensor to the layout in which it is read."
    else:
        yield "Every tensor is read as it is made: nothing is moved."


def _facts(plan: OperatorPlan) -> Iterator[tuple[str, str]]:
    """Graph and machine as short pairs."""
    cluster = plan.cluster
    layers = f"{plan.layers:,} equal layers, " if plan.layers else ""
    nodes = f"{cluster.nodes:,} nodes" if cluster.nodes > 1 else "1 node"
    large = plan.parameters >= _BILLIONS
    count = f"{plan.parameters / 1e9:,.2f} billion" if large else f"{plan.parameters:,}"
    yield "Graph", f"{layers}{count} parameters"
    yield "Products", f"priced in {plan.dtype}" if plan.dtype != "auto" else "as their tensors are"
    machine = f"{nodes} of {cluster.ranks_per_node} {cluster.device}"
    yield "Machine", f"{machine}, {cluster.hbm_bytes / 2**30:,.0f} GiB each"
    for word, layouts in (("Inputs", plan.inputs), ("Outputs", plan.outputs)):
        whole = sum(not layout for layout in layouts.values())
        cut = len(layouts) - whole
        yield word, f"{whole:,} whole on every rank" + (f", {cut:,} split" if cut else "")


def _certificate_section(plan: OperatorPlan) -> Html:
    held = plan.certificate
    verdict = (
        "No split of the space is faster by this cost model (gap 0)."
        if held.gap == 0
        else f"No split of the space is more than {percent(held.gap)} faster."
    )
    words = (
        f"There are {count_text(held.space_size)} ways to split all operators, equal layers alike,"
        f" on {held.meshes:,} mesh{'' if held.meshes == 1 else 'es'}. An integer program of"
        f" {held.variables:,} variables ({held.integers:,} integer) and {held.rows:,} rows chose"
        f" among them. {verdict} Its bound is {time(held.bound_s)}; without integers it would be"
        f" {time(held.lp_bound_s)}. The search took less than {held.wall_s:,.0f} s."
    )
    return tag("section", tag("h2", "Why this one"), tag("p", words))


def _splits_section(plan: OperatorPlan) -> Html:
    rows = [
        (kind, words, f"{calls:,}", time(seconds)) for kind, words, calls, seconds in plan.splits()
    ]
    shown = rows[:_MOST_ROWS]
    return tag(
        "section",
        tag("h2", "How operators are split"),
        tag("p", "Over which of its own loops an operator is split, by axis; one run in all."),
        table("Splits by kind", ("Kind", "Axis:loop", "Operators", "Time"), shown, words=2),
        _rest(len(rows) - len(shown), "operators.csv"),
    )


def _moves_section(plan: OperatorPlan) -> Html:
    if not plan.moves:
        return Html("")
    ordered = sorted(plan.moves, key=lambda row: -row.times * row.seconds)
    rows = [
        (
            row.tensor,
            row.kind,
            " ".join(row.axes),
            f"{layout_words(row.before)} \N{RIGHTWARDS ARROW} {layout_words(row.after)}",
            f"{row.times:,}",
            size_text(row.message_bytes),
            time(row.times * row.seconds),
        )
        for row in ordered[:_MOST_ROWS]
    ]
    names = ("Tensor", "Move", "Axes", "Layout", "Times", "Message", "Time")
    return tag(
        "section",
        tag("h2", "Collectives that are inserted"),
        tag(
            "p",
            "A layout names the dim of the tensor that each axis cuts; + is a partial sum. A slice"
            " is cut out by each rank for itself.",
        ),
        table("Inserted collectives", names, rows, words=4),
        _rest(len(ordered) - len(rows), "moves.csv"),
    )


def _rest(count: int, file: str) -> Html:
    return tag("p", f"{count:,} more are in {file}.", class_="soft") if count > 0 else Html("")


def _next_section(plan: OperatorPlan) -> Html:
    """Commands, of a plan whose graph lies in a file."""
    if not plan.source.endswith((".onnx", ".pt2")):
        return Html("")
    lines = [
        ("Prove it again", "shardplan verify plan.json"),
        ("What would change it", "shardplan explain plan.json"),
        ("Where Megatron's split loses", "shardplan explain plan.json --against megatron"),
    ]
    if plan.source.endswith(".onnx"):
        emit = "shardplan emit plan.json --target onnx --out ranks"
        lines.insert(0, ("An ONNX model of each rank", emit))
    return tag(
        "section",
        tag("h2", "What to run next"),
        tag("p", "Run where plan.json lies."),
        commands(lines),
    )


def _making_section(plan: OperatorPlan) -> Html:
    """The command that makes the plan again, and what it is bound to."""
    facts = (
        ("Made by", f"shardplan {plan.shardplan_version}"),
        ("Graph from", plan.source or "Python"),
        ("Graph digest", plan.digest),
    )
    words = [tag("span", word, class_="option") for word in _command(plan)]
    line = tag("pre", tag("code", Html(" ".join(words)))) if words else ""
    return tag("section", tag("h2", "How it was made"), line, pairs(facts))


def _command(plan: OperatorPlan) -> list[str]:
    """The search as options; none where the graph is no file, or pins and such were given."""
    asked, machine = plan.request, plan.cluster
    if not plan.source.endswith((".onnx", ".pt2")) or asked.pins or asked.forbid:
        return []
    words = ["shardplan search", f"--model {shlex.quote(plan.source)}", "--operators"]
    words.append(f"--cluster {shlex.quote(machine.name)}")
    if machine.nodes > 1:
        words.append(f"--nodes {machine.nodes}")
    words += _options(asked)
    if plan.dtype != "auto":
        words.append(f"--weight-dtype {shlex.quote(plan.dtype)}")
    return words


def _options(asked: OperatorRequest) -> Iterator[str]:
    if asked.mesh != "auto":
        yield "--mesh " + ",".join(f"{axis}={size}" for axis, size in asked.mesh.items())
    if asked.stages > 1:
        yield f"--stages {asked.stages}"
    if asked.cards is not None:
        yield f"--cards {asked.cards}"
    if asked.sizes:
        sizes = ",".join(f"{name}={size}" for name, size in asked.sizes.items())
        yield f"--sizes {shlex.quote(sizes)}"
    if asked.memory_bytes is not None:
        yield f"--memory-gib {asked.memory_bytes / 2**30:.6g}"
    if asked.time_limit_s is not None:
        yield f"--time-limit {asked.time_limit_s:g}"
