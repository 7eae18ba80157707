"""The operator-level search of whatever `load_graph` reads: found, proven, with tables and files.

model -> graph -> search_operators -> proof -> plan.json, tables (CSV), report.html, timing.json
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.opcost import AUTO_DTYPE
from shardplan.models.atomic import write_atomically
from shardplan.models.errors import InputError, ProofError
from shardplan.models.opgraph import Layout, OpGraph
from shardplan.search.oplevel.against import BASELINES, OperatorRival, baseline
from shardplan.search.oplevel.api import MeshShape, search_operators
from shardplan.search.oplevel.plan import OperatorPlan, layout_words
from shardplan.search.oplevel.proof import prove_operators
from shardplan.search.output import check_out
from shardplan.search.trial_table import TrialTable

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["FILES", "OperatorResult", "search_graph", "write_operators"]

FILES = ("plan.json", "operators.csv", "moves.csv", "report.html", "timing.json")
OPERATOR_COLUMNS = (
    "name", "kind", "where", "layer", "times", "split", "passes", "reads", "writes", "total_s",
    "compute_s", "memory_s", "overhead_s",
)  # fmt: skip
MOVE_COLUMNS = (
    "tensor", "kind", "axes", "before", "after", "times", "message_bytes", "seconds",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorResult:
    """An operator plan, the graph that it splits, the machine, and its tables.

    `timing`: measured seconds, apart from what is reproducible.
    """

    plan: OperatorPlan
    graph: OpGraph
    cluster: Cluster
    timing: dict[str, float]

    @property
    def operator_table(self) -> TrialTable:
        """A row of each operator, equal layers' once, as `operators.csv` has them."""
        return TrialTable.of_rows(OPERATOR_COLUMNS, _cells(self.plan.operators))

    @property
    def move_table(self) -> TrialTable:
        """A row of each inserted collective or slice, as `moves.csv` has them."""
        return TrialTable.of_rows(MOVE_COLUMNS, _cells(self.plan.moves))

    @property
    def operators(self) -> DataFrame:
        """The operator table as a pandas frame."""
        return self.operator_table.frame

    @property
    def moves(self) -> DataFrame:
        """The move table as a pandas frame."""
        return self.move_table.frame


def search_graph(
    graph: OpGraph,
    cluster: str | Cluster,
    *,
    nodes: int | None = None,
    device: str | None = None,
    cards: int | None = None,
    mesh: MeshShape = "auto",
    stages: int = 1,
    weight_dtype: str = AUTO_DTYPE,
    memory_bytes: float | None = None,
    time_limit: float | None = None,
    pins: Mapping[str, Layout] | None = None,
    forbid: Mapping[str, Sequence[str]] | None = None,
    sizes: Mapping[str, int] | None = None,
    notes: Iterable[str] = (),
) -> OperatorResult:
    """The fastest split of every operator of a graph, proven at level 1.

    `cluster`, `nodes`, `device`: as of `load_cluster`. The others as of `search_operators`;
    `weight_dtype` is its `dtype`, `time_limit` in seconds, `sizes` what the graph was read with.
    `InputError` for what breaks a rule, `InfeasibleError` where nothing fits.
    """
    start = time.perf_counter()
    if isinstance(cluster, str):
        machine = load_cluster(cluster, nodes=nodes, device=device, cards=cards)
    else:
        machine = cluster
    plan = search_operators(
        graph,
        machine,
        mesh,
        stages=stages,
        cards=cards,
        dtype=weight_dtype,
        pins=pins,
        forbid=forbid,
        memory_bytes=memory_bytes,
        time_limit_s=time_limit,
    )
    found = time.perf_counter()
    proof = prove_operators(plan, graph)
    if not proof.passed:
        raise ProofError(
            "the best split does not compute what the graph computes",
            got="; ".join(proof.failures)[:500],
        )
    request = plan.request.model_copy(update={"sizes": dict(sizes or {})})
    done = {"request": request, "proof": proof, "notes": (*notes, *_notes(plan, machine))}
    end = time.perf_counter()
    return OperatorResult(
        plan=plan.model_copy(update=done),
        graph=graph,
        cluster=machine,
        timing={"search_s": found - start, "proof_s": end - found, "total_s": end - start},
    )


def _notes(plan: OperatorPlan, cluster: Cluster) -> Iterator[str]:
    ranks = len(plan.stages)
    for size in plan.mesh.values():
        ranks *= size
    if ranks < cluster.ranks:
        yield f"{ranks} of the cluster's {cluster.ranks} ranks are used"
    if not any(row.split for row in plan.operators):
        yield "no operator is worth splitting: every rank computes the whole"
    if plan.certificate.gap:
        yield f"another split may be up to {plan.certificate.gap:.2%} faster"


def write_operators(result: OperatorResult, out: Path, *, force: bool = False) -> list[Path]:
    """Write every file of an operator-level search into `out`; returns their paths."""
    from shardplan.search.report.operators import write_operator_report

    check_out(out, force=force)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / name for name in FILES]
    result.plan.save(paths[0])
    write_atomically(paths[1], _csv(result.operator_table))
    write_atomically(paths[2], _csv(result.move_table))
    write_operator_report(result.plan, result.graph, tuple(_rivals(result)), paths[3])
    write_atomically(paths[4], json.dumps(result.timing, indent=2, sort_keys=True) + "\n")
    return paths


def _rivals(result: OperatorResult) -> Iterator[OperatorRival]:
    """Splits that are known, where the plan's pins allow them."""
    for name in BASELINES:
        with contextlib.suppress(InputError):
            yield baseline(result.plan, result.graph, name, result.cluster)


def _csv(table: TrialTable) -> str:
    text: str = table.frame.to_csv(index=False, lineterminator="\n", float_format="%.10g")
    return text


def _cells(rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Rows of a plan with layouts and axes as text: `x:0 y:+`."""
    for row in rows:
        yield {name: _text(value) for name, value in row.model_dump().items()}


def _text(value: Any) -> Any:
    if isinstance(value, dict):
        return layout_words(value)
    if isinstance(value, tuple) and value and isinstance(value[0], dict):
        return "; ".join(map(_text, value))
    return " ".join(value) if isinstance(value, tuple) else value
