"""The exact search finds what brute force finds, and its certificate adds up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.oracle import (
    Case,
    Found,
    best_of,
    brute_force,
    cases,
    dense,
    latent,
    small_case,
    sparse,
    specs,
)

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.load import Load
from shardplan.costmodel.step import StepModel
from shardplan.costmodel.steps import step_seconds
from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.graph import ModelGraph, Phase
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec, MoeSpec
from shardplan.search.bounds import most_objective
from shardplan.search.evaluate import LIMITS, LayoutScorer, Question
from shardplan.search.exact import search_exact
from shardplan.search.kept import Kept, pareto_mask
from shardplan.search.space import Choice, Space
from shardplan.search.spare import Spare


def _agrees(case: Case) -> None:
    """The search's best is as good as the oracle's, to the bit; every strategy is accounted for."""
    everything = brute_force(case)
    best = best_of(everything)
    space = case.space()
    outcome = search_exact(case.question, space)
    legal = list(dict.fromkeys(space.layout_of(one.parallel) for one in everything))
    assert legal == list(space.layouts)
    assert outcome.tally.evaluated + sum(outcome.tally.pruned_by.values()) == space.size
    assert min(outcome.tally.pruned_by.values(), default=0) >= 0
    feasible = sum(one.feasible for one in everything)
    assert outcome.tally.evaluated - sum(outcome.tally.infeasible.values()) <= feasible
    assert outcome.complete
    if best is None:
        assert outcome.best is None
        return
    kept = outcome.best
    assert kept is not None
    assert kept.columns["objective"] == best.objective == outcome.bound
    same = [one for one in everything if _same(one, kept)]
    assert [one.feasible for one in same] == [True]
    for one in everything:
        dtype = one.choice.weight_dtype
        assert one.objective <= most_objective(case.question, one.parallel, dtype)


def _same(one: Found, kept: Kept) -> bool:
    """Whether both are one strategy."""
    return (one.parallel, one.choice, one.batch, one.chunk) == (
        kept.parallel,
        kept.choice,
        kept.batch,
        kept.chunk,
    )


@settings(max_examples=12)
@given(cases())
def test_the_best_is_brute_forces_best(case: Case) -> None:
    _agrees(case)


@pytest.mark.slow
@settings(max_examples=100)
@given(cases())
def test_the_best_is_brute_forces_best_on_many_questions(case: Case) -> None:
    _agrees(case)


def _may_lose(case: Case, spare: Spare, rate: float) -> Case:
    """The same over a rate, with so much lost."""
    work = case.question.workload.model_copy(update={"request_rate": rate})
    return replace(case, question=replace(case.question, workload=work, spare=spare))


SPARES = st.builds(Spare, count=st.sampled_from([1, 1, 2]), unit=st.sampled_from(["card", "node"]))


@settings(max_examples=10)
@given(cases(), SPARES, st.sampled_from([1e-3, 5.0, 300.0]))
def test_headroom_is_that_of_brute_force(case: Case, spare: Spare, rate: float) -> None:
    _agrees(_may_lose(case, spare, rate))


@pytest.mark.slow
@settings(max_examples=50)
@given(cases(), SPARES, st.sampled_from([1e-3, 5.0, 300.0]))
def test_headroom_is_that_of_brute_force_on_many_questions(
    case: Case, spare: Spare, rate: float
) -> None:
    _agrees(_may_lose(case, spare, rate))


@settings(max_examples=20)
@given(specs(), st.sampled_from([1, 2, 4]), st.data())
def test_a_grid_holds_the_prices_of_its_points(
    spec: ModelSpec, cards: int, data: st.DataObject
) -> None:
    """A whole grid (whose equal steps are priced once) against one strategy at a time."""
    case = small_case(spec, cards=cards, concurrency=data.draw(st.sampled_from([None, 9])))
    par = data.draw(st.sampled_from(case.space().layouts))
    choice = data.draw(st.sampled_from(case.choices))
    scorer = LayoutScorer(case.question, par)
    batch, chunk = np.array(case.batches, float)[:, None], np.array(case.chunks, float)[None, :]
    grid = scorer.score(choice, batch, chunk)
    every = grid.every()
    rows, columns = grid.limit.shape
    for i, j in ((0, 0), (rows - 1, columns - 1), (3, 2), (rows - 1, 0), (1, columns - 1)):
        one = scorer.score(choice, batch[i], chunk[0, j : j + 1])
        assert one.limit[0] == grid.limit[i, j]
        for name, values in one.every().items():
            assert values[0] == pytest.approx(every[name][i, j], rel=1e-12, abs=1e-15), name


def test_a_switch_is_searched_where_it_is_legal_and_counted_where_it_is_not() -> None:
    """Four cards of A2: fused collectives with tp 2 or 4 and without sp, on 3 of 9 layouts.

    Four layers are cut into two stages in three ways: tp 1 has 1 + 3 + 1 cuts with pp 1, 2, 4, and
    the three layouts with sp have 1 + 1 + 3.
    """
    case = small_case(dense(), input_len=2000)
    on = replace(case.choices[0], fused_collectives=True)
    space = replace(case, choices=(case.choices[0], on)).space()
    outcome = search_exact(case.question, space)
    grid = len(space.batches) * len(space.chunks)
    assert outcome.tally.pruned_by["rule fused-group"] == 5 * grid
    assert outcome.tally.pruned_by["rule fused-sp"] == 5 * grid
    assert outcome.tally.evaluated + sum(outcome.tally.pruned_by.values()) == space.size
    assert {one.parallel.tp for one in outcome.kept if one.choice == on} == {2, 4}
    assert space.dimensions()["fused_collectives"] == [False, True]


@settings(max_examples=15)
@given(cases(), st.sampled_from([4e6, 8e6, 12e6]))
def test_what_memory_prunes_holds_nothing_feasible(case: Case, hbm_bytes: float) -> None:
    device = replace(case.question.cluster.device, hbm_bytes=hbm_bytes)
    question = replace(case.question, cluster=replace(case.question.cluster, device=device))
    batch = np.array(case.batches, float)[:, None]
    chunk = np.array(case.chunks, float)[None, :]
    for par in case.space().layouts[:6]:
        scorer = LayoutScorer(question, par)
        for choice in case.choices:
            allowed = case.space().broken_switch(par, choice) is None
            if allowed and scorer.least_bytes(choice) > scorer.ledger.capacity_bytes:
                assert not scorer.score(choice, batch, chunk).feasible.any()


def test_memory_prunes_and_says_so() -> None:
    """A model of 3.8 million parameters does not fit four cards of 1 MB, however it is split."""
    case = small_case(dense(), hbm_bytes=1e6)
    outcome = search_exact(case.question, case.space())
    assert outcome.best is None
    assert outcome.tally.evaluated == 0
    assert outcome.tally.pruned_by["memory"] == sum(
        map(case.space().strategies, case.space().layouts)
    )
    assert outcome.tally.nearest["memory"].columns["memory_bytes"] > 1e6


def test_what_just_fits_is_found() -> None:
    """Capacity of exactly the least that any strategy of the space needs: that one is the best."""
    case = small_case(dense(), concurrency=1)
    least = min(one.columns["memory_bytes"] for one in _every_smallest(case))
    fraction = case.question.engine.memory_fraction
    tight = small_case(dense(), concurrency=1, hbm_bytes=(least + 1.0) / fraction)
    best = search_exact(tight.question, tight.space()).best
    assert best is not None
    assert best.columns["memory_bytes"] == pytest.approx(least, rel=1e-12)


def _every_smallest(case: Case) -> list[Kept]:
    smallest = replace(case, batches=case.batches[:1], chunks=case.chunks[:1])
    return list(search_exact(smallest.question, smallest.space()).kept)


def test_of_equals_the_one_with_less_memory_is_taken() -> None:
    """One request in flight: more slots, or a step longer than its 300 tokens, gain nothing."""
    case = small_case(dense(), cards=1, concurrency=1)
    best = search_exact(case.question, case.space()).best
    assert best is not None
    assert (best.batch, best.chunk) == (1, 512)


@pytest.mark.parametrize("spec", [dense(), sparse(), latent()], ids=lambda spec: spec.name)
def test_what_is_kept_has_the_price_of_its_own_layout_and_choice(spec: ModelSpec) -> None:
    """Prices are shared between layouts and choices where they agree, and only there."""
    case = small_case(spec)
    seen: dict[tuple[Parallelism, Choice], Kept] = {}
    for one in search_exact(case.question, case.space()).kept:
        seen.setdefault((one.parallel, one.choice), one)
    assert len({choice for _, choice in seen}) == 2
    for one in list(seen.values())[:12]:
        at = np.array([float(one.batch)]), np.array([float(one.chunk)])
        alone = LayoutScorer(case.question, one.parallel).score(one.choice, *at)
        for name, values in alone.every().items():
            assert values[0] == pytest.approx(one.columns[name], rel=1e-12, abs=1e-15), name


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=40),
)
def test_the_pareto_points_are_those_that_none_beats(points: list[tuple[int, int]]) -> None:
    """Small integers, so that many points tie: of equal points one stands for all."""
    gain, cost = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    kept = [point for point, stays in zip(points, pareto_mask(gain, cost), strict=True) if stays]
    beaten = {
        (g, c) for g, c in points for g2, c2 in points if g2 >= g and c2 <= c and (g2, c2) != (g, c)
    }
    assert sorted(kept) == sorted(set(points) - beaten)


def test_two_searches_agree_in_everything() -> None:
    case = small_case(sparse(), tpot_s=0.004)
    one, two = (search_exact(case.question, case.space()) for _ in range(2))
    assert list(one.kept) == list(two.kept)
    assert one.best == two.best
    assert one.tally == two.tally


@settings(max_examples=12)
@given(cases(), st.sampled_from([1.3, 4.0]))
def test_more_memory_never_hurts(case: Case, factor: float) -> None:
    question = case.question
    device = replace(question.cluster.device, hbm_bytes=question.cluster.device.hbm_bytes * factor)
    larger = replace(question, cluster=replace(question.cluster, device=device))
    before = search_exact(question, case.space()).best
    after = search_exact(larger, case.space()).best
    if before is not None:
        assert after is not None
        assert after.columns["objective"] >= before.columns["objective"]


def test_a_limit_is_met_or_named() -> None:
    """Under a TPOT that some strategies miss, the best holds it; under one that all miss, none."""
    free = search_exact(*_asked(small_case(dense()))).best
    assert free is not None
    bound = free.columns["tpot_s"] * 0.9
    tight = search_exact(*_asked(small_case(dense(), tpot_s=bound)))
    assert tight.best is not None
    assert tight.best.columns["tpot_s"] <= bound
    assert tight.best.columns["objective"] <= free.columns["objective"]
    hopeless = search_exact(*_asked(small_case(dense(), tpot_s=1e-6)))
    assert hopeless.best is None
    assert hopeless.tally.nearest["tpot"].limit == LIMITS.index("tpot")


def _asked(case: Case) -> tuple[Question, Space]:
    return case.question, case.space()


def test_a_time_limit_leaves_the_rest_unproven() -> None:
    """What was not reached is bounded by the machine's peak, which is above the best there is."""
    case = small_case(dense())
    whole = search_exact(case.question, case.space())
    outcome = search_exact(case.question, case.space(), time_limit_s=0.0)
    assert not outcome.complete
    assert outcome.tally.evaluated == 0
    assert whole.bound is not None
    assert outcome.bound is not None
    assert outcome.bound > whole.bound


def _models(spec: ModelSpec, par: Parallelism, *, unfolded: bool) -> StepModel:
    phases: tuple[Phase, Phase] = ("prefill", "decode")
    graphs: Mapping[Phase, ModelGraph] = {phase: build_graph(spec, phase) for phase in phases}
    if unfolded:
        graphs = {phase: _unfold(graph) for phase, graph in graphs.items()}
    applied = {phase: apply(graph, par) for phase, graph in graphs.items()}
    return StepModel.of(applied, load_cluster("atlas-800t-a2"), load_engine("vllm-ascend"))


def _unfold(graph: ModelGraph) -> ModelGraph:
    """The same model with a template of its own for every layer."""
    names = tuple(f"{name}.{layer}" for layer, name in enumerate(graph.layers))
    own = {new: graph.blocks[old] for new, old in zip(names, graph.layers, strict=True)}
    ends = {name: graph.blocks[name] for name in ("embed", "head")}
    return replace(
        graph,
        blocks=MappingProxyType({"embed": ends["embed"], **own, "head": ends["head"]}),
        layers=names,
    )


def _step_s(model: StepModel, phase: Phase) -> float:
    new = 1 if phase == "decode" else 256
    seconds, _ = step_seconds(
        model,
        phase,
        batch=4,
        new=new,
        prefix=500,
        weight_dtype="bf16",
        kv_dtype="bf16",
        attention="flash",
    )
    return float(seconds)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("spec", [dense(), sparse(), latent()], ids=lambda spec: spec.name)
def test_a_folded_model_costs_what_its_unfolded_twin_costs(spec: ModelSpec, phase: Phase) -> None:
    for par in (Parallelism(tp=2), Parallelism(tp=2, pp=2)):
        folded = _models(spec, par, unfolded=False)
        twin = _models(spec, par, unfolded=True)
        assert _step_s(folded, phase) == pytest.approx(_step_s(twin, phase), rel=1e-12)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("base", [dense, latent])
def test_twice_the_layers_cost_the_layer_part_twice(
    base: Callable[..., ModelSpec], phase: Phase
) -> None:
    """step(8) - step(4) = step(12) - step(8): four layers, whatever embedding and head cost."""
    steps = [
        _step_s(_models(base(layers=layers), Parallelism(tp=2), unfolded=False), phase)
        for layers in (4, 8, 12)
    ]
    assert steps[2] - steps[1] == pytest.approx(steps[1] - steps[0], rel=1e-9)
    assert steps[1] > steps[0] > 0


def test_dense_and_expert_layers_of_one_model_are_counted_apart() -> None:
    """A first dense layer: its rows run once, those of the expert layers three times."""
    moe = MoeSpec(experts=8, experts_per_token=2, ffn=128, dense_layers=1)
    model = _models(dense(moe=moe), Parallelism(tp=2), unfolded=False)
    load = Load.of("decode", model.engine, tokens=4.0)
    kernels = {
        name: sum(r.group == "token" for r in rows) for name, rows in model.rows["decode"].items()
    }
    experts = [name for name in kernels if name not in ("embed", "dense", "head")]
    assert len(experts) == 1
    (stage,) = model.parts("token", load)
    expected = kernels["embed"] + kernels["dense"] + 3 * kernels[experts[0]] + kernels["head"]
    assert stage.kernels == expected
