"""A rival of a plan of operators, priced beside it: where each millisecond and gigabyte goes.

A rival is a split that is known (`megatron`, `replicated`) on the plan's own mesh, priced by the
same code, or another plan of the same graph as it stands in its file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from shardplan.costmodel.hardware import Cluster
from shardplan.models.errors import InputError
from shardplan.models.opfold import unfolded
from shardplan.models.opgraph import OpGraph
from shardplan.search.explanation import Difference
from shardplan.search.oplevel.api import price_operators
from shardplan.search.oplevel.known import Split, megatron_splits
from shardplan.search.oplevel.plan import KindRow, OperatorPlan, StageRow
from shardplan.search.oplevel.program import mesh_of
from shardplan.search.plan_confidence import Part

__all__ = ["BASELINES", "OperatorRival", "baseline", "beside", "priced_as", "rival_named"]

BASELINES = ("megatron", "replicated")
"""Splits that are known by a name."""
_MEMORY = ("parameters_bytes", "constants_bytes", "states_bytes", "activations_bytes")


class OperatorRival(Part):
    """Another split of the same graph."""

    name: str
    how: str
    """The split in words, or the file."""
    cluster: str
    mesh: dict[str, int]
    stages: int
    total_s: float
    ratio: float | None
    """Of the plan's seconds."""
    memory_bytes: float
    """Of its fullest rank."""
    capacity_bytes: float
    fits: bool
    costs: tuple[KindRow, ...]
    differences: tuple[Difference, ...]
    """time KIND in seconds of one run, which add up; then memory PART of the fullest rank."""


def rival_named(
    plan: OperatorPlan, graph: OpGraph, against: str, cluster: Cluster
) -> OperatorRival:
    """The rival of a name or a file; `InputError` for what is neither, or of another graph."""
    if against in BASELINES:
        return baseline(plan, graph, against, cluster)
    if not Path(against).is_file():
        raise InputError(
            "a rival of a plan of operators is megatron, replicated or another such plan.json",
            got=against[:100],
            hint="check the path",
        )
    other = OperatorPlan.load(against)
    if other.digest != plan.digest:
        raise InputError(
            "plans that are compared are of the same graph",
            got=f"{plan.graph}: {plan.digest[:12]}, {other.graph}: {other.digest[:12]}",
        )
    return beside(plan, other, Path(against).name, other.describe())


def baseline(plan: OperatorPlan, graph: OpGraph, name: str, cluster: Cluster) -> OperatorRival:
    """The best of the splits that a name of `BASELINES` stands for; one that fits before others.

    `InputError` where pins of the plan rule out all of them.
    """
    splits: list[tuple[str, Split]] = [("every operator runs whole on every rank", {})]
    if name == "megatron":
        splits = list(megatron_splits(unfolded(graph), mesh_of(plan)))
    found = [(how, priced_as(plan, graph, cluster, split)) for how, split in splits]
    how, best = min(found, key=lambda one: (not one[1].fits, one[1].total_s))
    return beside(plan, best, name, how)


def priced_as(
    plan: OperatorPlan, graph: OpGraph, cluster: Cluster, split: Mapping[str, Mapping[str, str]]
) -> OperatorPlan:
    """A split that is given, on the plan's mesh, stages and pins, held against its memory."""
    found = price_operators(
        graph,
        cluster,
        plan.mesh,
        {name: dict(chosen) for name, chosen in split.items()},
        stages=len(plan.stages),
        dtype=plan.dtype,
        pins=plan.request.pins,
    )
    limit = {"capacity_bytes": plan.stages[0].capacity_bytes}
    stages = tuple(one.model_copy(update=limit) for one in found.stages)
    fits = all(one.total_bytes <= one.capacity_bytes for one in stages)
    return found.model_copy(update={"stages": stages, "fits": fits})


def beside(plan: OperatorPlan, other: OperatorPlan, name: str, how: str) -> OperatorRival:
    """Another plan of the graph beside this one."""
    fullest = _fullest(other)
    return OperatorRival(
        name=name,
        how=how,
        cluster=other.cluster.name,
        mesh=other.mesh,
        stages=len(other.stages),
        total_s=other.total_s,
        ratio=other.total_s / plan.total_s if plan.total_s else None,
        memory_bytes=fullest.total_bytes,
        capacity_bytes=fullest.capacity_bytes,
        fits=other.fits,
        costs=other.costs,
        differences=tuple(_differences(plan, other)),
    )


def _differences(plan: OperatorPlan, other: OperatorPlan) -> Iterator[Difference]:
    """Time by kind of operator and collective, then memory; each the largest first."""
    ours, theirs = ({row.kind: row.total_s for row in one.costs} for one in (plan, other))
    yield from _ordered("time", ours, theirs)
    rows = [_fullest(one).model_dump() for one in (plan, other)]
    ours, theirs = ({name.removesuffix("_bytes"): row[name] for name in _MEMORY} for row in rows)
    yield from _ordered("memory", ours, theirs)


def _ordered(
    what: str, ours: Mapping[str, float], theirs: Mapping[str, float]
) -> Iterator[Difference]:
    pairs = {name: (ours.get(name, 0.0), theirs.get(name, 0.0)) for name in {**ours, **theirs}}
    for name, (one, two) in sorted(pairs.items(), key=lambda p: (-abs(p[1][1] - p[1][0]), p[0])):
        if one != two:
            yield Difference(what=f"{what} {name}", plan=one, rival=two)


def _fullest(plan: OperatorPlan) -> StageRow:
    """The stage that is fullest against what its ranks may hold."""
    return max(plan.stages, key=lambda one: one.total_bytes / one.capacity_bytes)
