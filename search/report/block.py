"""The sharded graph of one layer as a picture: operators, how each is split, what moves between.

Operators stand one below the other in computing order, so that the picture fits a narrow screen;
lines in the left margin join what is not the row above. Each row tells the dims of its output and
what cuts them; a collective tells its group and the bytes of its full tensor (that of the whole
group, as the price has it) in the plan's own step: a chunk of prompt, or all requests of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shardplan.models.accounting import transfers
from shardplan.models.apply import COLLECTIVES, ShardedBlock, ShardedGraph, ShardedOp, apply
from shardplan.models.build import build_graph
from shardplan.models.errors import InputError
from shardplan.models.graph import Phase
from shardplan.models.redistribute import PARTIAL
from shardplan.search.plan import Plan, StrategyInfo
from shardplan.search.predicted import ways_of
from shardplan.search.proof import model_of
from shardplan.search.report.markup import Attribute, Html, legend, tag

__all__ = ["block_section"]

_ROW, _BOX, _MARGIN = 44, 36, 17.0
_DIMS = {
    "B": "batch",
    "T": "new tokens",
    "S": "context",
    "H": "hidden",
    "K": "heads (kv heads where queries share them)",
    "G": "queries a kv head",
    "D": "head size",
    "F": "ffn width",
    "E": "experts",
    "I": "expert width",
    "X": "shared width",
    "Q": "query latent",
    "C": "kv latent",
    "N": "head part without position",
    "R": "rotary part",
    "W": "parts of a context",
    "L": "one token",
}


def block_section(plan: Plan) -> Html:
    """A picture of each kind of layer in both phases; nothing where the model is not at hand."""
    try:
        graphs = {phase: _graph(plan, way, phase) for phase, _, way, _ in ways_of(plan)}
    except InputError:
        return Html("")
    counts: dict[str, int] = {}
    for name in graphs["decode"].model.layers:
        counts[name] = counts.get(name, 0) + 1
    most = max(counts, key=lambda name: counts[name])
    sizes = {phase: _sizes(plan, way, phase) for phase, _, way, _ in ways_of(plan)}
    parts = [
        tag(
            "details",
            tag("summary", f"{name.replace('_', ' ')} layer, {count:,} of them"),
            tag("div", *_figures(graphs, sizes, name), class_="blocks"),
            open="" if name == most else None,
        )
        for name, count in counts.items()
    ]
    return tag(
        "section",
        tag("h2", "One layer, as each rank runs it"),
        tag(
            "p",
            "Dims of each operator's output and what cuts them: K/8 tp0 is K cut 8 ways over the"
            " axis tp0, sum/8 tp0 a sum of which each rank has a part. Between operators stand the"
            " collectives, with the bytes of the full tensor of one group, its ranks, and how the"
            " result lies.",
        ),
        _keys(),
        *parts,
        tag("p", _legend(graphs), class_="soft"),
    )


def _keys() -> Html:
    names = {"c0": "split", "c5": "partial sum", "c8": "whole on every rank", "c1": "collective"}
    return legend(names.items())


def _graph(plan: Plan, way: StrategyInfo, phase: Phase) -> ShardedGraph:
    graph = build_graph(model_of(plan), phase, mtp=bool(way.mtp))
    return apply(graph, way.parallelism())


def _sizes(plan: Plan, way: StrategyInfo, phase: Phase) -> dict[str, int]:
    """Global sizes of one step: a chunk in every dp group, or a full batch that decodes."""
    if phase == "prefill":
        return {"B": way.dp, "T": way.chunk, "S": way.chunk}
    work = plan.request.workload
    return {"B": way.dp * way.batch, "T": way.mtp + 1, "S": work.input_len + work.output_len}


def _figures(
    graphs: Mapping[Phase, ShardedGraph], sizes: Mapping[Phase, dict[str, int]], name: str
) -> Iterator[Html]:
    for phase, graph in graphs.items():
        free = sizes[phase]
        tokens = free["B"] * free["T"]
        yield tag(
            "figure",
            tag("figcaption", tag("b", phase.capitalize()), f" of {tokens:,} tokens a step"),
            _picture(graph, graph.blocks[name], free, f"{name} layer, {phase}"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """A line in the margin: from the row that makes a tensor to the rows that read it."""

    source: int
    readers: tuple[int, ...]
    lane: int


def _picture(graph: ShardedGraph, block: ShardedBlock, free: dict[str, int], label: str) -> Html:
    nodes = list(block.ops())
    moved = _moved(graph, block, free)
    lines = _lines(nodes)
    lanes = max((line.lane for line in lines), default=0) + 1
    parts = [part for line in lines for part in _draw_line(line, lanes)]
    for row, node in enumerate(nodes):
        parts += _row(graph, node, row, moved.get(node.name, ""))
        if row and nodes[row - 1].name in node.inputs:
            ends: dict[str, Attribute] = {"x1": "50%", "x2": "50%"}
            ends |= {"y1": row * _ROW - _ROW + _BOX, "y2": row * _ROW}
            parts.append(tag("line", class_="flow", **ends))
    words = ", ".join(f"{node.kind} {text}" for node in nodes if (text := moved.get(node.name)))
    label = f"{label}: {words or 'no collectives'}"
    return tag(
        "svg", *parts, class_="block", height=len(nodes) * _ROW, role="img", aria_label=label
    )


def _moved(graph: ShardedGraph, block: ShardedBlock, free: dict[str, int]) -> dict[str, str]:
    """Bytes of each collective by its name, as text."""
    nodes = [node for node in block.ops() if node.kind in COLLECTIVES]
    found = zip(nodes, transfers(graph, block), strict=True)
    return {node.name: _bytes(one.elements.at(free) * one.element_bytes) for node, one in found}


def _bytes(size_bytes: float) -> str:
    """Bytes in the binary unit that suits: 64.0 MiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size_bytes >= 2**power:
            return f"{size_bytes / 2**power:,.1f} {unit}"
    return f"{size_bytes:,.0f} B"


def _lines(nodes: list[ShardedOp]) -> list[_Line]:
    """One line a tensor that some row reads which is not the next; lanes are shared in turn."""
    rows = {node.name: row for row, node in enumerate(nodes)}
    readers: dict[int, list[int]] = {}
    for row, node in enumerate(nodes):
        for source in dict.fromkeys(node.inputs):
            if rows[source] < row - 1:
                readers.setdefault(rows[source], []).append(row)
    busy: list[int] = []
    found = []
    for first in sorted(readers):
        lane = next((i for i, end in enumerate(busy) if end < first), len(busy))
        busy[lane : lane + 1] = [readers[first][-1]]
        found.append(_Line(source=first, readers=tuple(readers[first]), lane=lane))
    return found


def _draw_line(line: _Line, lanes: int) -> Iterator[Html]:
    """Out of the row's left side, down its lane, into each reader with an arrow."""
    at = f"{_MARGIN * (1 - (line.lane + 1) / (lanes + 1)):.2f}%"
    out, edge = line.source * _ROW + 0.7 * _BOX, f"{_MARGIN:.2f}%"
    turns = [row * _ROW + 0.3 * _BOX for row in line.readers]
    yield _flow(at, edge, out, out)
    yield _flow(at, at, out, turns[-1])
    for turn in turns:
        yield _flow(at, edge, turn, turn)
        place: dict[str, Attribute] = {"x": edge, "y": turn + 4, "text_anchor": "end"}
        yield tag("text", "\N{BLACK RIGHT-POINTING SMALL TRIANGLE}", class_="tip", **place)


def _flow(x1: str, x2: str, y1: float, y2: float) -> Html:
    ends: dict[str, Attribute] = {"x1": x1, "x2": x2, "y1": y1, "y2": y2}
    return tag("line", class_="flow", **ends)


def _row(graph: ShardedGraph, node: ShardedOp, row: int, moved: str) -> list[Html]:
    """The box of an operator or a collective, its two lines of text and the stripe of its cut."""
    top, edge = row * _ROW, f"{_MARGIN:.2f}%"
    style = "move" if moved else "op"
    stripe = "c5" if PARTIAL in dict(node.layout).values() else "c0" if node.layout else "c8"
    first, second = _texts(graph, node, moved)
    box: dict[str, Attribute] = {"x": edge, "y": top, "width": f"{100 - _MARGIN:.2f}%"}
    mark: dict[str, Attribute] = {"x": edge, "y": top, "width": 5, "height": _BOX}
    text: dict[str, Attribute] = {"x": edge, "dx": 13}
    return [
        tag("rect", tag("title", f"{first}: {second}"), class_=style, height=_BOX, rx=4, **box),
        tag("rect", class_=stripe, **mark),
        tag("text", first, class_="what", y=top + 15, **text),
        tag("text", second, class_="how", y=top + 29, **text),
    ]


def _texts(graph: ShardedGraph, node: ShardedOp, moved: str) -> tuple[str, str]:
    if moved:
        ranks = graph.mesh.size(node.axes)
        first = f"{node.kind} {moved}"
        return (
            first,
            f"{ranks:,} of {' '.join(node.axes)} \N{RIGHTWARDS ARROW} {_cuts(graph, node)}",
        )
    name = node.name if node.op is not None else node.kind
    kind = "" if name == node.kind else f" {node.kind}"
    return f"{name}{kind} [{' '.join(node.dims)}]", _cuts(graph, node)


def _cuts(graph: ShardedGraph, node: ShardedOp) -> str:
    """What cuts the output, as `K/8 tp0`, and where it is a partial sum."""
    axes: dict[str, list[str]] = {}
    for axis, dim in node.layout:
        axes.setdefault(dim, []).append(axis)
    words = []
    for dim, names in axes.items():
        ways, over = graph.mesh.size(tuple(names)), " ".join(names)
        words.append(f"sum/{ways} {over}" if dim == PARTIAL else f"{dim}/{ways} {over}")
    return ", ".join(words) or "whole on every rank"


def _legend(graphs: Mapping[Phase, ShardedGraph]) -> str:
    """What the letters and axes mean, of those that stand in the pictures."""
    layers = [
        node
        for graph in graphs.values()
        for name in dict.fromkeys(graph.model.layers)
        for node in graph.blocks[name].ops()
    ]
    used = {dim for node in layers for dim in node.dims}
    dims = ", ".join(f"{dim} {word}" for dim, word in _DIMS.items() if dim in used)
    axes = {
        f"{axis} {size:,}"
        for graph in graphs.values()
        for axis, size in zip(graph.mesh.axes, graph.mesh.shape, strict=True)
    }
    mesh = f" Mesh axes with their ranks: {', '.join(sorted(axes))}." if axes else ""
    return f"Dims: {dims}.{mesh}"
