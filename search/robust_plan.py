"""What a search does about errors of its prices: a quick study always, the robust plan when asked.

search -> best -> quick flips                                  (every search)
search -> best -> full flips, least worst-case regret -> plan  (`--robust`)
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from shardplan.search.contenders import contenders_of
from shardplan.search.evaluate import Question
from shardplan.search.kept import Kept, Outcome
from shardplan.search.plan import Plan
from shardplan.search.plan_robustness import RobustChoice, Robustness
from shardplan.search.robust import FULL, QUICK, bands_of, robustness
from shardplan.search.robust_choice import choose

__all__ = ["Study", "study", "with_study"]

_TUNED = "slots and step size"


class Study(NamedTuple):
    """The strategy to deploy and how robust it is."""

    best: Kept
    robustness: Robustness


def study(question: Question, outcome: Outcome, *, robust: bool) -> Study:
    """The winner with its quick study, or the robust strategy with the full one.

    `outcome` has a best strategy.
    """
    depth = FULL if robust else QUICK
    found = contenders_of(question, outcome, depth.contenders)
    if not robust:
        return Study(found[0].kept, robustness(found, depth, found[0], _TUNED))
    while True:
        chosen = choose(found, bands_of(found))
        deployed = found[chosen.contender]
        if chosen.point is None:
            break
        best = deployed.at(chosen.point)
        if best.feasible:
            deployed = replace(deployed, kept=best)
            break
        found[chosen.contender] = deployed.without(np.array([chosen.point]))
    told = robustness(found, depth, deployed, _TUNED)
    return Study(deployed.kept, told.model_copy(update={"choice": chosen.summary}))


def with_study(plan: Plan, told: Robustness) -> Plan:
    """The plan with its robustness; the certificate of a robust one says what it gives up."""
    choice, proof = told.choice, plan.certificate
    if choice is None:
        return plan.model_copy(update={"robustness": told})
    if proof.bound is not None:
        own = choice.robust_objective
        proof = proof.model_copy(update={"gap": max(proof.bound / own - 1.0, 0.0)})
    return plan.model_copy(
        update={
            "robustness": told,
            "certificate": proof,
            "notes": (*plan.notes, _note(choice, told.contenders)),
        }
    )


def _note(choice: RobustChoice, others: int) -> str:
    counts = "" if choice.robust_prefill is None else ", and counts of instances,"
    return (
        f"robust: of all slots and step sizes{counts} of the best layout and the next {others}, "
        f"the strategy of least worst-case regret in {choice.scenarios} scenarios of the "
        f"calibration's bands ({choice.robust_regret:.1%}; the nominal best's is "
        f"{choice.nominal_regret:.1%}); it gives up {choice.given_up:.1%} of the nominal "
        f"objective, which the certificate's gap holds"
    )
