"""Candidates in stages: the best is found, most are given up early, and nothing is run twice."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from shardplan.search.staged import FACTOR, STEPS, race


@dataclass
class Runs:
    """A candidate whose value after each step is known."""

    values: tuple[float, ...]
    undecided: bool = False
    steps: list[int] = field(default_factory=list)
    dropped: bool = False

    def advance(self, step: int) -> float:
        """The value there; a run only goes on."""
        assert not self.dropped
        assert not self.steps or step > self.steps[-1]
        self.steps.append(step)
        return self.values[(*STEPS, STEPS[-1] * FACTOR).index(step)]

    def drop(self) -> None:
        """Nothing follows."""
        self.dropped = True


def steady(*values: float) -> list[Runs]:
    """Candidates whose values do not change."""
    return [Runs((value,) * (len(STEPS) + 1)) for value in values]


@pytest.mark.parametrize("rising", [False, True], ids=["falling", "rising"])
def test_the_best_of_many_costs_little_more_than_all_of_few(rising: bool) -> None:
    values = [float(value) for value in range(32, 0, -1)]
    some = steady(*(reversed(values) if rising else values))
    found = race(some)
    assert found.value == 32.0
    assert found.best == (31 if rising else 0)
    assert found.pruned == sum(one.steps[-1] < STEPS[-1] for one in some)
    assert sum(one.steps[-1] for one in some) <= 10 * STEPS[-1]
    assert all(one.dropped for one in some)


def test_of_equal_ones_the_first_wins() -> None:
    assert race(steady(2.0, 2.0, 2.0)).best == 0
    assert race(steady(-1.0)).best == 0


def test_one_that_was_given_up_is_taken_up_where_no_other_holds() -> None:
    """All that ran to the end missed a limit there; the best of the others goes on."""
    some = [Runs((9.0, 9.0, -0.2, -0.2)), *steady(3.0, 5.0)]
    found = race(some)
    assert (found.best, found.value, found.pruned) == (2, 5.0, 1)
    assert some[2].steps == [1, STEPS[-1]]
    assert some[1].steps == [1]


def test_one_that_missed_a_limit_is_not_taken_up() -> None:
    some = [Runs((9.0, 9.0, -0.2, -0.2)), *steady(-0.1)]
    assert race(some).best == 0
    assert some[1].steps == [1]


def test_a_percentile_near_its_limit_is_looked_at_for_longer() -> None:
    one = Runs((1.0, 1.0, 1.0, -0.1), undecided=True)
    found = race([one])
    assert found.value == -0.1
    assert one.steps == [*STEPS, STEPS[-1] * FACTOR]
