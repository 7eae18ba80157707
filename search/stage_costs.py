"""What each stage of a pipeline costs, in sums over templates: the input of the cuts.

The templates of a model run a number of times in each stage. A step of a stage is the sum of its
templates' times, and where the host launches the kernels at least their number times the launch;
its memory is the sum of their weights and cache. `TemplateCosts` prices each template alone at
the points of a grid; `rows` turns one point into the additive rows that `cuts` works on:

    decode, mixed      seconds of a stage: kernels, or at least what the host needs to launch them
    bytes              weights and cache of a stage

What is the same on every stage (activations, communicators, reserve) comes off the capacity; the
last stage holds the logits where those are larger than the activations.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.ledger import Ledger
from shardplan.costmodel.load import Parts
from shardplan.costmodel.serving import ServingInput, steady_steps
from shardplan.costmodel.step import StepModel
from shardplan.models.apply import ShardedGraph, Stage
from shardplan.models.graph import Phase
from shardplan.search.cuts import CostRow

__all__ = [
    "BYTES",
    "DECODE",
    "MIXED",
    "PointRows",
    "TemplateCosts",
    "ends_of",
    "template_seconds",
]

DECODE, MIXED, BYTES = range(3)
"""Places of the rows of a point."""


@dataclass(frozen=True, slots=True)
class PointRows:
    """The rows of one grid point, and the bytes that a stage's weights and cache may take."""

    rows: tuple[CostRow, ...]
    room_bytes: float


def _alone(graph: ShardedGraph) -> ShardedGraph:
    """The same graph with a stage for each template that any stage runs."""
    names = dict.fromkeys(name for stage in graph.stages for name in stage.counts)
    stages = tuple(
        Stage(index=place, first=0, last=0, counts={name: 1}) for place, name in enumerate(names)
    )
    return replace(graph, stages=stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateCosts:
    """Prices of each template at points `[n]` of a layout's grid."""

    layers: tuple[str, ...]
    ends: Mapping[Phase, tuple[Mapping[str, int], ...]]
    """Per stage, how often a step of a phase runs templates that are no layers."""
    times: tuple[tuple[Mapping[str, Array], ...], ...]
    """Template -> seconds `[n]` of each part of the rows DECODE and MIXED."""
    held: Mapping[str, Array]
    """Template -> bytes of weights and cache `[n]`."""
    room: Array
    """Bytes left for weights and cache, but for the logits."""
    logits: Array
    """Bytes that the last stage holds beyond the activations."""

    @classmethod
    def of(
        cls, model: StepModel, ledger: Ledger, given: ServingInput, memory: Mapping[str, Array]
    ) -> TemplateCosts:
        """Price every template at the points of `given`.

        `memory`: `cached_tokens`, `activations_bytes` and `logits_bytes` of the points.
        """
        graphs = {phase: _alone(graph) for phase, graph in model.graphs.items()}
        alone = model.with_graphs(graphs)
        graph = graphs["prefill"]
        names = {
            phase: [next(iter(stage.counts)) for stage in one.stages]
            for phase, one in graphs.items()
        }
        decode, mixed = steady_steps(alone, given)
        activations = memory["activations_bytes"]
        fixed = ledger.communicators * ledger.engine.communicator_bytes
        fixed += ledger.engine.reserve_bytes
        return cls(
            layers=graph.model.layers,
            ends={phase: ends_of(graph) for phase, graph in model.graphs.items()},
            times=(
                template_seconds(alone, "decode", names["decode"], decode),
                template_seconds(alone, "prefill", names["prefill"], mixed),
            ),
            held={
                name: ledger.weights_bytes(stage, given.weight_dtype)
                + memory["cached_tokens"] * ledger.kv_bytes_per_token(stage, given.kv_dtype)
                for name, stage in zip(names["prefill"], graph.stages, strict=True)
            },
            room=ledger.capacity_bytes - fixed - activations,
            logits=np.maximum(memory["logits_bytes"] - activations, 0.0),
        )

    def total(self, row: int) -> Array:
        """Row DECODE or MIXED summed over all stages, at every point: the larger of its parts."""
        phase: Phase = "decode" if row == DECODE else "prefill"
        runs = Counter(self.layers)
        for end in self.ends[phase]:
            runs.update(end)
        sums = (
            sum((count * costs[name] for name, count in runs.items()), np.zeros(()))
            for costs in self.times[row]
        )
        return functools.reduce(np.maximum, sums)

    def seconds(self, row: int, points: int) -> list[tuple[Array, Array]]:
        """Row DECODE or MIXED of all points: layers `[n, L]` and ends `[n, p]` of each part."""
        phase: Phase = "decode" if row == DECODE else "prefill"
        found = []
        for costs in self.times[row]:
            each = {name: np.broadcast_to(values, (points,)) for name, values in costs.items()}
            ends = [
                sum((count * each[name] for name, count in end.items()), np.zeros(points))
                for end in self.ends[phase]
            ]
            layers = np.stack([each[name] for name in self.layers], axis=1)
            found.append((layers, np.stack(ends, axis=1)))
        return found

    def rows(self, point: int) -> PointRows:
        """The rows of one grid point."""

        def part(
            costs: Mapping[str, Array], phase: Phase, last: float = 0.0
        ) -> tuple[list[float], list[float]]:
            each = {name: _at(values, point) for name, values in costs.items()}
            ends = [sum(count * each[n] for n, count in end.items()) for end in self.ends[phase]]
            ends[-1] += last
            return [each[name] for name in self.layers], ends

        decode, mixed = self.times
        rows = (
            CostRow.of(*(part(costs, "decode") for costs in decode)),
            CostRow.of(*(part(costs, "prefill") for costs in mixed)),
            CostRow.of(part(self.held, "prefill", _at(self.logits, point))),
        )
        return PointRows(rows, _at(self.room, point))


def ends_of(graph: ShardedGraph) -> tuple[dict[str, int], ...]:
    """Per stage, how often it runs each template that is no layer."""
    layers = set(graph.model.layers)
    return tuple(
        {name: count for name, count in stage.counts.items() if name not in layers}
        for stage in graph.stages
    )


def _at(values: Array, point: int) -> float:
    return float(values if values.ndim == 0 else values[point])


def template_seconds(
    model: StepModel, phase: Phase, names: list[str], stages: list[Parts]
) -> tuple[dict[str, Array], ...]:
    """Busy time and launch floor of each template."""
    gap, launch = model.engine.launch_gap_s, model.launch_floor_s(phase)
    pairs = list(zip(names, stages, strict=True))
    busy = {name: np.asarray(one.total_s + gap * one.kernels) for name, one in pairs}
    if not launch:
        return (busy,)
    return busy, {name: np.asarray(launch * one.kernels) for name, one in pairs}
