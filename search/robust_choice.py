"""The strategy of least worst-case regret under the calibration's error bands.

A scenario multiplies the time of every cost group by a factor: the prices as they are, each
group alone at either end of its band, and all corners of the bands together (2^groups).

    regret(x, s) = 1 - objective(x, s) / max over contenders' strategies y of objective(y, s)
    chosen       = the x of least max over s of regret(x, s), then of the larger nominal objective,
                   then what the search found, then the contender that did better as prices are

x and y are whole strategies: slots and step size stay as they are in every scenario. One that
breaks a limit in a scenario has regret 1 there; a scenario in which nothing meets the limits is
left out. Left out, too: what lies inside the bands (regret need not be largest at a corner), and
that bands of other strategies than the winner differ a little from the winner's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array
from shardplan.search.contender import Bands, Contender
from shardplan.search.plan_robustness import RobustChoice

__all__ = ["Chosen", "choose", "scenarios"]


class Chosen(NamedTuple):
    """The robust strategy and how it stands against the nominal winner."""

    contender: int
    point: int | None
    """None: the strategy that the search found."""
    summary: RobustChoice


def scenarios(bands: Bands) -> dict[str, Array]:
    """Factors of each group `[scenarios]`; the first are the prices as they are."""
    names = list(bands)
    rows = [[1.0] * len(names)]
    for at, name in enumerate(names):
        for end in bands[name]:
            rows.append([end if i == at else 1.0 for i in range(len(names))])
    if len(names) > 1:
        rows += [list(corner) for corner in itertools.product(*(bands[name] for name in names))]
    table = np.array(rows)
    return {name: np.ascontiguousarray(table[:, at]) for at, name in enumerate(names)}


def _words(factors: Mapping[str, Array], scenario: int) -> str:
    """A scenario in words; groups that keep their time are left out."""
    changed = {name: float(values[scenario]) for name, values in factors.items()}
    words = [f"{name} x{factor:.2f}" for name, factor in changed.items() if factor != 1.0]
    return ", ".join(words) or "prices as they are"


class _Regrets(NamedTuple):
    """One minus each objective over the best one of its scenario."""

    known: NDArray[np.int64]
    """Scenarios in which something meets the limits; the first are the prices as they are."""
    top: Array
    """Best objective of each of them."""
    points: list[Array]
    """Of each contender `[known, points]`."""
    nominal: Array
    """Of the strategy that the search found."""


def _regrets(contenders: Sequence[Contender], factors: Mapping[str, Array]) -> _Regrets:
    objectives = [one.objectives(factors) for one in contenders]
    own = contenders[0].own(factors)
    best = np.max([own, *(one.max(axis=1, initial=-np.inf) for one in objectives)], axis=0)
    known = np.flatnonzero(best > -np.inf)
    top = best[known]
    return _Regrets(
        known=known,
        top=top,
        points=[1.0 - np.maximum(one[known], 0.0) / top[:, None] for one in objectives],
        nominal=1.0 - np.maximum(own[known], 0.0) / top,
    )


def choose(contenders: Sequence[Contender], bands: Bands) -> Chosen:
    """The robust strategy among all points of the contenders; the first holds the winner."""
    factors = scenarios(bands)
    regrets = _regrets(contenders, factors)
    best = float(regrets.nominal.max()), float(regrets.nominal[0])
    chosen: tuple[int, int | None] = (0, None)
    ours = regrets.nominal
    for place, regret in enumerate(regrets.points):
        if not regret.shape[1]:
            continue
        worst, now = regret.max(axis=0), regret[0]
        point = int(np.lexsort((now, worst))[0])
        key = (float(worst[point]), float(now[point]))
        if key < best:
            best, chosen, ours = key, (place, point), regret[:, point]
    return Chosen(*chosen, summary=_summary(contenders, chosen, factors, regrets, ours))


def _summary(
    contenders: Sequence[Contender],
    chosen: tuple[int, int | None],
    factors: Mapping[str, Array],
    regrets: _Regrets,
    ours: Array,
) -> RobustChoice:
    """Both strategies side by side; `ours`: regrets of the robust one `[known scenarios]`."""
    count = len(next(iter(factors.values())))
    known, theirs = regrets.known, regrets.nominal
    before, after = (float(regrets.top[0] * (1.0 - one[0])) for one in (theirs, ours))
    bad, worst = int(np.argmax(theirs)), int(np.argmax(ours))
    place, point = chosen
    both = {"nominal": contenders[0].deployed(None), "robust": contenders[place].deployed(point)}
    strategies = {
        f"{which}_{name}": value
        for which, one in both.items()
        for name, value in one._asdict().items()
    }
    return RobustChoice(
        scenarios=int(known.size),
        left_out=count - int(known.size),
        nominal_objective=before,
        nominal_regret=float(theirs[bad]),
        nominal_breaks=int((theirs >= 1.0).sum()),
        nominal_worst=_words(factors, int(known[bad])),
        robust_objective=after,
        robust_regret=float(ours[worst]),
        robust_worst=_words(factors, int(known[worst])),
        given_up=max(1.0 - after / before, 0.0),
        **strategies,
    )
