"""The price of a step: rows of the op table through the formulas, summed over templates and stages.

    stage_s = sum over templates of (times it runs in the stage) * (sum of its rows)
    step_s  = device time, or kernels * host launch where the phase is launched by the host and
              the device waits for it, plus the engine's host time

One `StepModel` is one layout on one cluster under one engine. Its methods take numpy arrays of
any shape (tokens, batch, context) and one dtype at a time, and give arrays of that shape per
stage: the same code prices one strategy and a million. Token rows depend on the tokens of a step
alone, so a step that mixes prefill chunks and decoding requests is the token price of all of them
together plus the attention price of each part.
Left out: overlap of collectives with compute (the published A3 profiles show under 1 %).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, cast

import numpy as np

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.attention import (
    AttentionKernel,
    attention_decode,
    attention_prefill,
)
from shardplan.costmodel.kernels.base import Array, ArrayLike, KernelTime, Machine, as_array
from shardplan.costmodel.kernels.collectives import CollectiveKind, collective
from shardplan.costmodel.kernels.matmul import matmul
from shardplan.costmodel.kernels.mla import mla_decode, mla_prefill
from shardplan.costmodel.kernels.moe import grouped_matmul
from shardplan.costmodel.kernels.pointwise import pointwise
from shardplan.costmodel.memo import FEW_POINTS, Memo, Points
from shardplan.costmodel.optable import (
    Group,
    Row,
    block_rows,
    pointwise_bytes,
    pointwise_kernel,
)
from shardplan.models.apply import ShardedGraph
from shardplan.models.graph import Phase

__all__ = ["Load", "Parts", "StepModel", "kernel_dtype"]

_SIXTEEN_BIT = "bf16"


class Parts(NamedTuple):
    """Seconds, array by array, and kernels launched."""

    compute_s: Array
    memory_s: Array
    collective_s: Array
    overhead_s: Array
    kernels: float

    @property
    def total_s(self) -> Array:
        """All of it."""
        return self.compute_s + self.memory_s + self.collective_s + self.overhead_s

    def plus(self, other: Parts) -> Parts:
        """Two in a row."""
        return Parts(
            self.compute_s + other.compute_s,
            self.memory_s + other.memory_s,
            self.collective_s + other.collective_s,
            self.overhead_s + other.overhead_s,
            self.kernels + other.kernels,
        )

    def times(self, count: float) -> Parts:
        """The same `count` times."""
        return Parts(
            self.compute_s * count,
            self.memory_s * count,
            self.collective_s * count,
            self.overhead_s * count,
            self.kernels * count,
        )

    def at(self, points: Points) -> Parts:
        """Spread from the different points over the grid that they stand for."""

        seconds = (self.compute_s, self.memory_s, self.collective_s, self.overhead_s)
        a, b, c, d = (one if one.ndim == 0 else one[points.inverse] for one in seconds)
        return Parts(a, b, c, d, self.kernels)


ZERO = Parts(np.zeros(()), np.zeros(()), np.zeros(()), np.zeros(()), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a row is priced for; arrays broadcast against one another.

    `tokens` are those of one dp group for the row's group; for attention rows, `batch` sequences
    of one dp group with `new` tokens each after `prefix` cached ones.
    """

    phase: Phase
    tokens: Array
    batch: Array
    new: Array
    prefix: Array
    weight_dtype: str
    kv_dtype: str
    attention: AttentionKernel
    launch: Literal["graph", "host"]

    @classmethod
    def of(
        cls,
        phase: Phase,
        engine: EngineProfile,
        *,
        tokens: ArrayLike = 0.0,
        batch: ArrayLike = 0.0,
        new: ArrayLike = 0.0,
        prefix: ArrayLike = 0.0,
        weight_dtype: str = _SIXTEEN_BIT,
        kv_dtype: str = _SIXTEEN_BIT,
        attention: AttentionKernel = "flash",
    ) -> Load:
        """A load, launched as the engine launches its phase."""
        graph = engine.decode_graph if phase == "decode" else engine.prefill_graph
        return cls(
            phase=phase,
            tokens=as_array(tokens),
            batch=as_array(batch),
            new=as_array(new),
            prefix=as_array(prefix),
            weight_dtype=weight_dtype,
            kv_dtype=kv_dtype,
            attention=attention,
            launch="graph" if graph else "host",
        )

    @property
    def points(self) -> int:
        """Points of the grid that the arrays span."""
        return math.prod(np.broadcast_shapes(*(one.shape for one in self._arrays)))

    @property
    def _arrays(self) -> tuple[Array, Array, Array, Array]:
        return self.tokens, self.batch, self.new, self.prefix

    def at_points(self, memo: Memo[Parts]) -> tuple[Load, Points]:
        """The same load at its different points alone."""
        points = memo.different(self._arrays)
        tokens, batch, new, prefix = points.arrays
        return replace(self, tokens=tokens, batch=batch, new=new, prefix=prefix), points

    @property
    def kinds(self) -> tuple[str, ...]:
        """All that a price depends on beside the arrays."""
        return self.phase, self.weight_dtype, self.kv_dtype, self.attention, self.launch


def kernel_dtype(row: Row, weight_dtype: str) -> str:
    """Linear and expert weights take the strategy's dtype, everything else stays 16-bit."""
    return weight_dtype if row.weight_class in ("linear", "expert") else _SIXTEEN_BIT


def _tokens(row: Row, load: Load, groups: int) -> Array:
    """Local tokens of a row: those of all dp groups, cut `ways` ways, rounded up."""
    return np.ceil(load.tokens * groups / row.ways)


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
    ) -> StepModel:
        """The op tables of both phases; `memo`: shared with models of this machine and engine."""
        rows = {
            phase: {
                name: block_rows(graph, block, cluster, engine)
                for name, block in graph.blocks.items()
                if any(name in stage.counts for stage in graph.stages)
            }
            for phase, graph in graphs.items()
        }
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
        return self.graphs["decode"].parallel.dp

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
            key = tuple(sorted((n, c) for n, c in stage.counts.items() if n in prices))
            if key not in seen:
                times = [prices[name].times(count) for name, count in key]
                total = functools.reduce(Parts.plus, times, ZERO)
                seen[key] = total if points is None else total.at(points)
            stages.append(seen[key])
        return stages

    def _known(self, row: Row, load: Load, points: Points | None) -> Parts:
        """A row's price, from the memo where it was priced at these points before."""
        if points is None:
            return self._price(row, load)
        key = (row, self.groups, points.number, load.kinds)
        found = self.memo.prices.get(key)
        if found is None:
            found = self.memo.prices[key] = self._price(row, load)
        return found

    def by_kind(self, group: Group, load: Load) -> Iterator[tuple[str, Parts]]:
        """(kind, parts) of every row of a group, summed over all stages."""
        graph = self.graphs[load.phase]
        for name, rows in self.rows[load.phase].items():
            count = sum(stage.counts.get(name, 0) for stage in graph.stages)
            for row in rows:
                if row.group == group and count:
                    yield row.kind, self._price(row, load).times(count)

    def step_s(self, stages: list[Parts], phase: Phase) -> list[Array]:
        """Seconds of each stage, launches included; the engine's host time is not."""
        graph = self.engine.decode_graph if phase == "decode" else self.engine.prefill_graph
        gap = self.engine.launch_gap_s
        device = self.machine.device
        known: dict[int, Array] = {}
        for parts in stages:
            if id(parts) not in known:
                busy = parts.total_s + gap * parts.kernels
                floor = parts.kernels * device.host_launch_s
                known[id(parts)] = busy if graph else np.maximum(busy, floor)
        return [known[id(parts)] for parts in stages]

    def host_s(self, phase: Phase) -> float:
        """Host time of a step that the device waits for."""
        engine = self.engine
        return engine.step_host_s if phase == "decode" else engine.prefill_step_host_s

    def _price(self, row: Row, load: Load) -> Parts:
        if row.is_collective:
            time = collective(
                cast("CollectiveKind", row.kind),
                row.spans,
                2.0 * row.n * _tokens(row, load, self.groups),
                self.machine.calibration,
                launch=load.launch,
            )
            return Parts(np.zeros(()), np.zeros(()), time.total_s, np.zeros(()), 1.0)
        formula = FORMULAS.get(row.kind, _pointwise)
        time = formula(self, row, load)
        return Parts(time.compute_s, time.memory_s, np.zeros(()), time.overhead_s, 1.0)


def _matmul(model: StepModel, row: Row, load: Load) -> KernelTime:
    if row.group == "attention":
        tokens = load.batch * (load.prefix + load.new if row.context else load.new)
    else:
        tokens = _tokens(row, load, model.groups)
    return matmul(
        model.machine,
        np.maximum(tokens, 1.0),
        row.n,
        row.k,
        kernel_dtype(row, load.weight_dtype),
        weights="cold",
    )


def _grouped(model: StepModel, row: Row, load: Load) -> KernelTime:
    tokens = np.maximum(_tokens(row, load, model.groups), 1.0)
    active = row.experts * (1.0 - (1.0 - row.share / row.experts) ** tokens)
    return grouped_matmul(
        model.machine,
        np.maximum(tokens * row.share, active),
        row.experts,
        row.n,
        row.k,
        kernel_dtype(row, load.weight_dtype),
        active=active,
        ep=row.spread,
    )


def _pointwise(model: StepModel, row: Row, load: Load) -> KernelTime:
    elements = np.maximum(_tokens(row, load, model.groups) * row.width * row.share, 1.0)
    kind = pointwise_kernel(row)
    return pointwise(model.machine, kind, elements, elements * pointwise_bytes(row), _SIXTEEN_BIT)


def _attention(model: StepModel, row: Row, load: Load) -> KernelTime:
    window = int(row.window) or None
    if load.phase == "decode":
        return attention_decode(
            model.machine,
            load.batch,
            load.prefix + load.new,
            row.heads,
            row.kv_heads,
            row.head_dim,
            kernel=load.attention,
            kv_dtype=load.kv_dtype,
            window=window,
        )
    return attention_prefill(
        model.machine,
        load.batch,
        load.new,
        load.prefix,
        row.heads,
        row.kv_heads,
        row.head_dim,
        kernel=load.attention,
        kv_dtype=load.kv_dtype,
        window=window,
    )


def _mla_prefill(model: StepModel, row: Row, load: Load) -> KernelTime:
    return mla_prefill(
        model.machine,
        load.batch,
        load.new,
        load.prefix,
        row.heads,
        row.head_dim,
        row.rope_dim,
        row.value_dim,
        kernel=load.attention,
    )


def _mla_decode(model: StepModel, row: Row, load: Load) -> KernelTime:
    return mla_decode(
        model.machine,
        load.batch,
        load.prefix + load.new,
        row.heads,
        row.head_dim,
        row.rope_dim,
        kernel=load.attention,
        kv_dtype=load.kv_dtype,
    )


FORMULAS: Mapping[str, Callable[[StepModel, Row, Load], KernelTime]] = {
    "matmul": _matmul,
    "grouped_matmul": _grouped,
    "attention": _attention,
    "mla_attention": _mla_prefill,
    "mla_absorbed": _mla_decode,
}
"""Kind of operator -> formula; every other kind moves bytes (`_pointwise`)."""
