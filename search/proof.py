"""The proof of a plan: its strategy applied and executed (`shardplan.models.verify`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

from shardplan.costmodel.audit import audit_collectives, audit_memory
from shardplan.costmodel.catalog import cluster_names, device_names, load_cluster
from shardplan.costmodel.engines import engine_names, load_engine
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.ledger import Ledger
from shardplan.costmodel.step import StepModel
from shardplan.models.catalog import load_model, model_names
from shardplan.models.errors import InputError, ProofError
from shardplan.models.parallel import Parallelism
from shardplan.models.shrink import shrink
from shardplan.models.spec import ModelSpec
from shardplan.models.verify import Check, prove
from shardplan.search.evaluate import LayoutScorer, Question
from shardplan.search.plan import ClusterInfo, Plan, ProofInfo, StrategyInfo
from shardplan.search.space import Choice

__all__ = [
    "LEVELS",
    "merged_proof",
    "model_digest",
    "model_of",
    "prove_strategy",
    "scorer_of",
    "scorer_on",
    "verify_plan",
]

LEVELS = (0, 1, 2, 3)


def model_digest(spec: ModelSpec) -> str:
    """SHA-256 of a model's sizes and switches; its name and source do not count."""
    data = asdict(spec)
    for name in ("name", "source", "extra"):
        del data[name]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def prove_strategy(
    spec: ModelSpec,
    par: Parallelism,
    *,
    level: int = 1,
    scorer: LayoutScorer | None = None,
    choice: Choice | None = None,
) -> ProofInfo:
    """Prove one strategy; `LayoutError` where it cannot be laid on the model.

    Levels 2 and 3 also run the small model as PyTorch graphs and as processes (extra `torch`).
    With a `scorer`, what it charges for collectives and memory is held against the graph (L0),
    with the switches of `choice` on where one is given: they change prices, never the graph.
    """
    if level not in LEVELS:
        raise InputError("proof levels are 0 to 3", got=f"level={level}")
    further = _on_torch(spec, par, level)
    checks = [
        (check.passed, f"L{check.level} {check.name}: {check.detail}")
        for check in (*prove(spec, par, level=min(level, 1)).checks, *further)
    ]
    if scorer is not None:
        model = scorer.model if choice is None else scorer.model_for(choice)
        checks = [*_audit(model, scorer.ledger), *checks]
    return ProofInfo(
        level=level,
        passed=all(passed for passed, _ in checks),
        checks=tuple(text for passed, text in checks if passed),
        failures=tuple(text for passed, text in checks if not passed),
    )


def _on_torch(spec: ModelSpec, par: Parallelism, level: int) -> list[Check]:
    """Checks of levels 2 and 3. `InputError` where the extra `torch` is missing."""
    if level < LEVELS[2]:
        return []
    from shardplan.models.fx.processes import prove_processes
    from shardplan.models.fx.prove import prove_graphs

    case = shrink(spec, par)
    later = prove_processes(case) if level == LEVELS[3] else []
    return [*prove_graphs(case), *later]


def _audit(model: StepModel, ledger: Ledger) -> Iterator[tuple[bool, str]]:
    """(whether it holds, what was found) of each check of prices against the graph."""
    audits: dict[str, Callable[[], str]] = {
        "prefill: priced collectives are the graph's": lambda: audit_collectives(model, "prefill"),
        "decode: priced collectives are the graph's": lambda: audit_collectives(model, "decode"),
        "charged memory is the graph's": lambda: audit_memory(ledger),
    }
    for name, audit in audits.items():
        try:
            yield True, f"L0 {name}: {audit()}"
        except ProofError as error:
            yield False, f"L0 {name}: {error}"


def scorer_of(
    plan: Plan, spec: ModelSpec, machine: ClusterInfo, way: StrategyInfo
) -> LayoutScorer | None:
    """The scorer of a strategy; None where cluster, device or engine came from a file."""
    if (
        machine.name not in cluster_names()
        or machine.device not in device_names()
        or plan.request.engine_profile not in engine_names()
    ):
        return None
    cluster = load_cluster(machine.name, nodes=machine.nodes, device=machine.device)
    return scorer_on(plan, spec, cluster, way)


def scorer_on(plan: Plan, spec: ModelSpec, cluster: Cluster, way: StrategyInfo) -> LayoutScorer:
    """The scorer of a strategy on a cluster; `InputError` where the plan's engine is not known."""
    engine = load_engine(plan.request.engine_profile)
    question = Question.of(plan.request, spec, cluster, engine, cards=way.ranks)
    return LayoutScorer(question, way.parallelism())


def merged_proof(proofs: list[tuple[str, ProofInfo]]) -> ProofInfo:
    """Proofs of several strategies as one; each check says whose it is."""
    return ProofInfo(
        level=min(one.level for _, one in proofs),
        passed=all(one.passed for _, one in proofs),
        checks=tuple(f"{role}: {text}" for role, one in proofs for text in one.checks),
        failures=tuple(f"{role}: {text}" for role, one in proofs for text in one.failures),
    )


def model_of(plan: Plan, model: str | None = None) -> ModelSpec:
    """The model that a plan was made for, named by the plan or by `model`.

    `InputError` when the model found is not that one.
    """
    known = plan.model.name if plan.model.name in model_names() else plan.model.source
    spec = load_model(model or known)
    if model_digest(spec) != plan.model.digest:
        raise InputError(
            "the plan was made for a model of other sizes",
            got=f"{spec.name}: {model_digest(spec)[:12]}, plan: {plan.model.digest[:12]}",
            hint="name the model's config.json with --model",
        )
    return spec


def verify_plan(plan: Plan, *, level: int = 1, model: str | None = None) -> ProofInfo:
    """Prove a plan's strategies again on its model (`model_of`, which may raise)."""
    spec = model_of(plan, model)
    ways: list[tuple[str, ClusterInfo, StrategyInfo]] = [
        (pool.role, pool.cluster, pool.strategy) for pool in plan.pools
    ]
    proofs = [
        (
            role,
            prove_strategy(
                spec,
                way.parallelism(),
                level=level,
                scorer=scorer_of(plan, spec, machine, way),
                choice=Choice.of(way),
            ),
        )
        for role, machine, way in ways or [("", plan.cluster, plan.strategy)]
    ]
    return merged_proof(proofs) if ways else proofs[0][1]
