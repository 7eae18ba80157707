"""A benchmark run: makespan and means against an engine stepped through, rates, percentiles."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.costmodel.discrete import LinearModel, Setting, run_prompts
from tests.costmodel.priced import case_names, load

from shardplan.costmodel.run_out import Run, run_out
from shardplan.costmodel.serving import ServingInput, serve
from shardplan.costmodel.step import StepModel

ENGINES = ("vllm-ascend", "mindie")
RUNS = [
    (Setting(1, 2048, 512, 64), 5),
    (Setting(4, 2048, 512, 64), 16),
    (Setting(16, 2048, 512, 128), 16),
    (Setting(16, 2048, 512, 128), 40),  # a last wave of eight
    (Setting(16, 2048, 512, 128), 160),
    (Setting(32, 512, 1024, 256), 128),
    (Setting(64, 2048, 1024, 256), 100),
    (Setting(64, 4096, 2048, 512), 640),
    (Setting(128, 2048, 256, 128), 640),
    (Setting(64, 1024, 4096, 1024), 128),
    (Setting(128, 2048, 1024, 128), 512),
]
SATURATED = [
    (Setting(64, 1024, 4096, 256), 128),
    (Setting(256, 2048, 1024, 128), 512),
]


def asked(slots: Any, **changes: Any) -> ServingInput:
    """Prompts of 2048 tokens, outputs of 256, steps of 2048, unless said otherwise."""
    usual: dict[str, Any] = {"chunk": np.asarray([2048.0]), "input_len": 2048, "output_len": 256}
    return ServingInput(batch=np.atleast_1d(np.asarray(slots, dtype=float)), **(usual | changes))


def linear(setting: Setting, engine: str, prompts: int) -> Run:
    """The formulas under a step time linear in its tokens."""
    return run_out(
        cast("StepModel", LinearModel(engine)),
        asked(
            setting.slots,
            chunk=np.asarray([float(setting.chunk)]),
            input_len=setting.prompt,
            output_len=setting.output,
        ),
        num_prompts=prompts,
    )


@pytest.mark.parametrize(("setting", "prompts"), RUNS)
def test_a_run_takes_as_long_as_an_engine_step_by_step(setting: Setting, prompts: int) -> None:
    """Throughput within 4 %, TPOT within 6 %; TTFT, of prompts that keep together, within 40 %."""
    real, ours = run_prompts(setting, prompts), linear(setting, "vllm-ascend", prompts)
    assert ours.requests_per_s == pytest.approx(real.requests_per_s, rel=0.04)
    assert ours.tpot_mean_s == pytest.approx(real.tpot_s, rel=0.06)
    assert ours.ttft_mean_s == pytest.approx(real.ttft_s, rel=0.4)


@pytest.mark.parametrize(("setting", "prompts"), SATURATED)
def test_two_waves_beyond_saturation(setting: Setting, prompts: int) -> None:
    """The ends of so short a run, where fewer prompts and tokens share a step, weigh more."""
    real, ours = run_prompts(setting, prompts), linear(setting, "vllm-ascend", prompts)
    assert ours.requests_per_s == pytest.approx(real.requests_per_s, rel=0.07)
    assert ours.tpot_mean_s == pytest.approx(real.tpot_s, rel=0.13)
    assert ours.ttft_mean_s == pytest.approx(real.ttft_s, rel=0.4)


@pytest.mark.parametrize(("setting", "prompts"), RUNS + SATURATED)
def test_where_prompts_stop_decoding_too(setting: Setting, prompts: int) -> None:
    """Uneven outputs: TTFT within 16 %, TPOT within 12 % (30 % of two waves: start and end).

    Equal ones keep together for ever, which fills the steps of prompts: up to 3 / 10 faster.
    """
    whole = setting._replace(chunk=max(setting.chunk, setting.prompt))
    ours = linear(whole, "mindie", prompts)
    real = run_prompts(whole, prompts, prompts_first=True, uneven=True)
    assert ours.ttft_mean_s == pytest.approx(real.ttft_s, rel=0.16)
    assert ours.tpot_mean_s == pytest.approx(real.tpot_s, rel=0.3 if setting.slots > 128 else 0.12)
    even = run_prompts(whole, prompts, prompts_first=True)
    assert 0.7 * even.requests_per_s < ours.requests_per_s < 1.02 * even.requests_per_s


@settings(max_examples=8)
@given(name=case_names(), engine=st.sampled_from(ENGINES), slots=st.integers(1, 256))
def test_without_end_or_rate_it_is_the_steady_state(name: str, engine: str, slots: int) -> None:
    model = load(name, engine=engine).model
    run, steady = run_out(model, asked(slots)), serve(model, asked(slots))
    assert run.requests_per_s == pytest.approx(steady.requests_per_s)
    assert run.output_tokens_per_s == pytest.approx(steady.output_tokens_per_s)
    assert run.tpot_mean_s == pytest.approx(steady.tpot_s)
    assert run.ttft_mean_s == pytest.approx(steady.ttft_s)


@settings(max_examples=8)
@given(name=case_names(), engine=st.sampled_from(ENGINES), share=st.floats(0.05, 0.95))
def test_an_offered_rate_fills_the_slots_that_it_needs(
    name: str, engine: str, share: float
) -> None:
    """Little's law: slots in use = rate * latency, unless one is more than enough or all are used:

    where prompts stop decoding those of many groups leave it little, until the slots are full.
    """
    model = load(name, engine=engine).model
    capacity = float(serve(model, asked(256)).requests_per_s[0])
    run = run_out(model, asked(256), request_rate=share * capacity)
    assert run.requests_per_s == pytest.approx(share * capacity)
    if run.slots == 256:
        assert run.tpot_mean_s <= float(serve(model, asked(256)).tpot_s[0]) * (1 + 1e-9)
    elif run.slots > 1.001:
        assert run.slots * model.groups == pytest.approx(
            share * capacity * run.served.end_to_end_s, rel=0.02
        )


@settings(max_examples=8)
@given(name=case_names(), engine=st.sampled_from(ENGINES), factor=st.floats(1.01, 10.0))
def test_beyond_capacity_the_queue_grows(name: str, engine: str, factor: float) -> None:
    model = load(name, engine=engine).model
    capacity = float(serve(model, asked(64)).requests_per_s[0])
    rate = factor * capacity
    short, long = (run_out(model, asked(64), request_rate=rate, num_prompts=n) for n in (2e3, 2e4))
    assert short.slots == 64
    assert short.requests_per_s <= capacity
    assert long.requests_per_s == pytest.approx(capacity, rel=0.05)
    waited = (long.ttft_mean_s - short.ttft_mean_s) * 2 / (18e3 * (1 / capacity - 1 / rate))
    assert waited == pytest.approx(1.0, rel=0.02)


@settings(max_examples=8)
@given(
    name=case_names(),
    engine=st.sampled_from(ENGINES),
    slots=st.integers(1, 256),
    prompts=st.integers(1, 2000),
    share=st.sampled_from([0.3, 0.9, 2.0, np.inf]),
)
def test_percentiles_are_no_less_than_means(
    name: str, engine: str, slots: int, prompts: int, share: float
) -> None:
    model = load(name, engine=engine).model
    rate = share * float(serve(model, asked(slots)).requests_per_s[0])
    run = run_out(model, asked(slots), request_rate=rate, num_prompts=prompts)
    assert run.ttft_p99_s >= run.ttft_mean_s > 0
    assert run.tpot_p99_s >= run.tpot_mean_s > 0
    assert run.requests_per_s > 0


@settings(max_examples=8)
@given(name=case_names(), engine=st.sampled_from(ENGINES), slots=st.sampled_from([4, 32, 128]))
def test_a_longer_run_comes_closer_to_the_steady_state(name: str, engine: str, slots: int) -> None:
    model = load(name, engine=engine).model
    steady = float(serve(model, asked(slots)).requests_per_s[0])
    rates = [
        float(run_out(model, asked(slots), num_prompts=n * slots).requests_per_s[0])
        for n in (model.groups, 10 * model.groups, 100 * model.groups)
    ]
    one, ten, hundred = rates
    assert one <= ten * (1 + 1e-9) <= hundred * (1 + 2e-9) <= steady * (1 + 3e-9)
    assert hundred == pytest.approx(steady, rel=0.05)


def test_one_wave_on_one_slot_by_hand() -> None:
    """Three prompts one after another: three latencies."""
    model = load("dense tp8").model
    latency = serve(model, asked(1)).end_to_end_s
    run = run_out(model, asked(1), num_prompts=3)
    assert 1 / run.requests_per_s == pytest.approx(latency)


def test_requests_beyond_the_slots_wait_for_one() -> None:
    """Sixty-four in flight on sixteen slots: forty-eight wait, served at the rate of the rest."""
    model = load("dense tp8").model
    inside = run_out(model, asked(16))
    beyond = run_out(model, asked(16, in_flight=64.0))
    assert beyond.requests_per_s == pytest.approx(inside.requests_per_s)
    assert beyond.ttft_mean_s - inside.ttft_mean_s == pytest.approx(48 / inside.requests_per_s)


def test_a_request_taken_back_waits_after_its_first_token() -> None:
    """Forty-eight beyond memory: of 2,048 prompt and 128 mean output tokens 128 of 2,176 parts."""
    model = load("dense tp8").model
    assert model.engine.preempts
    short = run_out(model, asked(16, in_flight=64.0))
    taken = run_out(model, asked(16, in_flight=64.0), allowed=64.0)
    waits = 48 / taken.requests_per_s
    after = waits * 128 / (2048 + 128)
    assert taken.requests_per_s == pytest.approx(short.requests_per_s)
    assert short.ttft_mean_s - taken.ttft_mean_s == pytest.approx(after)
    assert (taken.tpot_mean_s - short.tpot_mean_s) * 255 == pytest.approx(after)
    assert taken.tpot_p99_s > short.tpot_p99_s
    half = run_out(model, asked(16, in_flight=64.0), allowed=40.0)
    assert (half.tpot_mean_s - short.tpot_mean_s) * 255 == pytest.approx(after / 2)


def test_rows_do_not_touch_one_another() -> None:
    model = load("dense dp2 tp4").model
    rates, prompts = np.asarray([0.5, np.inf, 2.0]), np.asarray([np.inf, 100.0, 500.0])
    together = run_out(model, asked([8, 16, 64]), request_rate=rates, num_prompts=prompts)
    for i, slots in enumerate((8, 16, 64)):
        alone = run_out(model, asked(slots), request_rate=rates[i], num_prompts=prompts[i])
        for name in ("ttft_mean_s", "ttft_p99_s", "tpot_mean_s", "tpot_p99_s", "requests_per_s"):
            assert getattr(together, name)[i] == pytest.approx(float(getattr(alone, name)[0]))


def test_rows_at_a_rate_go_on_until_they_are_close_by_themselves() -> None:
    """However long others take: to the bit."""
    model = load("dense dp2 tp4").model
    rates = np.linspace(0.05, 0.99, 7) * float(run_out(model, asked(64)).capacity_requests_per_s[0])
    together = run_out(model, asked([64] * 7), request_rate=rates)
    for i, rate in enumerate(rates):
        alone = run_out(model, asked(64), request_rate=rate)
        for name in ("slots", "ttft_mean_s", "tpot_mean_s"):
            assert getattr(together, name)[i] == getattr(alone, name)[0]


def test_means_alone_are_those_with_percentiles() -> None:
    """In less time: states that are not met add nothing."""
    model = load("dense dp2 tp4").model
    rates = np.linspace(0.05, 0.99, 7) * float(run_out(model, asked(64)).capacity_requests_per_s[0])
    with_tails = run_out(model, asked([64] * 7), request_rate=rates)
    without = run_out(model, asked([64] * 7), request_rate=rates, tails=False)
    assert without.ttft_mean_s == pytest.approx(with_tails.ttft_mean_s, rel=1e-9)
    assert np.isnan(without.ttft_p99_s).all()


def test_groups_that_are_left_serve_the_rate_of_all() -> None:
    """Half of the groups at a rate: as all at twice that, but for how slots are shared."""
    model = load("dense dp2 tp4").model
    whole, half = run_out(model, asked(16)), run_out(model, asked(16), left=0.5)
    assert half.capacity_requests_per_s == pytest.approx(whole.capacity_requests_per_s / 2)
    rate = float(half.capacity_requests_per_s[0]) * 0.9
    lost = run_out(model, asked(16), request_rate=rate, left=0.5)
    twice = run_out(model, asked(16), request_rate=2.0 * rate)
    assert lost.slots == pytest.approx(twice.slots)
    assert lost.tpot_mean_s == pytest.approx(twice.tpot_mean_s)
    assert lost.ttft_mean_s[0] > twice.ttft_mean_s[0]
    assert lost.requests_per_s == pytest.approx(rate)
