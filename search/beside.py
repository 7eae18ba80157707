"""What a search shows beside its answer: what other dtypes and an engine's switches would give.

They are searched over the layouts that did best (all, where those are few) and never applied
unasked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from shardplan.costmodel.memo import Memo
from shardplan.costmodel.rows import Overlap
from shardplan.models.parallel import Parallelism
from shardplan.search.build_plan import candidate
from shardplan.search.evaluate import Question
from shardplan.search.exact import search_exact
from shardplan.search.judged import Wanted
from shardplan.search.kept import Kept, Outcome, first_of_each
from shardplan.search.plan import QuantizationRow, StrategyInfo, SwitchRow
from shardplan.search.request import Resolved
from shardplan.search.space import Choice

__all__ = ["Beside", "search_beside"]

_LAYOUTS = 4


class Beside(NamedTuple):
    """Rows of a plan, and how many layouts they were found among."""

    quantization: tuple[QuantizationRow, ...] = ()
    switches: tuple[SwitchRow, ...] = ()
    layouts: int | None = None
    """None where there was nothing to search."""


def search_beside(
    resolved: Resolved,
    question: Question,
    outcome: Outcome,
    best: Kept,
    memo: Memo,
    time_limit_s: float | None,
) -> Beside:
    """Other dtypes and switches, each beside the plan's `best`."""
    choices = (*resolved.beside, *resolved.switches)
    if not choices:
        return Beside()
    space = replace(
        outcome.space,
        choices=choices,
        layouts=_layouts(outcome, choices),
        broken={},
        broken_ways={},
        reach=replace(outcome.space.reach, ways=False),
    )
    found = search_exact(
        question, space, time_limit_s=time_limit_s, memo=memo, wanted=Wanted(layouts=1, front=False)
    )
    return Beside(
        quantization=_quantization(found, best),
        switches=_switches(found, best),
        layouts=len(space.layouts),
    )


def _layouts(outcome: Outcome, choices: tuple[Choice, ...]) -> tuple[Parallelism, ...]:
    """The layouts that did best, of all and of those that allow each switch.

    Behind those that hold come those whose queue or percentiles alone are too long.
    """
    space = outcome.space
    if len(space.layouts) <= _LAYOUTS:
        return space.layouts
    held = (one.parallel for one in first_of_each(outcome.kept) if one.feasible)
    near = (par for (par, _), (slots, _) in outcome.refused.items() if slots.size)
    ranked = tuple(dict.fromkeys(space.layout_of(par) for par in (*held, *near)))
    found = dict.fromkeys(ranked[:_LAYOUTS])
    for choice in (one for one in choices if one.switched):
        able = [par for par in ranked if space.broken_switch(par, choice) is None]
        found |= dict.fromkeys(able[:_LAYOUTS])
    return tuple(found)


class _Gain(NamedTuple):
    """The best of some choices."""

    objective: float | None
    gain: float | None
    strategy: StrategyInfo | None


def _gain(found: Outcome, best: Kept, fits: Callable[[Choice], bool]) -> _Gain:
    every = first_of_each(found.kept)
    one = next((kept for kept in every if kept.feasible and fits(kept.choice)), None)
    if one is None:
        return _Gain(None, None, None)
    objective = one.columns["objective"]
    strategy = candidate(found, one).strategy
    return _Gain(objective, objective / best.columns["objective"], strategy)


def _quantization(found: Outcome, best: Kept) -> tuple[QuantizationRow, ...]:
    """What each pair of dtypes that was not searched would give."""
    rows = []
    plain = [choice for choice in found.space.choices if not choice.switched]
    for weight, kv in dict.fromkeys((one.weight_dtype, one.kv_dtype) for one in plain):

        def fits(choice: Choice, pair: tuple[str, str] = (weight, kv)) -> bool:
            return not choice.switched and (choice.weight_dtype, choice.kv_dtype) == pair

        told = _gain(found, best, fits)._asdict()
        rows.append(QuantizationRow(weight_dtype=weight, kv_dtype=kv, **told))
    return tuple(rows)


def _switches(found: Outcome, best: Kept) -> tuple[SwitchRow, ...]:
    """What each switch that was not searched would give, alone."""
    rows = []
    for overlap in dict.fromkeys(one.overlap for one in found.space.choices if one.switched):

        def fits(choice: Choice, it: Overlap = overlap) -> bool:
            return choice.overlap == it

        told = _gain(found, best, fits)._asdict()
        rows.append(
            SwitchRow(
                weight_prefetch=overlap.weight_prefetch,
                fused_collectives=overlap.fused_collectives,
                **told,
            )
        )
    return tuple(rows)
