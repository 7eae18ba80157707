"""The price of a step: rows of the op table through the formulas, summed over templates and stages.

    stage_s = sum over templates of (times it runs in the stage) * (sum of its rows)
    step_s  = device time, or kernels * host launch where the phase is launched by the host and
              the device waits for it, plus the engine's host time

One `StepModel` is one layout on one cluster under one engine. Its methods take numpy arrays of
any shape (tokens, batch, context) and one dtype at a time, and give arrays of that shape per
stage: the same code prices one strategy and a million. Token rows depend on the tokens of a step
alone, so a step that mixes prefill chunks and decoding requests is the token price of all of them
together plus the attention price of each part.
Collectives run beside compute only where a switch of the engine lets them (`overlap`): the
published A3 profiles show under 1 % of it otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.formulas import FORMULAS, local_tokens, pointwise_time
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.base import Array, KernelTime, Machine
from shardplan.costmodel.kernels.collectives import CollectiveKind, collective, group_size
from shardplan.costmodel.load import ZERO, Load, Parts, kernel_dtype
from shardplan.costmodel.memo import FEW_POINTS, Memo, Points
from shardplan.costmodel.optable import NO_OVERLAP, Group, Overlap, Row, block_rows, phase_rows
from shardplan.costmodel.overlap import fused_parts, prefetched
from shardplan.models.apply import ShardedGraph
from shardplan.models.graph import Phase
from shardplan.models.modules import data_widths
from shardplan.models.parallel import Parallelism

__all__ = ["FORMULAS", "Load", "Parts", "StepModel", "kernel_dtype"]


def _block_rows(
    graph: ShardedGraph, cluster: Cluster, engine: EngineProfile, overlap: Overlap, name: str
) -> tuple[Row, ...]:
    return block_rows(graph, graph.blocks[name], cluster, engine, overlap)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """Prices steps of one layout on one cluster under one engine."""

    graphs: Mapping[Phase, ShardedGraph]
    machine: Machine
    engine: EngineProfile
    rows: Mapping[Phase, Mapping[str, tuple[Row, ...]]]
    """Template -> rows, by phase."""
    memo: Memo[Parts] = field(default_factory=Memo, compare=False, repr=False)
    """Prices of rows at points; may be shared by models of one machine and engine."""
    sums: dict[Hashable, list[Parts]] = field(default_factory=dict, compare=False, repr=False)
    """Prices of this model's groups over whole grids."""

    @classmethod
    def of(
        cls,
        graphs: Mapping[Phase, ShardedGraph],
        cluster: Cluster,
        engine: EngineProfile,
        memo: Memo[Parts] | None = None,
        overlap: Overlap = NO_OVERLAP,
    ) -> StepModel:
        """The op tables of both phases; `memo`: shared with models of this machine and engine.

        `overlap`: switches of the engine that let kernels run beside one another.
        """
        rows = {}
        for phase, graph in graphs.items():
            of = functools.partial(_block_rows, graph, cluster, engine, overlap)
            used = {name for stage in graph.stages for name in stage.counts}
            rows[phase] = phase_rows(graph, [name for name in graph.blocks if name in used], of)
        return cls(
            graphs=graphs,
            machine=Machine.of(cluster.device, engine.name),
            engine=engine,
            rows=rows,
            memo=Memo() if memo is None else memo,
        )

    @property
    def groups(self) -> int:
        """Data-parallel groups."""
        return self._parallel.dp

    @property
    def locked(self) -> int:
        """Data-parallel groups whose steps run together: those that share experts or modules."""
        return max((1, *data_widths(self._parallel)))

    @property
    def context_ranks(self) -> int:
        """Ranks that share a context: a decoding token is computed by each of them."""
        return self._parallel.cp

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return self._parallel.pp

    @property
    def _parallel(self) -> Parallelism:
        """The layout, which is the same in every phase."""
        return next(iter(self.graphs.values())).parallel

    @property
    def mtp(self) -> int:
        """Tokens predicted ahead in a decode step."""
        return self.graphs["decode"].parallel.mtp

    def parts(self, group: Group, load: Load) -> list[Parts]:
        """Per stage, the rows of one group under a load."""
        if load.points < FEW_POINTS:
            return self._stages(group, load, None)
        own, points = load.at_points(self.memo)
        key = (group, points.number, own.kinds)
        found = self.sums.get(key)
        if found is None:
            found = self.sums[key] = self._stages(group, own, points)
        return found

    def _stages(self, group: Group, load: Load, points: Points | None) -> list[Parts]:
        """Per stage, the rows of one group, spread over the grid where `points` stand for it."""
        prices: dict[str, Parts] = {}
        for name, rows in self.rows[load.phase].items():
            own = [self._known(row, load, points) for row in rows if row.group == group]
            if own:
                prices[name] = functools.reduce(Parts.plus, own)
        stages, seen = [], {}
        for stage in self.graphs[load.phase].stages:
            runs = self.graphs[load.phase].runs(stage)
            key = tuple(sorted((n, c) for n, c in runs.items() if n in prices))
            if key not in seen:
                times = [prices[name].times(count) for name, count in key]
                total = functools.reduce(Parts.plus, times, ZERO)
                seen[key] = total if points is None else total.at(points)
            stages.append(seen[key])
        return stages

    def _known(self, row: Row, load: Load, points: Points | None) -> Parts:
        """A row's price, from the memo where it was priced at these points before."""
        if points is None:
            return self.price(row, load)
        key = (row, self.groups, points.number, load.kinds)
        found = self.memo.prices.get(key)
        if found is None:
            found = self.memo.prices[key] = self.price(row, load)
        return found

    def by_kind(self, group: Group, load: Load) -> Iterator[tuple[str, Parts]]:
        """(kind, parts) of every row of a group, summed over all stages."""
        graph = self.graphs[load.phase]
        for name, rows in self.rows[load.phase].items():
            count = sum(graph.runs(stage).get(name, 0) for stage in graph.stages)
            for row in rows:
                if row.group == group and count:
                    yield row.kind, self.price(row, load).times(count)

    def step_s(self, stages: list[Parts], phase: Phase) -> list[Array]:
        """Seconds of each stage, launches included; the engine's host time is not."""
        gap, launch = self.engine.launch_gap_s, self.launch_floor_s(phase)
        known: dict[int, Array] = {}
        for parts in stages:
            if id(parts) not in known:
                busy = parts.total_s + gap * parts.kernels
                known[id(parts)] = np.maximum(busy, parts.kernels * launch) if launch else busy
        return [known[id(parts)] for parts in stages]

    def launch_floor_s(self, phase: Phase) -> float:
        """Seconds that the host needs to launch a kernel; 0 where a captured graph is replayed."""
        graph = self.engine.decode_graph if phase == "decode" else self.engine.prefill_graph
        return 0.0 if graph else self.machine.device.host_launch_s

    def host_s(self, phase: Phase) -> float:
        """Host time of a step that the device waits for."""
        engine = self.engine
        return engine.step_host_s if phase == "decode" else engine.prefill_step_host_s

    def price(self, row: Row, load: Load) -> Parts:
        """Price of one row under a load."""
        if row.is_collective:
            time = self.collective_time(row, load)
            # the last rank of a step is waited for once
            once = row.group == "logits" and not row.settled
            late_s = self.engine.skew_s(load.phase, group_size(row.spans)) if once else 0.0
            return Parts(np.zeros(()), np.zeros(()), time.total_s + late_s, np.zeros(()), 1.0)
        if row.fused is not None:
            return fused_parts(self, row, row.fused, load)
        if row.behind:
            time = prefetched(self, row, load)
        else:
            time = FORMULAS.get(row.kind, pointwise_time)(self, row, load)
        return Parts(time.compute_s, time.memory_s, np.zeros(()), time.overhead_s, 1.0)

    def collective_time(self, row: Row, load: Load) -> KernelTime:
        """Time of a collective between a network's kernels, as the engine launches its phase."""
        return collective(
            cast("CollectiveKind", row.kind),
            row.spans,
            row.element_bytes * row.n * local_tokens(row, load, self.groups),
            self.machine.calibration,
            launch=load.launch,
            in_service=True,
        )
