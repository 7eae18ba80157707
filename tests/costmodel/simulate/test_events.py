"""The event loop: against the tiny reference, by hand, and what every run must satisfy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.costmodel.discrete import BASE_S, TOKEN_S, Measured, Setting, run_prompts
from tests.costmodel.simulate.linear import Watched, served, simulation

from shardplan.costmodel.disagg import Link
from shardplan.costmodel.simulate.batch import Policy
from shardplan.costmodel.simulate.events import Sending
from shardplan.costmodel.simulate.request import Asked
from shardplan.models.errors import InputError

PROMPTS = 200
SETTINGS = (
    Setting(8, 512, 300, 50),
    Setting(32, 2048, 512, 256),
    Setting(16, 256, 1000, 20),
    Setting(4, 128, 128, 1),
)
LINK = Sending(
    link=Link(tier="node", bytes_per_s=1e9, latency_s=1e-3),
    token_bytes=1e5,
    senders=2,
    receivers=4,
)


def measured(watched: Watched) -> Measured:
    """Means over all requests, as the reference gives them."""
    ended = watched.ended
    span = max(one.end_s for one in ended) - min(one.arrival_s for one in ended)
    later = [(one.end_s - one.first_s) / max(one.output_len - 1, 1) for one in ended]
    waits = [one.first_s - one.arrival_s for one in ended]
    return Measured(len(ended) / span, float(np.mean(waits)), float(np.mean(later)))


@pytest.mark.parametrize("prompts_first", [False, True])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_run_is_that_of_the_reference(setting: Setting, prompts_first: bool) -> None:
    """Which keeps every request, fills every step and counts: the same to rounding."""
    if prompts_first and setting.prompt > setting.chunk:
        pytest.skip("the reference computes no piece of a prompt where prompts go first")
    policy = Policy(slots=setting.slots, chunk=setting.chunk, prompts_first=prompts_first)
    asked = [Asked(0.0, setting.prompt, setting.output)] * PROMPTS
    mine = measured(served(asked, policy=policy, closed=setting.slots))
    told = run_prompts(setting, PROMPTS, prompts_first=prompts_first)
    assert mine == pytest.approx(told, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("closed", [None, 5])
@pytest.mark.parametrize("sending", [None, LINK], ids=["one pool", "apart"])
def test_a_run_in_parts_is_the_run(closed: int | None, sending: Sending | None) -> None:
    """Event by event: where it stops changes nothing."""
    asked = [Asked(0.01 * at, 100 + 37 * at % 400, 1 + 13 * at % 60) for at in range(80)]
    policy = Policy(slots=4, chunk=256)
    runs = []
    for parts in ([], [1, 7, 7, 40]):
        made, watched = simulation(
            iter(asked), policy=policy, engines=2, senders=2, sending=sending, closed=closed
        )
        for ended in parts:
            made.run(ended)
            assert ended <= made.done < 80
        made.run()
        runs.append([(one.number, one.first_s, one.end_s) for one in watched.ended])
    assert runs[0] == runs[1]
    assert len(runs[0]) == 80


def test_tokens_predicted_ahead_are_those_of_the_reference() -> None:
    """Different luck, the same means."""
    setting = Setting(16, 512, 300, 60, 2, 0.7)
    policy = Policy(slots=16, chunk=512, width=3)
    asked = [Asked(0.0, 300, 60)] * PROMPTS
    mine = measured(served(asked, policy=policy, closed=16, depth=2, acceptance=0.7))
    told = run_prompts(setting, PROMPTS)
    assert mine.requests_per_s == pytest.approx(told.requests_per_s, rel=0.02)
    assert mine.tpot_s == pytest.approx(told.tpot_s, rel=0.02)


def test_one_request_takes_its_steps() -> None:
    """A prompt of three pieces, then a step for each further token."""
    policy = Policy(slots=4, chunk=256)
    one = served([Asked(1.0, 600, 11)], policy=policy).ended[0]
    assert one.first_s == pytest.approx(1.0 + 3 * BASE_S + 600 * TOKEN_S)
    assert one.end_s - one.first_s == pytest.approx(10 * (BASE_S + TOKEN_S))


def test_a_request_that_comes_while_others_decode_waits_for_one_step_alone() -> None:
    """Steps that are taken at once end with the one that runs when it comes."""
    policy = Policy(slots=4, chunk=256)
    first = BASE_S + 100 * TOKEN_S
    step = BASE_S + TOKEN_S
    second = first + 5.5 * step
    ended = served([Asked(0.0, 100, 60), Asked(second, 100, 2)], policy=policy).ended
    late = next(one for one in ended if one.number == 1)
    mixed = BASE_S + 101 * TOKEN_S
    assert late.first_s == pytest.approx(first + 6 * step + mixed)


def test_prompts_share_a_step_or_go_first() -> None:
    """Beside a decoding request, or in a step of their own, as many as fit."""
    asked = [Asked(0.0, 100, 8), *[Asked(0.021, 100, 2)] * 3]
    shared = served(asked, policy=Policy(slots=8, chunk=256))
    assert [tokens for _, tokens in shared.steps if tokens] == [100, 255, 45]
    alone = served(asked, policy=Policy(slots=8, chunk=256, prompts_first=True))
    assert [tokens for _, tokens in alone.steps if tokens] == [100, 200, 100]
    apart = served(asked, policy=Policy(slots=8, chunk=256, prompts_first=True, most_prompts=1))
    assert [tokens for _, tokens in apart.steps if tokens] == [100, 100, 100, 100]


def test_the_last_one_is_preempted_and_computed_again() -> None:
    """Four blocks: two requests of two blocks each, the later of which has to give way."""
    asked = [Asked(0.0, 200, 80), Asked(0.0, 200, 80)]
    watched = served(asked, policy=Policy(slots=4, chunk=512), blocks=4)
    assert {one.number: one.preempted for one in watched.ended} == {0: 0, 1: 1}
    again = [tokens for _, tokens in watched.steps if tokens]
    assert again[0] == 400
    assert again[1] == 200 + 57  # 56 steps of two blocks, and the token of the prompt
    assert watched.peak == 4


def test_prompts_first_reserves_and_never_preempts() -> None:
    """The second waits until the first has ended."""
    policy = Policy(slots=4, chunk=512, prompts_first=True)
    ended = served([Asked(0.0, 200, 80), Asked(0.0, 200, 80)], policy=policy, blocks=4).ended
    assert [one.preempted for one in ended] == [0, 0]
    assert ended[1].first_s > ended[0].end_s


def test_groups_that_step_together_end_their_steps_together() -> None:
    """A prompt of one makes the step of the other a longer one."""
    asked = [Asked(0.0, 100, 20), Asked(0.1, 400, 5)]
    how = {"policy": Policy(slots=4, chunk=512), "engines": 2, "router": "round-robin"}
    apart = {one.number: one for one in served(asked, **how).ended}
    joined = {one.number: one for one in served(asked, together=2, **how).ended}
    longer = joined[0].end_s - apart[0].end_s
    assert longer == pytest.approx(399 * TOKEN_S)


def test_stages_of_a_pipeline_work_at_once() -> None:
    """Two microbatches of two stages pass in the time of one of twice the sequences and a half."""
    asked = [Asked(0.0, 128, 200)] * 8
    policy = Policy(slots=8, chunk=1024)
    one = measured(served(asked, policy=policy))
    two = measured(served(asked, policy=Policy(slots=8, chunk=1024, batches=2), stages=2))
    assert two.requests_per_s == pytest.approx(one.requests_per_s, rel=0.02)
    alone = served(asked[:1], policy=Policy(slots=8, chunk=1024, batches=2), stages=2).ended[0]
    assert alone.end_s == pytest.approx(200 * BASE_S + (128 + 199) * TOKEN_S)


def test_a_cache_is_sent_and_the_first_token_is_made_again() -> None:
    """Prompt, link, then every output token a decode step."""
    policy = Policy(slots=4, chunk=512)
    one = served([Asked(0.0, 200, 10)], policy=policy, senders=1, sending=LINK).ended[0]
    sent = 2 * 128 * 1e5 / (2 * 1e9) + 1e-3
    first = BASE_S + 200 * TOKEN_S + sent + BASE_S + TOKEN_S
    assert one.first_s == pytest.approx(first)
    assert one.end_s == pytest.approx(first + 9 * (BASE_S + TOKEN_S))


def test_a_full_decode_pool_holds_up_the_prefill_pool() -> None:
    """One slot to decode: prompts beyond what the prefill engine's cache holds wait there."""
    asked = [Asked(0.0, 200, 50)] * 6
    policy = Policy(slots=1, chunk=512)
    ended = served(asked, policy=policy, senders=1, sending=LINK, blocks=4).ended
    gaps = [b.first_s - a.end_s for a, b in itertools.pairwise(ended)]
    assert min(gaps) > 0.0
    assert all(one.preempted == 0 for one in ended)


def test_a_request_larger_than_the_cache_is_refused() -> None:
    made, _ = simulation(iter([Asked(0.0, 1000, 50)]), policy=Policy(slots=4, chunk=512), blocks=8)
    with pytest.raises(InputError, match="request 0: 1000 tokens in, 50 out"):
        made.run()


def test_a_shared_prefix_is_computed_once() -> None:
    """Two parts of 512 tokens, found by the second request; never its whole prompt."""
    asked = [Asked(0.0, 1024, 2, (7, 8)), Asked(1.0, 1024, 2, (7, 8)), Asked(2.0, 1100, 2, (7, 9))]
    watched = served(asked, policy=Policy(slots=4, chunk=4096))
    assert [tokens for _, tokens in watched.steps if tokens] == [1024, 512, 588]


def test_prefixes_draw_requests_together() -> None:
    """The router sends a prompt where its prefix is."""
    asked = [Asked(float(n), 1024, 2, (n % 2, 2 + n % 2)) for n in range(10)]
    ended = served(
        asked, policy=Policy(slots=4, chunk=4096), engines=2, router="prefix-aware"
    ).ended
    assert len({(one.number % 2, one.unit) for one in ended}) == 2


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Asked], dict[str, object]]:
    """Requests, and an engine in which they only just fit."""
    gaps = draw(st.lists(st.sampled_from([0.0, 0.01, 0.3]), min_size=1, max_size=25))
    asked, now = [], 0.0
    for gap in gaps:
        now += gap
        ids = draw(st.sampled_from([(), (1, 2), (1, 3), (4,)]))
        prompt = draw(st.integers(1, 1200))
        asked.append(Asked(now, prompt, draw(st.integers(1, 300)), ids[: prompt // 512]))
    width = draw(st.integers(1, 3))
    slots = draw(st.integers(1, 9))
    policy = Policy(
        slots=slots,
        chunk=draw(st.integers(slots * width, 700)),
        width=width,
        prompts_first=draw(st.booleans()),
        batches=draw(st.integers(1, min(slots, 3))),
        prefix_hit=draw(st.sampled_from([0.0, 0.5])),
    )
    together = draw(st.integers(1, 2))
    how: dict[str, object] = {
        "policy": policy,
        "blocks": draw(st.integers(12, 40)),
        "engines": 2,
        "together": together,
        "stages": policy.batches,
        "depth": width - 1,
        "acceptance": 0.6,
        "router": draw(st.sampled_from(["round-robin", "least-load", "prefix-aware"])),
        "closed": draw(st.sampled_from([None, 3])),
    }
    if draw(st.booleans()):
        how |= {"senders": 2, "sending": LINK}
    return asked, how


@settings(max_examples=150, deadline=None)
@given(runs())
def test_whatever_comes_ends_once_and_within_the_memory(
    run: tuple[list[Asked], dict[str, object]],
) -> None:
    """Tokens are conserved: each request makes what it asked for, whatever preempts it."""
    asked, how = run
    served(asked, **how)
