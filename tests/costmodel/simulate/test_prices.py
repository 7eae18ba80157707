"""Tables of step prices: the steady state's own steps, and how far lines between knots are off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.serving import ServingInput
from shardplan.costmodel.simulate.prices import StepPrices, StepTypes, knots
from shardplan.costmodel.step import StepModel
from shardplan.costmodel.steps import decode_stages, prompt_stages
from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.catalog import load_model
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism

PHASES: tuple[Phase, ...] = ("prefill", "decode")
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dense": ("llama-3.1-8b", "vllm-ascend", {"tp": 2}),
    "dense, mindie": ("qwen3-32b", "mindie", {"tp": 4}),
    "pipeline": ("llama-3.1-70b", "vllm-ascend", {"tp": 4, "pp": 2}),
    "experts": ("qwen3-30b-a3b", "vllm-ascend", {"tp": 2, "dp": 4, "ep": 8}),
    "ahead": ("deepseek-v3", "vllm-ascend", {"tp": 4, "dp": 4, "ep": 16, "mtp": 2}),
}


def step_model(model: str, engine: str, axes: dict[str, Any]) -> StepModel:
    """On Atlas 800I A3."""
    par = Parallelism(**axes)
    graphs = {
        phase: apply(build_graph(load_model(model), phase, mtp=par.mtp > 0), par)
        for phase in PHASES
    }
    return StepModel.of(graphs, load_cluster("atlas-800i-a3"), load_engine(engine))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_are_those_of_the_steady_state(case: str) -> None:
    """The same decode step, and the same step of one prompt alone, stage by stage."""
    model = step_model(*CASES[case])
    prices = StepPrices(model, StepTypes(), slots=32, chunk=2048, longest=8192)
    given = ServingInput(
        batch=np.asarray(24.0), chunk=np.asarray(2048.0), input_len=768.0, output_len=512.0
    )
    given = ServingInput(
        **{name: getattr(given, name) for name in ("batch", "chunk", "input_len", "output_len")},
        mtp=model.mtp,
    )
    told = model.step_s(decode_stages(model, given, np.asarray(24.0)), "decode")
    attention = [prices.cached(kind, 24, 1024.0) for kind in prices.kinds]
    mine = prices.decode_s(24, attention)
    assert [mine[kind] for kind in prices.which] == pytest.approx([float(one) for one in told])
    stages = prompt_stages(
        model,
        given,
        piece=np.asarray(768.0),
        prompt=np.asarray(768.0),
        sequences=np.asarray(0.0),
    )
    exact = prices.prompt_seconds(np.asarray(1.0), np.asarray(768.0), np.asarray(0.0))
    mine = prices.mixed_s(768, 0, 1, [float(one) for one in exact], beside=False)
    told = model.step_s(stages, "prefill")
    assert [mine[kind] for kind in prices.which] == pytest.approx([float(one) for one in told])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lines_between_knots_are_close(case: str) -> None:
    """Of random steps: mean and 99th percentile of the error of the whole step."""
    prices = StepPrices(step_model(*CASES[case]), StepTypes(), slots=128, chunk=4096, longest=16384)
    luck = np.random.default_rng(0)
    many = luck.integers(1, 129, 1000)
    context = luck.uniform(1.0, 12000.0, 1000)
    exact = prices.cached_seconds(many.astype(float), context)[0]
    errors = [
        prices.decode_s(n, [prices.cached(0, n, c)] * len(prices.kinds))[0]
        / prices.decode_s(n, [e] * len(prices.kinds))[0]
        - 1.0
        for n, c, e in zip(many.tolist(), context.tolist(), exact.tolist(), strict=True)
    ]
    assert np.mean(np.abs(errors)) < 5e-4
    assert np.percentile(np.abs(errors), 99) < 5e-3
    pieces = luck.integers(1, 7, 1000)
    new = np.maximum(np.exp(luck.uniform(0.0, np.log(4096 / pieces))).astype(int), 1)
    prefix = luck.integers(0, 4096, 1000) * (luck.random(1000) < 0.5)
    exact = prices.prompt_seconds(pieces.astype(float), new.astype(float), prefix.astype(float))[0]
    errors = []
    for m, n, x, e in zip(
        pieces.tolist(), new.tolist(), prefix.tolist(), exact.tolist(), strict=True
    ):
        found = prices.prompts(m, m * n, m * n * (x + n / 2.0))[0]
        whole, told = (
            prices.mixed_s(m * n, 0, m, [one] * len(prices.kinds), beside=False)[0]
            for one in (found, e)
        )
        errors.append(whole / told - 1.0)
    assert np.mean(np.abs(errors)) < 3e-3
    assert np.percentile(np.abs(errors), 99) < 3e-2


def test_uneven_pieces_keep_their_pairs() -> None:
    """One long prompt beside short ones costs more than as many even ones."""
    prices = StepPrices(
        step_model(*CASES["dense"]), StepTypes(), slots=16, chunk=8192, longest=16384
    )
    even = prices.prompts(4, 4096, 4 * 1024 * 512.0)
    uneven = prices.prompts(4, 4096, 4000 * 2000.0 + 3 * 32 * 16.0)
    assert uneven[0] > even[0]


def test_knots_grow_and_end_where_they_shall() -> None:
    found = knots(1000.0, 16.0, 1.1)
    assert (found[0], found[1], found[-1]) == (0.0, 16.0, 1000.0)
    gaps = np.diff(found)
    assert gaps[:-1].min() >= 16.0
    assert knots(1.0, 1.0, 1.1, 1.0) == [1.0, 2.0]
