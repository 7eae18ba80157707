"""Reading plan.json: its schema versions, and how a plan of an earlier one becomes one of today's.

| version | what a plan says                                                                     |
|---------|--------------------------------------------------------------------------------------|
| 1       | one deployment: question, strategy, performance, memory, proof, certificate          |
| 2       | also pools and transfer, servings, the engine's switches, confidence, robustness; of |
|         | a strategy also contexts over ranks, module ranks, rank order, tokens predicted      |
|         | ahead and collectives, which a reader of version 1 refuses as keys it does not know  |

A version is raised where a reader of the one before would refuse or misread a plan. Each has a
step from the one before; a plan is taken through all that it is behind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardplan.models.errors import InputError

__all__ = ["MAX_PLAN_BYTES", "PLAN_VERSION", "read_plan", "upgraded"]

PLAN_VERSION = 2
MAX_PLAN_BYTES = 16 * 2**20


def _from_1(plan: dict[str, Any]) -> dict[str, Any]:
    """Version 2 only adds; each key that it adds says of itself what its absence means."""
    return {**plan, "schema_version": 2}


_STEPS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}


def read_plan(path: str | os.PathLike[str]) -> object:
    """What the JSON of a saved plan says, of either kind. `InputError` where it is none."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_PLAN_BYTES:
            raise InputError("a plan.json is at most 16 MiB", got=str(file))
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError("the plan cannot be read", got=f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or a number too long
        raise InputError("a plan.json is JSON in UTF-8", got=f"{file}: {error}") from None


def upgraded(data: object, file: str) -> dict[str, Any]:
    """What plan.json holds, as a plan of today's version; `file` names it in errors.

    `InputError` for what is no plan, and for a plan of a version that is yet to come.
    """
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(data, dict) or type(version) is not int or version < 1:
        raise InputError(
            f"plan.json has a schema version, from 1 to {PLAN_VERSION}",
            got=f"{file}: schema_version={version!r:.40}",
            hint="make it anew with `shardplan search`",
        )
    if version > PLAN_VERSION:
        raise InputError(
            f"plan.json of schema version {PLAN_VERSION} and earlier is understood",
            got=f"{file}: schema_version={str(version)[:40]}, "
            f"of shardplan {data.get('shardplan_version')!r:.40}",
            hint="install that version of shardplan or a later one, or make the plan anew",
        )
    for step in range(version, PLAN_VERSION):
        data = _STEPS[step](data)
    return data
