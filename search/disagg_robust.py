"""Robustness of a deployment of pools: `robust` and `robust_choice` over pairs of instances."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.search.disagg import DisaggOutcome
from shardplan.search.disagg_combine import Combination, described
from shardplan.search.disagg_contenders import PairContender, Side, pair_contenders
from shardplan.search.disagg_options import Options, Priced
from shardplan.search.plan_robustness import Robustness
from shardplan.search.robust import FULL, QUICK, bands_of, robustness
from shardplan.search.robust_choice import choose

__all__ = ["PoolsStudy", "study_pools"]

_TUNED = "slots, step size and counts of instances"


class PoolsStudy(NamedTuple):
    """The deployment to plan and how robust it is."""

    best: Combination
    robustness: Robustness


def study_pools(outcome: DisaggOutcome, *, robust: bool) -> PoolsStudy:
    """The winner with its quick study, or the robust deployment with the full one.

    `outcome` has a best deployment; the options of a robust one that the search dropped as
    dominated are added to its tables.
    """
    depth = FULL if robust else QUICK
    found = pair_contenders(outcome, depth.contenders)
    if not robust:
        return PoolsStudy(found[0].kept, robustness(found, depth, found[0], _TUNED))
    chosen = choose(found, bands_of(found))
    deployed = found[chosen.contender]
    if chosen.point is not None:
        deployed = deployed.moved(*_added(outcome, deployed, chosen.point))
    told = robustness(found, depth, deployed, _TUNED)
    return PoolsStudy(deployed.kept, told.model_copy(update={"choice": chosen.summary}))


def _added(
    outcome: DisaggOutcome, contender: PairContender, point: int
) -> tuple[tuple[int, int], Combination]:
    """(places on the grids, the deployment) of a point, its options at the ends of the tables."""
    places, x, y = contender.place_of(point)
    for priced, side, place in zip(
        (outcome.prefill, outcome.decode),
        (contender.prefill, contender.decode),
        places,
        strict=True,
    ):
        _append(priced, side, place)
    options = outcome.prefill.options, outcome.decode.options
    last = options[0].size - 1, options[1].size - 1
    return places, described(outcome.question, options, last, (x, y))


def _append(priced: Priced, side: Side, place: int) -> None:
    options: Options = priced.options
    which: NDArray[np.int64] = np.array([side.option])
    one = options.at(which)
    size = len(side.pool.grid)
    for name in one.columns:
        if name in side.columns:
            one.columns[name] = np.broadcast_to(side.columns[name], size)[[place]]
    priced.options = options.joined(one)
