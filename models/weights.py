"""Parameters as numpy arrays, quantized or not, and how they and activations are cut over a mesh.

A cut tensor is one array with the mesh in front: shape [*mesh, *local]. `place` cuts, `gather`
puts together; both follow the nesting rule of `shardplan.models.apply` (axes that share a dim
nest major to minor). An int8 weight carries one scale per output channel (the dims it keeps), and
is cut together with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.models.apply import Layout
from shardplan.models.errors import ProofError
from shardplan.models.graph import ModelGraph, Op
from shardplan.models.parallel import Mesh
from shardplan.models.redistribute import PARTIAL

__all__ = ["Array", "Weight", "param_key", "place", "quantize", "random_weights"]

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter: `values` [dims], and per-channel `scale` [scale_dims] where it is int8."""

    values: NDArray[np.generic]
    dims: tuple[str, ...]
    scale: Array | None = None
    scale_dims: tuple[str, ...] = ()


def param_key(op: Op, layer: int) -> str:
    """Name of an operator's parameter in the whole model; tied embeddings share one."""
    return op.param if layer < 0 or op.shared else f"{layer}.{op.param}"


def quantize(weight: Weight, channels: tuple[str, ...]) -> Weight:
    """Int8, symmetric, one scale per output channel (the dims in `channels`)."""
    values = np.asarray(weight.values, dtype=np.float64)
    over = tuple(i for i, d in enumerate(weight.dims) if d not in channels)
    peak = np.abs(values).max(axis=over, keepdims=True)
    scale = np.where(peak > 0, peak, 1.0) / 127.0
    ints = np.rint(values / scale).astype(np.int8)
    return Weight(ints, weight.dims, scale.reshape(_kept(weight, over)), channels)


def _kept(weight: Weight, over: tuple[int, ...]) -> list[int]:
    return [size for i, size in enumerate(weight.values.shape) if i not in over]


def random_weights(graph: ModelGraph, seed: int, *, quantized: bool = False) -> dict[str, Weight]:
    """Random parameters of a (small) model, float64; linear and expert weights int8 on request."""
    rng = np.random.default_rng(seed)
    found: dict[str, Weight] = {}
    for name, layer in graph.sequence():
        for op in graph.blocks[name].ops():
            key = param_key(op, layer)
            if not op.weight or key in found:
                continue
            shape = [graph.sizes[d] for d in op.weight]
            values = rng.standard_normal(shape) / np.sqrt(max(shape[0], 1))
            if op.kind in ("rmsnorm", "scale"):
                values = 1.0 + 0.1 * rng.standard_normal(shape)
            weight = Weight(values, op.weight)
            if quantized and op.weight_class in ("linear", "expert"):
                weight = quantize(weight, tuple(d for d in op.weight if d not in op.contract))
            found[key] = weight
    return found


def place(array: NDArray[np.generic], dims: tuple[str, ...], layout: Layout, mesh: Mesh) -> Array:
    """Cut a whole tensor over the mesh: [dims] -> [*mesh, *local dims]."""
    axis_of: dict[str, list[str]] = {d: [] for d in dims}
    for axis, dim in layout:
        if dim == PARTIAL:
            raise ProofError("a whole tensor cannot be placed as a partial sum", got=str(layout))
        axis_of[dim].append(axis)
    shape: list[int] = []
    labels: list[str] = []
    for dim, size in zip(dims, array.shape, strict=True):
        ways = mesh.size(tuple(axis_of[dim]))
        if size % ways:
            raise ProofError("a cut dim must divide", got=f"dim={dim}, size={size}, ways={ways}")
        shape += [*(mesh.shape[mesh.axes.index(a)] for a in axis_of[dim]), size // ways]
        labels += [*axis_of[dim], "=" + dim]
    order = [a for a in mesh.axes if a in labels] + ["=" + d for d in dims]
    cut = array.reshape(shape).transpose([labels.index(label) for label in order])
    lead = [n if a in labels else 1 for a, n in zip(mesh.axes, mesh.shape, strict=True)]
    local = cut.shape[len(order) - len(dims) :]
    whole = np.broadcast_to(cut.reshape([*lead, *local]), (*mesh.shape, *local))
    result: Array = whole  # integer arrays keep their dtype; callers convert when they compute
    return result


def local_weight(weight: Weight, layout: Layout, mesh: Mesh) -> tuple[Array, int]:
    """One operator's parameter on every rank, dequantized, and the bytes one rank stores."""
    values = place(weight.values, weight.dims, layout, mesh)
    ranks = mesh.ranks
    stored = values.size // ranks * values.dtype.itemsize
    if weight.scale is None:
        return values, stored
    cut = tuple((a, d) for a, d in layout if d in weight.scale_dims)
    scale = place(weight.scale, weight.scale_dims, cut, mesh)
    stored += scale.size // ranks * 4
    spread = [
        values.shape[len(mesh.shape) + i] if d in weight.scale_dims else 1
        for i, d in enumerate(weight.dims)
    ]
    return values.astype(np.float64) * scale.reshape([*mesh.shape, *spread]), stored


def held(weights: Mapping[str, Weight]) -> int:
    """Parameter elements of a whole model."""
    return sum(int(np.prod(w.values.shape)) for w in weights.values())
