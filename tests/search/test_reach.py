"""Contexts over ranks and modules over ranks of their own: found where they are best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from tests.search.oracle import Case, dense, latent, small_case, sparse

from shardplan.costmodel.engines import load_engine
from shardplan.models.errors import LayoutError
from shardplan.models.parallel import Parallelism, make_mesh
from shardplan.models.spec import ModelSpec
from shardplan.search.api import search
from shardplan.search.evaluate import LayoutScorer
from shardplan.search.exact import search_exact
from shardplan.search.layouts import Reach, module_splits
from shardplan.search.space import build_space

MODULES = ("o_tp", "ffn_tp", "shared_tp", "head_tp", "embed_tp")
SHARED = sparse(shared_ffn=128)


def _free(spec: ModelSpec, **asked: float | int | None) -> Case:
    """A question to an engine that the fewest rules bind."""
    case = small_case(spec, **asked)  # type: ignore[arg-type]  # of a workload
    engine = replace(case.question.engine, name="torch-graph", prefill_first=True)
    question = replace(case.question, engine=replace(engine, fused=load_engine("vllm").fused))
    return replace(case, question=question, batches=(1, 16), chunks=(256, 2048))


def _every(spec: ModelSpec, cards: int, cp_most: int) -> Iterator[Parallelism]:
    """Every split of the cards that a mesh exists for, by plain loops."""
    sizes = [d for d in range(1, cards + 1) if cards % d == 0]
    for tp, pp, dp, cp in product(sizes, repeat=4):
        if tp * pp * dp * cp != cards or cp > cp_most or pp > spec.layers:
            continue
        for ep in range(1, tp * dp * cp + 1 if spec.moe else 2):
            for sp, exchange in product((False, True), ("allgather", "alltoall")):
                if (sp and tp == 1) or (ep == 1 and exchange == "alltoall"):
                    continue
                par = Parallelism(tp=tp, pp=pp, dp=dp, cp=cp, ep=ep, sp=sp, exchange=exchange)  # type: ignore[arg-type]  # a literal
                if _meshes(spec, par):
                    yield par


def _meshes(spec: ModelSpec, par: Parallelism) -> bool:
    try:
        make_mesh(spec, par)
    except LayoutError:
        return False
    return True


def _best(case: Case, layouts: list[Parallelism]) -> float:
    """The largest objective of any point of these layouts, cut evenly."""
    best = -np.inf
    for par in layouts:
        scorer = LayoutScorer(case.question, par)
        for choice in case.choices:
            for batch, chunk in product(case.batches, case.chunks):
                scores = scorer.score(choice, np.array([float(batch)]), np.array([float(chunk)]))
                if scores.feasible[0]:
                    best = max(best, float(scores.columns["objective"][0]))
    return best


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["throughput", "latency"])
@pytest.mark.parametrize("spec", [dense(), SHARED, latent()], ids=lambda spec: spec.name)
def test_contexts_are_searched_as_a_loop_over_them_does(spec: ModelSpec, objective: str) -> None:
    """Every cp that divides four cards, layers cut evenly and ranks in the usual order."""
    case = _free(spec, input_len=2000, output_len=8)
    case = replace(case, question=replace(case.question, objective=objective))
    space = build_space(
        spec,
        case.question.cluster,
        case.question.engine,
        cards=4,
        choices=case.choices,
        batches=case.batches,
        chunks=case.chunks,
        reach=Reach(contexts=None, ways=False),
    )
    layouts = list(_every(spec, 4, 4))
    assert set(space.layouts) == set(layouts)
    assert {par.cp for par in space.layouts} == {1, 2, 4}
    found = search_exact(case.question, space)
    assert found.best is not None
    assert found.best.columns["objective"] == _best(case, layouts)


def test_modules_take_every_set_of_ranks_that_nests() -> None:
    """Two groups of two: each set of modules over both groups, and shared experts whole."""
    par = Parallelism(tp=2, dp=2, ep=4)
    wanted = set()
    for chosen in product((0, 4), repeat=len(MODULES)):
        for shared in (chosen[2], 1) if not chosen[2] else (chosen[2],):
            one = replace(par, **dict(zip(MODULES, chosen, strict=True)) | {"shared_tp": shared})  # type: ignore[arg-type]  # sizes
            if one.ffn_tp == 0:  # every layer has experts
                wanted.add(one)
    assert set(module_splits(SHARED, par)) == wanted - {par}


def test_a_split_head_is_found_where_it_is_best() -> None:
    """The space with modules holds the one without, and its best is the best of a loop."""
    case = _free(replace(SHARED, vocab=65536), input_len=16, output_len=64, cards=4)
    found = {}
    for modules in (False, True):
        space = build_space(
            case.question.spec,
            case.question.cluster,
            case.question.engine,
            cards=4,
            choices=case.choices,
            batches=case.batches,
            chunks=case.chunks,
            reach=Reach(modules=modules, ways=False),
        )
        found[modules] = search_exact(case.question, space), space
    plain, split = found[False][0].best, found[True][0].best
    assert plain is not None
    assert split is not None
    assert split.columns["objective"] >= plain.columns["objective"]
    layouts = list(found[True][1].layouts)
    assert len(layouts) > len(found[False][1].layouts)
    assert split.columns["objective"] == _best(case, layouts)


def test_nothing_beyond_the_plain_axes_is_in_a_plan_unasked() -> None:
    plan = search("llama-3.1-8b", "atlas-800t-a2", cards=4, input_len=256, output_len=32).plan
    space = plan.certificate.space
    assert (space["cp"], space["mtp"]) == ([1], [0])
    assert all(space[name] == [0] for name in MODULES)


def test_a_context_that_is_asked_for_is_in_the_plan() -> None:
    """A long prompt for one request, on an engine that shares contexts."""
    asked: dict[str, Any] = {"cards": 4, "input_len": 30000, "output_len": 4, "concurrency": 1}
    usual = search("llama-3.1-8b", "atlas-800t-a2", objective="latency", **asked).plan
    wide = search("llama-3.1-8b", "atlas-800t-a2", objective="latency", cp="auto", **asked).plan
    assert wide.certificate.space["cp"] == [1, 2, 4]
    assert wide.performance.end_to_end_s <= usual.performance.end_to_end_s
    assert wide.proof.passed
