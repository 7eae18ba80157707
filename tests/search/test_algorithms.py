"""Algorithms between servers, from the question to the plan and its environment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.search.emit_cases import emit_plan

from shardplan.costmodel.catalog import load_cluster
from shardplan.models.errors import InputError
from shardplan.models.parallel import Parallelism
from shardplan.search.algorithms import algorithms_for, hccl_algo, supported
from shardplan.search.api import search
from shardplan.search.emit import emit
from shardplan.search.evaluate import LayoutScorer, Question
from shardplan.search.report.words import strategy_sentences
from shardplan.search.request import Asked, resolve
from shardplan.search.tables_plan import strategy_words


@pytest.mark.parametrize(
    ("cluster", "nodes", "wanted"),
    [
        ("atlas-800t-a2", 1, ("auto",)),
        ("atlas-800t-a2", 2, ("auto", "pipeline")),  # two servers: every other form is one step
        ("atlas-800t-a2", 3, ("auto", "H-D_R", "pipeline")),  # ring and NHR: two steps
        ("atlas-800t-a2", 4, ("auto", "ring", "H-D_R", "pipeline")),
        ("atlas-800i-a3", 4, ("auto", "ring")),
        ("cloudmatrix-384", 4, ("auto", "ring", "NHR", "NB")),
        ("hgx-h200", 4, ("auto",)),
        ("atlas-300i-duo", 1, ("auto",)),
    ],
)
def test_only_what_can_change_a_price_is_searched(
    cluster: str, nodes: int, wanted: tuple[str, ...]
) -> None:
    assert algorithms_for(load_cluster(cluster, nodes=nodes)) == wanted


def test_what_hccl_takes_depends_on_the_device() -> None:
    assert supported(("Ascend950PR_9589",)) == ("NHR",)
    assert "H-D_R" not in supported(("Ascend910_9392",))
    assert supported(("Ascend310P3",)) == supported(()) == ()


@pytest.mark.parametrize(
    ("collectives", "nodes", "message"),
    [
        ("bruck", 2, "try auto, all, ring"),
        ("NHR_V1", 2, "documents no cost"),
        ("ring", 1, "more than one server"),
    ],
)
def test_an_algorithm_that_is_not_to_be_had_is_said(
    collectives: str, nodes: int, message: str
) -> None:
    asked = Asked(model="qwen3-8b", cluster="atlas-800t-a2", nodes=nodes, collectives=collectives)
    with pytest.raises(InputError, match=message):
        resolve(asked)


def test_all_searches_them_and_auto_stays_what_it_was() -> None:
    base = Asked(model="qwen3-8b", cluster="atlas-800t-a2", nodes=4)
    plain, every = resolve(base), resolve(replace(base, collectives="all"))
    assert {one.collectives for one in plain.choices} == {"auto"}
    assert len(every.choices) == len(plain.choices) * len(algorithms_for(every.cluster))
    assert every.choices[: len(plain.choices)] == plain.choices
    assert {one.collectives for one in resolve(replace(base, collectives="RING")).choices} == {
        "ring"
    }


def test_a_scorer_prices_an_algorithm_and_knows_where_it_changes_nothing() -> None:
    found = resolve(
        Asked(model="qwen3-30b-a3b", cluster="atlas-800t-a2", nodes=4, collectives="all")
    )
    question = Question(
        spec=found.spec,
        cluster=found.cluster,
        engine=found.engine,
        workload=found.request.workload,
        limits=found.request.limits,
        objective="throughput",
        cards=32,
    )
    grid = np.array([[8.0]]), np.array([[2048.0]])
    wide = LayoutScorer(question, Parallelism(tp=4, dp=8, ep=32))
    near = LayoutScorer(question, Parallelism(tp=4, dp=8))
    times = {}
    for choice in found.choices:
        times[choice.collectives] = wide.score(choice, *grid).every()["collective_s"].item()
        assert near.model_for(choice) is near.model
    assert times["ring"] > times["auto"] != times["pipeline"]


@pytest.mark.slow
def test_searching_all_is_never_worse_and_equals_pricing_each_alone() -> None:
    plans = {
        name: search(
            "qwen3-30b-a3b",
            "atlas-800t-a2",
            nodes=2,
            input_len=512,
            output_len=64,
            concurrency=4,
            collectives=name,
        ).plan
        for name in ("auto", "all", "pipeline")
    }
    best = {name: plan.performance.output_tokens_per_s for name, plan in plans.items()}
    assert best["all"] == max(best["auto"], best["pipeline"])
    assert plans["all"].certificate.space["collectives"] == ["auto", "pipeline"]
    assert plans["all"].request.collectives == "all"


def test_the_engine_is_told_which_algorithm(tmp_path: Path) -> None:
    emit(emit_plan(tp=8, pp=2, collectives="ring"), "vllm-ascend", tmp_path / "out")
    script = (tmp_path / "out" / "serve_node0.sh").read_text("utf-8")
    assert 'export HCCL_ALGO="${HCCL_ALGO:-level0:NA;level1:ring}"' in script
    assert "HCCL_ALGO picks ring" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert hccl_algo("pairwise") == "alltoall=level0:NA;level1:pairwise"
    emit(emit_plan(tp=8, pp=2), "vllm-ascend", tmp_path / "auto")
    assert "HCCL_ALGO" not in (tmp_path / "auto" / "serve_node0.sh").read_text("utf-8")


def test_a_plan_says_its_algorithm_where_one_was_picked() -> None:
    plain, picked = emit_plan().strategy, emit_plan(pp=2, collectives="ring")
    assert "ring between nodes" in strategy_words(picked.strategy)
    assert "between nodes" not in strategy_words(plain)
    assert "Nodes exchange by HCCL's ring algorithm." in strategy_sentences(picked)


def test_an_algorithm_of_another_device_is_not_emitted(tmp_path: Path) -> None:
    plan = emit_plan(soc="Ascend910_9382", tp=16, collectives="pipeline")
    with pytest.raises(InputError, match=r"no such algorithm.*try auto, ring, NHR, NB"):
        emit(plan, "vllm-ascend", tmp_path / "out")
