"""One forward pass as the kernels that each pipeline stage runs, in computing order, each priced.

    stage_s = sum over its passes of (kernels + launch_gap_s * kernels) + what host launches add
    step_s  = sum of stage_s + host_s

These are the rows and prices of `StepModel` under another order: those of one template stand as
the graph computes them, a fused kernel where the first of its operators does. What host launches
add is the part of `kernels * launch floor` that the kernels themselves do not hide
(`StepModel.step_s`); it stands at the end of a stage. Layers that are alike share their kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.load import Load, Parts
from shardplan.costmodel.optable import Group, Overlap, draft_rows, placed_rows
from shardplan.costmodel.rows import Placed
from shardplan.costmodel.step import StepModel
from shardplan.models.apply import ShardedGraph, Stage
from shardplan.models.graph import Phase

__all__ = ["Kernel", "Pass", "Program", "StageProgram", "program_of"]

_DRAFT = "draft"
_DRAFT_PARTS = ("mtp", "mtp_head")
"""Templates that a draft after the first one runs."""


class Kernel(NamedTuple):
    """One kernel or collective of one rank, seconds."""

    name: str
    """The operators that it runs."""
    kind: str
    collective: bool
    compute_s: float
    memory_s: float
    collective_s: float
    overhead_s: float

    @property
    def total_s(self) -> float:
        """All of it; the gap to the next kernel is not."""
        return self.compute_s + self.memory_s + self.collective_s + self.overhead_s


class Pass(NamedTuple):
    """One run of a template: a layer, the embedding, the head, a send, a draft."""

    template: str
    layer: int
    """-1 where it is no layer."""
    kernels: tuple[Kernel, ...]
    seconds: float
    """Gaps between kernels included."""


class StageProgram(NamedTuple):
    """One pipeline stage."""

    stage: int
    passes: tuple[Pass, ...]
    launch_wait_s: float
    """What launches by the host add."""

    @property
    def seconds(self) -> float:
        """Of the stage; host time of the step is not in it."""
        return sum(one.seconds for one in self.passes) + self.launch_wait_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One forward pass through all stages."""

    phase: Phase
    stages: tuple[StageProgram, ...]
    gap_s: float
    """Between kernels."""
    host_s: float
    """Of the step, which the device waits for."""

    @property
    def step_s(self) -> float:
        """From the host's work to the end of the last stage, of one microbatch."""
        return sum(one.seconds for one in self.stages) + self.host_s

    @property
    def slowest_s(self) -> float:
        """Of the slowest stage."""
        return max(one.seconds for one in self.stages)

    @property
    def rotation_s(self) -> float:
        """One step of each of as many microbatches as there are stages, all in flight at once."""
        return max(self.step_s - self.host_s, self.slowest_s * len(self.stages)) + self.host_s


def program_of(
    model: StepModel, cluster: Cluster, overlap: Overlap, loads: Mapping[Group, Load]
) -> Program:
    """The pass whose groups of rows have `loads`, one point each.

    `overlap`: the switches that `model` was made with.
    """
    phase = loads["token"].phase
    graph, gap_s = model.graphs[phase], model.engine.launch_gap_s
    passes: dict[str, tuple[Kernel, ...]] = {}
    stages = []
    for stage in graph.stages:
        held = []
        for name, layer in _sequence(graph, stage):
            if name not in passes:
                placed = _in_order(graph, name, model, cluster, overlap)
                passes[name] = tuple(
                    _kernel(one, model.price(one.row, loads[one.row.group])) for one in placed
                )
            own = passes[name]
            seconds = sum(one.total_s for one in own) + gap_s * len(own)
            held.append(Pass(name, layer, own, seconds))
        stages.append(_stage(stage, held, gap_s, model.launch_floor_s(phase)))
    return Program(phase=phase, stages=tuple(stages), gap_s=gap_s, host_s=model.host_s(phase))


def _stage(stage: Stage, passes: list[Pass], gap_s: float, floor_s: float) -> StageProgram:
    """A stage, with what it waits for the host that launches its kernels."""
    count = sum(len(one.kernels) for one in passes)
    busy_s = sum(one.seconds for one in passes)
    return StageProgram(stage.index, tuple(passes), max(count * floor_s - busy_s, 0.0))


def _sequence(graph: ShardedGraph, stage: Stage) -> Iterator[tuple[str, int]]:
    """(template, layer) in computing order, the drafts after the first with them."""
    yield from graph.sequence(stage)
    for _ in range(graph.runs(stage).get(_DRAFT, 0)):
        yield _DRAFT, -1


def _in_order(
    graph: ShardedGraph, name: str, model: StepModel, cluster: Cluster, overlap: Overlap
) -> list[Placed]:
    """The rows of a template as it computes them; a further draft runs those of two templates."""
    found: list[Placed] = []
    for part in _DRAFT_PARTS if name == _DRAFT else (name,):
        block = graph.blocks[part]
        place = {node: at for at, node in enumerate(block.order)}
        found += sorted(
            placed_rows(graph, block, cluster, model.engine, overlap),
            key=lambda one: min((place[node] for node in one.nodes), default=len(place)),
        )
    if name != _DRAFT:
        return found
    rows = draft_rows(tuple(one.row for one in found), ())
    return [Placed(row, one.nodes) for row, one in zip(rows, found, strict=True)]


def _kernel(one: Placed, parts: Parts) -> Kernel:
    """A row at its one point."""
    row = one.row
    # a collective's node is called after the tensor that it moves: `o>all_reduce.7`
    name = ", ".join(node.partition(">")[0] for node in one.nodes) or row.kind
    return Kernel(name, row.kind, row.is_collective, *(float(part) for part in parts.seconds))
