"""Percentiles of TTFT of pools: a queue of prompts simulated, limits met exactly, slots."""

from __future__ import annotations

import heapq
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.disagg import Demand, Pools, serve_pools
from shardplan.costmodel.disagg_tail import (
    Queue,
    most_in_slots,
    most_rate,
    slots_for,
    ttft_beyond_s,
    wait_s,
)

COUNTS = st.integers(1, 60)
SHARES = st.floats(0.05, 0.98)


def _queue(instances: int, prompts: int) -> Queue:
    """Steps of 0.2 s that take so many prompts at once."""
    return Queue(
        np.asarray(float(instances)), np.asarray(instances * prompts / 0.2), np.asarray(0.2)
    )


def _simulated(instances: int, used: float) -> float:
    """99th percentile of the wait of 200,000 prompts that come at random, a step each."""
    luck, free, now = random.Random(7), [0.0] * instances, 0.0
    waits = []
    for _ in range(200_000):
        now += luck.expovariate(used * instances / 0.2)
        start = max(heapq.heappop(free), now)
        heapq.heappush(free, start + 0.2)
        waits.append(start - now)
    return float(np.percentile(waits, 99))


@pytest.mark.parametrize("instances", [1, 2, 4, 16])
@pytest.mark.parametrize("used", [0.6, 0.85, 0.95])
def test_the_wait_is_that_of_a_simulated_queue(instances: int, used: float) -> None:
    """Within a fifth of the wait, and a tenth of a step."""
    told = float(wait_s(_queue(instances, 1), np.asarray(used * instances / 0.2)))
    assert told == pytest.approx(_simulated(instances, used), rel=0.2, abs=0.02)


@given(COUNTS, st.integers(1, 8), st.floats(0.001, 30.0))
def test_the_most_requests_just_keep_the_limit(instances: int, prompts: int, left: float) -> None:
    queue, step, first = _queue(instances, prompts), np.asarray(0.05), np.asarray(0.4)
    rate = most_rate(queue, np.asarray(left), step)
    if left < 0.99 * 0.05:
        assert rate == 0.0
        return
    for share, keeps in ((1.0 - 1e-6, True), (1.0 + 1e-6, False)):
        late = ttft_beyond_s(first, step, wait_s(queue, rate * share))
        assert bool(late <= first + left) == keeps or late == pytest.approx(first + left)


@given(COUNTS, st.integers(1, 8), SHARES, st.floats(1.0, 3.0))
def test_what_is_better_waits_no_longer(
    instances: int, prompts: int, used: float, better: float
) -> None:
    """More instances, more prompts a step, shorter steps."""
    queue = _queue(instances, prompts)
    rate = used * queue.prompts_per_s
    wait = float(wait_s(queue, rate))
    for other in (
        _queue(instances + 1, prompts),
        _queue(instances, prompts + 1),
        Queue(queue.instances, queue.prompts_per_s * better, queue.busy_s / better),
    ):
        assert float(wait_s(other, rate)) <= wait * (1.0 + 1e-9)


@given(st.floats(1e-3, 1e6))
def test_slots_and_those_in_flight_are_inverse(slots: float) -> None:
    assert float(slots_for(most_in_slots(np.asarray(slots)))) == pytest.approx(slots, rel=1e-6)


def _pools(**changes: float) -> Pools:
    """Two instances that compute 5 prompts a second each; 1000 slots."""
    values = {
        "prefill_instances": 2.0,
        "prefill_per_s": 10.0,
        "busy_s": 0.2,
        "service_s": 0.2,
        "decode_per_s": 100.0,
        "step_s": 0.05,
        "later_s": 9.95,
        "transfer_s": 0.01,
        "transfer_per_s": 1000.0,
        **changes,
    }
    return Pools(**{name: np.asarray(value) for name, value in values.items()})


def test_a_limit_on_the_percentile_bounds_the_rate() -> None:
    found = serve_pools(_pools(), Demand(ttft_p99_s=1.0))
    assert found.ttft_p99_s is not None
    assert float(found.ttft_p99_s) == pytest.approx(1.0)
    assert float(found.ttft_s) < 1.0
    tighter = serve_pools(_pools(), Demand(ttft_p99_s=0.6))
    assert 0.0 < float(tighter.requests_per_s) < float(found.requests_per_s)
    assert float(serve_pools(_pools(), Demand(ttft_p99_s=0.3)).requests_per_s) == 0.0


def test_slots_are_left_free_for_requests_that_come_at_random() -> None:
    """100 slots: 79 in flight, of which 99 of 100 requests find one free."""
    found = serve_pools(_pools(decode_per_s=10.0, prefill_per_s=1e6), Demand(ttft_p99_s=10.0))
    in_flight = float(found.requests_per_s) * 10.0
    assert in_flight + 2.326 * math.sqrt(in_flight) == pytest.approx(100.0)


def test_one_in_flight_waits_for_nobody() -> None:
    """It decodes within a step of its cache: none runs, but 99 of 100 are said to wait for one."""
    found = serve_pools(_pools(), Demand(in_flight=1.0, ttft_p99_s=10.0))
    assert found.ttft_p99_s is not None
    assert float(found.ttft_p99_s) == pytest.approx(float(found.ttft_s) + 0.99 * 0.05)
