"""Percentiles of TTFT of pools: a queue of prompts simulated, limits met exactly, slots."""

from __future__ import annotations

import heapq
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.disagg_queue import Queue, filled, waits_in
from shardplan.costmodel.disagg_serve import Demand, Pools, serve_pools
from shardplan.costmodel.disagg_tail import most_in_slots, slots_for
from shardplan.costmodel.kernels.base import Array

COUNTS = st.integers(1, 60)
SHARES = st.floats(0.05, 0.98)


def _queue(instances: int, prompts: int) -> Queue:
    """Steps of 0.2 s that take so many prompts at once, of 0.1 s with one."""
    return _of(instances, prompts, 0.2)


def _of(instances: int, prompts: int, step_s: float) -> Queue:
    one_s = step_s if prompts == 1 else step_s / 2.0
    count, most = float(instances), instances * prompts / step_s
    return Queue.of(*(np.asarray(one) for one in (count, most, step_s, one_s, float(prompts))))


def mean_wait_s(queue: Queue, rate: Array) -> Array:
    """In steps as full as prompts come."""
    return np.minimum(*waits_in(queue, rate, filled(queue, rate).step_s))


def _late(queue: Queue, rate: Array) -> tuple[float, float]:
    busy_s = queue.one_s + (queue.prompts - 1.0) * queue.more_s
    one, full = waits_in(queue, rate, busy_s, 0.01)
    return float(one), float(full)


def _simulated(instances: int, used: float) -> tuple[float, float]:
    """Mean and 99th percentile of the wait of 200,000 random prompts, a step each."""
    luck, free, now = random.Random(7), [0.0] * instances, 0.0
    waits = []
    for _ in range(200_000):
        now += luck.expovariate(used * instances / 0.2)
        start = max(heapq.heappop(free), now)
        heapq.heappush(free, start + 0.2)
        waits.append(start - now)
    return float(np.mean(waits)), float(np.percentile(waits, 99))


@pytest.mark.parametrize("instances", [1, 2, 4, 16])
@pytest.mark.parametrize("used", [0.6, 0.85, 0.95])
def test_the_wait_is_that_of_a_simulated_queue(instances: int, used: float) -> None:
    """Within a fifth of the wait, and a tenth of a step."""
    queue, rate = _queue(instances, 1), np.asarray(used * instances / 0.2)
    mean, late = _simulated(instances, used)
    assert float(waits_in(queue, rate, np.asarray(0.2), 0.01)[0]) == pytest.approx(
        late, rel=0.2, abs=0.02
    )
    assert float(mean_wait_s(queue, rate)) == pytest.approx(mean, rel=0.2, abs=0.02)


@given(COUNTS, st.integers(1, 8), SHARES, st.floats(1.0, 3.0))
def test_what_is_better_waits_no_longer(
    instances: int, prompts: int, used: float, better: float
) -> None:
    """More instances, shorter steps."""
    queue = _queue(instances, prompts)
    rate = used * queue.prompts_per_s
    for other in (_queue(instances + 1, prompts), _of(instances, prompts, 0.2 / better)):
        assert float(mean_wait_s(other, rate)) <= float(mean_wait_s(queue, rate)) * (1.0 + 1e-9)
        for late, before in zip(_late(other, rate), _late(queue, rate), strict=True):
            assert late <= before * (1.0 + 1e-9)


@given(st.floats(1e-3, 1e6))
def test_slots_and_those_in_flight_are_inverse(slots: float) -> None:
    assert float(slots_for(most_in_slots(np.asarray(slots)))) == pytest.approx(slots, rel=1e-6)


def _pools(**changes: float) -> Pools:
    """Two instances that compute 5 prompts a second each; 1000 slots."""
    values = {
        "prefill_instances": 2.0,
        "prefill_per_s": 10.0,
        "busy_s": 0.2,
        "one_s": 0.2,
        "prompts": 1.0,
        "service_s": 0.2,
        "decode_per_s": 100.0,
        "step_s": 0.05,
        "later_s": 9.95,
        "setup_s": 0.002,
        "sent_s": 0.008,
        "received_s": 0.008,
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
