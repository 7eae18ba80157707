"""Many layouts priced together: kernels of one formula stacked, one call each, sums scattered back.

A `StepModel` prices the points of one layout in some hundred small numpy calls, which is what a
table of a hundred thousand points over thousands of layouts would spend its time on. A `Fleet`
holds the points of many layouts of one machine under one engine and prices them like one model:

    points p = 1..P of layouts l(p); kernels of l(p) that share a formula are stacked over all p
    seconds[p, template] = sum over those kernels of StepModel's own price, the sizes as arrays
    stage s of point p   = sum over templates of runs[l(p), s, template] * seconds[p, template]

What is not a number in a row of the op table (its kind, group, spans, window, dtype, rows that it
runs beside) tells formulas apart. Layouts of fewer stages have empty ones at the end.

The numbers are `StepModel`'s own to rounding (sums are added in another order).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.formulas import FORMULAS
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.load import Load, Parts, kernel_dtype
from shardplan.costmodel.optable import Group, Row
from shardplan.costmodel.step import StepModel
from shardplan.costmodel.weight_types import is_mixed
from shardplan.models.graph import Phase

__all__ = ["Call", "Dtypes", "Fleet", "Indices", "Watch"]

Indices = NDArray[np.int64]
Rows = Mapping[str, tuple[Row, ...]]

_SIZES = (
    "ways",
    "n",
    "k",
    "width",
    "experts",
    "spread",
    "share",
    "heads",
    "kv_heads",
    "head_dim",
    "value_dim",
    "rope_dim",
    "parts",
)
"""Numbers of a row: stacked."""
_PLAIN = (
    "kind",
    "group",
    "context",
    "weight_class",
    "window",
    "spans",
    "quantized",
    "element_bytes",
    "settled",
)
"""What else a formula reads."""
_UNREAD = ("fuse",)
_BY_GROUP = "weight_group"
"""Read where weight types differ between groups; else it would only cut the stacks."""
_NAMES = tuple(one.name for one in fields(Row) if one.name not in (*_SIZES, *_UNREAD, _BY_GROUP))
"""The same for all that are stacked."""
_SPECIAL = tuple(name for name in _NAMES if name not in _PLAIN)
"""Fields that this module does not know: a row that has one may depend on every dtype."""
_GROUPS: tuple[Group, ...] = get_args(Group)
_ATTENTION: tuple[Group, ...] = ("attention", "draft_attention")
_sizes_of, _names_of = attrgetter(*_SIZES), attrgetter(*_NAMES)


class Dtypes(NamedTuple):
    """The choices of a point that are not numbers."""

    weight_dtype: str
    kv_dtype: str
    attention: AttentionKernel


class _Kernels(NamedTuple):
    """Kernels of one formula, those of one table of rows side by side."""

    row: Row
    """Its names, and the sizes that are the same for all."""
    sizes: Mapping[str, Array]
    """The other sizes `[kernels]`."""
    start: Indices
    """First kernel of each table of rows."""
    counts: Indices
    template: Indices
    """Of each kernel, numbered over the phase."""


class _Tables(NamedTuple):
    """The op tables of one phase, stacked."""

    of_model: Indices
    """Which table of rows a model has; models that differ in their stages alone share one."""
    kernels: Mapping[Group, tuple[_Kernels, ...]]
    launches: Mapping[Group, Array]
    """Kernels of each table and template `[tables, templates]`."""
    runs: Array
    """Times that a template runs `[models, stages, templates]`."""
    times: Array
    """The same over all stages `[models, templates]`."""


class Call(NamedTuple):
    """One call of a formula: which kernels of which points, under which dtypes."""

    kernels: _Kernels
    dtypes: Dtypes
    point: Indices
    kernel: Indices
    place: Indices
    """Where a price is added: template * points + point."""


Watch = Callable[[Phase, Call, Array], None]
"""Phase of the load, the call, seconds `[kernels]` over all stages that run the kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stacked(StepModel):
    """A step model of many layouts: their data-parallel groups as an array."""

    dp: Array

    @property
    def groups(self) -> int:
        """Data-parallel groups, one a kernel."""
        return cast("int", self.dp)


def _depends(row: Row) -> tuple[str, ...]:
    """The dtypes that the price of a row depends on; attention rows do not know the weights'."""
    if any(getattr(row, name) for name in _SPECIAL):
        return Dtypes._fields
    if row.is_collective or row.kind not in FORMULAS:
        return ()
    if row.group in _ATTENTION:
        return () if row.kind == "matmul" else ("kv_dtype", "attention")
    return ("weight_dtype",) if kernel_dtype(row, "") == "" else ()


def _kernels(found: Sequence[tuple[int, int, Row]], tables: int) -> _Kernels:
    """Stack (table, template, row) of one formula, sorted by table."""
    row = found[0][2]
    stacked = np.asarray([_sizes_of(one) for _, _, one in found], dtype=np.float64).T
    same = (stacked == stacked[:, :1]).all(axis=1)
    sizes = {name: stacked[i] for i, name in enumerate(_SIZES) if not same[i]}
    count = np.bincount([table for table, _, _ in found], minlength=tables).astype(np.int64)
    return _Kernels(
        row=row,
        sizes=sizes,
        start=np.cumsum(count) - count,
        counts=count,
        template=np.asarray([template for _, template, _ in found], dtype=np.int64),
    )


def _tables(models: Sequence[StepModel], phase: Phase, by_group: bool) -> _Tables:
    """Stack the op tables of one phase; weights of different groups apart where that matters."""
    numbers: dict[int, int] = {}
    kept: list[Rows] = []
    of_model = np.empty(len(models), dtype=np.int64)
    for place, model in enumerate(models):
        rows = model.rows[phase]
        number = of_model[place] = numbers.setdefault(id(rows), len(kept))
        if number == len(kept):
            kept.append(rows)
    templates = {name: i for i, name in enumerate(dict.fromkeys(n for r in kept for n in r))}
    found: dict[tuple[Any, ...], list[tuple[int, int, Row]]] = {}
    launches = {group: np.zeros((len(kept), len(templates))) for group in _GROUPS}
    for table, rows in enumerate(kept):
        for name, ones in rows.items():
            for row in ones:
                names = (*_names_of(row), row.weight_group if by_group else "")
                found.setdefault(names, []).append((table, templates[name], row))
                launches[row.group][table, templates[name]] += 1.0
    stacked = [_kernels(ones, len(kept)) for ones in found.values()]
    runs = _runs(models, phase, templates)
    return _Tables(
        of_model=of_model,
        kernels={
            group: tuple(one for one in stacked if one.row.group == group) for group in _GROUPS
        },
        launches=launches,
        runs=runs,
        times=runs.sum(axis=1),
    )


def _runs(models: Sequence[StepModel], phase: Phase, templates: Mapping[str, int]) -> Array:
    graphs = [model.graphs[phase] for model in models]
    runs = np.zeros((len(models), max(len(one.stages) for one in graphs), len(templates)))
    for model, graph in enumerate(graphs):
        for index, stage in enumerate(graph.stages):
            for name, count in graph.runs(stage).items():
                runs[model, index, templates[name]] = count
    return runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Points of many layouts of one machine under one engine, priced like those of one model.

    Arrays are `[points]`, or of no dimension where they are common to all points. Of a load, the
    weight dtype of token and logits rows, the KV dtype and the attention kernel are not read:
    every point has its own.
    """

    models: tuple[StepModel, ...]
    which: Indices
    """Model of each point."""
    choices: tuple[Dtypes, ...]
    choice: Indices
    """Dtypes of each point."""
    tables: Mapping[Phase, _Tables]
    model_groups: Array
    """Data-parallel groups of each model."""
    model_locked: Array
    """Data-parallel groups of each model whose steps run together."""
    model_contexts: Array
    """Ranks that share a context, of each model."""
    model_stages: Array
    """Pipeline stages of each model."""
    model_mtp: Array
    """Tokens that each model predicts ahead."""
    watch: Watch | None = None
    """Is told of every call of a formula, as it is priced."""
    calls: dict[tuple[Phase, Group], list[Call]] = field(
        default_factory=dict, compare=False, repr=False
    )
    """How the points are stacked; made when first asked for."""

    @classmethod
    def of(
        cls,
        models: Sequence[StepModel],
        which: Indices,
        choices: Sequence[Dtypes],
        choice: Indices,
    ) -> Fleet:
        """Points `which` (into `models`, all of one machine and engine) under `choice`."""
        phases: tuple[Phase, ...] = ("prefill", "decode")
        by_group = any(is_mixed(one.weight_dtype) for one in choices)
        return cls(
            models=tuple(models),
            which=which,
            choices=tuple(choices),
            choice=choice,
            tables={phase: _tables(models, phase, by_group) for phase in phases},
            model_groups=np.asarray([model.groups for model in models], dtype=np.float64),
            model_locked=np.asarray([model.locked for model in models], dtype=np.float64),
            model_contexts=np.asarray([one.context_ranks for one in models], dtype=np.float64),
            model_stages=np.asarray([model.stages for model in models], dtype=np.float64),
            model_mtp=np.asarray([model.mtp for model in models], dtype=np.float64),
        )

    def at(self, which: Indices, choice: Indices) -> Fleet:
        """Other points of the same models and choices."""
        return replace(self, which=which, choice=choice, calls={})

    def take(self, points: Indices) -> Fleet:
        """The fleet of some of its points."""
        return self.at(self.which[points], self.choice[points])

    def watched(self, watch: Watch) -> Fleet:
        """The same points, every call told to `watch`."""
        return replace(self, watch=watch)

    @property
    def engine(self) -> EngineProfile:
        """The engine of all points."""
        return self.models[0].engine

    @property
    def groups(self) -> Array:
        """Data-parallel groups of each point."""
        return np.asarray(self.model_groups[self.which], dtype=np.float64)

    @property
    def locked(self) -> Array:
        """Data-parallel groups of each point whose steps run together."""
        return np.asarray(self.model_locked[self.which], dtype=np.float64)

    @property
    def context_ranks(self) -> Array:
        """Ranks that share a context, of each point."""
        return np.asarray(self.model_contexts[self.which], dtype=np.float64)

    @property
    def stages(self) -> Array:
        """Pipeline stages of each point."""
        return np.asarray(self.model_stages[self.which], dtype=np.float64)

    @property
    def mtp(self) -> Array:
        """Tokens that each point predicts ahead."""
        return np.asarray(self.model_mtp[self.which], dtype=np.float64)

    def step_s(self, stages: list[Parts], phase: Phase) -> list[Array]:
        """Seconds of each stage, launches included; the engine's host time is not."""
        return self.models[0].step_s(stages, phase)

    def host_s(self, phase: Phase) -> float:
        """Host time of a step that the device waits for."""
        return self.models[0].host_s(phase)

    def parts(self, group: Group, load: Load) -> list[Parts]:
        """Per stage, the rows of one group under a load; zeros where a point has no such stage."""
        tables = self.tables[load.phase]
        templates, points = tables.runs.shape[2], self.which.size
        sums = np.zeros((4, templates * points))
        for call, priced in self.prices(group, load):
            for total, seconds in zip(sums, priced[:4], strict=True):
                if seconds.ndim or float(seconds):
                    np.add.at(total, call.place, seconds)
            if self.watch is not None:
                times = tables.times[self.which[call.point], call.kernels.template[call.kernel]]
                self.watch(load.phase, call, priced.total_s * times)
        runs = tables.runs[self.which]
        seconds = np.einsum("qtp,pst->qsp", sums.reshape(4, templates, points), runs)
        launched = tables.launches[group][tables.of_model[self.which]]
        kernels = np.einsum("pt,pst->sp", launched, runs)
        return [
            Parts(
                *cast("tuple[Array, Array, Array, Array]", tuple(seconds[:, stage])),
                cast("float", kernels[stage]),
            )
            for stage in range(runs.shape[1])
        ]

    def prices(self, group: Group, load: Load) -> Iterator[tuple[Call, Parts]]:
        """Each call of a formula with the prices that it gives, kernel by kernel."""
        key = (load.phase, group)
        if key not in self.calls:
            self.calls[key] = list(self._calls(*key))
        first, groups = self.models[0], self.groups
        for call in self.calls[key]:
            stand_in = _Stacked(
                graphs=first.graphs,
                machine=first.machine,
                engine=first.engine,
                rows=first.rows,
                dp=groups[call.point],
            )
            sizes = {name: size[call.kernel] for name, size in call.kernels.sizes.items()}
            row = replace(call.kernels.row, **sizes) if sizes else call.kernels.row  # type: ignore[arg-type]  # sizes as arrays
            yield call, stand_in.price(row, _at(load, call))

    def _calls(self, phase: Phase, group: Group) -> Iterator[Call]:
        tables = self.tables[phase]
        table = tables.of_model[self.which]
        for kernels in tables.kernels[group]:
            each = kernels.counts[table]
            point = np.repeat(np.arange(table.size), each)
            ahead = np.repeat(np.cumsum(each) - each, each)
            kernel = kernels.start[table][point] + np.arange(point.size) - ahead
            place = kernels.template[kernel] * table.size + point
            for dtypes, chosen in self._by_dtypes(_depends(kernels.row)):
                if chosen is None:
                    some: Any = slice(None)
                else:
                    some = np.flatnonzero(chosen[point])
                if point[some].size:
                    yield Call(kernels, dtypes, point[some], kernel[some], place[some])

    def _by_dtypes(
        self, names: tuple[str, ...]
    ) -> Iterator[tuple[Dtypes, NDArray[np.bool_] | None]]:
        """(dtypes, which points have them) where they agree in `names`; None: all points."""
        if not names:
            yield self.choices[0], None
            return
        alike: dict[tuple[str, ...], list[int]] = {}
        for place, one in enumerate(self.choices):
            alike.setdefault(tuple(getattr(one, name) for name in names), []).append(place)
        for places in alike.values():
            among = np.zeros(len(self.choices), dtype=np.bool_)
            among[places] = True
            yield self.choices[places[0]], among[self.choice] if len(alike) > 1 else None


def _at(load: Load, call: Call) -> Load:
    """The load of each kernel of a call."""

    def spread(values: Array) -> Array:
        return values[call.point] if values.ndim else values

    weight_dtype, kv_dtype, attention = call.dtypes
    return replace(
        load,
        tokens=spread(load.tokens),
        batch=spread(load.batch),
        new=spread(load.new),
        prefix=spread(load.prefix),
        weight_dtype=load.weight_dtype if call.kernels.row.group in _ATTENTION else weight_dtype,
        kv_dtype=kv_dtype,
        attention=attention,
    )
