"""Bounds from below on what requests see: no more than the dear model, whatever is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.search.oracle import small_case
from tests.search.small_models import dense, latent, sparse

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.run_out import run_out
from shardplan.models.catalog import load_model
from shardplan.models.spec import ModelSpec
from shardplan.search.evaluate import LayoutScorer, Question
from shardplan.search.plan import Limits, Workload
from shardplan.search.seen import AT_RATE, TAILS, may_hold, seen_at_least, too_slow
from shardplan.search.space import Choice, build_space

CHOICE = Choice(attention="flash", weight_dtype="bf16", kv_dtype="bf16")
BATCHES = np.array(
    [1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 21, 28, 36, 50, 72, 100, 160, 256], dtype=float
)
CHUNKS = np.array([256, 464, 1024, 1728, 4096], dtype=float)
GRID = BATCHES[:, None], CHUNKS[None, :]
DRAWN = (
    ("qwen3-30b-a3b", "atlas-800i-a3", 16, "vllm-ascend"),
    ("deepseek-v2-lite", "atlas-800t-a2", 8, "mindie"),
    ("qwen2.5-14b", "atlas-800t-a2", 8, "vllm-ascend"),
    ("llama-3.1-8b", "hgx-h100", 4, "vllm"),
)


def question_of(name: str, cluster: str, cards: int, engine: str) -> Question:
    """With limits that nothing is held against."""
    return Question(
        spec=load_model(name),
        cluster=load_cluster(cluster, cards=cards),
        engine=load_engine(engine),
        workload=Workload(input_len=1024, output_len=256),
        limits=Limits(ttft_s=1.0, ttft_p99_s=1.0, tpot_p99_s=1.0),
        objective="throughput",
        cards=cards,
    )


def scorers(question: Question, count: int, rng: np.random.Generator) -> Iterator[LayoutScorer]:
    """Some layouts that are legal."""
    space = build_space(
        question.spec,
        question.cluster,
        question.engine,
        cards=question.cards,
        choices=(CHOICE,),
        batches=(1,),
        chunks=(256,),
    )
    able = [par for par in space.layouts if space.broken_switch(par, CHOICE) is None]
    for at in rng.permutation(len(able))[:count].tolist():
        yield LayoutScorer(question, able[at])


def drawn(able: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    places = np.flatnonzero(able)
    return rng.permutation(places)[:16]


@pytest.mark.parametrize("drawing", DRAWN, ids=lambda one: "-".join(map(str, one)))
@pytest.mark.parametrize("load", [None, 0.05, 0.5, 0.95])
def test_no_bound_is_above_the_value(
    drawing: tuple[str, str, int, str], load: float | None
) -> None:
    """Of drawn layouts, slots and step sizes, at rates from little to nearly all that is served."""
    rng = np.random.default_rng(len(drawing[0]))
    question = question_of(*drawing)
    told = 0
    for scorer in scorers(question, 4, rng):
        scores = scorer.score(CHOICE, *GRID, dear=False)
        served = scores.columns["requests_per_s"]
        fits = GRID[1] >= GRID[0]
        rate = None if load is None else load * float(rng.choice(served[fits]))
        work = question.workload.model_copy(update={"request_rate": rate})
        scorer.question = replace(question, workload=work)
        least = seen_at_least(scorer, CHOICE, GRID, scores.steady)
        at = drawn(fits & (served > (rate or 0.0)), rng)
        slots, tokens = (np.broadcast_to(one, served.shape).ravel()[at] for one in GRID)
        given = scorer.serving_input(CHOICE, slots, tokens)
        run = run_out(scorer.model_for(CHOICE), given, request_rate=rate or math.inf)
        values = {AT_RATE: run.ttft_mean_s, TAILS[0]: run.ttft_p99_s, TAILS[1]: run.tpot_p99_s}
        for name, bound in least.items():
            own = np.broadcast_to(bound, served.shape).ravel()[at]
            assert (own <= values[name]).all(), name
            told += int((own > 0.3 * values[name]).sum())
        if load is None:
            tpot_s = least[TAILS[1]].ravel()[at]
            assert tpot_s == pytest.approx(run.tpot_p99_s, rel=1e-8)
    assert told


@pytest.mark.parametrize("load", [None, 0.3])
def test_points_alone_have_bounds_too(load: float | None) -> None:
    """Of a list of points as of cuts: no more than what a whole grid knows of them."""
    case = small_case(latent(), cards=2, ttft_p99_s=1.0)
    scorer = LayoutScorer(case.question, case.space().layouts[0])
    scores = scorer.score(CHOICE, *GRID, dear=False)
    served = scores.columns["requests_per_s"]
    rate = None if load is None else load * float(served.max())
    work = case.question.workload.model_copy(update={"request_rate": rate})
    scorer.question = replace(case.question, workload=work)
    at = np.flatnonzero(served >= (rate or 0.0))[::3]
    slots, tokens = (np.broadcast_to(one, served.shape).ravel()[at] for one in GRID)
    alone = seen_at_least(
        scorer, CHOICE, (slots, tokens), scorer.score(CHOICE, slots, tokens, dear=False).steady
    )
    every = seen_at_least(scorer, CHOICE, GRID, scores.steady)
    for name, bound in alone.items():
        whole = np.broadcast_to(every[name], served.shape).ravel()[at]
        assert (bound > 0.0).all()
        assert (bound <= whole * (1.0 + 1e-9)).all()


@pytest.mark.parametrize("spec", [dense(), sparse()], ids=["dense", "sparse"])
def test_what_shorter_steps_may_hold_is_not_left_out(spec: ModelSpec) -> None:
    """As steps are, what no bound refuses; with shorter steps no fewer points."""
    case = small_case(spec, cards=2, ttft_p99_s=0.05)
    scorer = LayoutScorer(case.question, case.space().layouts[0])
    scores = scorer.score(CHOICE, *GRID, dear=False)
    rate = 0.4 * float(scores.columns["requests_per_s"].max())
    work = case.question.workload.model_copy(update={"request_rate": rate})
    scorer.question = question = replace(case.question, workload=work)
    before = None
    for share in (1.0, 0.9, 0.5, 0.1):
        able = may_hold(scorer, CHOICE, GRID, scores.steady, np.full((1, 1), share))
        if before is None:
            least = seen_at_least(scorer, CHOICE, GRID, scores.steady)
            slow = too_slow(question, least)["ttft_p99"]
            assert (able == ~slow).all()
        else:
            assert (able | ~before).all()
        before = able
