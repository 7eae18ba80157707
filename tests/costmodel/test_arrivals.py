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
from shardplan.costmodel.long_prompts import Line, bare_steps, pieces_of
from shardplan.costmodel.occupancy import WEIGHTS, Occupancy, met, numbers_of, occupancy

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
        "last_s": 0.0,
        "rest_s": 0.0,
        "late_s": 0.0,
        "late": 0.0,
        "bare": 1.0,
        "step_s": 0.02,
    }
    first = bool(changes.pop("prompts_first", False))
    told = usual | changes
    told = {"bare_s": told["decode_s"]} | told
    arrays = {name: np.array([value]) for name, value in told.items()}
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


@given(mean=st.floats(0.01, 60.0), uneven=st.floats(1.0, 9.0), slots=st.floats(80.0, 500.0))
def test_numbers_in_slots_keep_their_mean(mean: float, uneven: float, slots: float) -> None:
    """None beyond the slots; where none is near them the variance is kept, too."""
    one = numbers_of(*(np.array([value]) for value in (mean, uneven, slots)))
    assert (one <= slots).all()
    assert float((one @ WEIGHTS)[0]) == pytest.approx(mean, rel=0.02)
    if 9.0 * uneven < mean < slots / 4.0:
        assert float(((one - mean) ** 2 @ WEIGHTS)[0]) == pytest.approx(mean * uneven, rel=0.05)


def test_a_request_is_in_more_of_the_steps_that_many_share() -> None:
    """Of 4 and 12 requests for the same time, steps of 10 ms and of 30: three of the first a step
    of the other."""
    numbers, seconds = np.array([[4.0] * 2 + [8.0] + [12.0] * 2]), np.array([[0.01, 0.02, 0.03]])
    seconds = seconds[:, [0, 0, 1, 2, 2]]
    found = met(numbers, seconds)
    steps = WEIGHTS / seconds[0]
    step_s = (steps * seconds[0]).sum() / steps.sum()
    own_s = (steps * numbers[0] * seconds[0]).sum() / (steps * numbers[0]).sum()
    assert found.mean[0] == pytest.approx(8.0, rel=1e-6)
    assert found.step_s[0] == pytest.approx(step_s, rel=1e-6)
    assert found.step_s[0] + found.more_s[0] == pytest.approx(own_s, rel=1e-6)
    assert found.longer[0] == pytest.approx(0.5)  # the most that is followed


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


@given(fills=st.floats(1.05, 4.0), load=st.floats(0.01, 0.6))
def test_rests_of_prompts_share_the_steps_of_others(fills: float, load: float) -> None:
    """No token is computed twice; steps between x and ceil(x); more in steps with others."""
    line = Line(np.array([0.02]), np.array([1e-4]))
    room, each = np.array([1000.0]), np.array([load / (fills * 0.12)])
    prompt = fills * room
    one = pieces_of(line, prompt, room, (each, np.ones(1)), np.ones(1))
    assert fills <= one.steps[0] <= math.ceil(fills)
    assert one.first_s[0] == pytest.approx(one.steps[0] * 0.02 + prompt[0] * 1e-4)
    assert one.first_s[0] <= one.alone_s[0] <= one.full_s[0] + 1e-12
    several = pieces_of(line, prompt, room, (each, np.ones(1)), np.full(1, 8.0))
    assert several.first_s[0] >= one.first_s[0]
    assert several.first_s[0] <= several.steps[0] * 0.12 + 1e-12


def test_a_group_alone_decodes_in_bare_steps() -> None:
    """And one beside others in theirs: between two of as many servers and of independent ones."""
    line, ones = Line(np.array([0.02]), np.array([1e-4])), np.ones(1)
    own = pieces_of(line, 2500.0 * ones, 1000.0 * ones, (ones, ones), ones)
    step_s, bare = bare_steps(own, 0.02 * ones, ones, ones)
    assert step_s[0] == pytest.approx(0.02)
    assert bare[0] == pytest.approx(1.0)
    some = [float(bare_steps(own, 0.02 * ones, ones, g * ones)[0][0]) for g in (1.0, 2.0, 4.0)]
    assert some[0] < some[1] < some[2] < float(own.first_s[0] / own.steps[0])


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
