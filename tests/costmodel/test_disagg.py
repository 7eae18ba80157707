"""Pools of prefill and decode instances: queue, transfer and counts, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.disagg import link_between, step_prompts, unbounded_utilisation
from shardplan.costmodel.disagg_queue import filled
from shardplan.costmodel.disagg_serve import BOUNDS, Demand, Pools, Service, serve_pools
from shardplan.models.errors import InputError


def _pools(**changes: float) -> Pools:
    """Prompts at 10 a second, alone in 0.2 s; 20 decoded a second in steps of 50 ms."""
    values = {
        "prefill_instances": 1.0,
        "prefill_per_s": 10.0,
        "busy_s": 0.1,
        "one_s": 0.1,
        "prompts": 1.0,
        "service_s": 0.2,
        "decode_per_s": 20.0,
        "step_s": 0.05,
        "later_s": 0.5,
        "setup_s": 0.002,
        "sent_s": 0.008,
        "received_s": 0.004,
        "transfer_per_s": 1000.0,
        **changes,
    }
    return Pools(**{name: np.asarray(value) for name, value in values.items()})


def _served(demand: Demand, **changes: float) -> Service:
    return serve_pools(_pools(**changes), demand)


def test_a_ttft_limit_is_what_the_prefill_queue_is_filled_to() -> None:
    """Limit 0.385 s, without a wait 0.285 s: one of 0.1 s is a utilisation of 2/3 (M/D/1)."""
    found = _served(Demand(ttft_s=0.385))
    assert float(found.requests_per_s) == pytest.approx(20.0 / 3.0)
    assert float(found.ttft_s) == pytest.approx(0.385)
    assert float(found.end_to_end_s) == pytest.approx(0.385 + 10 * 0.05)
    assert BOUNDS[int(found.bound)] == "prefill"


def test_the_slowest_part_binds() -> None:
    """Slots, links or what comes, where they are less than the prompts."""
    open_ended = Demand(ttft_s=10.0)
    for name, changes in (
        ("decode", {"decode_per_s": 3.0}),
        ("transfer", {"transfer_per_s": 3.0}),
    ):
        found = _served(open_ended, **changes)
        assert BOUNDS[int(found.bound)] == name
        assert float(found.requests_per_s) == 3.0
    offered = _served(Demand(offered_per_s=4.0))
    assert BOUNDS[int(offered.bound)] == "demand"
    assert float(offered.wait_s) == pytest.approx(0.4 * 0.1 / (2 * 0.6))


def test_one_request_in_flight_waits_for_nothing() -> None:
    """Its latency is service, transfer and O steps; the rate is one over that."""
    found = _served(Demand(in_flight=1.0))
    assert float(found.wait_s) == pytest.approx(0.0, abs=1e-12)
    assert float(found.end_to_end_s) == pytest.approx(0.2 + 0.01 + 11 * 0.05)
    assert float(found.requests_per_s) == pytest.approx(1.0 / 0.76)


def test_without_any_bound_the_queue_is_kept_at_a_stated_utilisation() -> None:
    """Nine tenths of the prompts that can be computed."""
    found = _served(Demand())
    assert float(found.requests_per_s) == pytest.approx(10.0 * unbounded_utilisation())


def test_a_limit_below_a_prompt_alone_serves_nothing() -> None:
    """No load meets it."""
    assert float(_served(Demand(ttft_s=0.25)).requests_per_s) == 0.0


_POSITIVE = st.floats(1e-3, 1e2)


@given(
    in_flight=st.integers(1, 5000),
    prefill=_POSITIVE,
    decode=_POSITIVE,
    busy=st.floats(1e-3, 1.0),
    step=st.floats(1e-3, 0.2),
)
def test_littles_law_holds_of_a_closed_population(
    in_flight: int, prefill: float, decode: float, busy: float, step: float
) -> None:
    """Rate times latency is the requests in flight; no pool serves more than it can."""
    times = {"busy_s": busy, "one_s": busy, "service_s": busy}
    changes = {"prefill_per_s": prefill / busy, **times}
    demand = Demand(in_flight=float(in_flight))
    found = _served(demand, decode_per_s=decode, step_s=step, later_s=19 * step, **changes)
    rate = float(found.requests_per_s)
    assert rate <= min(prefill / busy, decode) * (1 + 1e-9)
    wanted = min(in_flight, rate * float(found.end_to_end_s))
    assert rate * float(found.end_to_end_s) >= wanted
    if float(found.wait_s) > 0:
        assert rate * float(found.end_to_end_s) == pytest.approx(in_flight)


@given(more=st.floats(1.0, 10.0), limit=st.sampled_from([None, 0.3, 1.0]))
def test_more_of_anything_never_serves_less(more: float, limit: float | None) -> None:
    """Prompts, slots and links."""
    demand = Demand(ttft_s=limit, in_flight=None if limit else 40.0)
    before = float(_served(demand).requests_per_s)
    for name in ("prefill_per_s", "decode_per_s", "transfer_per_s"):
        found = _served(demand, **{name: float(getattr(_pools(), name)) * more})
        assert float(found.requests_per_s) >= before * (1 - 1e-9)


def test_a_step_holds_whole_prompts_or_one_piece() -> None:
    """Prompts of 1000: two fit into 2048 tokens; 300 tokens take four pieces of 250."""
    prompts, pieces, tokens = step_prompts(np.array([2048.0, 1000.0, 300.0]), np.asarray(1000.0))
    assert prompts.tolist() == [2, 1, 1]
    assert pieces.tolist() == [1, 1, 4]
    assert tokens.tolist() == [2000, 1000, 250]


def test_a_transfer_takes_the_busier_end() -> None:
    """A prefill rank sends for 8 ms a prompt, a decode rank takes one in 4 or 9; 2 ms before."""
    for received, wanted in ((0.004, 0.010), (0.009, 0.011)):
        found = _served(Demand(in_flight=1.0), received_s=received)
        assert float(found.passed.transfer_s) == pytest.approx(wanted)


def test_steps_are_as_full_as_prompts_come() -> None:
    """Four prompts in 0.1 s, one in 0.04: 20 a second find 1 in a step, 36 find 18/7."""
    full = {"prefill_per_s": 40.0, "one_s": 0.04, "prompts": 4.0}
    slow, fast = (filled(_pools(**full).queue, np.asarray(rate)) for rate in (20.0, 36.0))
    assert (float(slow.prompts), float(slow.step_s)) == pytest.approx((1.0, 0.04))
    step_s = 0.04 + 0.02 * 11 / 7
    assert (float(fast.prompts), float(fast.step_s)) == pytest.approx((18 / 7, step_s))
    assert step_s * 36 == pytest.approx(18 / 7)


def test_the_search_takes_steps_of_one_prompt_or_full_ones() -> None:
    """20 a second are kept up with one by one, 36 are not."""
    full = {"prefill_per_s": 40.0, "one_s": 0.04, "prompts": 4.0, "decode_per_s": 1e3}
    slow = _served(Demand(offered_per_s=20.0), **full)
    assert float(slow.passed.service_s) == pytest.approx(0.2 * 0.4)
    assert float(slow.passed.transfer_s) == pytest.approx(0.002 + 0.008)
    assert float(slow.wait_s) == pytest.approx(0.8 * 0.04 / (2 * 0.2))
    fast = _served(Demand(offered_per_s=36.0), **full)
    assert float(fast.passed.service_s) == pytest.approx(0.2)
    assert float(fast.passed.transfer_s) == pytest.approx(0.002 + 4 * 0.008)
    assert float(fast.wait_s) == pytest.approx(0.05 + 0.9 / (2 * 40.0 * 0.1))


def test_several_instances_share_a_queue() -> None:
    """Three of them at nine tenths: a fifth of the wait behind one (Sakasegawa)."""
    one = _served(Demand(offered_per_s=9.0), decode_per_s=1e3)
    three = _served(
        Demand(offered_per_s=27.0), decode_per_s=1e3, prefill_instances=3.0, prefill_per_s=30.0
    )
    share = 0.9 ** (8.0**0.5 - 1.0) / 0.9 / 3.0
    assert float(three.wait_s) == pytest.approx(float(one.wait_s) * share)
    assert share == pytest.approx(0.305, abs=0.001)


@given(
    held=st.integers(2, 40),
    one=st.floats(0.03, 1.0),
    limit=st.floats(0.2, 3.0),
    tail=st.booleans(),
)
def test_the_most_that_keeps_a_limit_just_keeps_it(
    held: int, one: float, limit: float, tail: bool
) -> None:
    """More breaks it, and what cannot be worth it is not looked for."""
    changes = {"prefill_per_s": 10.0 * held, "one_s": 0.1 * max(one, 1 / held)}
    pools = {**changes, "prompts": float(held), "decode_per_s": 1e6, "transfer_per_s": 1e6}
    name = "ttft_p99_s" if tail else "ttft_s"
    found = _served(Demand(ttft_s=limit) if not tail else Demand(ttft_p99_s=limit), **pools)
    rate = float(found.requests_per_s)
    if rate == 0.0:
        return
    assert float(getattr(found, name)) == pytest.approx(limit, rel=1e-6)
    more = Demand(offered_per_s=rate * 1.001, ttft_s=1e9, ttft_p99_s=1e9)
    if rate * 1.001 < 10.0 * held * (1.0 - 1e-3):
        assert float(getattr(_served(more, **pools), name)) > limit
    left = serve_pools(_pools(**pools), Demand(ttft_s=limit), np.asarray(11.0 * held))
    assert float(left.requests_per_s) == 0.0


def test_pools_meet_on_the_innermost_tier_that_joins_them() -> None:
    """Inside one node its mesh, beyond it RoCE, and on a supernode its own fabric."""
    a2 = load_cluster("atlas-800t-a2", nodes=2)
    assert link_between(a2, a2, 8, same=True).tier == "mesh"
    assert link_between(a2, a2, 16, same=True).tier == "roce"
    cloud = load_cluster("cloudmatrix-384")
    assert link_between(cloud, cloud, 384, same=True).tier == "supernode"


def test_two_clusters_meet_over_the_slower_nic() -> None:
    """25 GB/s on A2, 24.5 on A3; a cluster without RoCE is refused."""
    a2, a3 = load_cluster("atlas-800t-a2", nodes=2), load_cluster("atlas-800i-a3", nodes=2)
    half = link_between(a2, a2, 16, same=True).bytes_per_s
    assert link_between(a2, a3, 16, same=False).bytes_per_s == pytest.approx(half * 24.5 / 25)
    with pytest.raises(InputError, match="roce"):
        link_between(load_cluster("cloudmatrix-384"), a2, 16, same=False)
