"""What a user holds fixed: layouts of inputs, outputs and parameters, axes that a kind may not use.

`pins`: {tensor: {axis: dim}}. An input comes so, an output is given so, a parameter is held so (and
read so by every reader). Inputs come whole and outputs are given whole where no pin says otherwise,
except what an operator that reads a cache gives back beside its first result: it stays as it lies,
since the next step reads it there. `forbid`: {kind of operator: axes} over which none is split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from shardplan.models.errors import InputError, LayoutError, UnknownNameError
from shardplan.models.opgraph import Layout, OpGraph
from shardplan.models.parallel import Mesh
from shardplan.models.redistribute import PARTIAL
from shardplan.search.oplevel.candidates import Candidate
from shardplan.search.oplevel.layouts import WHOLE, Key, key_of, local_elements

__all__ = ["Constraints"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What is held fixed; nothing unless told."""

    pins: Mapping[str, Layout] = field(default_factory=lambda: MappingProxyType({}))
    forbid: Mapping[str, Sequence[str]] = field(default_factory=lambda: MappingProxyType({}))

    def check(self, graph: OpGraph, mesh: Mesh) -> None:
        """`UnknownNameError`, `InputError` or `LayoutError` for what the graph or mesh lacks."""
        for name, layout in self.pins.items():
            if name not in graph.tensors:
                raise UnknownNameError("tensor", name, graph.tensors)
            tensor = graph.tensors[name]
            if tensor.kind not in ("input", "parameter") and name not in graph.outputs:
                raise InputError(
                    "layouts of inputs, outputs and parameters can be pinned",
                    got=f"{name}, kind={tensor.kind}",
                )
            _check_axes(layout, mesh, name)
            dims = list(layout.values())
            strange = [d for d in dims if d == PARTIAL or not 0 <= int(d) < len(tensor.shape)]
            if strange or not local_elements(tensor, key_of(layout, mesh), mesh):
                raise LayoutError(
                    "a pinned layout names dims of the tensor that the axes divide",
                    got=f"{name}, shape={list(tensor.shape)}, layout={dict(layout)}, "
                    f"mesh={dict(zip(mesh.axes, mesh.shape, strict=True))}",
                )
        kinds = {one.kind for one in graph.operators}
        for kind, axes in self.forbid.items():
            if kind not in kinds:
                raise UnknownNameError("kind of operator", kind, kinds)
            _check_axes(dict.fromkeys(axes, ""), mesh, kind)

    def allows(self, kind: str, candidate: Candidate) -> bool:
        """Whether an operator of a kind may run so."""
        return not set(self.forbid.get(kind, ())) & set(candidate.chosen)

    def input_key(self, name: str, mesh: Mesh) -> Key:
        """How an input comes."""
        return key_of(self.pins.get(name, {}), mesh)

    def output_key(self, graph: OpGraph, name: str, mesh: Mesh) -> Key | None:
        """How an output is given; None where it stays as it lies."""
        if name in self.pins:
            return key_of(self.pins[name], mesh)
        return None if name in _grown(graph) else WHOLE


def _check_axes(named: Mapping[str, object], mesh: Mesh, what: str) -> None:
    for axis in named:
        if axis not in mesh.axes:
            raise InputError(
                "constraints name axes of the mesh",
                got=f"{what}: axis={axis}",
                hint="its axes are " + (", ".join(mesh.axes) or "none"),
            )


def _grown(graph: OpGraph) -> set[str]:
    """Results that give a cache back."""
    return {
        one.tensor
        for op in graph.operators
        if any(graph.tensors[name].kind == "state" for name in op.inputs)
        for one in op.writes[op.kind == "attention" :]
    }
