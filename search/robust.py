"""How wrong the prices of a cost group may be before another strategy wins, and which one.

For a group g and a factor f on its time in both phases, contenders c (layout and choice), points p
of their grids (slots, step size):

    best_c(f)  = max over p that meet the limits at f of objective(c, p, f)
    flip of g  = the f nearest to 1, up or down, at which max over others best_c(f) > best_winner(f)

Everything is priced again through the serving model (`contenders`), winner and others tuned again
alike. Factors from 1/2 to 2 are scanned on a logarithmic grid; between the last one that does not
flip and the first that does, the change is narrowed down. A flip and flip back between two
neighbouring factors of the grid is not seen.

`QUICK` runs with every search: few contenders and factors, and only those that overtook the winner
at a bracket's end are narrowed down. `FULL` runs with `--robust`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.confidence import level
from shardplan.costmodel.cost_groups import COST_GROUPS, TRANSFER
from shardplan.costmodel.kernels.base import Array
from shardplan.search.contender import Answers, Contender
from shardplan.search.plan_robustness import Flip, GroupRobustness, Robustness

__all__ = ["FULL", "QUICK", "Depth", "bands_of", "flips", "robustness"]

MOST_FACTOR = 2.0
_NARROW = 8
"""Factors tried between the ends of a bracket."""
_OWN_STEPS = 64
"""Factors tried of the plan as it stands, and again between two of them."""
ALL_GROUPS = (*COST_GROUPS, TRANSFER)


class Depth(NamedTuple):
    """How much is priced."""

    contenders: int
    """Other layouts and choices, the best ones."""
    scan: int
    """Factors of the grid in each direction."""
    narrowings: int
    narrow_all: bool
    """Narrow down with all contenders, not only those that overtook."""

    @property
    def resolution(self) -> float:
        """Relative width of the last bracket."""
        width = math.log(MOST_FACTOR) / self.scan / (_NARROW + 1.0) ** self.narrowings
        return math.expm1(width)


QUICK = Depth(contenders=3, scan=4, narrowings=2, narrow_all=False)
FULL = Depth(contenders=16, scan=16, narrowings=3, narrow_all=True)


def bands_of(contenders: Sequence[Contender]) -> dict[str, tuple[float, float]]:
    """The band of each cost group: of the winner, or of the first that spends time in it."""
    found: dict[str, tuple[float, float]] = {}
    for one in contenders:
        if one.groups - {*found}:
            found = {**one.bands(), **found}
    return {group: found[group] for group in ALL_GROUPS if group in found}


def robustness(
    contenders: Sequence[Contender], depth: Depth, plan: Contender, tuned: str
) -> Robustness:
    """The flips of every cost group; the first of `contenders` is the winner.

    `plan`: the strategy that is deployed, whose shares and limits are told; most often the winner.
    `tuned`: what of a contender is tuned again at every factor, in words.
    """
    bands = bands_of(contenders)
    used = set[str]().union(*(one.groups for one in contenders))
    groups = [group for group in ALL_GROUPS if group in used]
    own = _own(plan, groups)
    rows = []
    for group in groups:
        band = bands.get(group)
        slower, faster = flips(contenders, group, depth, band)
        rows.append(
            GroupRobustness(
                group=group,
                share=own[group].share,
                band_low=None if band is None else band[0],
                band_high=None if band is None else band[1],
                slower=slower,
                faster=faster,
                limit_factor=own[group].limit_factor,
                limit=own[group].limit,
            )
        )
    return Robustness(
        method=_method(len(contenders) - 1, depth, tuned),
        contenders=len(contenders) - 1,
        most_factor=MOST_FACTOR,
        resolution=depth.resolution,
        level=level(),
        groups=tuple(rows),
    )


def _method(others: int, depth: Depth, tuned: str) -> str:
    return (
        f"each cost group's time times {1.0 / MOST_FACTOR:g} to {MOST_FACTOR:g} in both phases, "
        f"{depth.scan} factors a direction, then narrowed to {depth.resolution:.2%}; the layout "
        f"that is best and the next {others}, {tuned} of each tuned again"
    )


class _Ahead(NamedTuple):
    """Who is ahead at each factor."""

    winner: Array
    best: Array
    """Of the others."""
    who: NDArray[np.int64]
    """Index into the contenders."""
    point: NDArray[np.int64]

    @property
    def lost(self) -> NDArray[np.bool_]:
        """Where another one than the winner is."""
        return np.asarray(self.best > self.winner)

    def some(self, places: slice) -> _Ahead:
        """At some of the factors."""
        return _Ahead(self.winner[places], self.best[places], self.who[places], self.point[places])


def _compare(contenders: Sequence[Contender], group: str, steps: Array) -> _Ahead:
    """At the factors whose logarithms are `steps`."""
    tuned = [one.tuned({group: np.exp(steps)}) for one in contenders]
    objective = np.stack([one.objective for one in tuned])
    points = np.stack([one.point for one in tuned])
    who, at = 1 + np.argmax(objective[1:], axis=0), np.arange(steps.size)
    return _Ahead(objective[0], objective[who, at], who, points[who, at])


def flips(
    contenders: Sequence[Contender],
    group: str,
    depth: Depth,
    band: tuple[float, float] | None,
) -> tuple[Flip | None, Flip | None]:
    """The changes nearest to none, slower and faster, at which another strategy wins."""
    if len(contenders) == 1:
        return None, None
    steps = np.linspace(0.0, math.log(MOST_FACTOR), depth.scan + 1)[1:]
    found = _compare(contenders, group, np.concatenate([steps, -steps]))
    return (
        _narrowed(contenders, group, depth, band, steps, found.some(slice(depth.scan))),
        _narrowed(contenders, group, depth, band, -steps, found.some(slice(depth.scan, None))),
    )


def _narrowed(
    contenders: Sequence[Contender],
    group: str,
    depth: Depth,
    band: tuple[float, float] | None,
    steps: Array,
    found: _Ahead,
) -> Flip | None:
    """The first flip of a scan in one direction, its bracket narrowed down."""
    if not found.lost.any():
        return None
    first, near = int(np.argmax(found.lost)), 0.0
    among = contenders if depth.narrow_all else [contenders[0], contenders[int(found.who[first])]]
    for _ in range(depth.narrowings):
        near = float(steps[first - 1]) if first else near
        steps = np.linspace(near, float(steps[first]), _NARROW + 2)[1:]
        found = _compare(among, group, steps)
        first = int(np.argmax(found.lost))
    factor, plan = math.exp(steps[first]), float(found.winner[first])
    runner, point = among[int(found.who[first])], int(found.point[first])
    return Flip(
        factor=factor,
        within_band=None if band is None else band[0] <= factor <= band[1],
        **runner.deployed(point)._asdict(),
        objective=float(found.best[first]),
        plan_objective=plan if math.isfinite(plan) else None,
    )


class _Own(NamedTuple):
    """How the plan as it stands answers to the time of one group."""

    share: float
    limit_factor: float | None
    limit: str


def _own(plan: Contender, groups: Sequence[str]) -> dict[str, _Own]:
    """Of each group its share of the time, and how much slower it may be before a limit breaks."""
    rows, none = np.arange(len(groups)), np.full(len(groups), -1)
    near, far = np.zeros(len(groups)), np.full(len(groups), math.log(MOST_FACTOR))
    shares, limit = np.zeros(len(groups)), none
    now_s = plan.answers({group: np.ones(1) for group in groups}).seconds[0]
    for narrowing in range(2):
        steps = np.linspace(near, far, _OWN_STEPS + 1, axis=1)[:, 1:]
        found, seconds = _answers(plan, groups, steps)
        if narrowing == 0:
            shares = (seconds[:, 0] / now_s - 1.0) / np.expm1(steps[:, 0])
        first = np.argmax(found >= 0, axis=1)
        hit = found[rows, first] >= 0
        near = np.where(hit & (first > 0), steps[rows, first - 1], near)
        far = np.where(hit, steps[rows, first], far)
        limit = np.where(hit, found[rows, first], none)
    return {
        group: _Own(
            share=max(float(shares[at]), 0.0),
            limit_factor=math.exp(far[at]) if limit[at] >= 0 else None,
            limit=plan.limits[int(limit[at])] if limit[at] >= 0 else "",
        )
        for at, group in enumerate(groups)
    }


def _answers(plan: Contender, groups: Sequence[str], steps: Array) -> Answers:
    """At steps `[groups, steps]` of one group each."""
    count, each = steps.shape
    factors = {group: np.ones(count * each) for group in groups}
    for at, group in enumerate(groups):
        factors[group][at * each : (at + 1) * each] = np.exp(steps[at])
    limit, seconds = plan.answers(factors)
    return Answers(limit.reshape(count, each), np.reshape(seconds, (count, each)))
