"""A plan.json of either kind: of a deployment, or of the operators of a graph."""

from __future__ import annotations

import os

from shardplan.search.oplevel.plan import OperatorPlan
from shardplan.search.plan import OPERATORS, Plan
from shardplan.search.plan_versions import read_plan

__all__ = ["load_plan"]


def load_plan(path: str | os.PathLike[str]) -> Plan | OperatorPlan:
    """Read a saved plan. `InputError` with the place and the rule where it breaks one."""
    data = read_plan(path)
    operators = isinstance(data, dict) and data.get("kind") == OPERATORS
    return OperatorPlan.of(data, path) if operators else Plan.of(data, path)
