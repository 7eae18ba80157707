"""Candidates simulated in stages, as trials of an Optuna study whose pruner gives most up early.

    a trial = a candidate: the steady state's first, the one in the middle, those in the quarters
    after step 1, 4, 16 (and 64 where a percentile is near its limit): report -> prune or go on

A trial goes on, from where its simulation is, if it stands among the best quarter of those that
came as far, or is the best of the first few (asynchronous successive halving): most of N candidates
cost their first step alone. In the order of the steady state, where each may be better than all
before it, none would be given up; so halves, quarters and so on come in turn. Where none that ran
to its end holds, those that were given up while they did go on, the best first, until one does.
Nothing is random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from shardplan.search.storage import quiet_optuna

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

__all__ = ["FACTOR", "STEPS", "Race", "Racer", "race"]

FACTOR = 4
"""Of each step over the one before; one of so many goes on."""
STEPS = (1, 4, 16)
_NAME = "candidate"


class Racer(Protocol):
    """A candidate, as far as it was simulated."""

    @property
    def undecided(self) -> bool:
        """Whether a further step may change whether it holds."""

    def advance(self, step: int) -> float:
        """Go on to a step; its value, above 0 where it holds, the larger the better."""

    def drop(self) -> None:
        """It will not go on: give up what that takes."""


class Race(NamedTuple):
    """How it ended."""

    best: int
    value: float
    pruned: int
    """Candidates that were given up and not taken up again."""


def race(racers: Sequence[Racer]) -> Race:
    """The candidate of the largest value; of equal ones the first."""
    import optuna

    pruned: dict[int, float] = {}
    ended: dict[int, float] = {}
    with quiet_optuna():
        study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.RandomSampler(seed=0),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=FACTOR),
        )
        which: dict[str, BaseDistribution] = {
            _NAME: optuna.distributions.IntDistribution(0, len(racers) - 1)
        }
        for number in _order(len(racers)):
            one = racers[number]
            study.enqueue_trial({_NAME: number})
            trial = study.ask(which)
            value, given_up = _run(one, trial)
            if given_up:
                pruned[number] = value
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                ended[number] = value
                study.tell(trial, value)
            if given_up and (value <= 0.0 or max(ended.values()) > 0.0):
                one.drop()
    for number in sorted(pruned, key=lambda at: -pruned[at]):
        if pruned[number] > 0.0 >= max(ended.values()):
            ended[number] = _to_the_end(racers[number])
        racers[number].drop()
    best = max(ended, key=lambda at: (ended[at], -at))
    return Race(best, ended[best], len(racers) - len(ended))


def _order(count: int) -> list[int]:
    """Numbers below `count`: by their binary digits from the last to the first."""
    digits = max(count - 1, 1).bit_length()
    return sorted(range(count), key=lambda number: f"{number:0{digits}b}"[::-1])


def _run(one: Racer, trial: Trial) -> tuple[float, bool]:
    """(the value so far, whether the pruner gave it up)."""
    for step in STEPS[:-1]:
        value = one.advance(step)
        trial.report(value, step)
        if trial.should_prune():
            return value, True
    return _to_the_end(one), False


def _to_the_end(one: Racer) -> float:
    value = one.advance(STEPS[-1])
    if one.undecided:
        value = one.advance(STEPS[-1] * FACTOR)
    one.drop()
    return value
