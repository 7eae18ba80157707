"""Shares of lengths up to a bound against what is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from shardplan.costmodel.simulate.lengths import Fixed, Histogram, Lengths, read_lengths

BOUNDS = np.array([0, 1, 2, 50, 100, 399, 400, 1000, 5999, 6000, 10**7])


@pytest.mark.parametrize(
    "value",
    [
        512,
        {"mean": 900, "cv": 1.0, "max": 6000},
        {"mean": 900, "cv": 0.2, "min": 400, "max": 1000},
        {"edges": [1, 100, 400, 800], "weights": [2, 3, 1]},
        {"edges": [5, 6], "weights": [1]},
    ],
)
def test_shares_are_those_of_draws(value: object) -> None:
    """100,000 draws: a share is off by at most four deviations of its mean, 0.65 %."""
    lengths: Lengths = read_lengths("input_len", value)
    drawn = lengths.draw(np.random.default_rng(1), 100_000)
    counted = (drawn[:, None] <= BOUNDS[None, :]).mean(axis=0)
    assert np.abs(lengths.below(BOUNDS) - counted).max() < 0.0065
    assert lengths.below(BOUNDS)[-1] == 1.0


def test_shares_by_hand() -> None:
    """A fixed length is all or nothing; a bin of 1 to 4 holds half its weight up to 2."""
    assert Fixed(7).below(np.array([6, 7])).tolist() == [0.0, 1.0]
    assert Histogram((1, 5, 9), (1.0, 1.0)).below(np.array([0, 2, 4, 8])).tolist() == [
        0.0,
        0.25,
        0.5,
        1.0,
    ]
