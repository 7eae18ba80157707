"""What a run is worth: limits first, then the objective."""

from __future__ import annotations

from typing import Any

import pytest

from shardplan.search.plan import Limits, Workload
from shardplan.search.plan_refinement import SimulatedRun
from shardplan.search.runner import Aim

WORK = Workload(input_len=256, output_len=64)
RUN: dict[str, Any] = {
    "requests": 100,
    "ttft_s": 0.2,
    "ttft_p99_s": 1.0,
    "tpot_s": 0.02,
    "tpot_p99_s": 0.05,
    "end_to_end_s": 2.0,
    "output_tokens_per_s": 500.0,
    "waiting": 0.0,
}


@pytest.mark.parametrize(
    ("limits", "missed"),
    [
        ({}, 0.0),
        ({"ttft_s": 0.2, "tpot_p99_s": 0.05}, 0.0),
        ({"ttft_s": 0.1}, 0.5),
        ({"ttft_p99_s": 0.5, "tpot_s": 0.015}, 0.75),
    ],
)
def test_every_limit_that_is_missed_counts(limits: dict[str, float], missed: float) -> None:
    aim = Aim(Limits(**limits), "throughput", WORK)
    assert aim.missed(SimulatedRun(**RUN)) == pytest.approx(missed)
    grows = SimulatedRun(**{**RUN, "waiting": 0.3})
    assert aim.missed(grows) == pytest.approx(missed + 0.3)


def test_a_percentile_within_a_tenth_of_its_limit_is_near() -> None:
    run = SimulatedRun(**RUN)
    assert Aim(Limits(ttft_p99_s=1.05), "throughput", WORK).near(run)
    assert Aim(Limits(tpot_p99_s=0.048), "throughput", WORK).near(run)
    assert not Aim(Limits(ttft_p99_s=1.5, ttft_s=0.2), "throughput", WORK).near(run)
