"""Strategies that follow from a graph: Megatron's split of its products, a split of some tensors.

Megatron's: products whose input is whole are split by columns, the others by rows, and what lies
between follows. On a decoder this gives the known plan (Shoeybi et al., Megatron-LM, 2019):
projections of queries, keys and values by heads, the output projection by rows, gate and up by
columns, down by rows, the embedding table and the output head by vocabulary; two all-reduces a
layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from shardplan.models.errors import LayoutError
from shardplan.models.frontends.onnx_graph import Strategy
from shardplan.models.opgraph import Operator, OpGraph
from shardplan.models.parallel import Mesh

__all__ = ["both", "follow_strategy", "megatron_strategy"]


def megatron_strategy(graph: OpGraph, mesh: Mesh, axis: str) -> dict[str, dict[str, str]]:
    """{operator: {axis: loop}} for one axis of a mesh; what it does not name runs whole."""
    return _chosen(graph, mesh, axis, {}, seed=True)


def follow_strategy(
    graph: OpGraph, mesh: Mesh, axis: str, dims: Mapping[str, int]
) -> dict[str, dict[str, str]]:
    """Tensors split along a dim each ({tensor: dim}), and what follows from them.

    Inputs along their batch: data parallelism. Weights of experts along their first dim: expert
    parallelism. `LayoutError` for a tensor that the graph does not have or a dim that does not
    divide.
    """
    for name, dim in dims.items():
        shape = graph.tensors[name].shape if name in graph.tensors else ()
        if not 0 <= dim < len(shape) or shape[dim] % mesh.size((axis,)):
            raise LayoutError(
                "tensors are split along a dim of theirs that the axis divides",
                got=f"tensor={name}, shape={list(shape)}, dim={dim}, axis={axis}",
            )
    return _chosen(graph, mesh, axis, dims, seed=False)


def both(*strategies: Strategy) -> dict[str, dict[str, str]]:
    """Strategies of different axes as one."""
    found: dict[str, dict[str, str]] = {}
    for strategy in strategies:
        for name, chosen in strategy.items():
            found.setdefault(name, {}).update(chosen)
    return found


def _chosen(
    graph: OpGraph, mesh: Mesh, axis: str, dims: Mapping[str, int], *, seed: bool
) -> dict[str, dict[str, str]]:
    ways, split = mesh.size((axis,)), dict(dims)
    found: dict[str, dict[str, str]] = {}
    for op in graph.operators:
        loop = _followed(op, split, ways) or (_seeded(graph, op, split, ways) if seed else "")
        if not loop:
            continue
        found[op.name] = {axis: loop}
        tables = op.reads[:1] if op.kind == "embedding" else ()  # a tied head reads it too
        for one in (*op.writes, *tables):
            if loop in one.loops:
                split.setdefault(one.tensor, one.loops.index(loop))
    return found


def _may(op: Operator, loop: str, ways: int) -> bool:
    return loop in op.loops and not op.loops[loop].whole and op.loops[loop].size % ways == 0


def _followed(op: Operator, split: Mapping[str, int], ways: int) -> str:
    """The loop that runs over what is split already, where all reads agree; "" for none.

    Of two reads that disagree the larger keeps its split.
    """
    loops = {
        read.loops[split[read.tensor]]: math.prod(
            one.size for name, one in op.loops.items() if name in read.loops
        )
        for read in op.reads
        if read.tensor in split
    }
    may = {loop: size for loop, size in loops.items() if loop and _may(op, loop, ways)}
    return max(may, key=lambda loop: may[loop]) if may else ""


def _seeded(graph: OpGraph, op: Operator, split: Mapping[str, int], ways: int) -> str:
    """Columns of a product with a weight, rows of an embedding table."""
    if any(name in split for name in op.inputs):
        return ""
    weights = [
        read
        for read in op.reads
        if graph.tensors[read.tensor].kind == "parameter" and len(read.loops) > 1
    ]
    if op.kind == "embedding" and _may(op, "v", ways):
        return "v"
    columns = op.kind in ("matmul", "conv") and weights and "n" in weights[0].loops
    return "n" if columns and _may(op, "n", ways) else ""
