"""What requests see of a strategy that its steady state does not tell: its queue, its tails.

At an asked rate requests come at random and wait for a slot where all are taken; a limit on the
mean TTFT holds for that (`ttft_at_rate_s`), beside the TTFT of all slots in use. 99th percentiles
are those at the rate, else of the closed loop. Where replicas may be lost all is told of those that
are left, which the whole rate comes to.

Dear to price (`costmodel.run_out`: fixed points, a chain of steps), so that it is priced only where
every other limit holds. Strategies of many layouts are priced together.
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
from shardplan.costmodel.run_out import run_out
from shardplan.costmodel.serving import ServingInput

if TYPE_CHECKING:
    from shardplan.search.evaluate import LayoutScorer, Question
    from shardplan.search.space import Choice

__all__ = ["AT_RATE", "TAILS", "Sight", "seen", "seen_names", "too_slow"]

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


def too_slow(question: Question, columns: Mapping[str, Array]) -> dict[str, NDArray[np.bool_]]:
    """By limit, which strategies break it; columns without a number break none."""
    limits = question.limits
    most = {
        AT_RATE: ("ttft", limits.ttft_s),
        TAILS[0]: ("ttft_p99", limits.ttft_p99_s),
        TAILS[1]: ("tpot_p99", limits.tpot_p99_s),
    }
    return {
        most[name][0]: np.asarray(columns[name] > (most[name][1] or math.inf))
        for name in seen_names(question)
        if name in columns
    }


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
