"""The proof of a plan: its strategy applied and executed (`shardplan.models.verify`)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from shardplan.models.catalog import load_model, model_names
from shardplan.models.errors import InputError
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec
from shardplan.models.verify import prove
from shardplan.search.plan import Plan, ProofInfo

__all__ = ["model_digest", "prove_strategy", "verify_plan"]


def model_digest(spec: ModelSpec) -> str:
    """SHA-256 of a model's sizes and switches; its name and source do not count."""
    data = asdict(spec)
    for name in ("name", "source", "extra"):
        del data[name]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def prove_strategy(spec: ModelSpec, par: Parallelism, *, level: int = 1) -> ProofInfo:
    """Prove one strategy; `LayoutError` where it cannot be laid on the model."""
    if level not in (0, 1):
        raise InputError("proof levels are 0 and 1", got=f"level={level}")
    proof = prove(spec, par, level=level)
    return ProofInfo(
        level=level,
        passed=proof.passed,
        checks=tuple(f"L{c.level} {c.name}: {c.detail}" for c in proof.checks if c.passed),
        failures=tuple(f"L{c.level} {c.name}: {c.detail}" for c in proof.checks if not c.passed),
    )


def verify_plan(plan: Plan, *, level: int = 1, model: str | None = None) -> ProofInfo:
    """Prove a plan's strategy again on its model, named by the plan or by `model`.

    `InputError` when the model found is not the one the plan was made for.
    """
    known = plan.model.name if plan.model.name in model_names() else plan.model.source
    spec = load_model(model or known)
    if model_digest(spec) != plan.model.digest:
        raise InputError(
            "the plan was made for a model of other sizes",
            got=f"{spec.name}: {model_digest(spec)[:12]}, plan: {plan.model.digest[:12]}",
            hint="name the model's config.json with --model",
        )
    return prove_strategy(spec, plan.strategy.parallelism(), level=level)
