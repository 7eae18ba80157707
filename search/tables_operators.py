"""A plan of operators for people: what is split how, what moves, its costs, what to run next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardplan.search.explanation import Difference
from shardplan.search.oplevel.plan import layout_words
from shardplan.search.report.words import count_text
from shardplan.search.tables import add, bytes_text, new_table, seconds_text, show

if TYPE_CHECKING:
    from rich.console import Console

    from shardplan.search.oplevel.against import OperatorRival
    from shardplan.search.oplevel.explain import OperatorExplanation
    from shardplan.search.oplevel.plan import KindRow, OperatorPlan

__all__ = ["print_operators", "print_why"]

_MOST_ROWS = 12
_MOST_WORDS = 40


def print_operators(
    plan: OperatorPlan, folder: Path, timing: dict[str, float], console: Console
) -> None:
    """The plan, what it costs, why it is the best, and what to run next."""
    machine = plan.cluster
    console.print(
        f"{plan.graph} on {machine.device} ({machine.name}), {plan.layers} equal layers, "
        f"{plan.parameters:,} parameters, operator by operator",
        markup=False,
    )
    split = sum(one.times for one in plan.operators if one.split)
    total = sum(one.times for one in plan.operators)
    console.print(
        f"plan: mesh {plan.describe()}, {split} of {total} operators split, "
        f"{seconds_text(plan.total_s)} a run",
        style="bold green",
        markup=False,
    )
    console.print()
    _print_costs(plan.costs, plan.total_s, console)
    _print_splits(plan, console)
    _print_moves(plan, console)
    _print_stages(plan, console)
    for text in plan.notes:
        console.print(f"note: {text}", markup=False)
    console.print(f"certificate: {certificate_text(plan)}", markup=False)
    if plan.proof is not None:
        verdict = "all hold" if plan.proof.passed else "FAILED"
        console.print(f"proof: {len(plan.proof.checks)} checks of level 1, {verdict}")
    spent = ", ".join(f"{name.removesuffix('_s')} {s:.2f} s" for name, s in timing.items())
    console.print(f"time: {spent}", markup=False)
    console.print()
    _print_next(plan, folder, console)


def print_why(found: OperatorExplanation, console: Console) -> None:
    """Memory, where the time goes, what other splits and machines give."""
    console.print(f"{found.graph} on {found.cluster}", markup=False)
    mesh = " ".join(f"{axis}{size}" for axis, size in found.mesh.items())
    words = f"mesh {mesh}, {found.stages} stage(s), {seconds_text(found.total_s)} a run"
    console.print(f"plan: {words}", style="bold green", markup=False)
    used = found.memory_bytes / found.capacity_bytes
    sizes = f"{bytes_text(found.memory_bytes)} of {bytes_text(found.capacity_bytes)}"
    console.print(f"memory of the fullest rank: {sizes} ({used:.0%})", markup=False)
    console.print()
    _print_costs(found.costs, found.total_s, console)
    if found.changes:
        table = new_table("were one thing different", "change", "run", "", "", right=("run",))
        for one in found.changes:
            spent = "-" if one.total_s is None else seconds_text(one.total_s)
            more = "" if one.ratio is None else f"{one.ratio - 1.0:+.1%}"
            add(table, one.change, spent, more, one.note)
        show(console, table)
    if found.rival is not None:
        _print_rival(found, found.rival, console)


def _print_rival(found: OperatorExplanation, rival: OperatorRival, console: Console) -> None:
    """The rival, and the largest of what it spends more or less."""
    console.print(f"against {rival.name}: {rival.how}", style="bold", markup=False)
    if not rival.fits:
        sizes = f"{bytes_text(rival.memory_bytes)} of {bytes_text(rival.capacity_bytes)}"
        console.print(f"  it does not fit: {sizes}", style="red", markup=False)
    console.print()
    numbers = ("plan", "rival", "more")
    table = new_table("", "what", *numbers, right=numbers)
    sums = Difference(what="one run", plan=found.total_s, rival=rival.total_s)
    full = Difference(
        what="memory of the fullest rank", plan=found.memory_bytes, rival=rival.memory_bytes
    )
    parts = {
        kind: [row for row in rival.differences if row.what.startswith(kind)][:_MOST_ROWS]
        for kind in ("time", "memory")
    }
    for row in (sums, *parts["time"], full, *parts["memory"]):
        text = bytes_text if row.what.startswith("memory") else seconds_text
        sign = "-" if row.more < 0 else "+"
        add(table, row.what, text(row.plan), text(row.rival), sign + text(abs(row.more)))
    show(console, table)


def certificate_text(plan: OperatorPlan) -> str:
    """What was searched and how far the answer can be from the best."""
    proof = plan.certificate
    space = f"{count_text(proof.space_size)} ways to split on {proof.meshes} mesh(es)"
    bounds = f"bound {seconds_text(proof.bound_s)}, relaxed {seconds_text(proof.lp_bound_s)}"
    if proof.gap == 0:
        return f"{space}; none is faster (gap 0; {bounds})"
    return f"{space}; none is more than {proof.gap:.2%} faster ({bounds})"


def _print_costs(costs: Sequence[KindRow], total_s: float, console: Console) -> None:
    numbers = ("calls", "time", "share")
    table = new_table("one run", "kind", *numbers, right=numbers)
    rows = sorted(costs, key=lambda row: -row.total_s)
    for row in rows[:_MOST_ROWS]:
        share = row.total_s / total_s if total_s else 0.0
        add(table, row.kind, row.calls, seconds_text(row.total_s), f"{share:.0%}")
    show(console, table)


def _print_splits(plan: OperatorPlan, console: Console) -> None:
    """How the operators of each kind are split, those that take longest first."""
    numbers = ("operators", "time")
    table = new_table("splits, {axis: loop}", "kind", "split", *numbers, right=numbers)
    for kind, words, calls, spent in plan.splits()[:_MOST_ROWS]:
        add(table, kind, words, calls, seconds_text(spent))
    show(console, table)


def _print_moves(plan: OperatorPlan, console: Console) -> None:
    if not plan.moves:
        return
    numbers = ("times", "message", "time")
    names = ("tensor", "kind", "axes", "from", "to")
    table = new_table("inserted collectives", *names, *numbers, right=numbers)
    rows = sorted(plan.moves, key=lambda row: -row.times * row.seconds)
    for row in rows[:_MOST_ROWS]:
        places = (layout_words(row.before), layout_words(row.after))
        spent = seconds_text(row.times * row.seconds)
        name, message = row.tensor[:_MOST_WORDS], bytes_text(row.message_bytes)
        add(table, name, row.kind, " ".join(row.axes), *places, row.times, message, spent)
    show(console, table)
    if len(rows) > _MOST_ROWS:
        console.print(f"and {len(rows) - _MOST_ROWS} more in moves.csv")


def _print_stages(plan: OperatorPlan, console: Console) -> None:
    numbers = ("layers", "time", "held", "alive", "limit")
    table = new_table("memory of a rank", "stage", *numbers, right=numbers)
    for row in plan.stages:
        held = row.parameters_bytes + row.constants_bytes + row.states_bytes
        sizes = map(bytes_text, (held, row.activations_bytes, row.capacity_bytes))
        add(table, row.stage, row.layers, seconds_text(row.seconds), *sizes)
    show(console, table)


def _print_next(plan: OperatorPlan, folder: Path, console: Console) -> None:
    file = shlex.quote(str(folder / "plan.json"))
    console.print("next", style="bold")
    console.print(f"  shardplan verify {file}", markup=False, soft_wrap=True)
    if plan.source.endswith(".onnx"):
        out = shlex.quote(str(folder / "ranks"))
        command = f"  shardplan emit {file} --target onnx --out {out}"
        console.print(command, markup=False, soft_wrap=True)
