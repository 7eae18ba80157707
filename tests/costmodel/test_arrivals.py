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
from shardplan.costmodel.arrivals import Arrivals, unevenness, waits
from shardplan.costmodel.first_token import closed_values, open_values, percentiles
from shardplan.costmodel.occupancy import Occupancy, crowd_met, occupancy

NEVER = Occupancy(np.zeros(1), np.zeros(1), np.zeros(1))


def arrivals(**changes: Any) -> Arrivals:
    """One group: decode steps of 20 ms, prompts of 80 ms, others beside them for nothing."""
    usual = {
        "rate": 2.0,
        "groups": 1.0,
        "lanes": 1.0,
        "replicas": 1.0,
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
    found = arrivals_module._at_most(np.full((1, 4), mean), groups)[0, 0]
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
    """M/M/S: the share that waits is Erlang's C; ends are regular, so the wait is shorter."""
    offered = load * slots
    terms = [offered**n / math.factorial(n) for n in range(slots)]
    last = offered**slots / math.factorial(slots) / (1.0 - load)
    numbers = (offered, float(slots), float(slots), offered, 1.0)
    found = occupancy(*(np.array([one]) for one in numbers))
    assert found.waiting[0] == pytest.approx(last / (sum(terms) + last), rel=1e-6)
    assert found.variance[0] == pytest.approx(offered, rel=1e-6)
    random_s = 1.0 / (slots - offered)
    assert 0.5 * random_s <= found.wait_s[0] <= random_s
    if slots == 1:
        assert found.wait_s[0] == pytest.approx(0.5 * random_s)


def test_uneven_requests_take_every_slot_more_often() -> None:
    numbers = (9.0, 10.0, 30.0, 20.0)
    even, uneven = (
        occupancy(*(np.array([one]) for one in (*numbers, more))) for more in (1.0, 4.0)
    )
    assert uneven.waiting[0] > 2.0 * even.waiting[0]
    assert uneven.variance[0] == pytest.approx(4.0 * even.variance[0])


@given(in_flight=st.floats(0.01, 500.0), uneven=st.floats(1.0, 9.0))
def test_a_request_is_among_more_than_are_there_on_average(in_flight: float, uneven: float) -> None:
    """N + V with slots for all; never more than the slots, nor less than itself."""
    mean, spread = np.array([in_flight]), np.array([uneven])
    assert crowd_met(mean, spread, np.array([1e6]))[0] == pytest.approx(
        in_flight + uneven, rel=1e-6
    )
    few = float(crowd_met(mean, spread, np.array([8.0]))[0])
    assert 1.0 <= few <= 8.0
    assert few <= in_flight + uneven + 1e-9


@given(rate=st.floats(0.5, 9.0), first=st.booleans(), at_once=st.sampled_from([1.0, 3.0]))
def test_steps_after_a_prompt_are_counted_out(rate: float, first: bool, at_once: float) -> None:
    """By hand: the chain followed for many steps from the step of a prompt."""
    one = arrivals(rate=rate, prompts_first=first, at_once=at_once, more_s=0.02)
    state = waits(one)
    count = 24
    seconds = np.where(np.arange(count) > 0, 0.08, 0.02)
    seconds = seconds + 0.02 * np.maximum(np.minimum(np.arange(count), at_once) - 1.0, 0.0)
    chain = np.zeros((count, count))
    for place in range(count):
        left, mean = int(max(place - at_once, 0)), rate * seconds[place]
        odds = [math.exp(-mean) * mean**n / math.factorial(n) for n in range(count - left)]
        chain[place, left:] = odds
        chain[place, -1] += 1.0 - chain[place].sum()
    shares = np.linalg.matrix_power(chain, 4096)[0]
    decodes = np.arange(count) == 0 if first else np.ones(count, dtype=bool)
    step_s = (shares * seconds).sum() / (shares * decodes).sum()
    assert state.step_s[0] == pytest.approx(step_s, rel=1e-3)
    now = shares * np.minimum(np.arange(count), at_once)
    now = now / now.sum() @ chain
    end = chain[0] if first else shares
    more = 0.0
    for _ in range(4000):
        more += ((now - end) * (seconds - step_s * decodes)).sum()
        now, end = now @ chain, end @ chain
    assert state.begun_s[0] == pytest.approx(more, rel=0.02, abs=2e-4)


@given(load=st.floats(0.05, 0.7))
def test_requests_behind_prompts_come_in_clusters(load: float) -> None:
    """Borel's distribution: variance over mean of Poisson clusters, 1 / (1 - r)^2."""
    one = arrivals(rate=load / 0.08, prompts_first=True, at_once=1.0)
    assert unevenness(one, waits(one))[0] == pytest.approx(1.0 / (1.0 - load) ** 2)
    beside = arrivals(rate=load / 0.06, at_once=1.0)  # of 80 ms 20 decode
    assert unevenness(beside, waits(beside))[0] == pytest.approx(1.0 / (1.0 - load) ** 2)
    shared = arrivals(rate=load / 0.08, prompts_first=True)  # others in a step cost nothing
    assert unevenness(shared, waits(shared))[0] < 1.0 / (1.0 - load) ** 2


def test_a_queue_that_never_ends_beside_one_that_never_begins_is_solved() -> None:
    """Hardly anything comes during a decode step, and more than is served during a prompt's."""
    one = arrivals(rate=1e-15, first_s=1e17, at_once=1.0)
    state = waits(one)
    assert state.share.sum() == pytest.approx(1.0)
    assert np.isfinite(state.begun_s).all()


def test_replicas_by_turns_have_fewer_prompts_at_once() -> None:
    """The same rate each, more evenly; the mean number that waits is the mean number that came."""
    alone, turns = (waits(arrivals(rate=6.0, replicas=count)) for count in (1.0, 4.0))
    numbers = np.arange(alone.share.shape[1])
    for state in (alone, turns):
        came = 6.0 * (state.share * state.seconds).sum()
        assert (state.share * numbers).sum() == pytest.approx(came, rel=1e-6)
    assert turns.share[0, 2:].sum() < 0.5 * alone.share[0, 2:].sum()


def test_the_fullest_group_lies_between_even_and_chance() -> None:
    """Microbatches: as chance has it."""
    states = {
        name: waits(arrivals(rate=20.0, groups=groups, lanes=lanes))
        for name, groups, lanes in (("alone", 1.0, 1.0), ("groups", 4.0, 1.0), ("lanes", 4.0, 4.0))
    }
    full = {name: state.share[0, 2:].sum() for name, state in states.items()}
    assert full["groups"] < full["lanes"] < full["alone"]


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
