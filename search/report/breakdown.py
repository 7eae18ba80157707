"""Where the time of one step goes, by kind of operator, and what the numbers rest on."""

from __future__ import annotations

from shardplan.search.plan import BreakdownRow, Performance, Plan
from shardplan.search.report.markup import Html, table, tag
from shardplan.search.report.svg import Segment, bar
from shardplan.search.report.words import milliseconds, percent, time

__all__ = ["breakdown_section", "kind_styles"]

_COLOURS = 8
_OTHER = f"c{_COLOURS}"
_HEADINGS = (
    "Kind",
    "Basis",
    "Calls",
    "Compute",
    "Memory",
    "Collectives",
    "Overhead",
    "Total",
    "Share",
)
_PARTS = ("compute_s", "memory_s", "collective_s", "overhead_s", "total_s")


def breakdown_section(plan: Plan) -> Html:
    """A stacked bar and a table for prefill and for decode."""
    if not plan.breakdown:
        return Html("")
    styles = kind_styles(plan.breakdown)
    phases = []
    for phase in ("prefill", "decode"):
        rows = [row for row in plan.breakdown if row.phase == phase]
        if rows:
            phases.append(_phase(phase, rows, styles))
    return tag(
        "section",
        tag("h2", "Where the time goes"),
        tag(
            "p",
            "One step, in ms, summed over the stages that a token passes. Basis says what the"
            " formula's coefficients rest on: measured, fitted to measurements, derived from data"
            " sheets, or assumed.",
        ),
        _mean_step(plan.performance),
        *phases,
    )


def _mean_step(does: Performance) -> Html:
    """Why the time per output token is not the time of a decode step."""
    if not does.mixed_share:
        return Html("")
    return tag(
        "p",
        f"The time per output token is a mean over steps: {percent(does.mixed_share)} of them also"
        f" carry prompt tokens and take {time(does.mixed_step_s)}, the others"
        f" {time(does.decode_step_s)}.",
    )


def kind_styles(rows: tuple[BreakdownRow, ...]) -> dict[str, str]:
    """A colour for each kind, the largest first; the smallest share the last one."""
    totals: dict[str, float] = {}
    steps = {phase: _total(rows, phase) or 1.0 for phase in ("prefill", "decode")}
    for row in rows:
        totals[row.kind] = totals.get(row.kind, 0.0) + row.total_s / steps[row.phase]
    kinds = sorted(totals, key=lambda kind: -totals[kind])
    return {kind: f"c{place}" if place < _COLOURS else _OTHER for place, kind in enumerate(kinds)}


def _total(rows: tuple[BreakdownRow, ...], phase: str) -> float:
    return sum(row.total_s for row in rows if row.phase == phase)


def _phase(phase: str, rows: list[BreakdownRow], styles: dict[str, str]) -> Html:
    step_s = sum(row.total_s for row in rows)
    rows = sorted(rows, key=lambda row: -row.total_s)
    shares = [row.total_s / step_s if step_s else 0.0 for row in rows]
    segments = [
        Segment(
            share=share,
            style=styles[row.kind],
            title=f"{row.kind}: {time(row.total_s)} ({percent(share)})",
        )
        for row, share in zip(rows, shares, strict=True)
    ]
    name = f"{phase.capitalize()} step"
    return tag(
        "div",
        tag("p", tag("b", name), tag("span", time(step_s)), class_="bar-head"),
        bar(f"{name} of {time(step_s)} by kind of operator", segments),
        _phase_table(name, rows, shares, styles),
        tag("p", _basis_sentence(rows, step_s), class_="soft"),
        class_="phase",
    )


def _phase_table(
    name: str, rows: list[BreakdownRow], shares: list[float], styles: dict[str, str]
) -> Html:
    lines = []
    for row, share in zip(rows, shares, strict=True):
        values = row.model_dump()
        kind = Html(tag("i", class_=f"key {styles[row.kind]}") + tag("span", row.kind))
        times = [milliseconds(values[part]) for part in _PARTS]
        lines.append([kind, row.basis, f"{row.calls:,}", *times, percent(share)])
    sums = [milliseconds(sum(row.model_dump()[part] for row in rows)) for part in _PARTS]
    foot = ["All", "", f"{sum(row.calls for row in rows):,}", *sums, "100 %"]
    return table(f"{name} by kind of operator, ms", _HEADINGS, lines, words=2, foot=foot)


def _basis_sentence(rows: list[BreakdownRow], step_s: float) -> str:
    """How much of a step rests on what, the largest share first."""
    shares: dict[str, float] = {}
    for row in rows:
        shares[row.basis] = shares.get(row.basis, 0.0) + row.total_s
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])
    parts = [f"{basis} {percent(value_s / step_s)}" for basis, value_s in ordered if value_s]
    return f"Of this step's time: {', '.join(parts)}." if parts else "This step takes no time."
