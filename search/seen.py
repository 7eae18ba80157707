"""What requests see of a strategy that its steady state does not tell: its queue, its tails.

At an asked rate requests come at random and wait for a slot where all are taken; a limit on the
mean TTFT holds for that (`ttft_at_rate_s`), beside the TTFT of all slots in use. 99th percentiles
are those at the rate, else of the closed loop. Where replicas may be lost all is told of those that
are left, which the whole rate comes to.

Dear to price (`costmodel.run_out`: fixed points, a chain of steps), so that it is priced only where
every other limit holds, and what it is at least (`costmodel.run_least`) keeps the limit.
Strategies of many layouts are priced together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.bulk import Dtypes, Fleet
from shardplan.costmodel.forward import Pricer
from shardplan.costmodel.kernels.base import Array, as_array
from shardplan.costmodel.run_least import Least, least_at_rate, least_closed
from shardplan.costmodel.run_out import run_out
from shardplan.costmodel.serving import ServingInput, Steady, steady

if TYPE_CHECKING:
    from shardplan.search.evaluate import LayoutScorer, Question
    from shardplan.search.space import Choice

__all__ = [
    "AT_RATE",
    "TAILS",
    "Sight",
    "may_hold",
    "mean_limits",
    "missed",
    "seen",
    "seen_at_least",
    "seen_names",
    "too_slow",
]

AT_RATE = "ttft_at_rate_s"
TAILS = ("ttft_p99_s", "tpot_p99_s")
_TOGETHER = 4096
"""Strategies whose values are made at once: what that takes of memory."""


class Sight(NamedTuple):
    """Some strategies `[n]` of one layout and choice."""

    scorer: LayoutScorer
    choice: Choice
    batch: Array
    chunk: Array


def seen_names(question: Question) -> tuple[str, ...]:
    """Columns that the limits of a question need beyond the steady state; often none."""
    limits, rate = question.limits, question.workload.request_rate
    queue = (AT_RATE,) if rate is not None and limits.ttft_s is not None else ()
    return (*queue, *(TAILS if limits.has_tails else ()))


def _allowed(question: Question) -> dict[str, tuple[str, float]]:
    """(limit, seconds) of each column."""
    limits = question.limits
    most = {
        AT_RATE: ("ttft", limits.ttft_s),
        TAILS[0]: ("ttft_p99", limits.ttft_p99_s),
        TAILS[1]: ("tpot_p99", limits.tpot_p99_s),
    }
    return {name: (most[name][0], most[name][1] or math.inf) for name in seen_names(question)}


def mean_limits(question: Question) -> tuple[float, float]:
    """Seconds of TTFT and TPOT on average that keep their limits with all slots in use.

    Without a rate the percentiles are of these, and no less than the means.
    """
    limits = question.limits
    tails = question.workload.request_rate is None
    pairs = (limits.ttft_s, limits.ttft_p99_s), (limits.tpot_s, limits.tpot_p99_s)
    ttft_s, tpot_s = (min(mean or math.inf, (tails and p99) or math.inf) for mean, p99 in pairs)
    return ttft_s, tpot_s


def too_slow(question: Question, columns: Mapping[str, Array]) -> dict[str, NDArray[np.bool_]]:
    """By limit, which strategies break it; columns without a number break none."""
    return {
        limit: np.asarray(columns[name] > most_s)
        for name, (limit, most_s) in _allowed(question).items()
        if name in columns
    }


def missed(question: Question, columns: Mapping[str, Array]) -> dict[str, Array]:
    """By column, its seconds over what is allowed; above 1 the limit is missed."""
    return {name: columns[name] / most_s for name, (_, most_s) in _allowed(question).items()}


def seen_at_least(
    scorer: LayoutScorer, choice: Choice, grid: tuple[Array, Array], steady_: Steady
) -> dict[str, Array]:
    """No more than `seen` of what is priced, in its shape; zeros where nothing is known.

    At a rate that is of those whose capacity is above it.
    """
    rate, shape = scorer.question.workload.request_rate, steady_.timed.end_to_end_s.shape
    model, given = scorer.model_for(choice), scorer.serving_input(choice, *grid)
    if rate is None:
        return _named(scorer.question, least_closed(model, given, steady_.timed))
    if given.in_flight is not None or not scorer.left:
        return {name: np.zeros(shape) for name in seen_names(scorer.question)}
    if _crossed(grid):
        least = least_at_rate(model, given, steady_.timed, rate, scorer.left)
        return _named(scorer.question, least)
    slots, row = np.unique(np.append(grid[0], 1.0), return_inverse=True)
    chunks, column = np.unique(grid[1], return_inverse=True)
    given = scorer.serving_input(choice, slots[:, None], chunks[None, :])
    least = least_at_rate(model, given, steady(model, given).timed, rate, scorer.left)
    found = _named(scorer.question, least)
    return {name: one[row[:-1], column] for name, one in found.items()}


def _crossed(grid: tuple[Array, Array]) -> bool:
    """Whether a grid is slots `[n, 1]` by step sizes `[1, m]`."""
    return grid[0].shape[1:] == (1,) and grid[1].shape[:1] == (1,)


def _named(question: Question, least: Least) -> dict[str, Array]:
    names = seen_names(question)
    return {name: least.ttft_mean_s if name == AT_RATE else getattr(least, name) for name in names}


def may_hold(
    scorer: LayoutScorer,
    choice: Choice,
    grid: tuple[Array, Array],
    steady_: Steady,
    share: Array,
) -> NDArray[np.bool_]:
    """Which points of a grid of slots and step sizes may keep the limits at the rate, were steps
    `share` of what they are.

    Where all times are s of what they are, rate R means s of what rate s R did; s is the least.
    """
    question, timed, least_share = scorer.question, steady_.timed, float(share.min())
    rate, given = question.workload.request_rate, scorer.serving_input(choice, *grid)
    left = question.share_left(scorer.parallel, best=True)
    able = np.ones(timed.end_to_end_s.shape, dtype=bool)
    if rate is None or not seen_names(question) or given.in_flight is not None or not left:
        return able
    least = least_at_rate(scorer.model_for(choice), given, timed, rate * least_share, left)
    told = {name: one * least_share for name, one in _named(question, least).items()}
    return np.asarray(able & ~np.logical_or.reduce([*too_slow(question, told).values()]))


def seen(sights: Sequence[Sight]) -> list[dict[str, Array]]:
    """The columns of `seen_names` of each, `[n]`; all of one question."""
    question = sights[0].scorer.question
    names = seen_names(question)
    asked = [one.scorer.serving_input(one.choice, one.batch, one.chunk) for one in sights]
    counts = [one.batch.size for one in sights]
    given = _stacked(asked, counts)
    left = np.repeat([one.scorer.left for one in sights], counts)
    pricer = _pricer(sights, counts)
    columns = {name: np.empty(left.size) for name in names}
    for start in range(0, left.size, _TOGETHER):
        rows = np.arange(start, min(start + _TOGETHER, left.size))
        run = run_out(
            pricer.take(rows) if isinstance(pricer, Fleet) else pricer,
            _rows(given, rows),
            request_rate=question.workload.request_rate or math.inf,
            left=left[rows],
            tails=question.limits.has_tails,
        )
        for name, values in columns.items():
            values[rows] = run.ttft_mean_s if name == AT_RATE else getattr(run, name)
    ends = np.cumsum(counts)[:-1]
    parts = {name: np.split(values, ends) for name, values in columns.items()}
    return [{name: parts[name][at] for name in names} for at in range(len(sights))]


def _pricer(sights: Sequence[Sight], counts: Sequence[int]) -> Pricer:
    """The model of the one layout, or a fleet of all."""
    models = [one.scorer.model_for(one.choice) for one in sights]
    if len(sights) == 1:
        return models[0]
    each = {id(one): place for place, one in enumerate({id(m): m for m in models}.values())}
    types = [Dtypes(one.weight_dtype, one.kv_dtype, one.attention) for _, one, *_ in sights]
    known = list(dict.fromkeys(types))
    return Fleet.of(
        list({id(one): one for one in models}.values()),
        np.repeat([each[id(one)] for one in models], counts),
        known,
        np.repeat([known.index(one) for one in types], counts),
    )


def _stacked(asked: Sequence[ServingInput], counts: Sequence[int]) -> ServingInput:
    """One input of all strategies; dtypes are those of the first, which a fleet does not read."""
    flight = [one.in_flight for one in asked if one.in_flight is not None]
    return replace(
        asked[0],
        batch=np.concatenate([one.batch for one in asked]),
        chunk=np.concatenate([one.chunk for one in asked]),
        mtp=_common([as_array(one.mtp) for one in asked], counts),
        in_flight=_common([as_array(one) for one in flight], counts) if flight else None,
    )


def _common(values: Sequence[Array], counts: Sequence[int]) -> Array:
    return values[0] if len(values) == 1 else np.repeat(np.stack(values), counts)


def _rows(given: ServingInput, rows: NDArray[np.int64]) -> ServingInput:
    mtp, flight = as_array(given.mtp), given.in_flight
    return replace(
        given,
        batch=given.batch[rows],
        chunk=given.chunk[rows],
        mtp=mtp[rows] if mtp.ndim else mtp,
        in_flight=flight if flight is None or not np.ndim(flight) else as_array(flight)[rows],
    )
