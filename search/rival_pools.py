"""Rivals that are whole plans: prefill and decode pools of other strategies, the other serving.

A rival of pools is named by the axes of its instances, `prefill.tp=4,decode.tp=8,decode.ep=16`;
what is not named is searched, counts of instances too, so that it is beaten at its best.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, get_args

from shardplan import __version__
from shardplan.models.errors import InfeasibleError, InputError
from shardplan.models.parallel import Parallelism
from shardplan.search.api import search
from shardplan.search.asked_again import Known, asked_of, objective_of
from shardplan.search.disagg import search_disagg
from shardplan.search.disagg_failure import nothing_disaggregated
from shardplan.search.disagg_plan import build_disagg_plan
from shardplan.search.disagg_space import Pool, Role
from shardplan.search.explain_pools import KnownPools
from shardplan.search.explanation import Difference, Rival
from shardplan.search.plan import Plan
from shardplan.search.rival import memory_differences, step_differences, words_of
from shardplan.search.rulebook import rules
from shardplan.search.space import Choice
from shardplan.search.tables_disagg import instances_words

__all__ = ["SERVINGS", "is_of_pools", "other_serving", "rival_of_pools", "rival_plan"]

SERVINGS = ("agg", "disagg")
_ROLES: tuple[Role, ...] = get_args(Role)


def is_of_pools(text: str) -> bool:
    """Whether words name a rival of pools: the first of them is of a role."""
    return text.strip().startswith(tuple(f"{role}." for role in _ROLES))


def rival_plan(plan: Plan, other: Plan, *, notes: tuple[str, ...] = ()) -> Rival:
    """Another plan beside a plan, as it stands."""
    if other.request.workload != plan.request.workload:
        notes = (*notes, "the rival was made for another workload: its times are of that one")
    return Rival(
        strategy=other.strategy,
        performance=other.performance,
        broken=(),
        ratio=objective_of(other) / objective_of(plan),
        differences=tuple(_differences(plan, other)),
        words=instances_words(other),
        notes=notes,
    )


def _differences(plan: Plan, other: Plan) -> Iterator[Difference]:
    yield from step_differences(plan.breakdown, other.breakdown)
    if plan.pools and other.pools:
        for one, two in zip(plan.pools, other.pools, strict=True):
            yield from memory_differences(one.memory, two.memory, f"memory {one.role}")
    else:
        yield from memory_differences(plan.memory, other.memory)


def other_serving(known: Known, serving: str) -> Rival:
    """The best plan of the question served so: `agg` or `disagg`."""
    plan = known.plan
    note: tuple[str, ...] = ()
    if plan.request.prefill_cards is not None:
        note = ("the rival has the cards of the decode cluster only",)
    try:
        other = search(**{**asked_of(known), "serving": serving}).plan
    except (InfeasibleError, InputError) as error:
        return Rival.refused(plan.strategy, error, words=f"serving {serving}", notes=note)
    return rival_plan(plan, other, notes=note)


def rival_of_pools(found: KnownPools, text: str) -> Rival:
    """The best deployment of pools whose instances are as named. `InputError` for other words."""
    plan, words = found.known.plan, _words(text)
    own = found.question
    try:
        question = replace(
            own,
            prefill=_held(own.prefill, words["prefill"]),
            decode=_held(own.decode, words["decode"]),
        )
        outcome = search_disagg(question)
        if outcome.best is None:
            raise nothing_disaggregated(outcome, None)
    except InfeasibleError as error:
        return Rival.refused(plan.strategy, error, words=text)
    other = build_disagg_plan(
        found.sides, outcome, outcome.best, quantized=[], top=0, version=__version__
    )
    return rival_plan(plan, other)


def _words(text: str) -> dict[str, dict[str, Any]]:
    """Values of either role."""
    parts: dict[str, list[str]] = {role: [] for role in _ROLES}
    for part in filter(None, (one.strip() for one in text.split(","))):
        role, dot, rest = part.partition(".")
        if role not in parts or not dot:
            raise InputError(
                "a rival of pools is named by the axes of its instances",
                got=part[:60],
                hint="try prefill.tp=4,decode.tp=8",
            )
        parts[role].append(rest)
    return {role: words_of(",".join(some)) if some else {} for role, some in parts.items()}


def _held(pool: Pool, values: Mapping[str, Any]) -> Pool:
    """A pool held to values. `InputError` where it has none of them, `InfeasibleError` where
    rules allow none."""
    grid, choices = pool.grid, pool.choices
    size = "chunk" if pool.role == "prefill" else "batch"
    axes = {one.name for one in fields(Parallelism)} & set(values)
    kinds = {one.name for one in fields(Choice)} & set(values)
    if size in values:
        grid = (values[size],)
    choices = tuple(
        one for one in choices if all(getattr(one, name) == values[name] for name in kinds)
    )
    layouts = tuple(
        one
        for one in pool.layouts
        if all(getattr(one.parallel, name) == values[name] for name in axes)
    )
    if not layouts or not choices:
        raise InputError(
            f"no {pool.role} instance of the space is so",
            got=", ".join(f"{name}={value}" for name, value in values.items()),
            hint="instances are parts that divide a node, or whole nodes, of "
            f"{', '.join(map(str, pool.sizes))} cards",
        )
    if all(one.rule for one in layouts):
        rule = layouts[0].rule
        raise InfeasibleError(f"{pool.role}: {rule}: {rules()[rule].sentence}")
    return replace(pool, grid=grid, choices=choices, layouts=layouts)
