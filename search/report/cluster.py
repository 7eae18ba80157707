"""The machine as a picture: every rank by its node, coloured by its place on each axis.

One picture an axis that is wider than one: ranks of one colour have the same coordinate there, so
those of one stage, or of one data-parallel group, are seen together, and so is what lies on
several nodes. Instances of a pool are numbered one after another from the pool's first node on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shardplan.models.parallel import Parallelism
from shardplan.models.ranks import axis_stride, coordinates
from shardplan.search.plan import ClusterInfo, Plan, StrategyInfo
from shardplan.search.report.markup import Attribute, Html, table, tag

__all__ = ["cluster_section"]

COLOURS = 8
MOST_RANKS = 512
"""Ranks of a picture; whole nodes beyond them are left out, and that is said."""
_LARGE = 64
"""Up to so many ranks, cells are large enough for a number."""
_AXES = {
    "pp": ("pipeline stage", "stage"),
    "dp": ("data-parallel group", "dp"),
    "cp": ("part of the context", "cp"),
    "tp": ("tensor-parallel rank", "tp"),
}
_MEANS = {
    "instance": "instances, each with the whole model",
    "pp": "stages hold different layers",
    "dp": "groups serve requests of their own",
    "cp": "ranks share the context of each request",
    "tp": "ranks split every matrix",
}


@dataclass(frozen=True, kw_only=True)
class _Fleet:
    """Instances of one strategy on one machine."""

    title: str
    machine: ClusterInfo
    way: StrategyInfo
    instances: int
    cards: int
    """With those that stay free."""

    @functools.cached_property
    def par(self) -> Parallelism:
        return self.way.parallelism()

    @property
    def used(self) -> int:
        return self.instances * self.way.ranks

    def place(self, rank: int, axis: str) -> int:
        """Coordinate of a rank: of its instance, or on an axis inside it."""
        if axis == "instance":
            return rank // self.way.ranks
        return coordinates(self.par, rank % self.way.ranks)[axis]  # type: ignore[index]

    def axes(self) -> list[str]:
        """What differs between ranks."""
        wide = [axis for axis in _AXES if getattr(self.way, axis) > 1]
        return (["instance"] if self.instances > 1 else []) + wide


def cluster_section(plan: Plan) -> Html:
    """One set of pictures a pool, or one for the whole deployment."""
    fleets = [
        _Fleet(
            title=f"{pool.role.capitalize()} pool",
            machine=pool.cluster,
            way=pool.strategy,
            instances=pool.instances,
            cards=pool.cards,
        )
        for pool in plan.pools
    ] or [
        _Fleet(
            title="",
            machine=plan.cluster,
            way=plan.strategy,
            instances=1,
            cards=max(plan.request.cards, plan.strategy.ranks),
        )
    ]
    return tag(
        "section",
        tag("h2", "Where each rank stands"),
        *[part for fleet in fleets for part in _fleet(fleet)],
    )


def _fleet(fleet: _Fleet) -> Iterator[Html]:
    if fleet.title:
        yield tag("h3", fleet.title)
    per_node = fleet.machine.ranks_per_node
    nodes = math.ceil(fleet.cards / per_node)
    shown = min(nodes, max(MOST_RANKS // per_node, 1))
    yield tag("p", _sentence(fleet, nodes, shown))
    for axis in fleet.axes() or [""]:
        yield _picture(fleet, axis, shown)
    yield _groups(fleet)


def _sentence(fleet: _Fleet, nodes: int, shown: int) -> str:
    many = f"{nodes:,} nodes" if nodes > 1 else "one node"
    per_node = fleet.machine.ranks_per_node
    words = f"{fleet.cards:,} ranks on {many} of {per_node}; each square is a rank."
    if fleet.cards > fleet.used:
        words += f" Grey ones stay free ({fleet.cards - fleet.used:,})."
    if any(_size(fleet, axis) > COLOURS for axis in fleet.axes()):
        words += " Colours come again after eight."
    if shown < nodes:
        words += f" The first {shown:,} nodes are drawn; the others go on alike."
    return words


def _size(fleet: _Fleet, axis: str) -> int:
    return fleet.instances if axis == "instance" else int(getattr(fleet.way, axis))


def _picture(fleet: _Fleet, axis: str, nodes: int) -> Html:
    """All nodes, coloured by one axis."""
    name, _ = _AXES.get(axis, (axis or "rank", ""))
    words = f"By {name}"
    if axis in _MEANS:
        words += f": {_size(fleet, axis):,} {_MEANS[axis]}"

    def colour(rank: int) -> int:
        return fleet.place(rank, axis) if axis else 0

    boxes = [_node(fleet, node, colour) for node in range(nodes)]
    return tag(
        "figure",
        tag("figcaption", words),
        tag("div", *boxes, class_="nodes", role="img", aria_label=_spoken(fleet, axis)),
        class_="ranks",
    )


def _spoken(fleet: _Fleet, axis: str) -> str:
    """What the picture shows, in words."""
    if not axis:
        return f"{fleet.used:,} ranks, all alike"
    if axis == "instance":
        return f"{fleet.instances:,} instances of {fleet.way.ranks:,} ranks, one after another"
    stride = axis_stride(fleet.par, axis)  # type: ignore[arg-type]  # one of `AXES`
    return f"{_AXES[axis][0]}: {_size(fleet, axis):,} of them, {stride:,} ranks apart"


def _node(fleet: _Fleet, node: int, colour: Callable[[int], int]) -> Html:
    """The ranks of one node in rows of eight."""
    per_node = fleet.machine.ranks_per_node
    large = fleet.cards <= _LARGE
    size, gap = (24, 3) if large else (10, 2)
    across = min(per_node, 8)
    cells = []
    first = node * per_node
    for rank in range(first, min(first + per_node, fleet.cards)):
        row, column = divmod(rank - first, across)
        at: dict[str, Attribute] = {"x": column * (size + gap), "y": row * (size + gap)}
        used = rank < fleet.used
        place = colour(rank) if used else 0
        style = f"c{place % COLOURS}" if used else "track"
        told = tag("title", _told(fleet, rank, node))
        cells.append(tag("rect", told, class_=style, width=size, height=size, rx=2, **at))
        if large and used:
            middle: dict[str, Attribute] = {
                "x": column * (size + gap) + size / 2,
                "y": row * (size + gap) + size / 2 + 4,
            }
            cells.append(tag("text", f"{place}", class_=f"on {style}", **middle))
    rows = math.ceil(per_node / across)
    svg = tag(
        "svg",
        *cells,
        width=across * (size + gap) - gap,
        height=rows * (size + gap) - gap,
        aria_hidden="true",
    )
    return tag("div", svg, tag("span", f"node {node}"), class_="node")


def _told(fleet: _Fleet, rank: int, node: int) -> str:
    """The tooltip of a rank."""
    if rank >= fleet.used:
        return f"rank {rank} on node {node}: free"
    words = [
        f"{_AXES[axis][1]} {fleet.place(rank, axis)}" for axis in fleet.axes() if axis in _AXES
    ]
    if fleet.instances > 1:
        words.insert(0, f"instance {fleet.place(rank, 'instance')}")
    return f"rank {rank} on node {node}: {', '.join(words) or 'the whole model'}"


def _groups(fleet: _Fleet) -> Html:
    """Groups of ranks that exchange along an axis, and whether they leave their node."""
    per_node, ranks = fleet.machine.ranks_per_node, fleet.way.ranks
    rows = []
    for axis in (one for one in fleet.axes() if one in _AXES):
        stride, size = axis_stride(fleet.par, axis), _size(fleet, axis)  # type: ignore[arg-type]
        members = range(0, size * stride, stride)
        held = len({rank // per_node for rank in members})
        where = "inside a node" if held == 1 else f"over {held:,} nodes"
        first = ", ".join(map(str, members[:3])) + (", ..." if size > 3 else "")  # noqa: PLR2004
        rows.append([f"{axis} {size}", first, where, f"{ranks // size:,}"])
    if not rows:
        return Html("")
    heads = ("Axis", "The first group's ranks", "It lies", "Groups an instance")
    words = "Groups of ranks along each axis"
    title = f"{words}, {fleet.title.lower()}" if fleet.title else words
    return tag(
        "details",
        tag("summary", title),
        table(title, heads, rows, words=3),
    )
