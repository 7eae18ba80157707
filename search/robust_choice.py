"""The strategy of least worst-case regret under the calibration's error bands.

A scenario multiplies the time of every cost group by a factor: the prices as they are, each
group alone at either end of its band, and all corners of the bands together (2^groups).

    regret(x, s) = 1 - objective(x, s) / max over contenders' strategies y of objective(y, s)
    chosen       = the x of least max over s of regret(x, s), then of the larger nominal objective,
                   then of the contender that did better as prices are, then of less memory

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
from shardplan.search.contenders import Contender
from shardplan.search.kept import Kept
from shardplan.search.plan import StrategyInfo
from shardplan.search.plan_robustness import RobustChoice
from shardplan.search.robust import Bands
from shardplan.search.space import Space

__all__ = ["Chosen", "choose", "scenarios"]


class Chosen(NamedTuple):
    """The robust strategy and how it stands against the nominal winner."""

    contender: int
    kept: Kept
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


def _regrets(
    contenders: Sequence[Contender], factors: Mapping[str, Array]
) -> tuple[list[Array], NDArray[np.int64]]:
    """Of each contender the regret of every point `[feasible scenarios, points]`; those scenarios.

    The first of them are the prices as they are: a winner is feasible there.
    """
    objectives = [one.objectives(factors) for one in contenders]
    best = np.max([one.max(axis=1, initial=-np.inf) for one in objectives], axis=0)
    known = np.flatnonzero(best > -np.inf)
    top = best[known, None]
    return [1.0 - np.maximum(one[known], 0.0) / top for one in objectives], known


def choose(contenders: Sequence[Contender], bands: Bands, space: Space) -> Chosen:
    """The robust strategy among all points of the contenders; the first holds the winner."""
    factors = scenarios(bands)
    regrets, known = _regrets(contenders, factors)
    nominal = _kept_point(contenders[0])
    best: tuple[float, float] | None = None
    chosen = (0, nominal)
    for place, (one, regret) in enumerate(zip(contenders, regrets, strict=True)):
        if not one.batch.size:
            continue
        worst, now = regret.max(axis=0), -regret[0]
        point = int(np.lexsort((-now, worst))[0])
        key = (float(worst[point]), -float(now[point]))
        if best is None or key < best:
            best, chosen = key, (place, point)
    place, point = chosen
    kept = contenders[place].at(point)
    theirs, ours = regrets[0][:, nominal], regrets[place][:, point]
    return Chosen(
        contender=place,
        kept=kept,
        summary=_summary(contenders[0].kept, kept, space, factors, known, theirs, ours),
    )


def _kept_point(winner: Contender) -> int:
    kept = winner.kept
    return int(np.flatnonzero((winner.batch == kept.batch) & (winner.chunk == kept.chunk))[0])


def _summary(
    winner: Kept,
    robust: Kept,
    space: Space,
    factors: Mapping[str, Array],
    known: NDArray[np.int64],
    theirs: Array,
    ours: Array,
) -> RobustChoice:
    """Both strategies side by side; `theirs` and `ours`: regrets `[feasible scenarios]`."""
    count = len(next(iter(factors.values())))
    before, after = winner.columns["objective"], robust.columns["objective"]
    bad, worst = int(np.argmax(theirs)), int(np.argmax(ours))
    return RobustChoice(
        scenarios=int(known.size),
        left_out=count - int(known.size),
        nominal_strategy=_strategy(space, winner),
        nominal_objective=before,
        nominal_regret=float(theirs[bad]),
        nominal_breaks=int((theirs >= 1.0).sum()),
        nominal_worst=_words(factors, int(known[bad])),
        robust_strategy=_strategy(space, robust),
        robust_objective=after,
        robust_regret=float(ours[worst]),
        robust_worst=_words(factors, int(known[worst])),
        given_up=max(1.0 - after / before, 0.0),
    )


def _strategy(space: Space, kept: Kept) -> StrategyInfo:
    return space.strategy(kept.parallel, kept.choice, kept.batch, kept.chunk)
