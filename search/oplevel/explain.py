"""Why a plan of operators: its memory, where its time goes, what other splits and machines give.

Each other plan is one of the same graph by the same code: a search with one thing changed, or the
price of a split that is known (none, Megatron's columns and rows). So a row tells what the best
plan would then be, exactly, by this cost model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.hardware import Cluster
from shardplan.models.errors import InfeasibleError, InputError
from shardplan.models.opfold import unfolded
from shardplan.models.opgraph import OpGraph
from shardplan.search.asked_again import FASTER, faster
from shardplan.search.oplevel.against import OperatorRival, priced_as, rival_named
from shardplan.search.oplevel.api import search_operators
from shardplan.search.oplevel.known import Split, columns_and_rows
from shardplan.search.oplevel.plan import KindRow, OperatorPlan
from shardplan.search.oplevel.program import check_same, mesh_of
from shardplan.search.plan_confidence import Part

__all__ = ["OperatorChange", "OperatorExplanation", "explain_operators"]

_MOST_KINDS = 3
"""Kinds of operators whose split is told by what it would cost to have none."""


class OperatorChange(Part):
    """The best plan, or a known split, were one thing different."""

    change: str
    total_s: float | None
    """None where nothing fits: `note` says why."""
    ratio: float | None
    """Of the plan's seconds."""
    note: str = ""


class OperatorExplanation(Part):
    """Why this plan."""

    graph: str
    cluster: str
    mesh: dict[str, int]
    stages: int
    total_s: float
    memory_bytes: float
    """Of the fullest rank."""
    capacity_bytes: float
    costs: tuple[KindRow, ...]
    changes: tuple[OperatorChange, ...]
    rival: OperatorRival | None = None


def explain_operators(
    plan: OperatorPlan, graph: OpGraph, *, shadows: bool = True, against: str | None = None
) -> OperatorExplanation:
    """Why this plan. `InputError` for another graph, or a cluster that is not found by name.

    `against`: a rival beside it (`against.rival_named`).
    """
    check_same(plan, graph)
    rival = None
    if against is not None:
        rival = rival_named(plan, graph, against, _cluster(plan))
    fullest = max(plan.stages, key=lambda one: one.total_bytes / one.capacity_bytes)
    return OperatorExplanation(
        graph=plan.graph,
        cluster=plan.cluster.name,
        mesh=plan.mesh,
        stages=len(plan.stages),
        total_s=plan.total_s,
        memory_bytes=fullest.total_bytes,
        capacity_bytes=fullest.capacity_bytes,
        costs=tuple(sorted(plan.costs, key=lambda row: -row.total_s)),
        changes=tuple(_Changes(plan, graph).all()) if shadows else (),
        rival=rival,
    )


def _cluster(plan: OperatorPlan) -> Cluster:
    """The plan's cluster, which has a name."""
    machine = plan.cluster
    return load_cluster(machine.name, nodes=machine.nodes, device=machine.device)


class _Changes:
    def __init__(self, plan: OperatorPlan, graph: OpGraph) -> None:
        self.plan, self.graph = plan, graph
        self.cluster = _cluster(plan)

    def all(self) -> Iterator[OperatorChange]:
        """One change after another."""
        plan = self.plan
        yield self.known("no operator is split", {})
        whole, mesh = unfolded(self.graph), mesh_of(plan)
        for axis, size in plan.mesh.items():
            if size > 1:
                split = columns_and_rows(whole, mesh, axis)
                yield self.known(f"products by columns and rows over {axis}", split)
        for kind in self.split_kinds():
            forbid = {**plan.request.forbid, kind: tuple(plan.mesh)}
            yield self.searched(f"every {kind} whole", forbid=forbid)
        fullest = max(one.total_bytes / one.capacity_bytes for one in plan.stages)
        if plan.total_s and fullest * FASTER > 1.0:
            limit = FASTER * plan.stages[0].capacity_bytes
            yield self.searched(f"{FASTER - 1:.0%} more memory", memory_bytes=limit)
        for tier in self.cluster.tiers:
            if tier.ranks > 1:
                words = f"{tier.name} links {FASTER - 1:.0%} faster"
                yield self.searched(words, cluster=faster(self.cluster, tier))

    def split_kinds(self) -> list[str]:
        """Kinds of operators that are split, those that take longest first."""
        spent: Counter[str] = Counter()
        for row in self.plan.operators:
            if row.split:
                spent[row.kind] += round(row.times * row.total_s * 1e12)
        return [kind for kind, _ in spent.most_common(_MOST_KINDS)]

    def known(self, words: str, split: Split) -> OperatorChange:
        """A split that is given."""
        try:
            found = priced_as(self.plan, self.graph, self.cluster, split)
        except InputError as error:  # pins that the split breaks
            return OperatorChange(change=words, total_s=None, ratio=None, note=str(error))
        fullest = max(one.total_bytes for one in found.stages)
        over = fullest - self.plan.stages[0].capacity_bytes
        note = f"{over / 2**20:,.1f} MiB more than a rank has" if over > 0 else ""
        return self.told(words, found, note)

    def searched(self, words: str, **changed: Any) -> OperatorChange:
        """The plan's question with one thing changed."""
        request = self.plan.request
        cluster: Cluster = changed.pop("cluster", self.cluster)
        asked = {
            "memory_bytes": request.memory_bytes,
            "forbid": request.forbid,
            "pins": request.pins,
            "time_limit_s": request.time_limit_s,
            **changed,
        }
        try:
            found = search_operators(
                self.graph, cluster, self.plan.mesh, stages=len(self.plan.stages),
                dtype=self.plan.dtype, **asked,
            )  # fmt: skip
        except (InputError, InfeasibleError) as error:
            return OperatorChange(change=words, total_s=None, ratio=None, note=str(error))
        return self.told(words, found, "")

    def told(self, words: str, found: OperatorPlan, note: str) -> OperatorChange:
        """What a change gives."""
        ratio = found.total_s / self.plan.total_s if self.plan.total_s else None
        return OperatorChange(change=words, total_s=found.total_s, ratio=ratio, note=note)
