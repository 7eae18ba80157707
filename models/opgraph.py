"""A captured graph: operators over loops, whoever captured it (a PyTorch export, an ONNX file).

Where `graph` builds a model from what its configuration says, this is what a compiler sees: any
operators, in computing order, on tensors of known shapes. An operator is what it does to a set of
*loops* (iteration dims): each dim of each of its tensors runs over one loop or over none, and a
loop that no output has is contracted.

    y[b, t, n] = sum over h of x[b, t, h] w[n, h]       loops b, t, n kept, h contracted

A strategy of an operator is {axis: loop}, as everywhere: a tensor dim that runs over the loop is
split over the axis, and where the loop is contracted the output is a partial sum. What this needs
to know of an operator is in its loops alone; front ends write them down (`oploops`), and an
operator that none of them knows is refused with its place in the source.

A reshape that splits or joins dims gives its major part a loop: [b, t, h d] -> [b, t, h, d] has the
loop h of size h, which runs over blocks of d elements of the input's last dim (`Tensor dims` may be
larger than their loop; they are cut into as many equal blocks).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from shardplan.models.errors import LayoutError
from shardplan.models.graph import digraph
from shardplan.models.parallel import Mesh
from shardplan.models.redistribute import PARTIAL

if TYPE_CHECKING:
    import networkx as nx

__all__ = [
    "Access",
    "Layout",
    "Loop",
    "OpGraph",
    "Operator",
    "Tensor",
    "check_graph",
    "element_bytes",
    "layouts_of",
]

Layout = Mapping[str, int | str]
"""{axis: tensor dim that it splits, or `PARTIAL`}; axes that are not named hold the whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A tensor of the graph: an input, a parameter, a constant, or an operator's result."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """float64, float32, bfloat16, float16, int8, int32, int64, bool, ..."""
    kind: str
    """input | parameter | constant | state | result. A state is a cache: read, grown, given back.
    """
    source: str = ""
    """What its owner calls it: the parameter's name in the module or file."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of all elements."""
        return self.elements * element_bytes(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """An iteration dim of an operator."""

    size: int
    whole: bool = False
    """No axis may split it (a softmax's own dim, a norm's, what a reshape moves apart)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """One tensor that an operator reads or writes: the loop of each of its dims, "" for none."""

    tensor: str
    loops: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One operator. A loop that no output has is contracted: splitting it leaves partial sums."""

    name: str
    kind: str
    """matmul | attention | embedding | norm | softmax | pointwise | reshape | reduce | moe | ..."""
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    loops: Mapping[str, Loop]
    linear: tuple[int, ...] = ()
    """Reads through which a partial sum may pass unreduced, all of them together."""
    flop: float = 0.0
    where: str = ""
    """Its place in the source: module path or node name."""
    layer: int = -1
    """Number of the repeated block it belongs to, -1 for none."""
    attrs: Mapping[str, float | str] = field(default_factory=lambda: MappingProxyType({}))
    refused: str = ""
    """Why nothing of it may be split or read in parts; "" where its loops say what may."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors that it reads."""
        return tuple(one.tensor for one in self.reads)

    @property
    def contracted(self) -> tuple[str, ...]:
        """Loops that no output has."""
        kept = {name for one in self.writes for name in one.loops}
        return tuple(name for name in self.loops if name not in kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpGraph:
    """Operators in computing order, and every tensor by name."""

    name: str
    tensors: Mapping[str, Tensor]
    operators: tuple[Operator, ...]
    outputs: tuple[str, ...]
    layers: int = 0
    """Repeated blocks that were found; the operators of all are present unless `folded`."""
    folded: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    """Layer -> how many equal layers it stands for, of those that are present."""
    source: str = ""

    @property
    def parameters(self) -> int:
        """Elements of all parameters; a folded layer counts as often as it stands."""
        return sum(self.times(owner) * one.elements for one, owner in self._parameters())

    @property
    def flop(self) -> float:
        """Floating point operations of one run; a folded layer counts as often as it stands."""
        return sum(self.times(one.layer) * one.flop for one in self.operators)

    def times(self, layer: int) -> int:
        """How many equal layers a layer stands for."""
        return self.folded.get(layer, 1)

    def of_kind(self, *kinds: str) -> Iterator[Operator]:
        """Operators of these kinds, in computing order."""
        return (one for one in self.operators if one.kind in kinds)

    def producers(self) -> dict[str, Operator]:
        """The operator that gives each result."""
        return {write.tensor: one for one in self.operators for write in one.writes}

    @property
    def graph(self) -> nx.DiGraph[str]:
        """The same as a networkx DiGraph of operators: attribute `op` on nodes, `slot` on edges."""
        made = self.producers()
        nodes = {
            one.name: _Node(one, tuple(made[name].name for name in one.inputs if name in made))
            for one in self.operators
        }
        return digraph(nodes)

    def _parameters(self) -> Iterator[tuple[Tensor, int]]:
        """Each parameter once, with the layer of its first reader."""
        seen: set[str] = set()
        for one in self.operators:
            for name in one.inputs:
                if self.tensors[name].kind == "parameter" and name not in seen:
                    seen.add(name)
                    yield self.tensors[name], one.layer


@dataclass(frozen=True, slots=True)
class _Node:
    """An operator with the operators that it reads, as `digraph` takes it."""

    op: Operator
    inputs: tuple[str, ...]


_BYTES = {"float64": 8, "int64": 8, "uint64": 8, "complex64": 8, "complex128": 16}
_BYTES |= {"float32": 4, "int32": 4, "uint32": 4}
_TWO = ("bfloat16", "float16", "int16", "uint16")


def element_bytes(dtype: str) -> int:
    """Bytes of one element; types of 8 bits and fewer take one."""
    return _BYTES.get(dtype, 2 if dtype in _TWO else 1)


def layouts_of(
    op: Operator, chosen: Mapping[str, str], mesh: Mesh, tensors: Mapping[str, Tensor]
) -> tuple[tuple[Layout, ...], tuple[Layout, ...]]:
    """(layouts of the reads, of the writes) where {axis: loop} is the operator's strategy.

    `LayoutError` where a loop is unknown or must stay whole, or its size or a tensor dim that runs
    over it does not divide by the ranks that share it.
    """
    for name in dict.fromkeys(chosen.values()):
        ways = math.prod(mesh.size((axis,)) for axis, loop in chosen.items() if loop == name)
        loop = op.loops.get(name)
        if loop is None or loop.whole or op.refused:
            raise LayoutError(
                "an operator is split over a loop of its own that may be split",
                got=f"{op.name} ({op.kind}) at {op.where}, loop={name}",
                hint="try " + (", ".join(n for n, one in op.loops.items() if not one.whole) or "R"),
            )
        if loop.size % ways:
            raise LayoutError(
                "the ranks that share a loop divide it",
                got=f"{op.name} at {op.where}, loop={name} of {loop.size}, ranks={ways}",
            )
    reads = tuple(_layout(one, chosen, {}) for one in op.reads)
    partial = {axis for axis, loop in chosen.items() if loop in op.contracted}
    return reads, tuple(_layout(one, chosen, dict.fromkeys(partial, PARTIAL)) for one in op.writes)


def _layout(access: Access, chosen: Mapping[str, str], partial: Mapping[str, str]) -> Layout:
    found: dict[str, int | str] = dict(partial)
    for axis, loop in chosen.items():
        if loop in access.loops:
            found[axis] = access.loops.index(loop)
    return found


def check_graph(graph: OpGraph) -> None:
    """`LayoutError` unless every access names a tensor and gives each of its dims a loop or none,
    sizes divide, and tensors are made before they are read."""
    ready = {name for name, one in graph.tensors.items() if one.kind != "result"}
    for op in graph.operators:
        for access in (*op.reads, *op.writes):
            _check_access(op, access, graph.tensors)
        missing = [name for name in op.inputs if name not in ready]
        if missing:
            raise LayoutError("tensors are made before they are read", got=f"{op.name}: {missing}")
        ready |= {one.tensor for one in op.writes}
    lost = [name for name in graph.outputs if name not in ready]
    if lost:
        raise LayoutError("the outputs of a graph are tensors of it", got=", ".join(lost))


def _check_access(op: Operator, access: Access, tensors: Mapping[str, Tensor]) -> None:
    tensor = tensors.get(access.tensor)
    if tensor is None or len(access.loops) != len(tensor.shape):
        raise LayoutError(
            "an operator gives every dim of its tensors a loop or none",
            got=f"{op.name} at {op.where}: {access.tensor}{list(access.loops)}",
        )
    _check_sizes(op, access, tensor.shape)


def _check_sizes(op: Operator, access: Access, shape: Sequence[int]) -> None:
    for size, name in zip(shape, access.loops, strict=True):
        if name and (name not in op.loops or size % op.loops[name].size):
            raise LayoutError(
                "a loop divides the dims that run over it",
                got=f"{op.name} at {op.where}: {access.tensor}, dim of {size}, loop {name}",
            )
