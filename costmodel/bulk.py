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
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.bulk_tables import (
    Dtypes,
    Indices,
    Kernels,
    Tables,
    depends,
    tables_of,
)
from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.formulas import ATTENTION
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.load import Load, Parts
from shardplan.costmodel.optable import Group
from shardplan.costmodel.row_stacks import with_sizes
from shardplan.costmodel.step import Stacked, StepModel
from shardplan.costmodel.weight_types import is_mixed
from shardplan.models.graph import Phase

__all__ = ["Call", "Dtypes", "Fleet", "Indices", "Watch"]


class Call(NamedTuple):
    """One call of a formula: which kernels of which points, under which dtypes."""

    kernels: Kernels
    dtypes: Dtypes
    point: Indices
    kernel: Indices
    place: Indices
    """Where a price is added: template * points + point."""


Watch = Callable[[Phase, Call, Array], None]
"""Phase of the load, the call, seconds `[kernels]` over all stages that run the kernel."""


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
    tables: Mapping[Phase, Tables]
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
            tables={phase: tables_of(models, phase, by_group) for phase in phases},
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
    def memo(self) -> None:
        """Its points are of many layouts: each is priced as it is."""
        return None

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
            stand_in = Stacked.like(first, groups[call.point])
            row = with_sizes(call.kernels.row, call.kernels.sizes, call.kernel)
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
            for dtypes, chosen in self._by_dtypes(depends(kernels.row)):
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
        weight_dtype=load.weight_dtype if call.kernels.row.group in ATTENTION else weight_dtype,
        kv_dtype=kv_dtype,
        attention=attention,
    )
