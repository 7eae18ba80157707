"""Graph sizes and step sizes of a plan, and what each gains; nothing where not asked."""

from __future__ import annotations

from collections.abc import Iterator

from shardplan.search.plan import Plan
from shardplan.search.plan_batching import GraphSizes, SettingRow
from shardplan.search.report.markup import Html, table, tag
from shardplan.search.report.words import percent, signed_percent, time

__all__ = ["batching_section"]

_OF = {"prefill": "One prompt", "decode": "One step"}


def batching_section(plan: Plan) -> Html:
    """Both phases, beside sizes that one might take instead, and the settings."""
    found = plan.batching
    if found is None:
        return Html("")
    phases = [one for one in (found.prefill, found.decode) if one is not None]
    kept = f"A graph keeps {found.graph_bytes / 2**20:,.0f} MiB of a rank"
    parts = [part for one in phases for part in _sizes(one)]
    if found.settings:
        heads = ("Setting", "Plan", "Default", "Gain over the default")
        rows = [_setting(row) for row in found.settings]
        parts.append(tag("h3", "Step sizes"))
        parts.append(table("Step sizes against the engine's defaults", heads, rows))
    return tag(
        "section",
        tag("h2", "Graph sizes"),
        tag("p", f"{kept} ({found.graph_bytes_kind}: {found.graph_bytes_source})."),
        *parts,
        tag("ul", *[tag("li", note) for note in found.notes], class_="notes")
        if found.notes
        else "",
    )


def _sizes(one: GraphSizes) -> Iterator[Html]:
    """The sizes of one phase in full, and the others."""
    many = "1 graph" if len(one.sizes) == 1 else f"{len(one.sizes):,} graphs"
    yield tag("h3", f"{one.phase.capitalize()}: {many}, {one.unit}")
    sizes = ", ".join(f"{size:,}" for size in one.sizes)
    yield tag("p", f"{sizes}. For {one.loads}; what ends their number: {one.bound}.")
    rows = [("these", f"{len(one.sizes):,}", time(one.expected_s), percent(one.padding), "")]
    for other in one.others:
        longer = signed_percent(other.expected_s / one.expected_s - 1)
        row = (f"{other.count:,}", time(other.expected_s), percent(other.padding), longer)
        rows.append((other.name, *row))
    heads = ("Sizes", "Graphs", _OF[one.phase], "Padding", "Longer than these")
    yield table(f"Sizes of {one.phase} graphs", heads, rows, chosen=0)


def _setting(row: SettingRow) -> tuple[str, ...]:
    own, default = ("" if one is None else f"{one:,}" for one in (row.value, row.default))
    gain = f"breaks {row.limit}" if row.gain is None else signed_percent(row.gain - 1)
    return row.setting, own, default, gain
