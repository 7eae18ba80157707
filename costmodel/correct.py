"""The fit behind `shardplan calibrate`: how one machine's kernels differ from the calibration.

For each calibration section with enough measured shapes, in the terms of `costmodel.correction`,
with r = ln(measured / model) of a shape:

    scale   one factor for body and overhead, exp(w median r),  w = n t^2 / (n t^2 + s^2)
    floor   one for each
    curve   one for the overhead, and four knots over the bodies measured

s is the spread of r (from its median absolute deviation, at least 0.05) and t = 0.5 what a kernel
may well differ by before anything is measured: few or scattered rows move the price little. The
last two minimise the soft absolute error of ln(time), held near the first by a ridge and, between
knots, to one another. Bodies below a tenth of the overhead say nothing and have no knot.

The simplest form is taken unless a richer one has a tenth less error on rows left out of its own
fit (in turn, or by fifths), half a percent at least. With 40 shapes or more a fifth, chosen by a
hash of the shape, is kept out of all of this and gives the errors; with fewer each shape is left
out in turn. A correction that does not lessen their error, by a fiftieth at least, is not kept.

An error here is half the mean |ln error| of all rows and half that of the slowest quarter: grids
of benchmarks hold many small shapes, steps are made of the large ones.

Left out: dependence between shapes of one model; which of two runs of a machine was the better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.correction import MAX_FACTOR, Correction
from shardplan.costmodel.fitting.common import ErrorStats, error_stats, held_out, robust_fit
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.price_measured import Priced

__all__ = ["FamilyFit", "Form", "correct", "fit_section"]

Form = Literal["scale", "floor", "curve"]
Rows = NDArray[np.int64]
_NEEDED: dict[Form, int] = {"scale": 3, "floor": 6, "curve": 16}
"""Shapes that a form needs."""
_HASHED = 40
"""From this many shapes on a hashed fifth is held out; below, each in turn."""
_FOLDS = 5
_PRIOR = 0.5
_SPREAD = 0.05
_MAD_TO_SIGMA = 1.4826
_BETTER = 0.9
_HELPS = 0.98
_WORTH = 0.005
_RIDGE = 0.1
_KNOTS = 4
_SPAN = 10.0
"""Bodies must span this factor for a curve."""
_STEEP = 0.4
"""A knot moves at most this share of the distance to its neighbours, in logs."""
_SLOWEST = 0.75
_SHARE = 0.1
_TINY_S = 1e-9
_LIMIT = math.log(MAX_FACTOR)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """Parameters of a correction: logs of the floor factor, the knots and the factors there."""

    log_floor: float
    log_knots: Array
    log_factors: Array

    def seconds(self, body_s: Array, overhead_s: Array) -> Array:
        """Corrected times, `[rows]`."""
        reach = np.log(np.maximum(body_s, _TINY_S))
        factor = np.exp(np.interp(reach, self.log_knots, self.log_factors))
        return np.asarray(body_s * factor + overhead_s * math.exp(self.log_floor))


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyFit:
    """What the measurements of one section say."""

    section: str
    shapes: int
    calls: int
    kernels: tuple[str, ...]
    form: Form | None
    before: ErrorStats
    """Errors of the uncorrected model on the held-out rows; on all rows where nothing is fitted."""
    after: ErrorStats
    """Errors of the correction on the same rows."""
    correction: Correction | None
    reason: str
    """Why there is no correction; blank where there is one."""


def correct(priced: Sequence[Priced]) -> list[FamilyFit]:
    """The fit of every section, sorted by name."""
    return [fit_section(part) for part in sorted(priced, key=lambda one: one.section)]


def fit_section(part: Priced) -> FamilyFit:
    """Fit, hold out, and keep what helps."""
    every = np.arange(len(part.measured), dtype=np.int64)
    if every.size < _NEEDED["scale"]:
        return _unfitted(part, f"under {_NEEDED['scale']} shapes")
    rows = held = every
    if every.size >= _HASHED:
        out = held_out(one.shape for one in part.measured)
        rows, held = (every[~out], every[out]) if out.any() else (every, every)
    form = _best_form(part, rows)
    if held is rows:
        predicted = _left_out(part, rows, form, rows.size)
    else:
        predicted = _fit(part, rows, form).seconds(part.body_s[held], part.overhead_s[held])
    truth, plain = part.seconds[held], part.total_s[held]
    before, after = error_stats(plain, truth), error_stats(predicted, truth)
    change = _fit(part, rows, form)
    if _error(predicted, truth) > _HELPS * _error(plain, truth):
        return _unfitted(part, "no gain on rows left out", form, before, after)
    if max(abs(change.log_floor), float(np.abs(change.log_factors).max())) >= _LIMIT:
        return _unfitted(
            part, f"over {MAX_FACTOR:g} times off: another kernel?", form, before, after
        )
    return _fitted(part, form, change, before, after, rows.size)


def _unfitted(
    part: Priced,
    reason: str,
    form: Form | None = None,
    before: ErrorStats | None = None,
    after: ErrorStats | None = None,
) -> FamilyFit:
    plain = before or error_stats(part.total_s, part.seconds)
    return FamilyFit(
        section=part.section,
        shapes=len(part.measured),
        calls=sum(one.count for one in part.measured),
        kernels=_kernels(part),
        form=form,
        before=plain,
        after=after or plain,
        correction=None,
        reason=reason,
    )


def _fitted(
    part: Priced, form: Form, change: _Change, before: ErrorStats, after: ErrorStats, rows: int
) -> FamilyFit:
    calls = sum(one.count for one in part.measured)
    files = sorted({one.file for one in part.measured})
    turn = "" if before.rows + rows == len(part.measured) else ", each left out in turn for errors"
    kernels = _kernels(part)
    correction = Correction(
        name=part.section,
        floor_factor=math.exp(change.log_floor),
        knots_s=tuple(np.exp(change.log_knots).tolist()),
        factors=tuple(np.exp(change.log_factors).tolist()),
        kind="fitted",
        source=f"{', '.join(kernels)}: {len(part.measured)} shapes, {calls} calls of "
        f"{', '.join(files)}{turn}",
        rows_fitted=rows,
        rows_held_out=before.rows,
        median_error_before=before.median,
        p90_error_before=before.p90,
        median_error=after.median,
        p90_error=after.p90,
    )
    return FamilyFit(
        section=part.section,
        shapes=len(part.measured),
        calls=calls,
        kernels=kernels,
        form=form,
        before=before,
        after=after,
        correction=correction,
        reason="",
    )


def _kernels(part: Priced) -> tuple[str, ...]:
    return tuple(sorted({one.kernel for one in part.measured}))


def _error(model_s: Array, measured_s: Array) -> float:
    """Half the mean |ln error| of all rows, half that of the slowest quarter."""
    error = np.abs(np.log(model_s / measured_s))
    slowest = measured_s >= np.quantile(measured_s, _SLOWEST)
    return 0.5 * float(np.mean(error)) + 0.5 * float(np.mean(error[slowest]))


def _best_form(part: Priced, rows: Rows) -> Form:
    """The simplest form that a richer one does not beat by a tenth on rows left out."""
    folds = rows.size if rows.size < _HASHED else _FOLDS
    best: Form = "scale"
    error = _error(_left_out(part, rows, best, folds), part.seconds[rows])
    forms: tuple[Form, ...] = ("floor", "curve")
    for form in forms:
        if rows.size >= _NEEDED[form]:
            other = _error(_left_out(part, rows, form, folds), part.seconds[rows])
            if other < min(_BETTER * error, error - _WORTH):
                best, error = form, other
    return best


def _left_out(part: Priced, rows: Rows, form: Form, folds: int) -> Array:
    """Corrected times of rows, each by a fit without its fold, `[rows]`."""
    out = np.empty(rows.size)
    for fold in range(folds):
        mine = np.arange(rows.size) % folds == fold
        change = _fit(part, rows[~mine], form)
        out[mine] = change.seconds(part.body_s[rows[mine]], part.overhead_s[rows[mine]])
    return out


def _fit(part: Priced, rows: Rows, form: Form) -> _Change:
    body, over, truth = part.body_s[rows], part.overhead_s[rows], part.seconds[rows]
    ratio = np.log(truth / (body + over))
    middle = float(np.median(ratio))
    spread = max(_MAD_TO_SIGMA * float(np.median(np.abs(ratio - middle))), _SPREAD)
    weight = rows.size * _PRIOR**2 / (rows.size * _PRIOR**2 + spread**2)
    log_scale = float(np.clip(weight * middle, -_LIMIT, _LIMIT))
    log_knots = _knots(body, over, form)
    plain = _Change(
        log_floor=log_scale, log_knots=log_knots, log_factors=np.full(log_knots.size, log_scale)
    )
    return plain if form == "scale" else _richer(plain, body, over, truth)


def _knots(body: Array, over: Array, form: Form) -> Array:
    """Logs of the bodies between which the factor is linear; one where it is constant."""
    high = max(float(body.max()), _TINY_S)
    low = max(float(body.min()), _SHARE * float(np.median(over)), _TINY_S)
    if form != "curve" or high < _SPAN * low:
        return np.asarray([0.5 * (math.log(min(low, high)) + math.log(high))])
    return np.linspace(math.log(low), math.log(high), _KNOTS)


def _richer(plain: _Change, body: Array, over: Array, truth: Array) -> _Change:
    """Floor factor and factors at the knots by the robust fit, near the plain scale."""
    knots = plain.log_knots
    reach = _STEEP * float(knots[1] - knots[0]) if knots.size > 1 else _LIMIT
    middle = np.concatenate([[plain.log_floor], plain.log_factors])
    room = np.asarray([_LIMIT, *[min(reach, _LIMIT)] * knots.size])

    def changed(point: Array) -> _Change:
        return _Change(log_floor=float(point[0]), log_knots=knots, log_factors=point[1:])

    found = robust_fit(
        lambda point: changed(point).seconds(body, over),
        truth,
        middle,
        middle - room,
        middle + room,
        ridge=np.full(middle.size, _RIDGE),
        penalty=lambda point: _RIDGE * np.diff(point[1:]),
    )
    return changed(found)
