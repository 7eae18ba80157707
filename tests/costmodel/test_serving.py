"""Steady-state serving: limits by hand, Little's law, and an engine stepped through as oracle."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.costmodel.discrete import BASE_S, TOKEN_S, LinearModel, Setting, measure
from tests.costmodel.priced import CASES, case_names, load, price

from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.load import Load
from shardplan.costmodel.memo import Memo
from shardplan.costmodel.serving import Serving, ServingInput, serve
from shardplan.costmodel.step import StepModel
from shardplan.costmodel.steps import step_seconds
from shardplan.models.catalog import load_model
from shardplan.models.parallel import Parallelism

SLOTS = 2.0 ** np.arange(10)
ENGINES = ("vllm-ascend", "mindie")


def served(model: StepModel, slots: Any, **asked: Any) -> Serving:
    """Prompts of 2048 tokens, outputs of 256, steps of 2048, unless said otherwise."""
    usual: dict[str, Any] = {"chunk": np.asarray(2048.0), "input_len": 2048, "output_len": 256}
    return serve(model, ServingInput(batch=np.asarray(slots, dtype=float), **(usual | asked)))


def linear(setting: Setting, engine: str) -> Serving:
    """The formulas under a step time linear in its tokens."""
    return served(
        cast("StepModel", LinearModel(engine)),
        float(setting.slots),
        chunk=np.asarray(float(setting.chunk)),
        input_len=setting.prompt,
        output_len=setting.output,
    )


BELOW_SATURATION = [
    Setting(1, 2048, 512, 64),
    Setting(4, 2048, 512, 64),
    Setting(16, 2048, 512, 128),
    Setting(64, 2048, 1024, 256),
    Setting(32, 512, 1024, 256),
    Setting(16, 512, 2048, 256),
    Setting(64, 4096, 2048, 512),
    Setting(128, 2048, 256, 128),
    Setting(64, 1024, 4096, 1024),
    Setting(8, 512, 4096, 128),
    Setting(128, 2048, 1024, 128),
    Setting(16, 2048, 2048, 128),
    Setting(160, 2048, 1024, 128),
]
SATURATED = [
    Setting(256, 2048, 1024, 128),
    Setting(16, 2048, 512, 1),
    Setting(16, 512, 4096, 1),
    Setting(4, 512, 1000, 2),
]


@pytest.mark.parametrize("setting", BELOW_SATURATION)
def test_chunked_prefill_is_what_an_engine_does_step_by_step(setting: Setting) -> None:
    """Throughput and TPOT within 3 %; TTFT, whose wait supposes uneven lengths, within 40 %."""
    assert setting.load < 0.85
    real, ours = measure(setting), linear(setting, "vllm-ascend")
    assert ours.requests_per_s == pytest.approx(real.requests_per_s, rel=0.03)
    assert ours.tpot_s == pytest.approx(real.tpot_s, rel=0.03)
    assert 0.85 * real.ttft_s <= ours.ttft_s <= 1.4 * real.ttft_s


@pytest.mark.parametrize("setting", SATURATED)
def test_beyond_saturation_prompts_wait_and_throughput_stays(setting: Setting) -> None:
    assert setting.load > 1.0
    real, ours = measure(setting), linear(setting, "vllm-ascend")
    assert ours.requests_per_s == pytest.approx(real.requests_per_s, rel=0.03)
    assert ours.ttft_s == pytest.approx(real.ttft_s, rel=0.15)
    if setting.output > 1:
        assert ours.tpot_s == pytest.approx(real.tpot_s, rel=0.03)


@pytest.mark.parametrize("setting", BELOW_SATURATION + SATURATED)
def test_prompts_that_stop_decoding_are_what_an_engine_does_step_by_step(setting: Setting) -> None:
    """An engine that does not chunk takes whole prompts, as many as fit a step."""
    whole = setting._replace(chunk=max(setting.chunk, setting.prompt))
    real, ours = measure(whole, prompts_first=True), linear(whole, "mindie")
    assert ours.requests_per_s == pytest.approx(real.requests_per_s, rel=0.03)
    assert ours.ttft_s == pytest.approx(real.ttft_s, rel=0.08)
    if setting.output > 1:
        assert ours.tpot_s == pytest.approx(real.tpot_s, rel=0.03)


def test_three_prompts_a_step_by_hand() -> None:
    """31 slots, prompts of 100, outputs of 10: a request takes 10 steps, so 30 others start 3 a
    step. Every step carries 300 prompt tokens beside 27 that decode.
    """
    ours = linear(Setting(31, 1000, 100, 10), "vllm-ascend")
    assert ours.mixed_share == 1.0
    assert ours.tpot_s == ours.mixed_step_s == pytest.approx(BASE_S + TOKEN_S * (300 + 27))


def test_one_prompt_in_four_steps_by_hand() -> None:
    """6 slots, prompts of 100, outputs of 20: the 5 others start 0.25 a step; 4.75 decode."""
    ours = linear(Setting(6, 1000, 100, 20), "vllm-ascend")
    assert ours.mixed_share == pytest.approx(0.25)
    assert ours.mixed_step_s == pytest.approx(BASE_S + TOKEN_S * (100 + 5))
    assert ours.decode_step_s == pytest.approx(BASE_S + TOKEN_S * 6)
    assert ours.tpot_s == pytest.approx(BASE_S + TOKEN_S * (0.25 * 105 + 0.75 * 6))


@pytest.mark.parametrize("name", CASES)
def test_pure_prefill_runs_at_the_rate_of_full_steps(name: str) -> None:
    """One output token and many prompts waiting: every step is full of prompt tokens.

    A pipeline has as many such steps under way as stages, or most of them would idle.
    """
    model = load(name).model
    ours = served(model, 64.0 * model.stages, output_len=1, input_len=3000)
    tokens_per_s = ours.requests_per_s * 3000 / model.groups
    assert tokens_per_s == pytest.approx(model.stages * 2048 / ours.mixed_step_s, rel=0.01)
    assert ours.tpot_s == 0.0


@pytest.mark.parametrize("slots", [4, 32, 256])
@pytest.mark.parametrize("stages", [2, 4])
def test_a_pipeline_of_equal_stages_is_as_many_engines_in_turn(stages: int, slots: int) -> None:
    """Each microbatch has its share of the slots, and its prompts hold up those of the others.

    Groups that step together do so, too, and wait for the fullest of them besides.
    """
    asked: dict[str, Any] = {"chunk": np.asarray(2048.0), "input_len": 1024, "output_len": 128}
    one = LinearModel("vllm-ascend", locked=stages)
    alone = served(cast("StepModel", one), slots / stages, **asked)
    cut = served(cast("StepModel", LinearModel("vllm-ascend", stages)), float(slots), **asked)
    assert cut.requests_per_s == pytest.approx(stages * alone.requests_per_s, rel=0.15)
    assert cut.tpot_s == pytest.approx(alone.tpot_s, rel=0.15)
    assert cut.ttft_s == pytest.approx(alone.ttft_s, rel=0.2)
    if slots >= 64 * stages:
        assert cut.requests_per_s >= stages * alone.requests_per_s


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_a_lone_request_prefills_then_decodes(name: str, engine: str) -> None:
    """TTFT is its prompt's step (up to one more token in it), TPOT a decode step half-way.

    Groups that share experts have a request each, whose prompts hold one another up.
    """
    model = load(name, engine=engine).model
    kinds: dict[str, Any] = {"weight_dtype": "bf16", "kv_dtype": "bf16", "attention": "flash"}
    prefill, _ = step_seconds(model, "prefill", batch=1, new=1500, prefix=0, **kinds)
    decode, _ = step_seconds(model, "decode", batch=1, new=1, prefix=1500 + 128, **kinds)
    ours = served(model, 1.0, input_len=1500)
    stages = len(model.graphs["decode"].stages)
    assert ours.wait_s == pytest.approx(0.0, abs=1e-9)
    if stages == 1:
        assert ours.ttft_s == pytest.approx(float(prefill), rel=0.03)
        if model.locked > 1:
            assert ours.tpot_s > decode
        else:
            assert ours.tpot_s == pytest.approx(float(decode), rel=1e-9)
    else:  # microbatches of other requests would run beside it: as slow as with them
        assert ours.ttft_s >= 0.99 * prefill
        assert decode <= ours.tpot_s <= 1.5 * decode


@given(
    name=case_names(),
    engine=st.sampled_from(ENGINES),
    slots=st.integers(1, 512),
    chunk=st.sampled_from([256.0, 2048.0, 8192.0]),
    lengths=st.tuples(st.integers(1, 32768), st.integers(1, 4096)),
    waiting=st.integers(0, 512),
)
def test_littles_law(
    name: str, engine: str, slots: int, chunk: float, lengths: tuple[int, int], waiting: int
) -> None:
    model = load(name, engine=engine).model
    asked = {"chunk": np.asarray(chunk), "input_len": lengths[0], "output_len": lengths[1]}
    ours = served(model, float(slots), in_flight=float(slots + waiting), **asked)
    assert ours.requests_per_s * ours.end_to_end_s == pytest.approx(
        (slots + waiting) * model.groups, rel=1e-9
    )
    assert ours.concurrency == pytest.approx((slots + waiting) * model.groups, rel=1e-9)
    later = (lengths[1] - 1) * ours.tpot_s
    assert ours.end_to_end_s == pytest.approx(ours.ttft_s + later, rel=1e-9)
    inside = served(model, float(slots), **asked)
    assert ours.requests_per_s == inside.requests_per_s
    assert ours.ttft_s >= inside.ttft_s


@given(
    name=case_names(),
    engine=st.sampled_from(ENGINES),
    lengths=st.tuples(st.integers(1, 16384), st.integers(16, 2048)),
)
def test_more_slots_serve_more_and_each_request_slower(
    name: str, engine: str, lengths: tuple[int, int]
) -> None:
    """Throughput saturates; it falls by at most 10 % and TPOT by at most 6 % on the way.

    It falls where the cache leaves L2 (measured attention takes 3 times as long for twice the
    slots there). The TPOT of few slots is the decode step of few rows, where the matmul surface
    bends; that of groups in lock step falls where a prompt no longer fits one step.
    """
    model = load(name, engine=engine).model
    ours = served(model, SLOTS, input_len=lengths[0], output_len=lengths[1])
    rate, tpot = ours.output_tokens_per_s, ours.tpot_s
    assert np.all(rate >= 0.9 * np.maximum.accumulate(rate))
    if model.locked == 1:
        assert np.all(tpot >= 0.94 * np.maximum.accumulate(tpot))
    assert rate[-1] > rate[0]


@given(name=case_names(), engine=st.sampled_from(ENGINES), slots=st.integers(1, 256))
def test_a_prefix_that_is_cached_is_not_computed_again(name: str, engine: str, slots: int) -> None:
    """Steps are as long where those of another group are full: fewer of one's own save little."""
    hits = (0.0, 0.5, 0.9)
    model = load(name, engine=engine).model
    ours = [served(model, float(slots), input_len=8192, prefix_hit=hit) for hit in hits]
    for less, more in itertools.pairwise(ours):
        assert more.ttft_s < less.ttft_s
        least = 1.0 if model.locked == 1 else 0.9
        assert more.output_tokens_per_s > least * less.output_tokens_per_s


@pytest.mark.parametrize("name", ["dense tp2 pp3", "dense pp4 uneven", "mla tp8"])
def test_a_pipeline_is_as_fast_as_its_slowest_stage(name: str) -> None:
    """32 slots a microbatch: a token of all of them takes a round of the slowest stage."""
    model = load(name).model
    stages = len(model.graphs["decode"].stages)
    ours = served(model, 32.0 * stages, chunk=np.asarray(65536.0), input_len=1, output_len=4096)
    sizes = Load.of("decode", model.engine, tokens=32.0, batch=32.0, new=1.0, prefix=1 + 2048.0)
    parts = [model.parts(group, sizes) for group in ("token", "attention", "logits")]
    each = [sum(float(group[i].total_s) for group in parts) for i in range(stages)]
    assert ours.decode_step_s >= stages * max(each)
    assert ours.decode_step_s == pytest.approx(stages * max(each) + model.host_s("decode"))


@pytest.mark.parametrize("name", CASES)
def test_engines_that_chunk_and_engines_that_stop_agree_on_a_lone_request(name: str) -> None:
    case = load(name)
    stops = replace(load_engine("vllm-ascend"), prefill_first=True)
    other = price(case.spec, case.graphs["decode"].parallel, engine=stops).model
    one, two = served(case.model, 1.0, input_len=1500), served(other, 1.0, input_len=1500)
    if other.locked == 1:
        assert two.tpot_s == pytest.approx(float(one.tpot_s), rel=1e-9)
    if len(other.graphs["decode"].stages) == 1:
        assert two.ttft_s == pytest.approx(float(one.ttft_s), rel=0.03)


def test_data_parallel_groups_add_up() -> None:
    """Two independent copies of a dense model serve twice as much, each request no slower."""
    spec = load_model("llama-3.1-8b")
    alone, twice = (served(price(spec, Parallelism(tp=2, dp=dp)).model, SLOTS) for dp in (1, 2))
    assert twice.requests_per_s == pytest.approx(2 * alone.requests_per_s, rel=1e-9)
    assert twice.ttft_s == pytest.approx(alone.ttft_s, rel=1e-9)


@given(name=case_names(), engine=st.sampled_from(ENGINES), output=st.integers(1, 512))
def test_the_parts_of_an_average_step_sum_to_it(name: str, engine: str, output: int) -> None:
    ours = served(load(name, engine=engine).model, SLOTS, output_len=output)
    parts = (ours.compute_s, ours.memory_s, ours.collective_s, ours.overhead_s)
    step = ours.tpot_s if output > 1 else ours.prefill_s
    assert sum(parts) == pytest.approx(step, rel=1e-9)
    assert all(np.all(part >= 0.0) for part in parts)


def test_a_grid_is_its_points() -> None:
    model = load("moe dp4 tp2 ep8").model
    chunks = np.asarray([512.0, 2048.0, 8192.0])
    grid = served(model, SLOTS[:, None], chunk=chunks[None, :])
    assert grid.tpot_s.shape == (10, 3)
    for i, j in ((0, 0), (4, 1), (9, 2)):
        one = served(model, float(SLOTS[i]), chunk=np.asarray(chunks[j]))
        for name in ("ttft_s", "tpot_s", "requests_per_s", "compute_s", "overhead_s"):
            assert getattr(grid, name)[i, j] == pytest.approx(float(getattr(one, name)), rel=1e-9)


def test_points_that_are_all_alike_are_spread_over_the_grid() -> None:
    """One decode step stands for all of them."""
    memo = Memo()
    alike = memo.different((np.full(9, 4.0),))
    assert alike.spread(np.array([7.0])).tolist() == [7.0] * 9
    assert alike.spread(np.array([[1.0], [2.0]])).shape == (2, 9)
    apart = memo.different((np.arange(9.0) // 3,))
    assert apart.spread(np.array([1.0, 2.0, 3.0])).tolist() == [1.0] * 3 + [2.0] * 3 + [3.0] * 3
    assert apart.spread(np.array([[5.0], [6.0]])).shape == (2, 1)
    assert apart.spread(np.asarray(8.0)).shape == ()


def test_the_front_end_delays_the_first_token_and_takes_its_share_of_a_closed_loop() -> None:
    """Of one request: latency and TTFT grow by its seconds, TPOT stays."""
    model = load("dense tp8").model
    slow = replace(model, engine=replace(model.engine, request_host_s=0.1))
    given = ServingInput(batch=np.ones(1), chunk=np.full(1, 2048.0), input_len=1024, output_len=64)
    usual, late = serve(model, given), serve(slow, given)
    assert late.ttft_s - usual.ttft_s == pytest.approx(0.1)
    assert late.end_to_end_s - usual.end_to_end_s == pytest.approx(0.1)
    assert late.tpot_s == pytest.approx(usual.tpot_s)
    assert late.requests_per_s == pytest.approx(1 / late.end_to_end_s)


def test_a_request_waits_for_steps_of_the_engine_on_its_way() -> None:
    """Each of `request_steps` is a mean step, and the more of them the more requests decode."""
    model = load("dense tp8").model
    slow = replace(model, engine=replace(model.engine, request_host_s=0.01, request_steps=3.0))
    slots = np.asarray([1.0, 16.0, 64.0])
    given = ServingInput(batch=slots, chunk=np.full(3, 2048.0), input_len=1024, output_len=64)
    late = serve(slow, given)
    assert late.front_s == pytest.approx(0.01 + 3.0 * late.tpot_s)
    assert (np.diff(late.front_s) > 0.0).all()
    assert (serve(model, given).front_s == 0.0).all()
