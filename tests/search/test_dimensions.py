"""What a draw stands for: always a strategy of the space, whatever dimensions it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, IntDistribution
from tests.search.oracle import Case, cases, dense, small_case, sparse

from shardplan.models.parallel import Parallelism
from shardplan.search.dimensions import Dimensions, Point
from shardplan.search.space import Space


def _split(cards: int) -> Space:
    """A space of layouts that differ in fields no rule of today lets through, too."""
    space = small_case(dense()).space()
    layouts = (
        Parallelism(tp=2, dp=2),
        Parallelism(tp=2, dp=2, ffn_tp=4),
        Parallelism(tp=4, order=("dp", "pp", "cp", "tp")),
        Parallelism(cp=4, mtp=2),
    )
    return replace(space, layouts=layouts, cards=cards)


def test_fields_that_vary_are_dimensions_without_being_named() -> None:
    """tp, cp, ffn_tp and mtp by place, the order of axes as a word; dp follows."""
    dimensions = Dimensions(_split(4))
    found = dimensions.distributions()
    assert set(found) == {
        "tp", "cp", "ffn_tp", "mtp", "order",
        "attention", "weight_dtype", "kv_dtype", "batch", "chunk",
    }  # fmt: skip
    assert found["tp"] == IntDistribution(0, 2)
    assert found["order"] == CategoricalDistribution(["dp-pp-cp-tp", "pp-dp-cp-tp"])


def test_a_draw_between_layouts_is_the_nearest() -> None:
    """tp 4 (place 2) in the usual order differs by a word from one, by places from others."""
    space = _split(4)
    draw = {"tp": 2, "cp": 0, "ffn_tp": 0, "mtp": 0, "order": "pp-dp-cp-tp"}
    assert Dimensions(space).point(draw).parallel == space.layouts[2]


def test_a_draw_says_where_it_stands() -> None:
    """Four cards, tp 2 of (1, 2, 4) and pp 1: dp follows as 2."""
    dimensions = Dimensions(small_case(dense()).space())
    drawn = {"tp": 1, "pp": 0, "sp": True, "batch": 4, "chunk": 2, "attention": "flash"}
    drawn |= {"weight_dtype": "bf16", "kv_dtype": "bf16"}
    point = dimensions.point(drawn)
    assert point.describe() == "tp2 pp1 dp2 sp flash bf16 kv bf16 batch 6 chunk 256"


def test_switches_that_change_nothing_make_no_new_strategy() -> None:
    """The exchange without expert parallelism, and sequence parallelism on one rank."""
    dimensions = Dimensions(small_case(sparse()).space())
    plain = dimensions.point({"tp": 0, "ep": 0})
    assert dimensions.point({"tp": 0, "ep": 0, "exchange": "alltoall", "sp": True}) == plain


def test_a_dense_model_draws_no_expert_dimensions() -> None:
    assert not {"ep", "exchange"} & set(Dimensions(small_case(dense()).space()).distributions())


def test_kernels_and_dtypes_that_do_not_combine_freely_give_the_nearest_choice() -> None:
    """Flash on bf16 and naive on int8 alone: one word that is off is closer than two."""
    case = small_case(dense())
    draw = {"attention": "naive", "weight_dtype": "w8a8", "kv_dtype": "bf16"}
    assert Dimensions(case.space()).point(draw).choice == case.choices[1]


@given(case=cases(), data=st.data())
def test_every_draw_is_a_strategy_of_the_space_and_every_strategy_can_be_drawn(
    case: Case, data: st.DataObject
) -> None:
    space = case.space()
    if not space.layouts:
        return
    dimensions = Dimensions(space)
    drawn = {
        name: data.draw(
            st.sampled_from(one.choices)
            if isinstance(one, CategoricalDistribution)
            else st.integers(0, one.high)  # type: ignore[attr-defined]  # the other kind
        )
        for name, one in dimensions.distributions().items()
    }
    point = dimensions.point(drawn)
    assert space.layout_of(point.parallel) in space.layouts
    assert point.choice in space.choices
    other = Point(
        parallel=data.draw(st.sampled_from(space.layouts)),
        choice=data.draw(st.sampled_from(space.choices)),
        batch=data.draw(st.sampled_from(space.batches)),
        chunk=data.draw(st.sampled_from(space.chunks)),
    )
    assert dimensions.point(dimensions.params(other)) == other


def _cuts(par: Parallelism) -> Sequence[tuple[int, ...]]:
    uneven: list[tuple[int, ...]] = [(), (3, 1), (1, 3)]
    return uneven if par.pp == 2 else uneven[:1]


@pytest.mark.parametrize("lazily", [True, False])
def test_cuts_of_the_pipeline_are_one_dimension(lazily: bool) -> None:
    """Two stages of four layers may be cut three ways: near the even one, or all written out."""
    space = small_case(dense()).space()
    if not lazily:
        every = [replace(par, stage_layers=cut) for par in space.layouts for cut in _cuts(par)]
        space = replace(space, layouts=tuple(every))
    dimensions = Dimensions(space)
    assert dimensions.distributions()["cut"] == IntDistribution(0, 2)
    two = dimensions.params(dimensions.point({"pp": 1}))
    assert [dimensions.point({**two, "cut": cut}).parallel.stage_layers for cut in range(3)] == [
        (),
        (3, 1),
        (1, 3),
    ]
    one = dimensions.params(dimensions.point({"pp": 0}))
    assert {dimensions.point({**one, "cut": cut}).parallel.stage_layers for cut in range(3)} == {()}
    uneven = dimensions.point({**two, "cut": 2})
    assert dimensions.point(dimensions.params(uneven)) == uneven
