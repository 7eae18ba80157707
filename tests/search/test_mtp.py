"""Depth of prediction as a dimension of the search: asked for, legal, priced, emitted."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.search.emit_cases import emit_plan, moe, run_script
from tests.search.oracle import best_of, brute_force, latent, small_case, sparse

import shardplan
from shardplan.costmodel.engines import load_engine
from shardplan.models.catalog import load_model
from shardplan.models.errors import InputError, LayoutError
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec
from shardplan.search.api import SearchResult, estimate
from shardplan.search.emit import emit
from shardplan.search.emit.atc import files as atc_files
from shardplan.search.emit.vllm_ascend import files
from shardplan.search.evaluate import LayoutScorer
from shardplan.search.exact import search_exact
from shardplan.search.mtp import mtp_depths
from shardplan.search.plan import Plan
from shardplan.search.proof import verify_plan
from shardplan.search.request import Asked, resolve
from shardplan.search.sampled import search_sampled


def test_depths_that_are_asked_for() -> None:
    spec, engine = load_model("deepseek-v3"), load_engine("vllm-ascend")
    notes: list[str] = []
    assert mtp_depths(spec, engine, "off", notes) == (0,)
    assert mtp_depths(spec, engine, "auto", notes) == (0, 1, 2, 3)
    assert mtp_depths(spec, engine, "2", notes) == mtp_depths(spec, engine, 2, notes) == (2,)
    assert notes == []
    assert mtp_depths(load_model("qwen3-32b"), engine, "auto", notes) == (0,)
    assert mtp_depths(spec, load_engine("torch-graph"), "auto", notes) == (0,)
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("model", "engine", "asked", "says"),
    [
        ("qwen3-32b", "vllm-ascend", 1, "ships no prediction layer"),
        ("deepseek-v3", "torch-graph", 1, "predicts no tokens ahead"),
        ("glm-4.5", "mindie", 1, "predicts no tokens ahead"),
        ("deepseek-v3", "mindie", 3, "at most 2 tokens ahead"),
        ("deepseek-v3", "vllm-ascend", 4, "at most 3 tokens ahead"),
        ("deepseek-v3", "vllm-ascend", "-1", "off, auto or"),
        ("deepseek-v3", "vllm-ascend", "on", "off, auto or"),
        ("deepseek-v3", "vllm-ascend", True, "off, auto or"),
    ],
)
def test_depths_that_cannot_be_had(model: str, engine: str, asked: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        mtp_depths(load_model(model), load_engine(engine), asked, [])


@pytest.mark.parametrize("spec", [sparse(), latent()], ids=["experts", "latent"])
def test_the_best_of_all_depths_is_brute_forces_best(spec: ModelSpec) -> None:
    spec = replace(spec, mtp_layers=1)
    case = small_case(spec, cards=2, tpot_s=0.01, concurrency=24, mtp_acceptance=0.7)
    grid: dict[str, Any] = {"choices": case.choices[:1], "batches": (1, 16), "chunks": (16, 2048)}
    case = replace(case, **grid, depths=(0, 1, 2))
    everything, space = brute_force(case), case.space()
    best, outcome = best_of(everything), search_exact(case.question, space)
    assert list(dict.fromkeys(space.layout_of(one.parallel) for one in everything)) == list(
        space.layouts
    )
    assert best is not None
    assert outcome.best is not None
    assert (outcome.best.parallel, outcome.best.batch, outcome.best.chunk) == (
        best.parallel,
        best.batch,
        best.chunk,
    )
    assert outcome.best.columns["objective"] == best.objective
    assert best.parallel.mtp > 0
    assert space.dimensions()["mtp"] == [0, 1, 2]
    piped = [par for par in space.layouts if par.pp > 1]
    assert piped
    assert not any(par.mtp for par in piped)


def test_sampling_draws_depths_too() -> None:
    case = small_case(replace(latent(), mtp_layers=1), cards=2, mtp_acceptance=0.9)
    case = replace(case, batches=(4, 16), chunks=(512, 2048), depths=(0, 1, 2))
    space = case.space()
    found = search_sampled(case.question, space, engine="random", trials=40, seed=1)
    assert {one.parallel.mtp for one in found.kept} == {0, 1, 2}
    assert {space.layout_of(one.parallel) for one in found.kept} <= set(space.layouts)


def test_without_drafts_a_layout_scores_as_if_it_had_none() -> None:
    """A model that ships a layer and one that does not: the same numbers, to the bit."""
    batch, chunk = np.asarray([[1.0], [9.0], [64.0]]), np.asarray([[64.0, 512.0, 4096.0]])
    scores = []
    for layers in (0, 1):
        case = small_case(replace(sparse(), mtp_layers=layers), concurrency=9)
        scorer = LayoutScorer(case.question, Parallelism(tp=2, dp=2, ep=4))
        scores.append(scorer.score(case.choices[0], batch, chunk))
    other = scores[1].every()
    for name, values in scores[0].every().items():
        assert values.tobytes() == other[name].tobytes()


def test_a_step_must_hold_all_that_its_slots_verify() -> None:
    case = small_case(replace(sparse(), mtp_layers=1))
    scorer = LayoutScorer(case.question, Parallelism(tp=4, mtp=3))
    scores = scorer.score(case.choices[0], np.asarray([64.0]), np.asarray([255.0, 256.0]))
    assert scores.limit.tolist() == [2, -1]


@pytest.fixture(scope="module")
def found() -> SearchResult:
    """GLM-4.5 on eight A3 dies over all depths."""
    return shardplan.search(
        "glm-4.5",
        "atlas-800i-a3",
        cards=8,
        input_len=1024,
        output_len=256,
        concurrency=64,
        tpot_ms=100,
        weight_dtype="w8a8",
        mtp="auto",
        mtp_acceptance=0.7,
    )


def test_a_plan_that_drafts_says_so_and_is_proven(found: SearchResult, tmp_path: Any) -> None:
    plan = found.plan
    assert plan.strategy.mtp > 0
    assert plan.request.mtp == "auto"
    assert plan.request.workload.mtp_acceptance == 0.7
    assert plan.certificate.space["mtp"] == [0, 1, 2, 3]
    assert plan.certificate.gap == 0.0
    assert any("prediction layer joined" in check for check in plan.proof.checks)
    kinds = {row.kind for row in plan.breakdown if row.phase == "decode"}
    assert "concat" in kinds
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.dumps() == plan.dumps()
    assert verify_plan(again).passed


def test_the_engine_is_told_the_depth(tmp_path: Any) -> None:
    """Graphs are captured for all tokens that a step verifies."""
    glm = moe(architecture="Glm4MoeForCausalLM")
    plan = emit_plan(mtp=3, batch=16, ep=8, model=glm, workload={"mtp_acceptance": 0.7})
    emit(plan, "vllm-ascend", tmp_path / "out")
    (call,) = run_script(tmp_path / "out" / "serve_node0.sh", "vllm", MODEL="/checkpoint")
    told = json.loads(call.words[call.words.index("--speculative-config") + 1])
    assert told == {"method": "mtp", "num_speculative_tokens": 3}
    graphs = json.loads(call.words[call.words.index("--compilation-config") + 1])
    assert graphs["cudagraph_capture_sizes"] == [4, 8, 16, 32, 64]
    assert "70% of drafts" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mtp": 16}, "at most 15 tokens"),
        ({"mtp": 1, "model": moe()}, "predicted ahead with DeepseekV3ForCausalLM"),
        ({"mtp": 1, "tp": 4, "pp": 2, "ep": 4}, "one pipeline stage"),
        ({"mtp": 3, "batch": 24, "chunk": 95}, "times the tokens that a step verifies"),
    ],
)
def test_what_the_engine_cannot_draft_is_refused(changes: dict[str, Any], says: str) -> None:
    glm = {"model": moe(architecture="Glm4MoeForCausalLM"), "ep": 8}
    with pytest.raises(InputError, match=says):
        files(emit_plan(**{**glm, **changes}))


def test_a_compiler_drafts_nothing() -> None:
    with pytest.raises(InputError, match="no loop that drafts"):
        atc_files(emit_plan(mtp=1))


def test_nothing_is_predicted_unless_asked() -> None:
    usual = resolve(Asked(model="glm-4.5", cluster="atlas-800i-a3", concurrency=64))
    assert usual.reach.depths == (0,)
    assert usual.request.mtp == "off"
    assert usual.request.workload.mtp_acceptance is None
    assert not any("mtp" in note for note in usual.notes)
    asked = resolve(Asked(model="glm-4.5", cluster="atlas-800i-a3", mtp="auto"))
    assert asked.request.workload.mtp_acceptance == 0.85
    assert any("mtp_acceptance was not given" in note for note in asked.notes)


POINT: dict[str, Any] = {
    "model": "deepseek-v3",
    "cluster": "atlas-800i-a3",
    "nodes": 2,
    "tp": 4,
    "dp": 8,
    "ep": 32,
}


def test_estimate_prices_a_depth() -> None:
    decode = [estimate(phase="decode", batch=16, tokens=4096, mtp=k, **POINT) for k in (0, 1, 2)]
    steps = [one["step_s"] for one in decode]
    assert steps[0] < steps[1] < steps[2] < 2 * steps[0]
    assert decode[0]["memory_bytes"] < decode[1]["memory_bytes"]
    serve = {"phase": "serve", "input_len": 512, "output_len": 512, "concurrency": 64, **POINT}
    plain, usual = estimate(**serve), estimate(mtp=1, **serve)
    assert usual["tpot_mean_s"] < plain["tpot_mean_s"]
    assert "mtp_acceptance was not given" in usual["message"]
    told = estimate(mtp=1, mtp_acceptance=0.0, **serve)
    assert told["tpot_mean_s"] > plain["tpot_mean_s"]
    assert "mtp_acceptance" not in told["message"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"mtp": 4}, InputError),
        ({"mtp": 1, "model": "qwen3-32b", "ep": 1}, InputError),
        ({"mtp": 1, "mtp_acceptance": 1.5}, InputError),
        ({"mtp": -1}, InputError),
        ({"mtp": 1, "tp": 7}, LayoutError),
    ],
)
def test_estimate_refuses_a_depth_that_cannot_be_had(
    changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        estimate(phase="decode", **{**POINT, **changes})


@pytest.mark.slow
def test_deepseek_on_64_dies_of_a_supernode() -> None:
    found = shardplan.search("deepseek-v3", "cloudmatrix-384", cards=64, mtp="auto")
    plan = found.plan
    assert plan.strategy.mtp > 0
    assert plan.proof.passed
    assert any("mtp_acceptance was not given: 0.85" in note for note in plan.notes)
