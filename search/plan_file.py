"""A plan.json of either kind: of a deployment, or of the operators of a graph."""

from __future__ import annotations

import json
import os
from pathlib import Path

from shardplan.search.oplevel.plan import OperatorPlan
from shardplan.search.plan import MAX_PLAN_BYTES, OPERATORS, Plan

__all__ = ["load_plan"]


def load_plan(path: str | os.PathLike[str]) -> Plan | OperatorPlan:
    """Read a saved plan. `InputError` with the place and the rule where it breaks one."""
    return OperatorPlan.load(path) if _kind(Path(path)) == OPERATORS else Plan.load(path)


def _kind(file: Path) -> object:
    """What a file says of its kind; None where it cannot be read, which its reader then says."""
    try:
        if file.stat().st_size > MAX_PLAN_BYTES:
            return None
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data.get("kind") if isinstance(data, dict) else None
