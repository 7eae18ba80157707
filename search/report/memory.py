"""Memory of one card of each pipeline stage, against what the engine may use."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from shardplan.search.plan import ClusterInfo, MemoryRow, Plan
from shardplan.search.report.markup import Html, legend, table, tag
from shardplan.search.report.svg import Segment, bar
from shardplan.search.report.words import gib, percent

__all__ = ["memory_section"]

_PARTS = (
    ("weights_bytes", "Weights"),
    ("kv_cache_bytes", "KV cache"),
    ("activations_bytes", "Activations"),
    ("communicators_bytes", "Communicators"),
    ("reserve_bytes", "Reserve"),
)


def memory_section(plan: Plan) -> Html:
    """A stacked bar and a table row for each stage; neighbours that are alike share one."""
    fleets = [
        (f"{pool.role.capitalize()} instances", pool.memory, pool.largest_lever, pool.cluster)
        for pool in plan.pools
    ] or [("", plan.memory, plan.largest_lever, plan.cluster)]
    parts = [part for fleet in fleets if fleet[1] for part in _fleet(*fleet)]
    if not parts:
        return Html("")
    keys = [(f"c{place}", name) for place, (_, name) in enumerate(_PARTS)]
    keys += [("track", "Unused"), ("capacity", "What the engine may use")]
    return tag("section", tag("h2", "Memory of one card"), legend(keys), *parts)


def _fleet(
    title: str, memory: tuple[MemoryRow, ...], lever: str, machine: ClusterInfo
) -> Iterator[Html]:
    """The stages of one deployment or of one instance of a pool."""
    held = (max(row.total_bytes, row.capacity_bytes) for row in memory)
    full = max(machine.hbm_bytes, *held)
    groups = list(_alike(memory))
    if title:
        yield tag("h3", title)
    for name, row in groups:
        yield _stage(name, row, full)
    yield _memory_table(title, groups)
    yield tag("p", "Largest lever: ", lever.rstrip("."), ".")


def _alike(rows: tuple[MemoryRow, ...]) -> Iterator[tuple[str, MemoryRow]]:
    """Neighbouring stages with the same numbers, under one name."""
    for _, same in groupby(rows, key=lambda row: row.model_dump(exclude={"stage"})):
        stages = list(same)
        first, last = stages[0], stages[-1]
        layers = f"{first.layers} layer" + ("" if first.layers == 1 else "s")
        if len(stages) == 1:
            yield f"Stage {first.stage}, {layers}", first
        else:
            yield f"Stages {first.stage} to {last.stage}, {layers} each", first


def _stage(name: str, row: MemoryRow, full_bytes: float) -> Html:
    values = row.model_dump()
    segments = [
        Segment(
            share=values[key] / full_bytes,
            style=f"c{place}",
            title=f"{part}: {gib(values[key])} GiB",
        )
        for place, (key, part) in enumerate(_PARTS)
    ]
    used = f"{gib(row.total_bytes)} of {gib(row.capacity_bytes)} GiB"
    used += f" ({percent(row.total_bytes / row.capacity_bytes)})"
    capacity = f"what the engine may use: {gib(row.capacity_bytes)} GiB"
    return tag(
        "div",
        tag("p", tag("b", name), tag("span", used), class_="bar-head"),
        bar(f"{name}: {used}", segments, marker=(row.capacity_bytes / full_bytes, capacity)),
    )


def _memory_table(title: str, groups: list[tuple[str, MemoryRow]]) -> Html:
    headings = ["GiB", *[name for _, name in _PARTS], "Total", "Capacity", "Free"]
    rows = []
    for name, row in groups:
        values = row.model_dump()
        free = gib(row.capacity_bytes - row.total_bytes)
        parts = [gib(values[key]) for key, _ in _PARTS]
        rows.append([name, *parts, gib(row.total_bytes), gib(row.capacity_bytes), free])
    caption = "Memory of one card by stage, GiB"
    return table(f"{title}: {caption}" if title else caption, headings, rows)
