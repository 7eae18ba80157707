"""`search_operators`: the fastest split of a captured graph; `price_operators`: the price of one.

Operators run as the engine profile `torch-graph` has it: each a kernel of a captured graph, its
launch gap, memory share and reserve.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.opcost import AUTO_DTYPE, OperatorPrices
from shardplan.models.errors import InfeasibleError, InputError
from shardplan.models.opfold import unfolded
from shardplan.models.opgraph import Layout, OpGraph, check_graph
from shardplan.models.parallel import Mesh
from shardplan.search.oplevel.constraints import Constraints
from shardplan.search.oplevel.ilp import relaxed_s
from shardplan.search.oplevel.memory import capacity_bytes
from shardplan.search.oplevel.pipeline import find
from shardplan.search.oplevel.plan import OperatorPlan, OperatorRequest
from shardplan.search.oplevel.problem import Problem, Strategy, make_problem
from shardplan.search.oplevel.quotient import Quotient, quotient_of
from shardplan.search.oplevel.tell import Answer, tell

__all__ = ["ENGINE", "MeshShape", "price_operators", "search_operators"]

MeshShape = Mapping[str, int] | Sequence[int] | Literal["auto"]
ENGINE = "torch-graph"
"""Profile that operators run as."""
_NAMES = ("x", "y")


def search_operators(
    graph: OpGraph,
    cluster: Cluster | str,
    mesh_shape: MeshShape = "auto",
    *,
    stages: int = 1,
    cards: int | None = None,
    dtype: str = AUTO_DTYPE,
    pins: Mapping[str, Layout] | None = None,
    forbid: Mapping[str, Sequence[str]] | None = None,
    memory_bytes: float | None = None,
    time_limit_s: float | None = None,
) -> OperatorPlan:
    """The fastest split of every operator over a mesh of one or two axes.

    `mesh_shape`: {axis: ranks} or ranks of the axes x and y, major to minor; `auto` tries all that
    use the whole cluster (or `cards` of it) and takes the fastest. `stages`: pipeline stages, each
    a mesh of its own. `cards`: ranks that the mesh and its stages fill, all or fewer by default.
    `dtype`: of matrix products, `auto` as the graph's tensors are. `pins`: {tensor: {axis: dim}} of
    inputs, outputs and parameters; `forbid`: {kind of operator: axes}; both need a mesh that is
    named. `memory_bytes`: of a rank, in place of what its card leaves. `time_limit_s`: of each
    turn of the solver; the gap may then be above 0.
    `InputError` for what breaks a rule, `InfeasibleError` where nothing fits, with how much it
    would take.
    """
    start = time.perf_counter()
    machine = load_cluster(cluster) if isinstance(cluster, str) else cluster
    constraints = Constraints(pins=pins or {}, forbid=forbid or {})
    for name, value in (("memory_bytes", memory_bytes), ("time_limit_s", time_limit_s)):
        if value is not None and not value > 0:
            raise InputError(f"`{name}` is above 0", got=f"{name}={value}")
    if mesh_shape == "auto" and (pins or forbid):
        raise InputError(
            "constraints name axes of a mesh that is given",
            got=f"mesh_shape=auto, pins={sorted(pins or {})}, forbid={sorted(forbid or {})}",
            hint="give mesh_shape={'x': 2, 'y': 4} or such",
        )
    quotient = _quotient(graph)
    asked = [
        _ask(quotient, machine, mesh, constraints, dtype)
        for mesh in _meshes(mesh_shape, machine, stages, cards)
    ]
    if len(asked) > 1:
        asked.sort(key=lambda one: relaxed_s(one.problem))
    best = _best(asked, stages, memory_bytes, time_limit_s)
    request = OperatorRequest(
        mesh=_said(mesh_shape, asked[0].problem.mesh),
        stages=stages,
        cards=cards,
        memory_bytes=memory_bytes,
        time_limit_s=time_limit_s,
        pins={name: dict(layout) for name, layout in constraints.pins.items()},
        forbid={kind: tuple(axes) for kind, axes in constraints.forbid.items()},
    )
    return tell(
        graph,
        best,
        request,
        space_size=sum(one.problem.space_size for one in asked),
        meshes=len(asked),
        wall_s=time.perf_counter() - start,
    )


def price_operators(
    graph: OpGraph,
    cluster: Cluster | str,
    mesh_shape: MeshShape,
    strategy: Strategy,
    *,
    stages: int = 1,
    dtype: str = AUTO_DTYPE,
    pins: Mapping[str, Layout] | None = None,
) -> OperatorPlan:
    """The price of a given {operator: {axis: loop}}, moves as cheap as they can be.

    Operators that it leaves out run whole (partial sums may pass them); one of equal layers' stands
    for all. Its memory is told, not limited (`fits`). Arguments and errors as of
    `search_operators`; `LayoutError` for a split that an operator refuses.
    """
    start = time.perf_counter()
    machine = load_cluster(cluster) if isinstance(cluster, str) else cluster
    if mesh_shape == "auto":
        raise InputError("a strategy is priced on a mesh that is given", got="mesh_shape=auto")
    (mesh,) = _meshes(mesh_shape, machine, stages, None)
    asked = _ask(_quotient(graph), machine, mesh, Constraints(pins=pins or {}), dtype, strategy)
    best = _best([asked], stages, np.inf, None)
    wall_s = time.perf_counter() - start
    request = OperatorRequest(
        mesh=_said(mesh_shape, mesh),
        stages=stages,
        pins={name: dict(layout) for name, layout in (pins or {}).items()},
    )
    space_size = asked.problem.space_size
    return tell(graph, best, request, space_size=space_size, meshes=1, wall_s=wall_s)


def _said(shape: MeshShape, mesh: Mesh) -> Literal["auto"] | dict[str, int]:
    """A mesh as it was asked for."""
    return "auto" if shape == "auto" else dict(zip(mesh.axes, mesh.shape, strict=True))


def _quotient(graph: OpGraph) -> Quotient:
    check_graph(graph)
    if not graph.operators:
        raise InputError("a graph has operators", got=f"graph={graph.name}")
    return quotient_of(unfolded(graph))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The question on one mesh."""

    problem: Problem
    prices: OperatorPrices


def _ask(
    quotient: Quotient,
    cluster: Cluster,
    mesh: Mesh,
    constraints: Constraints,
    dtype: str,
    strategy: Strategy | None = None,
) -> _Asked:
    constraints.check(quotient.graph, mesh)
    prices = OperatorPrices.of(cluster, mesh, load_engine(ENGINE), quotient.graph.tensors, dtype)
    return _Asked(problem=make_problem(quotient, prices, constraints, strategy), prices=prices)


def _best(
    asked: Sequence[_Asked], stages: int, memory_bytes: float | None, time_limit_s: float | None
) -> Answer:
    """The fastest answer of any mesh; meshes whose bound is no less than it are left."""
    best, failed = None, None
    for one in asked:
        cluster, engine = one.prices.cluster, one.prices.engine
        capacity = capacity_bytes(cluster.device, engine, one.problem.mesh)
        limit = capacity if memory_bytes is None else memory_bytes
        below_s = np.inf if best is None else best.seconds
        try:
            found = find(one.problem, one.prices, stages, limit, time_limit_s, below_s)
        except InfeasibleError as error:
            failed = error
            continue
        if found is not None:
            told = capacity if limit == np.inf else limit
            answer = Answer(
                problem=one.problem, prices=one.prices, found=found, capacity_bytes=told
            )
            best = answer if answer.seconds < below_s else best
    if best is None:
        raise failed or InfeasibleError("a graph fits on some mesh", got="no mesh")
    return best


def _meshes(shape: MeshShape, cluster: Cluster, stages: int, cards: int | None) -> Iterator[Mesh]:
    """Meshes of one stage. `InputError` for one that the cluster or the cards do not hold."""
    if cards is not None and not 1 <= cards <= cluster.ranks:
        raise InputError(
            "`cards` are some of the cluster's",
            got=f"cards={cards}, ranks={cluster.ranks}",
            hint="use more nodes",
        )
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise InputError("`stages` is a whole number from 1", got=f"stages={stages!r}")
    if isinstance(shape, str):
        yield from _all_meshes(shape, cards or cluster.ranks, stages)
        return
    sizes = dict(shape) if isinstance(shape, Mapping) else dict(zip(_NAMES, shape, strict=False))
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes.values())
    if not whole or len(sizes) != len(shape) or not 1 <= len(shape) <= len(_NAMES):
        raise InputError(
            "a mesh has one or two axes of one or more ranks each",
            got=f"mesh_shape={shape!r}",
            hint="try (8,) or {'x': 2, 'y': 8}",
        )
    mesh = Mesh(tuple(map(str, sizes)), tuple(sizes.values()), {})
    if mesh.ranks * stages > cluster.ranks:
        raise InputError(
            "a mesh and its stages fit in the cluster",
            got=f"mesh_shape={shape!r}, stages={stages}, ranks={cluster.ranks}",
            hint="use more nodes",
        )
    if cards is not None and mesh.ranks * stages != cards:
        raise InputError(
            "a mesh and its stages fill the cards that are asked for",
            got=f"mesh_shape={shape!r}, stages={stages}, cards={cards}",
            hint="leave one of them out",
        )
    yield mesh


def _all_meshes(shape: str, cards: int, stages: int) -> Iterator[Mesh]:
    ranks, rest = divmod(cards, stages)
    if shape != "auto" or rest or not ranks:
        raise InputError(
            "`mesh_shape` is `auto`, where the stages share the ranks evenly, or ranks of axes",
            got=f"mesh_shape={shape!r}, stages={stages}, ranks={cards}",
        )
    yield Mesh(_NAMES[:1], (ranks,), {})
    for first in range(2, ranks // 2 + 1):
        if ranks % first == 0:
            yield Mesh(_NAMES, (first, ranks // first), {})
