"""One exported step split over ranks and stages, and run in lock step.

The values of an input or output are lists over the ranks of a stage. Stages run one after another
and hand their wires on; each hand-over counts as one `send`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardplan.models.errors import ProofError
from shardplan.models.fx.emit import emit
from shardplan.models.fx.lockstep import groups_of_axes, run_in_step
from shardplan.models.fx.modules import cut, held_by
from shardplan.models.fx.stages import StageGraph, cut_stages
from shardplan.models.fx.torch_lib import torch_lib
from shardplan.models.lockstep import Communication
from shardplan.models.opshard import Key, Program, place
from shardplan.models.parallel import Mesh

__all__ = [
    "Exported",
    "SplitStep",
    "exported_of",
    "split_step",
    "unsplit",
    "whole_value",
    "widened",
]

_ALONE = Mesh((), (), {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What is used of a `torch.export.ExportedProgram`."""

    graph: Any
    graph_signature: Any
    tensors: Mapping[str, Any]
    """Parameters, buffers and constants by name."""


def exported_of(program: Any) -> Exported:
    """The parts of an `ExportedProgram`; nothing is copied."""
    return Exported(
        graph=program.graph,
        graph_signature=program.graph_signature,
        tensors={**program.state_dict, **program.constants},
    )


def widened(exported: Exported) -> Exported:
    """The same with every float32 made a float64; nodes keep their names."""
    torch = torch_lib()
    graph = copy.deepcopy(exported.graph)

    def wide(argument: Any) -> Any:
        return torch.float64 if argument is torch.float32 else argument

    for node in graph.nodes:
        node.args = tuple(map(wide, node.args))
        node.kwargs = {name: wide(value) for name, value in node.kwargs.items()}
    tensors = {
        name: one.double() if one.dtype == torch.float32 else one
        for name, one in exported.tensors.items()
    }
    return Exported(graph=graph, graph_signature=exported.graph_signature, tensors=tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitStep:
    """The stages of a step; `weights[stage][rank]` are what each rank holds."""

    program: Program
    stages: tuple[StageGraph, ...]
    tensors: Mapping[str, Any]
    """Whole parameters, buffers and constants by name."""
    weights: tuple[tuple[Mapping[str, Any], ...], ...]
    inputs: tuple[str, ...]

    @property
    def mesh(self) -> Mesh:
        """The mesh of one stage."""
        return self.program.mesh

    def parts(self, number: int, value: Any) -> list[Any]:
        """An input as each rank is given it."""
        lies = self.program.inputs[self.inputs[number]]
        return [cut(value, lies, self.mesh, rank) for rank in range(self.mesh.ranks)]

    def run(self, inputs: Sequence[list[Any]], log: list[Communication]) -> list[list[Any]]:
        """Outputs over ranks, from inputs over ranks; what crossed ranks is appended to `log`."""
        given = dict(zip(self.inputs, inputs, strict=True))
        ranks = [torch_lib().tensor(rank) for rank in range(self.mesh.ranks)]
        mail: dict[str, list[Any]] = {}
        outputs: dict[int, list[Any]] = {}
        for stage, weights in zip(self.stages, self.weights, strict=True):
            values = [mail[name] for name in stage.wires_in]
            values += [given[name] for name in stage.inputs]
            held = {name: [one[name] for one in weights] for name in stage.held}
            found = run_in_step(
                stage.graph, self.mesh, [*values, ranks], held, log=log, stage=stage.index
            )
            columns = [list(column) for column in zip(*found, strict=True)]
            for name, column in zip(stage.wires_out, columns, strict=False):
                mail[name] = column
                size = column[0].numel()
                log.append(Communication(stage.index, "", "send", ("pp",), 2, size))
            results = columns[len(stage.wires_out) :]
            outputs |= dict(zip(stage.outputs, results, strict=True))
        return [outputs[number] for number in sorted(outputs)]


def split_step(exported: Exported, program: Program, layers: Sequence[int]) -> SplitStep:
    """A step under a program, over stages of so many layers each."""
    whole = emit(exported, program)
    stages = cut_stages(whole, layers)
    mesh = program.mesh
    weights = tuple(
        tuple(held_by(stage.held, exported.tensors, mesh, rank) for rank in range(mesh.ranks))
        for stage in stages
    )
    return SplitStep(
        program=program,
        stages=stages,
        tensors=exported.tensors,
        weights=weights,
        inputs=whole.inputs,
    )


def unsplit(exported: Exported, graph: Any, inputs: Sequence[Any]) -> list[Any]:
    """Outputs of the captured graph on one rank."""
    step = split_step(exported, place(graph, {}, _ALONE), (1,))
    return [one[0] for one in step.run([[value] for value in inputs], [])]


def whole_value(parts: Sequence[Any], lies: Key, mesh: Mesh) -> Any:
    """The whole tensor from the ranks' parts. `ProofError` where replicas differ."""
    torch = torch_lib()
    values = list(parts)
    for axis, dim in reversed(lies):
        for group in groups_of_axes(mesh, (axis,)):
            whole = torch.cat([values[rank] for rank in group], int(dim))
            for rank in group:
                values[rank] = whole
    first = values[0]
    spread = max(float((one - first).abs().max()) for one in values)
    if not spread <= 1e-6 * max(1.0, float(first.abs().max())):
        raise ProofError("replicas of an output disagree", got=f"largest difference {spread:.3g}")
    return first
