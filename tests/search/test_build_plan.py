"""From an outcome to a plan: the front, the lever, and numbers that are those of the scorer."""

from __future__ import annotations

import numpy as np
import pytest

from shardplan.models.counts import kv_bytes_per_token, parameter_count
from shardplan.search.api import search
from shardplan.search.build_plan import build_plan, memory_rows, pareto_front
from shardplan.search.evaluate import LayoutScorer, Question
from shardplan.search.exact import search_exact
from shardplan.search.kept import Outcome
from shardplan.search.plan import Plan
from shardplan.search.proof import prove_strategy
from shardplan.search.request import Asked, Resolved, resolve
from shardplan.search.space import build_space


@pytest.fixture(scope="module")
def found() -> tuple[Resolved, Question, Outcome]:
    """Llama-65B on a node, a grid of a few sizes."""
    resolved = resolve(Asked(model="llama-65b", cluster="atlas-800t-a2", concurrency=64))
    question = Question(
        spec=resolved.spec,
        cluster=resolved.cluster,
        engine=resolved.engine,
        workload=resolved.request.workload,
        limits=resolved.request.limits,
        objective="throughput",
        cards=8,
    )
    space = build_space(
        resolved.spec,
        resolved.cluster,
        resolved.engine,
        cards=8,
        choices=resolved.choices,
        batches=(1, 8, 64),
        chunks=(1024, 4096),
    )
    return resolved, question, search_exact(question, space)


@pytest.fixture(scope="module")
def plan(found: tuple[Resolved, Question, Outcome]) -> Plan:
    """Its plan."""
    resolved, question, outcome = found
    assert outcome.best is not None
    return build_plan(
        resolved,
        LayoutScorer(question, outcome.best.parallel),
        [outcome],
        outcome.best,
        prove_strategy(resolved.spec, outcome.best.parallel, level=0),
        quantization=(),
        switches=(),
        top=3,
        version="1.2.3",
        notes=("one",),
    )


def test_a_plan_tells_what_the_scorer_says(
    found: tuple[Resolved, Question, Outcome], plan: Plan
) -> None:
    """Scoring the plan's strategy alone gives every number of its performance."""
    _, question, outcome = found
    best = outcome.best
    assert best is not None
    scores = LayoutScorer(question, plan.strategy.parallelism()).score(
        best.choice,
        np.array([float(plan.strategy.batch)]),
        np.array([float(plan.strategy.chunk)]),
    )
    for name, value in plan.performance.model_dump().items():
        assert value == pytest.approx(float(scores.every()[name][0]), rel=1e-12), name


def test_the_model_and_machine_are_counted(plan: Plan) -> None:
    """65.3 billion parameters; 80 layers * 2 * 64 heads * 128 * 2 bytes a token."""
    assert plan.model.parameters == 65_285_660_672
    assert plan.model.kv_bytes_per_token == 80 * 2 * 64 * 128 * 2
    assert (plan.cluster.ranks, plan.cluster.nodes, plan.request.cards) == (8, 1, 8)
    assert plan.shardplan_version == "1.2.3"
    assert plan.notes[0] == "one"
    assert plan.quantization == ()


def test_weights_and_cache_of_a_rank_by_hand(
    found: tuple[Resolved, Question, Outcome],
) -> None:
    """tp 8, one stage: an eighth of the matrices and of the cache, whole norms."""
    resolved, question, outcome = found
    one = next(k for k in outcome.kept if k.parallel.tp == 8 and k.batch == 8)
    (row,) = memory_rows(LayoutScorer(question, one.parallel), one)
    spec = resolved.spec
    norms = (2 * spec.layers + 1) * spec.hidden
    held = (parameter_count(spec) - norms) / 8 + norms
    assert row.weights_bytes == pytest.approx(2.0 * held, rel=1e-12)
    tokens = 1024 + 256
    cache = kv_bytes_per_token(spec, dtype_bytes=2) * tokens * 8 / 8
    assert row.kv_cache_bytes == pytest.approx(cache, rel=1e-12)
    assert row.layers == 80


def test_every_stage_of_a_pipeline_has_a_row(found: tuple[Resolved, Question, Outcome]) -> None:
    """Layers and weights of all stages together are the model's."""
    resolved, question, outcome = found
    one = next(k for k in outcome.kept if k.parallel.pp == 4 and k.parallel.tp == 2)
    rows = memory_rows(LayoutScorer(question, one.parallel), one)
    assert [row.stage for row in rows] == [0, 1, 2, 3]
    assert sum(row.layers for row in rows) == resolved.spec.layers
    weights = sum(2 * row.weights_bytes for row in rows)
    assert weights == pytest.approx(2.0 * parameter_count(resolved.spec), rel=1e-3)


def test_the_front_by_brute_force(found: tuple[Resolved, Question, Outcome]) -> None:
    """A feasible strategy is on it unless another is at least as good in both and better in one."""
    _, _, outcome = found
    feasible = [one for one in outcome.kept if one.feasible]
    points = [(k.columns["output_tokens_per_s"], -k.columns["tpot_s"]) for k in feasible]
    best = {p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)}
    front = pareto_front(outcome)
    assert {(k.columns["output_tokens_per_s"], -k.columns["tpot_s"]) for k in front} == best
    assert len(front) == len(best)


def test_the_lever_is_the_largest() -> None:
    """Weights fill the card at one slot, the cache at many; 16-bit types halve."""
    alone = search("llama-65b", "atlas-800t-a2", concurrency=1).plan
    row = max(alone.memory, key=lambda one: one.total_bytes)
    assert "8-bit weights" in alone.largest_lever
    assert f"{row.weights_bytes / 2 / 2**30:.1f} GiB more" in alone.largest_lever
    free = (row.capacity_bytes - row.total_bytes) / 2**30
    assert f"{free:.1f} GiB free" in alone.largest_lever
    many = search("llama-65b", "atlas-800t-a2", ttft_ms=1e6, tpot_ms=1e6).plan
    assert "int8 KV cache" in many.largest_lever
    quantized = search("llama-65b", "atlas-800t-a2", concurrency=1, weight_dtype="w8a8").plan
    assert "4-bit weights" in quantized.largest_lever
    no_narrower = search("mixtral-8x7b", "atlas-800-9000", concurrency=1, weight_dtype="w8a8").plan
    assert "weights" not in no_narrower.largest_lever


def test_the_plan_says_how_sure_it_is(plan: Plan) -> None:
    """Shares of one whole, bands around the performance, a weakest part and what to run."""
    sure = plan.confidence
    assert sure is not None
    assert sum(sure.basis.model_dump().values()) == pytest.approx(1.0)
    rate, tpot_s = plan.performance.output_tokens_per_s, plan.performance.tpot_s
    assert sure.output_tokens_per_s_low < rate < sure.output_tokens_per_s_high
    assert sure.tpot_low_s < tpot_s < sure.tpot_high_s
    assert rate / sure.output_tokens_per_s_low == pytest.approx(sure.tpot_high_s / tpot_s)
    assert sure.weakest.kind in ("derived", "assumed")
    assert "shardplan" in sure.weakest.advice
