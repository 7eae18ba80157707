"""The sharded graph of one layer as a picture: operators, how each is split, what moves between.

Operators stand one below the other in computing order, so that the picture fits a narrow screen;
lines in the left margin join what is not the row above. Each row tells the dims of its output and
what cuts them; a collective tells its group and the bytes of its full tensor (that of the whole
group, as the price has it) in the plan's own step: a chunk of prompt, or all requests of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardplan.models.accounting import transfers
from shardplan.models.apply import COLLECTIVES, ShardedBlock, ShardedGraph, ShardedOp, apply
from shardplan.models.build import build_graph
from shardplan.models.errors import InputError
from shardplan.models.graph import Phase
from shardplan.models.redistribute import PARTIAL
from shardplan.search.plan import Plan, StrategyInfo
from shardplan.search.predicted import ways_of
from shardplan.search.proof import model_of
from shardplan.search.report.markup import Html, tag
from shardplan.search.report.rows import (
    CUT,
    PARTIAL_SUM,
    WHOLE,
    Row,
    rows_keys,
    rows_picture,
    size_text,
)

__all__ = ["block_section"]

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
        rows_keys(),
        *parts,
        tag("p", _legend(graphs), class_="soft"),
    )


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


def _picture(graph: ShardedGraph, block: ShardedBlock, free: dict[str, int], label: str) -> Html:
    nodes = list(block.ops())
    moved = _moved(graph, block, free)
    words = ", ".join(f"{node.kind} {text}" for node in nodes if (text := moved.get(node.name)))
    rows = [_row(graph, node, moved.get(node.name, "")) for node in nodes]
    return rows_picture(rows, f"{label}: {words or 'no collectives'}")


def _moved(graph: ShardedGraph, block: ShardedBlock, free: dict[str, int]) -> dict[str, str]:
    """Bytes of each collective by its name, as text."""
    nodes = [node for node in block.ops() if node.kind in COLLECTIVES]
    found = zip(nodes, transfers(graph, block), strict=True)
    return {node.name: size_text(one.elements.at(free) * one.element_bytes) for node, one in found}


def _row(graph: ShardedGraph, node: ShardedOp, moved: str) -> Row:
    first, second = _texts(graph, node, moved)
    sums = PARTIAL in dict(node.layout).values()
    return Row(
        name=node.name,
        inputs=tuple(node.inputs),
        first=first,
        second=second,
        stripe=PARTIAL_SUM if sums else CUT if node.layout else WHOLE,
        moves=bool(moved),
    )


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
