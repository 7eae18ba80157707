"""Random arrivals: chains of two states, M/D/1 and Erlang's queue are met exactly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import pdtr

from shardplan.costmodel import arrivals as arrivals_module
from shardplan.costmodel.arrivals import Arrivals, waits
from shardplan.costmodel.first_token import closed_values, open_values, percentiles
from shardplan.costmodel.occupancy import Occupancy, occupancy

NEVER = Occupancy(np.zeros(1), np.zeros(1), np.zeros(1))


def arrivals(**changes: Any) -> Arrivals:
    """One group: decode steps of 20 ms, prompts of 80 ms, others beside them for nothing."""
    usual = {
        "rate": 2.0,
        "groups": 1.0,
        "decode_s": 0.02,
        "first_s": 0.08,
        "more_s": 0.0,
        "at_once": 100.0,
        "steps": 1.0,
        "rest_s": 0.0,
    }
    first = bool(changes.pop("prompts_first", False))
    arrays = {name: np.array([value]) for name, value in (usual | changes).items()}
    return Arrivals(**arrays, prompts_first=first)


@given(rate=st.floats(0.1, 60.0), mixed=st.floats(0.03, 0.5))
def test_steps_with_and_without_prompts_by_hand(rate: float, mixed: float) -> None:
    """Share with prompts h = a / (a + exp(-l mixed)), a = 1 - exp(-l decode)."""
    state = waits(arrivals(rate=rate, first_s=mixed))
    a = 1.0 - math.exp(-rate * 0.02)
    share = a / (a + math.exp(-rate * mixed))
    assert state.share.sum() == pytest.approx(1.0)
    assert 1.0 - state.share[0, 0] == pytest.approx(share, rel=1e-6)
    assert state.step_s[0] == pytest.approx(share * mixed + (1.0 - share) * 0.02, rel=1e-6)


@given(mean=st.floats(1e-6, 300.0), groups=st.sampled_from([1.0, 2.0, 2.5, 7.0, 64.0]))
def test_sums_of_terms_are_poissons_distribution(mean: float, groups: float) -> None:
    """Up to so many of each group."""
    found = arrivals_module._upto(np.full((1, 4), mean), np.array([groups]))[0, 0]
    exact = pdtr(np.floor(np.arange(4.0) * groups), mean)
    assert found == pytest.approx(exact, rel=1e-9, abs=1e-15)


@given(rate=st.floats(0.1, 60.0), at_once=st.sampled_from([1.0, 2.0, 100.0]))
def test_few_states_are_all_where_the_others_are_not_met(rate: float, at_once: float) -> None:
    """Solved over the first of them or over all."""
    one = arrivals(rate=rate, at_once=at_once)
    few = waits(one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrivals_module, "_FEW", arrivals_module.STATES)
        whole = waits(one)
    assert few.share == pytest.approx(whole.share, abs=1e-10)
    assert few.step_s == pytest.approx(whole.step_s, rel=1e-9)


@given(rate=st.floats(0.1, 60.0))
def test_where_prompts_go_first_tokens_wait_for_them(rate: float) -> None:
    """Seconds of all steps over those that decode."""
    state = waits(arrivals(rate=rate, prompts_first=True))
    share = 1.0 - state.share[0, 0]
    assert state.step_s[0] == pytest.approx(0.02 + share / (1.0 - share) * 0.08, rel=1e-6)


@pytest.mark.parametrize("load", [0.1, 0.4, 0.7])
def test_one_prompt_a_step_and_nothing_else_is_a_queue_of_one_server(load: float) -> None:
    """M/D/1: mean wait rho s / (2 (1 - rho))."""
    one = arrivals(rate=load / 0.08, at_once=1.0, decode_s=1e-6)
    found = open_values(one, waits(one), NEVER, np.zeros(1))
    assert found.weights.sum() == pytest.approx(1.0)
    wait = load * 0.08 / (2.0 * (1.0 - load))
    assert found.mean[0] == pytest.approx(0.08 + wait, rel=0.02)


def test_a_request_at_random_waits_for_half_a_step() -> None:
    """Few prompts among decode steps of 20 ms."""
    one = arrivals(rate=1e-3)
    found = open_values(one, waits(one), NEVER, np.zeros(1))
    assert found.mean[0] == pytest.approx(0.09, rel=1e-3)
    p50, p90, p99 = (float(value[0]) for value in percentiles(found))
    assert 0.085 < p50 < 0.095 < p90 < p99 <= 0.1


def test_alone_it_waits_for_nothing() -> None:
    one = arrivals()
    found = open_values(one, waits(one), NEVER, np.ones(1))
    assert found.mean[0] == pytest.approx(0.08)


@pytest.mark.parametrize(("slots", "load"), [(1, 0.5), (8, 0.7), (64, 0.9)])
def test_slots_whose_speed_does_not_depend_on_one_another_are_erlangs(
    slots: int, load: float
) -> None:
    """M/M/S: the share that waits is Erlang's C."""
    offered = load * slots
    terms = [offered**n / math.factorial(n) for n in range(slots)]
    last = offered**slots / math.factorial(slots) / (1.0 - load)
    numbers = (offered, float(slots), float(slots), offered)
    found = occupancy(*(np.array([one]) for one in numbers))
    assert found.waiting[0] == pytest.approx(last / (sum(terms) + last), rel=1e-6)
    assert found.variance[0] == pytest.approx(offered, rel=1e-6)
    assert found.wait_s[0] == pytest.approx(0.5 / (slots - offered))


def test_in_a_closed_loop_it_shares_its_step_with_others_that_ended() -> None:
    """Others are Poisson: none of 1 % more than half, so the 99th percentile has one beside it."""
    one = arrivals(more_s=0.05)
    found = closed_values(one, np.array([0.1]), np.array([64.0]), np.array([0.0]))
    p50, _, p99 = (float(value[0]) for value in percentiles(found))
    assert p50 == pytest.approx(0.08)
    assert 0.12 < p99 <= 0.13


def test_other_groups_hold_up_the_step_too() -> None:
    """The fullest of eight groups."""
    alone, many = (
        closed_values(arrivals(more_s=0.05, groups=groups), np.full(1, 0.1), np.full(1, 64.0), zero)
        for groups, zero in ((1.0, np.zeros(1)), (8.0, np.zeros(1)))
    )
    assert many.mean > alone.mean
    assert np.all(many.seconds == alone.seconds)
