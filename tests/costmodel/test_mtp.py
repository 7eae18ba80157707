"""Tokens predicted ahead: how many are kept, what a step costs, what a rank holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.costmodel.discrete import BASE_S, TOKEN_S, LinearModel, Setting, measure
from tests.costmodel.priced import PHASES, Priced, price

from shardplan.costmodel.acceptance import default_acceptance
from shardplan.costmodel.audit import audit_collectives, audit_memory
from shardplan.costmodel.bulk import Dtypes, Fleet
from shardplan.costmodel.bulk_memory import FleetMemory
from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import engine_names, load_engine
from shardplan.costmodel.forward import forward_loads
from shardplan.costmodel.kernels.attention import attention_decode
from shardplan.costmodel.kernels.base import Machine, as_array
from shardplan.costmodel.kernels.mla import mla_decode
from shardplan.costmodel.run_out import run_out
from shardplan.costmodel.serving import Serving, ServingInput, serve
from shardplan.costmodel.step import StepModel
from shardplan.costmodel.step_mix import tokens_per_step
from shardplan.costmodel.steps import step_seconds
from shardplan.models.catalog import load_model
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism

KINDS = Dtypes("w8a8", "bf16", "flash")
WAYS = {
    "latent tp8": ("deepseek-v3", Parallelism(tp=8)),
    "latent tp2 dp8 sp": ("deepseek-v3", Parallelism(tp=2, dp=8, ep=16, sp=True)),
    "latent a2a": ("deepseek-v3", Parallelism(tp=2, dp=8, ep=16, exchange="alltoall")),
    "grouped pp2": ("glm-4.5", Parallelism(tp=8, pp=2)),
}


def ahead(name: str, depth: int, engine: str = "vllm-ascend") -> Priced:
    """One of `WAYS` at a depth."""
    preset, par = WAYS[name]
    return price(load_model(preset), replace(par, mtp=depth), engine=engine)


def test_tokens_per_step_by_hand() -> None:
    assert tokens_per_step(0, 0.85) == 1.0
    assert tokens_per_step(1, 0.85) == pytest.approx(1.85)
    assert tokens_per_step(2, 0.5) == pytest.approx(1 + 0.5 + 0.25)
    assert tokens_per_step(3, 1.0) == 4.0
    assert tokens_per_step(3, 0.0) == 1.0


@given(st.integers(0, 15), st.floats(0.0, 1.0))
def test_a_step_gives_a_token_and_at_most_all_that_it_verifies(depth: int, kept: float) -> None:
    found = float(tokens_per_step(depth, kept))
    assert 1.0 <= found <= depth + 1.0 + 1e-9
    assert found == pytest.approx(sum(kept**i for i in range(depth + 1)), rel=1e-9)
    assert tokens_per_step(depth + 1, kept) >= found


def test_a_request_needs_fewer_steps_by_hand() -> None:
    """257 tokens: the first from the prompt, 256 more at 1.75 a step, in 146.3 steps."""
    given = ServingInput(
        batch=np.ones(1), chunk=np.ones(1), input_len=8, output_len=257, mtp=2, acceptance=0.5
    )
    assert float(given.decode_steps) == pytest.approx(256 / 1.75)
    assert float(given.steps_per_token) == pytest.approx(1 / 1.75)
    two = replace(given, output_len=2)
    assert float(two.decode_steps) == float(two.steps_per_token) == 1.0
    one = replace(given, output_len=1)
    assert float(one.decode_steps) == 0.0


def linear(setting: Setting, engine: str) -> Serving:
    """The formulas under a step time linear in its tokens."""
    return serve(
        cast("StepModel", LinearModel(engine)),
        ServingInput(
            batch=np.asarray(float(setting.slots)),
            chunk=np.asarray(float(setting.chunk)),
            input_len=setting.prompt,
            output_len=setting.output,
            mtp=setting.ahead,
            acceptance=setting.kept,
        ),
    )


STEPPED = [
    Setting(16, 2048, 512, 256, 1, 0.85),
    Setting(64, 2048, 1024, 512, 2, 0.7),
    Setting(16, 512, 2048, 512, 3, 0.6),
]


@pytest.mark.parametrize("setting", STEPPED)
def test_serving_is_what_an_engine_does_step_by_step(setting: Setting) -> None:
    """Each draft kept or not by a throw of dice, in an engine that keeps every request."""
    real, ours = measure(setting), linear(setting, "vllm-ascend")
    assert ours.requests_per_s == pytest.approx(real.requests_per_s, rel=0.03)
    assert ours.tpot_s == pytest.approx(real.tpot_s, rel=0.03)
    assert 0.85 * real.ttft_s <= ours.ttft_s <= 1.4 * real.ttft_s


@pytest.mark.parametrize("setting", STEPPED)
def test_engines_that_take_prompts_first_too(setting: Setting) -> None:
    whole = setting._replace(chunk=max(setting.chunk, setting.prompt))
    real, ours = measure(whole, prompts_first=True), linear(whole, "mindie")
    assert ours.requests_per_s == pytest.approx(real.requests_per_s, rel=0.03)
    assert ours.tpot_s == pytest.approx(real.tpot_s, rel=0.03)


def test_a_lone_request_by_hand() -> None:
    """Every step verifies 3 tokens and keeps 1.75: the time of a step over 1.75 a token."""
    ours = linear(Setting(1, 1000, 100, 176, 2, 0.5), "vllm-ascend")
    step_s = BASE_S + TOKEN_S * 3
    assert ours.tpot_s == pytest.approx(step_s / 1.75)
    assert ours.end_to_end_s == pytest.approx(BASE_S + TOKEN_S * 100 + 100 * step_s)


@pytest.fixture(scope="module")
def machine() -> Machine:
    """An A3 die."""
    return Machine.of(load_cluster("atlas-800i-a3").device, "vllm-ascend")


@given(st.integers(1, 64), st.integers(64, 16384), st.integers(2, 8))
def test_tokens_of_a_sequence_share_one_read_of_the_cache(
    machine: Machine, batch: int, seen: int, new: int
) -> None:
    """Several query tokens cost no less than one (to the fit's few percent) and less than a call
    for each.
    """
    kinds: dict[str, Any] = {"kernel": "flash", "kv_dtype": "bf16"}
    one = attention_decode(machine, batch, seen, 12.0, 1.0, 128.0, **kinds).total_s
    many = attention_decode(machine, batch, seen, 12.0, 1.0, 128.0, new_tokens=new, **kinds).total_s
    assert one * 0.97 <= many < new * one
    one = mla_decode(machine, batch, seen, 16.0, 512.0, 64.0, **kinds).total_s
    many = mla_decode(machine, batch, seen, 16.0, 512.0, 64.0, new_tokens=new, **kinds).total_s
    assert one * 0.97 <= many < new * one


@pytest.mark.parametrize("kernel", ["flash", "naive"])
def test_one_new_token_is_what_it_was(machine: Machine, kernel: Any) -> None:
    seen = np.asarray([1.0, 100.0, 5000.0])
    kinds: dict[str, Any] = {"kernel": kernel, "kv_dtype": "int8"}
    usual = attention_decode(machine, 4.0, seen, 8.0, 2.0, 128.0, **kinds)
    told = attention_decode(machine, 4.0, seen, 8.0, 2.0, 128.0, new_tokens=1.0, **kinds)
    assert usual.total_s.tobytes() == told.total_s.tobytes()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", WAYS)
def test_what_is_priced_is_what_is_proven(name: str, depth: int) -> None:
    case = ahead(name, depth)
    for phase in PHASES:
        assert audit_collectives(case.model, phase)
    assert audit_memory(case.ledger)


def _step_s(case: Priced, phase: Phase, new: float, depth: int) -> float:
    total, _ = step_seconds(
        case.model, phase, batch=32.0, new=new, prefix=2000.0, mtp=depth, **KINDS._asdict()
    )
    return float(total)


@pytest.mark.parametrize("name", WAYS)
def test_each_further_draft_costs_one_more_pass_of_one_token(name: str) -> None:
    """The same tokens verified at depths 1, 2 and 3: the step grows by the same each time."""
    one, two, three = (_step_s(ahead(name, depth), "decode", 4.0, depth) for depth in (1, 2, 3))
    assert 0.0 < two - one == pytest.approx(three - two, rel=1e-9)
    none = _step_s(ahead(name, 0), "decode", 4.0, 0)
    layers = load_model(WAYS[name][0]).layers
    assert none / layers / 2 < one - none < none / layers * 6


def test_a_prompt_passes_the_layer_once_whatever_the_depth() -> None:
    prompts = [_step_s(ahead("latent tp8", depth), "prefill", 512.0, depth) for depth in (0, 1, 3)]
    assert prompts[0] < prompts[1] == prompts[2]


def test_loads_of_a_step_by_hand() -> None:
    """8 sequences, 3 verified tokens each: 24 tokens and logits, then one token a sequence."""
    engine = load_engine("vllm-ascend")
    loads = forward_loads(
        "decode", engine, batch=8.0, new=3.0, prefix=99.0, mtp=2, **KINDS._asdict()
    )
    tokens = {name: float(one.tokens) for name, one in loads.items() if "attention" not in name}
    assert tokens == {"token": 24.0, "logits": 24.0, "draft_logits": 8.0, "draft": 8.0}
    again = loads["draft_attention"]
    assert [float(one) for one in (again.batch, again.new, again.prefix)] == [8.0, 1.0, 102.0]
    usual = forward_loads("decode", engine, batch=8.0, new=1.0, prefix=99.0, **KINDS._asdict())
    assert set(usual) == {"token", "attention", "logits"}


def test_the_last_stage_holds_the_layer_and_its_cache_by_hand() -> None:
    """GLM-4.5, tp 8, pp 2: one layer more, and the table of the embedding beside the head's."""
    plain, case = ahead("grouped pp2", 0), ahead("grouped pp2", 1)
    spec, stages = plain.spec, plain.ledger.graph.stages
    first, last = (
        case.ledger.weights_bytes(case.ledger.graph.stages[i], "bf16")
        - plain.ledger.weights_bytes(stages[i], "bf16")
        for i in (0, 1)
    )
    moe = spec.moe
    assert moe is not None
    layer = plain.ledger.graph.blocks["moe"]
    held = sum(
        plain.ledger.graph.model.size(node.op.weight)
        // plain.ledger.graph.mesh.size(tuple(axis for axis, _ in node.weight_layout))
        for node in layer.ops()
        if node.op is not None and node.op.weight
    )
    own = 2 * spec.hidden**2 + 3 * spec.hidden
    assert first == 0.0
    assert last == 2.0 * (held + own + spec.vocab * spec.hidden // 8)
    per_layer = plain.ledger.kv_bytes_per_token(stages[1], "bf16") / (
        stages[1].last - stages[1].first
    )
    more = case.ledger.kv_bytes_per_token(case.ledger.graph.stages[1], "bf16")
    assert more == plain.ledger.kv_bytes_per_token(stages[1], "bf16") + per_layer


def test_drafted_tokens_have_room_in_the_cache_and_logits() -> None:
    """A sequence that fills its blocks needs one more for tokens that may be refused."""
    case, plain = ahead("latent tp8", 2), ahead("latent tp8", 0)
    asked: dict[str, Any] = {**KINDS._asdict(), "batch": 4.0, "tokens": 16.0, "context": 128.0}
    full = case.ledger.stages(case.model.machine, **asked)[0]
    usual = plain.ledger.stages(plain.model.machine, **asked)[0]
    assert full.kv_cache_bytes == pytest.approx(usual.kv_cache_bytes * 2 * 62 / 61)
    assert full.activations_bytes >= 4.0 * 4 * 3 * case.spec.vocab


@pytest.mark.parametrize("engine", ["vllm-ascend", "mindie"])
def test_a_fleet_of_depths_costs_what_each_does_alone(engine: str) -> None:
    layouts = [
        ahead(name, depth, engine) for name in ("latent a2a", "grouped pp2") for depth in (0, 1, 2)
    ]
    which = np.arange(len(layouts))
    fleet = Fleet.of([one.model for one in layouts], which, [KINDS], np.zeros_like(which))
    places = which.astype(np.float64)
    batch, prefix = as_array(1.0 + 3.0 * places), as_array(500.0 + 100.0 * places)
    loads: dict[str, Any] = {"batch": batch, "new": 1.0 + fleet.mtp, "prefix": prefix}
    total, _ = step_seconds(fleet, "decode", mtp=fleet.mtp, **loads, **KINDS._asdict())
    given = ServingInput(
        batch=batch,
        chunk=np.full(which.shape, 2048.0),
        input_len=as_array(700.0 + places),
        output_len=as_array(100.0 + places),
        mtp=fleet.mtp,
        acceptance=np.full(which.shape, 0.8),
        **KINDS._asdict(),
    )
    together = run_out(fleet, given, num_prompts=400.0)
    memory = FleetMemory.of(
        [one.ledger for one in layouts], layouts[0].model.machine, which, [KINDS], 0 * which
    )
    held = memory.fullest_bytes(batch=batch, step_tokens=batch, context=prefix)
    for place, one in enumerate(layouts):
        depth = one.model.mtp
        want, _ = step_seconds(
            one.model,
            "decode",
            batch=batch[place],
            new=1.0 + depth,
            prefix=prefix[place],
            mtp=depth,
            **KINDS._asdict(),
        )
        assert total[place] == pytest.approx(float(want), rel=1e-12)
        own = slice(place, place + 1)
        alone = run_out(
            one.model,
            replace(
                given,
                batch=batch[own],
                chunk=np.full(1, 2048.0),
                input_len=700.0 + place,
                output_len=100.0 + place,
                mtp=depth,
                acceptance=0.8,
            ),
            num_prompts=400.0,
        )
        for name in ("ttft_mean_s", "tpot_mean_s", "tpot_p99_s", "output_tokens_per_s"):
            assert getattr(together, name)[place] == pytest.approx(
                float(getattr(alone, name)[0]), rel=1e-9
            )
        stages = one.ledger.stages(
            one.model.machine,
            batch=batch[place],
            tokens=batch[place],
            context=prefix[place],
            **KINDS._asdict(),
        )
        assert held[place] == pytest.approx(max(float(s.total_bytes) for s in stages), rel=1e-12)


@given(st.floats(0.0, 0.95), st.integers(1, 3))
def test_keeping_more_never_hurts(kept: float, depth: int) -> None:
    model = cast("StepModel", LinearModel("vllm-ascend"))
    given = ServingInput(
        batch=np.asarray([1.0, 16.0, 64.0]),
        chunk=np.asarray(2048.0),
        input_len=512,
        output_len=256,
        mtp=depth,
        acceptance=kept,
    )
    less, more = serve(model, given), serve(model, replace(given, acceptance=kept + 0.05))
    assert (more.tpot_s < less.tpot_s).all()
    assert (more.output_tokens_per_s > less.output_tokens_per_s).all()


def test_every_acceptance_and_depth_says_where_it_comes_from() -> None:
    known, other = default_acceptance("DeepseekV3ForCausalLM"), default_acceptance("Any")
    assert 0.85 <= known.value <= 0.9
    assert known.fact.kind == "measured"
    assert "2412.19437" in known.fact.source
    assert other.fact.kind == "assumed"
    for name in engine_names():
        engine = load_engine(name)
        assert engine.facts["mtp_max"].source
    assert load_engine("torch-graph").mtp_max == 0
