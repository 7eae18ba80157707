"""Op tables of many layouts side by side: different kernels as arrays, and where each runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.formulas import ATTENTION, dtypes_of
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.optable import Group, Row
from shardplan.costmodel.row_stacks import SPECIAL, alike, stack
from shardplan.costmodel.step import StepModel
from shardplan.models.graph import Phase

__all__ = ["Dtypes", "Indices", "Kernels", "Tables", "depends", "tables_of"]

Indices = NDArray[np.int64]
Rows = Mapping[str, tuple[Row, ...]]

_GROUPS: tuple[Group, ...] = get_args(Group)


class Dtypes(NamedTuple):
    """The choices of a point that are not numbers."""

    weight_dtype: str
    kv_dtype: str
    attention: AttentionKernel


class Kernels(NamedTuple):
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


class Tables(NamedTuple):
    """The op tables of one phase, stacked."""

    of_model: Indices
    """Which table of rows a model has; models that differ in their stages alone share one."""
    kernels: Mapping[Group, tuple[Kernels, ...]]
    launches: Mapping[Group, Array]
    """Kernels of each table and template `[tables, templates]`."""
    runs: Array
    """Times that a template runs `[models, stages, templates]`."""
    times: Array
    """The same over all stages `[models, templates]`."""


def depends(row: Row) -> tuple[str, ...]:
    """The dtypes that the price of a row depends on; attention rows do not know the weights'."""
    plain = row.group in ATTENTION and row.kind == "matmul"
    return () if plain and not any(getattr(row, name) for name in SPECIAL) else dtypes_of(row)


def _kernels(found: Sequence[tuple[int, int, Row]], tables: int) -> Kernels:
    """Stack (table, template, row) of one formula, sorted by table."""
    row, sizes = stack([one for _, _, one in found])
    count = np.bincount([table for table, _, _ in found], minlength=tables).astype(np.int64)
    return Kernels(
        row=row,
        sizes=sizes,
        start=np.cumsum(count) - count,
        counts=count,
        template=np.asarray([template for _, template, _ in found], dtype=np.int64),
    )


def tables_of(models: Sequence[StepModel], phase: Phase, by_group: bool) -> Tables:
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
    found: list[tuple[int, int, Row]] = []
    launches = {group: np.zeros((len(kept), len(templates))) for group in _GROUPS}
    for table, rows in enumerate(kept):
        for name, ones in rows.items():
            for row in ones:
                found.append((table, templates[name], row))
                launches[row.group][table, templates[name]] += 1.0
    stacks = alike((row for _, _, row in found), by_group)
    stacked = [_kernels([found[i] for i in places], len(kept)) for places in stacks]
    runs = _runs(models, phase, templates)
    return Tables(
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
