"""Time and memory of a plan of operators, alone and beside other splits of the same graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shardplan.search.oplevel.against import OperatorRival
from shardplan.search.oplevel.plan import KindRow, OperatorPlan, StageRow
from shardplan.search.report.markup import Html, legend, table, tag
from shardplan.search.report.rows import size_text
from shardplan.search.report.svg import Segment, bar
from shardplan.search.report.words import milliseconds, percent, signed_percent, time

__all__ = ["memory_section", "rivals_section", "time_section"]

_COLOURS = 8
_OTHER = f"c{_COLOURS}"
_MEMORY = (
    ("parameters_bytes", "Parameters"),
    ("constants_bytes", "Constants"),
    ("states_bytes", "Caches"),
    ("activations_bytes", "Activations"),
)
_TIMES = ("compute_s", "memory_s", "collective_s", "overhead_s", "total_s")


def time_section(plan: OperatorPlan, rivals: Sequence[OperatorRival]) -> Html:
    """A stacked bar and a table by kind of operator and collective; colours as of the rivals."""
    styles = _styles(plan, rivals)
    rows = sorted(plan.costs, key=lambda row: -row.total_s)
    lines = []
    for row in rows:
        values = row.model_dump()
        kind = Html(tag("i", class_=f"key {styles[row.kind]}") + tag("span", row.kind))
        share = row.total_s / plan.total_s if plan.total_s else 0.0
        times = [milliseconds(values[name]) for name in _TIMES]
        lines.append([kind, f"{row.calls:,}", *times, percent(share)])
    sums = [milliseconds(sum(row.model_dump()[name] for row in rows)) for name in _TIMES]
    foot = ["All", f"{sum(row.calls for row in rows):,}", *sums, "100 %"]
    headings = (
        *("Kind", "Calls", "Compute", "Memory", "Collectives", "Overhead", "Total", "Share"),
    )
    return tag(
        "section",
        tag("h2", "Where the time goes"),
        tag("p", "One run of the whole graph, in ms, through all stages."),
        tag(
            "div",
            _time_bar("This plan", plan.total_s, rows, styles, plan.total_s),
            table("One run by kind, ms", headings, lines, foot=foot),
            class_="phase",
        ),
    )


def _styles(plan: OperatorPlan, rivals: Sequence[OperatorRival]) -> dict[str, str]:
    """A colour for each kind, the largest of any plan first; the smallest share the last one."""
    most: dict[str, float] = {}
    for rows in (plan.costs, *(one.costs for one in rivals)):
        for row in rows:
            most[row.kind] = max(most.get(row.kind, 0.0), row.total_s)
    kinds = sorted(most, key=lambda kind: (-most[kind], kind))
    return {kind: f"c{min(place, _COLOURS)}" for place, kind in enumerate(kinds)}


def _time_bar(
    name: str, total_s: float, rows: Sequence[KindRow], styles: dict[str, str], full_s: float
) -> Html:
    """Seconds by kind against `full_s`, the whole width."""
    segments = [
        Segment(
            share=row.total_s / full_s if full_s else 0.0,
            style=styles[row.kind],
            title=f"{row.kind}: {time(row.total_s)}",
        )
        for row in sorted(rows, key=lambda row: -row.total_s)
    ]
    words = time(total_s)
    head = tag("p", tag("b", name), tag("span", words), class_="bar-head")
    return tag("div", head, bar(f"{name}: {words} by kind of operator", segments))


def memory_section(plan: OperatorPlan) -> Html:
    """A stacked bar of each stage against what the graph may use, and a table."""
    held = (max(row.total_bytes, row.capacity_bytes) for row in plan.stages)
    full = max(0.0 if plan.request.memory_bytes else plan.cluster.hbm_bytes, *held)
    keys = [(f"c{place}", name) for place, (_, name) in enumerate(_MEMORY)]
    keys += [("track", "Unused"), ("capacity", "What the graph may use")]
    headings = ["Stage", *[name for _, name in _MEMORY], "Total", "Capacity", "Free"]
    return tag(
        "section",
        tag("h2", "Memory of one rank"),
        legend(keys),
        *[_stage(row, plan, full) for row in plan.stages],
        table(
            "Memory of one rank by stage",
            headings,
            [_memory_cells(row, plan) for row in plan.stages],
        ),
        tag(
            "p",
            "Activations are a bound on what is alive at once. Communicator buffers and the"
            " engine's part are left out of what the graph may use.",
            class_="soft",
        ),
    )


def _stage(row: StageRow, plan: OperatorPlan, full_bytes: float) -> Html:
    values = row.model_dump()
    segments = [
        Segment(
            share=values[key] / full_bytes,
            style=f"c{place}",
            title=f"{name}: {size_text(values[key])}",
        )
        for place, (key, name) in enumerate(_MEMORY)
    ]
    name = _stage_name(row, plan)
    used = f"{size_text(row.total_bytes)} of {size_text(row.capacity_bytes)}"
    used += f" ({percent(row.total_bytes / row.capacity_bytes)})"
    if len(plan.stages) > 1:
        used += f", {time(row.seconds)}"
    marker = (
        row.capacity_bytes / full_bytes,
        f"what the graph may use: {size_text(row.capacity_bytes)}",
    )
    head = tag("p", tag("b", name), tag("span", used), class_="bar-head")
    return tag("div", head, bar(f"{name}: {used}", segments, marker=marker))


def _stage_name(row: StageRow, plan: OperatorPlan) -> str:
    if len(plan.stages) == 1:
        return "The whole graph"
    return f"Stage {row.stage}, {row.layers:,} layer{'' if row.layers == 1 else 's'}"


def _memory_cells(row: StageRow, plan: OperatorPlan) -> list[str]:
    values = row.model_dump()
    free = max(row.capacity_bytes - row.total_bytes, 0.0)
    sizes = [*(values[key] for key, _ in _MEMORY), row.total_bytes, row.capacity_bytes, free]
    return [_stage_name(row, plan), *map(size_text, sizes)]


def rivals_section(plan: OperatorPlan, rivals: Sequence[OperatorRival]) -> Html:
    """Splits that are known, on a common scale, and where each spends more."""
    if not rivals:
        return Html("")
    styles = _styles(plan, rivals)
    full_s = max(plan.total_s, *(one.total_s for one in rivals))
    bars = [_time_bar("This plan", plan.total_s, plan.costs, styles, full_s)]
    bars += [
        _time_bar(one.name.capitalize(), one.total_s, one.costs, styles, full_s) for one in rivals
    ]
    names = {style: kind for kind, style in styles.items() if style != _OTHER}
    names |= {_OTHER: "other"} if _OTHER in styles.values() else {}
    fullest = max(plan.stages, key=lambda one: one.total_bytes / one.capacity_bytes)
    own = (
        "This plan",
        "chosen here",
        time(plan.total_s),
        "",
        size_text(fullest.total_bytes),
        "yes",
    )
    return tag(
        "section",
        tag("h2", "Beside splits that are known"),
        tag("p", "The same graph on the same mesh, priced by the same code."),
        legend(names.items()),
        *bars,
        table(
            "Other splits",
            ("Split", "How", "One run", "More", "Memory", "Fits"),
            [own, *map(_rival_cells, rivals)],
            words=2,
            chosen=0,
        ),
        *[part for one in rivals for part in _differences(one)],
    )


def _rival_cells(one: OperatorRival) -> tuple[str, ...]:
    more = "" if one.ratio is None else signed_percent(one.ratio - 1.0)
    fits = "yes" if one.fits else "no"
    return (
        one.name.capitalize(), one.how, time(one.total_s), more, size_text(one.memory_bytes), fits,
    )  # fmt: skip


def _differences(rival: OperatorRival) -> Iterator[Html]:
    """Each millisecond and gigabyte of difference."""
    rows = []
    for row in rival.differences:
        kind, _, name = row.what.partition(" ")
        text = size_text if kind == "memory" else time
        sign = "\N{MINUS SIGN}" if row.more < 0 else "+"
        cells = (text(row.plan), text(row.rival), sign + text(abs(row.more)))
        rows.append((f"{kind}: {name.replace('_', ' ') if kind == 'memory' else name}", *cells))
    if rows:
        title = f"{rival.name.capitalize()} against this plan"
        headings = ("Of one run, or of the fullest rank", "This plan", "The other", "More")
        yield tag(
            "details",
            tag("summary", f"{rival.name.capitalize()}: each millisecond and gigabyte"),
            table(title, headings, rows),
        )
