"""What a trial of a study says became of its strategy; a storage may hold anything.

result      {state, reason, columns, strategy}   as `sampled.Drawing.make` writes it
violations  [illegal, by how much each limit is missed]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, TypeAdapter, ValidationError

from shardplan.models.errors import InputError
from shardplan.search.dimensions import Dimensions, Point
from shardplan.search.evaluate import LIMITS
from shardplan.search.trials import NUMBER_COLUMNS

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

__all__ = ["TrialResult", "read_attribute", "read_trial", "read_violations"]

_HINT = "it was changed from outside: start the study anew under another name"


class TrialResult(BaseModel):
    """What became of a strategy."""

    state: Literal["feasible", "infeasible", "illegal"]
    reason: str
    columns: dict[str, float] = {}


def read_trial(dimensions: Dimensions, trial: FrozenTrial) -> tuple[Point, TrialResult]:
    """The strategy of a finished trial and what became of it; `InputError` where that is unsaid."""
    try:
        point = dimensions.point(trial.params)
        result = TrialResult.model_validate(trial.user_attrs.get("result"))
    except (ValidationError, LookupError, TypeError, ValueError) as error:
        raise _refuse(trial, f"{type(error).__name__}: {error}") from None
    if result.state == "illegal":
        return point, result
    if result.reason not in ("", *LIMITS) or bool(result.reason) != (result.state == "infeasible"):
        raise _refuse(trial, f"{result.state}, reason={result.reason!r}")
    missing = [name for name in NUMBER_COLUMNS if name not in result.columns]
    if missing:
        raise _refuse(trial, f"no {missing[0]}")
    return point, result


def read_violations(trial: FrozenTrial) -> tuple[float, ...]:
    """By how much a finished trial breaks rules and limits. `InputError` as of `read_trial`."""
    try:
        found = TypeAdapter(tuple[float, ...]).validate_python(trial.user_attrs.get("violations"))
    except ValidationError as error:
        raise _refuse(trial, str(error)) from None
    if len(found) != 1 + len(LIMITS):
        raise _refuse(trial, f"{len(found)} violations")
    return found


def _refuse(trial: FrozenTrial, what: str) -> InputError:
    return InputError(
        "a finished trial of a study says what became of its strategy",
        got=f"trial {trial.number}: {' '.join(what.split())[:120]}",
        hint=_HINT,
    )


def read_attribute(attributes: Mapping[str, Any], name: str, kind: Any) -> Any:
    """A user attribute of a study as its type. `InputError` where it is of another."""
    try:
        return TypeAdapter(kind).validate_python(attributes.get(name))
    except ValidationError:
        raise InputError(
            "a study says what it was made for",
            got=f"{name}={str(attributes.get(name))[:60]!r}",
            hint=_HINT,
        ) from None
