"""Deployments of two tables of options: dominated ones left out, the others paired and counted."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shardplan.search.disagg_bounds import floor_of, most_later, most_of
from shardplan.search.disagg_combine import Combination, combine
from shardplan.search.disagg_counts import DisaggTally
from shardplan.search.disagg_dominance import Partners, undominated, worth_another_look
from shardplan.search.disagg_options import Options
from shardplan.search.disagg_question import DisaggQuestion

__all__ = ["Both", "Found", "Tables", "combined", "hoped"]

Tables = tuple[Options, Options]
"""Of the prefill and of the decode pool."""
Both = tuple[Partners, Partners]


@dataclass(frozen=True, slots=True)
class Found:
    """The deployments of some options."""

    options: Tables
    """Those that were paired."""
    kept: list[Combination] = field(default_factory=list)
    """Best first; feasible before infeasible."""
    tally: DisaggTally = field(default_factory=DisaggTally)
    unreached: float = -math.inf
    """The most that a pair can do which was not reached in time."""

    def worth(self, question: DisaggQuestion) -> float:
        """Of the best feasible one; -inf without any."""
        first = [one.worth(question.objective) for one in self.kept[:1] if one.feasible]
        return max(first, default=-math.inf)


def combined(question: DisaggQuestion, partners: Both, full: Tables, until_s: float) -> Found:
    """Deployments of the options that no other may take the place of.

    `until_s`: reading of `time.perf_counter` after which no other prefill option is paired.
    """
    if not all(one.size for one in full):
        return Found(full)
    first, second = (
        undominated(options, role, own)
        for options, role, own in zip(full, ("prefill", "decode"), partners, strict=True)
    )
    found = _paired(question, partners, (full[0].at(first), full[1].at(second)), until_s)
    best = found.kept[0] if found.kept else None
    again = (
        worth_another_look(question, full, "prefill", best),
        worth_another_look(question, (full[0].at(first), full[1]), "decode", best),
    )
    one, two = (
        np.union1d(own, np.flatnonzero(also))
        for own, also in zip((first, second), again, strict=True)
    )
    if (one.size, two.size) == (first.size, second.size):
        return found
    other = _paired(question, partners, (full[0].at(one), full[1].at(two)), until_s)
    if not other.tally.unreached.size:
        return other
    left = most_of(
        question,
        floor_of(full[0].at(one), "prefill"),
        floor_of(full[1].at(two), "decode"),
    )
    return Found(found.options, found.kept, found.tally, max(found.unreached, float(left)))


def _paired(question: DisaggQuestion, partners: Both, options: Tables, until_s: float) -> Found:
    """Deployments of all these options."""
    tally = DisaggTally()
    kept = combine(question, *options, _allowed(partners, options), tally, until_s)
    rest = floor_of(options[0].at(tally.unreached), "prefill")
    left = most_of(question, rest, floor_of(options[1], "decode"))
    return Found(options, kept, tally, float(left))


def _allowed(partners: Both, options: Tables) -> NDArray[np.bool_]:
    """Legal pairs of options."""
    rows, columns = (own.of(one) for own, one in zip(partners, options, strict=True))
    return np.asarray(partners[0].table[rows][:, columns])


def hoped(
    question: DisaggQuestion, partners: Both, found: Found, hopes: Tables, until_s: float
) -> float:
    """The most of deployments with an option that none is proven to be; -inf without any."""
    if not any(one.size for one in hopes):
        return -math.inf
    full = tuple(
        one.joined(hope) if one.size else hope
        for one, hope in zip(found.options, hopes, strict=True)
    )
    every = full[0], full[1]
    if time.perf_counter() <= until_s:
        other = combined(question, partners, every, until_s)
        if not other.tally.unreached.size:
            return max(
                other.worth(question), other.unreached, most_later(question, other.tally.late)
            )
    return float(most_of(question, floor_of(every[0], "prefill"), floor_of(every[1], "decode")))
