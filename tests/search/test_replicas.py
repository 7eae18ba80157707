"""Replicas: data-parallel groups that share no experts are deployments of their own."""

from __future__ import annotations

import numpy as np
import pytest
from tests.search.legality_cases import POD, VLLM, P, subject, wide
from tests.search.oracle import dense, small_case, sparse

from shardplan.models.parallel import Parallelism, make_mesh
from shardplan.models.spec import ModelSpec
from shardplan.search.evaluate import LayoutScorer
from shardplan.search.legality import first_broken_rule

LAYOUTS = [
    (P(dp=64, ep=32), 2),
    (P(tp=8, dp=4, ep=32), 1),
    (P(tp=4, dp=4, ep=8), 2),
    (P(tp=4, dp=4), 4),
    (P(tp=4, dp=4, ep=2), 4),
    (P(tp=4), 1),
]


@pytest.mark.parametrize(("layout", "replicas"), LAYOUTS, ids=[p.describe() for p, _ in LAYOUTS])
def test_groups_that_share_no_experts_are_replicas(layout: Parallelism, replicas: int) -> None:
    """dp 64 with ep 32 at tp 1: two deployments of 32, as the mesh of ranks has it."""
    assert layout.replicas == replicas
    mesh = make_mesh(wide(), layout)
    assert mesh.size(mesh.groups["dp0"]) == replicas


def test_replicas_never_fall_below_one() -> None:
    """A layout that breaks a rule still has a number that other rules may divide by."""
    assert P(dp=2, ep=4).replicas == 1


def test_several_deployments_side_by_side_are_in_the_space() -> None:
    """64 dies of a supernode: experts over 32, twice, and over 16 four times."""
    for ep in (16, 32, 64):
        layout = P(dp=64, ep=ep, exchange="alltoall")
        assert first_broken_rule(subject(wide(), POD, engine=VLLM, parallel=layout)) is None


@pytest.mark.parametrize(
    ("spec", "one", "two"),
    [(sparse(), P(dp=4, ep=4), P(dp=8, ep=4)), (dense(), P(tp=4), P(tp=4, dp=2))],
    ids=["experts", "dense"],
)
def test_two_replicas_do_twice_the_work_of_one(
    spec: ModelSpec, one: Parallelism, two: Parallelism
) -> None:
    """The same times and memory a rank, twice the rate: nothing passes between replicas."""
    grid = np.array([4.0]), np.array([512.0])
    found = []
    for layout in (one, two):
        case = small_case(spec, cards=layout.ranks)
        scores = LayoutScorer(case.question, layout).score(case.choices[0], *grid)
        found.append({name: float(values[0]) for name, values in scores.every().items()})
    for name in ("ttft_s", "tpot_s", "memory_bytes"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-12)
    twice = 2.0 * found[0]["output_tokens_per_s"]
    assert found[1]["output_tokens_per_s"] == pytest.approx(twice, rel=1e-12)
