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
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.formulas import FORMULAS, dtypes_of, local_tokens, pointwise_time
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.base import Array, KernelTime, Machine
from shardplan.costmodel.kernels.collectives import CollectiveKind, collective, group_size
from shardplan.costmodel.load import PARTS, ZERO, Load, Parts
from shardplan.costmodel.memo import Memo, Points
from shardplan.costmodel.optable import NO_OVERLAP, Group, Overlap, Row, block_rows, phase_rows
from shardplan.costmodel.overlap import fused_parts, prefetched
from shardplan.costmodel.row_stacks import RowTable, Stack, row_table
from shardplan.costmodel.weight_types import is_mixed
from shardplan.models.apply import ShardedGraph
from shardplan.models.graph import Phase
from shardplan.models.modules import data_widths
from shardplan.models.parallel import Parallelism

__all__ = [
    "StepModel",
]


def _block_rows(
    graph: ShardedGraph, cluster: Cluster, engine: EngineProfile, overlap: Overlap, name: str
) -> tuple[Row, ...]:
    return block_rows(graph, graph.blocks[name], cluster, engine, overlap)


@dataclass(frozen=True, slots=True)
class Kept:
    """What one step model has worked out."""

    sums: dict[Hashable, list[Parts]] = field(default_factory=dict)
    """Prices of its groups over whole grids."""
    tables: dict[tuple[Phase, Group, bool], RowTable] = field(default_factory=dict)
    """Its groups in stacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """Prices steps of one layout on one cluster under one engine."""

    graphs: Mapping[Phase, ShardedGraph]
    machine: Machine
    engine: EngineProfile
    rows: Mapping[Phase, Mapping[str, tuple[Row, ...]]]
    """Template -> rows, by phase."""
    memo: Memo = field(default_factory=Memo, compare=False, repr=False)
    """Prices of rows at points `[4, points]`; may be shared by models of one machine and engine."""
    kept: Kept = field(default_factory=Kept, compare=False, repr=False)
    """What this model has worked out for itself."""

    @classmethod
    def of(
        cls,
        graphs: Mapping[Phase, ShardedGraph],
        cluster: Cluster,
        engine: EngineProfile,
        memo: Memo | None = None,
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

    def with_graphs(self, graphs: Mapping[Phase, ShardedGraph]) -> StepModel:
        """The same op tables under other stages."""
        return replace(self, graphs=graphs, kept=Kept())

    def with_rows(self, rows: Mapping[Phase, Mapping[str, tuple[Row, ...]]]) -> StepModel:
        """The same stages with other rows."""
        return replace(self, rows=rows, kept=Kept())

    def forget(self) -> None:
        """Give up prices of loads, for whoever asks for each but once."""
        self.memo.clear()
        self.kept.sums.clear()

    def parts(self, group: Group, load: Load) -> list[Parts]:
        """Per stage, the rows of one group under a load; stages that are alike share an object."""
        if not load.remembered:
            return self._stages(group, load, None)
        own, points = load.at_points(self.memo)
        key = (group, points.number, own.kinds)
        found = self.kept.sums.get(key)
        if found is None:
            found = self.kept.sums[key] = self._stages(group, own, points)
        return found

    def _stages(self, group: Group, load: Load, points: Points | None) -> list[Parts]:
        """Per stage, the rows of one group, spread over the grid where `points` stand for it."""
        table = self.table(group, load)
        if not table.rows:
            return [ZERO] * len(table.stage)
        seconds = np.einsum("sr,r...->s...", table.runs, self._seconds(table, load, points))
        if points is not None:
            seconds = seconds[:, :, points.inverse]
        sums = [
            Parts(one[0], one[1], one[2], one[3], n)
            for one, n in zip(seconds, table.kernels, strict=True)
        ]
        return [sums[which] for which in table.stage]

    def table(self, group: Group, load: Load) -> RowTable:
        """The rows of one group in stacks of which weights have one type each."""
        phase, by_group = load.phase, is_mixed(load.weight_dtype)
        key = (phase, group, by_group)
        found = self.kept.tables.get(key)
        if found is None:
            rows = {
                name: [row for row in rows if row.group == group]
                for name, rows in self.rows[phase].items()
            }
            graph = self.graphs[phase]
            runs = [graph.runs(stage) for stage in graph.stages]
            found = self.kept.tables[key] = row_table(
                rows, runs, by_group, self.memo.number, dtypes_of
            )
        return found

    def _seconds(self, table: RowTable, load: Load, points: Points | None) -> Array:
        """Compute, memory, collective and overhead seconds `[rows, 4, *points]` of each row.

        Rows that were priced at these points before come from the memo.
        """
        seconds = np.empty((len(table.rows), PARTS, *load.shape))
        numbers, groups = table.numbers, self.groups
        for places, stack, dtypes in table.stacks:
            if points is None:
                self._price(stack, places, range(len(places)), load, seconds)
                continue
            known = self.memo.priced((groups, points.number, load.kinds_of(dtypes)))
            missing = []
            for index, place in enumerate(places):
                price = known.get(numbers[place])
                if price is None:
                    missing.append(index)
                else:
                    seconds[place] = price
            if missing:
                self._price(stack, places, missing, load, seconds)
                for index in missing:
                    known[numbers[places[index]]] = seconds[places[index]].copy()
        return seconds

    def _price(
        self,
        stack: Stack,
        places: Sequence[int],
        which: Sequence[int],
        load: Load,
        out: Array,
    ) -> None:
        """Price rows `which` of a stack at once, into their places of `out` [rows, 4, *points]."""
        priced = self.price(stack.at(which, out.ndim - 2), load)
        if len(which) == 1:
            for part in range(PARTS):
                out[places[which[0]], part] = priced[part]
            return
        own = np.empty((len(which), *out.shape[1:]))
        for part in range(PARTS):
            own[:, part] = priced[part]
        out[[places[index] for index in which]] = own

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked(StepModel):
    """Stands for step models of many layouts: their data-parallel groups as an array."""

    dp: Array

    @classmethod
    def like(cls, one: StepModel, dp: Array) -> Stacked:
        """For layouts of the machine and engine of `one`."""
        return cls(graphs=one.graphs, machine=one.machine, engine=one.engine, rows=one.rows, dp=dp)

    @property
    def groups(self) -> int:
        """Data-parallel groups, one a kernel."""
        return cast("int", self.dp)
