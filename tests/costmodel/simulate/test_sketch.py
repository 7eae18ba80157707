"""Figures in bounded memory: percentiles against numpy, and a course against its integral."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shardplan.costmodel.simulate.record import Limits, Mark, saturation
from shardplan.costmodel.simulate.sketch import Course, Spread


def test_percentiles_are_within_a_cell_of_the_value_of_their_rank() -> None:
    luck = np.random.default_rng(3)
    values = np.concatenate([luck.lognormal(0.0, 2.0, 5000), np.zeros(40)])
    one = Spread()
    for value in values.tolist():
        one.add(value)
    for share in (0.001, 0.5, 0.9, 0.99, 1.0):
        told = float(np.percentile(values, share * 100, method="inverted_cdf"))
        assert one.percentile(share) == pytest.approx(told, rel=5.1e-4, abs=1e-12)
    assert one.mean == pytest.approx(values.mean())
    assert one.variation == pytest.approx(values.std() / values.mean())
    assert (one.least, one.most) == (0.0, values.max())


def test_nothing_has_no_figures() -> None:
    assert all(math.isnan(one) for one in Spread().figures().values())
    assert Course().means() == []


def test_a_course_keeps_its_integral_as_its_cells_widen() -> None:
    course, luck = Course(), np.random.default_rng(1)
    now = total = 0.0
    for _ in range(5000):
        span, value = float(luck.exponential(0.05)), float(luck.random())
        course.add(now, now + span, value)
        now += span
        total += span * value
    cells = course.means()
    assert len(cells) <= 1024
    widths = [min(course.width_s, now - begin) for begin, _ in cells]
    found = sum(mean * width for (_, mean), width in zip(cells, widths, strict=True))
    assert found == pytest.approx(total)


def test_a_queue_that_grows_is_saturation() -> None:
    """Ten come and six are served a second."""
    marks = [Mark(float(t), 10 * t, 6 * t, 4 * t) for t in range(1, 400)]
    found = saturation(marks)
    assert found is not None
    assert found["served_requests_per_s"] == pytest.approx(6.0)
    assert found["offered_requests_per_s"] == pytest.approx(10.0)
    assert saturation([one._replace(waiting=20) for one in marks]) is None
    assert saturation([]) is None


def test_bursts_let_a_queue_grow_by_chance() -> None:
    """Two hundred of two thousand wait: too many of random arrivals, not of uneven ones."""
    marks = [Mark(float(t), 10 * t, 9 * t, t) for t in range(1, 401)]
    assert saturation(marks) is not None
    assert saturation(marks, uneven=10.0) is None


def test_limits_are_upper_ones() -> None:
    assert Limits().meets(1e9, 1e9)
    assert Limits(1.0, 0.05).meets(1.0, 0.05)
    assert not Limits(1.0, 0.05).meets(1.1, 0.01)
    assert not Limits(None, 0.05).meets(0.1, 0.06)
