"""Pipeline cuts against every cut there is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, combinations_with_replacement, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.search.cuts import (
    CostRow,
    cut_count,
    fill,
    front,
    least,
    least_of_many,
    row_max,
)

COSTS = st.floats(0.0, 100.0, allow_nan=False).map(lambda x: round(x, 2))


def every_cut(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """All ways to cut, by the places between layers."""
    for places in combinations(range(1, layers), stages - 1):
        ends = (0, *places, layers)
        yield tuple(b - a for a, b in pairwise(ends))


@st.composite
def problems(draw: st.DrawFn, rows: int) -> list[CostRow]:
    """Rows over the same layers and stages."""
    layers = draw(st.integers(1, 7))
    stages = draw(st.integers(1, layers))
    return [
        CostRow.of(
            *(
                (
                    draw(st.lists(COSTS, min_size=layers, max_size=layers)),
                    draw(st.lists(COSTS, min_size=stages, max_size=stages)),
                )
                for _ in range(draw(st.integers(1, 2)))
            )
        )
        for _ in range(rows)
    ]


def sizes(row: CostRow) -> tuple[int, int]:
    """(layers, stages)."""
    return row.layers, row.stages


def test_a_heavy_head_takes_layers_from_the_last_stage() -> None:
    """Eight layers of 1 and a head of 2 on two stages: 5 + 3, both stages cost 5."""
    row = CostRow.of(([1.0] * 8, [0.0, 2.0]))
    cut = least([row], [math.inf], 0)
    assert cut == (5, 3)
    assert row_max(row, cut) == 5.0


def test_memory_moves_a_cut_that_time_would_put_elsewhere() -> None:
    """Time alone is balanced by 2 + 2; the first stage holds only one layer's weights."""
    time = CostRow.of(([1.0] * 4, [0.0, 0.0]))
    memory = CostRow.of(([1.0] * 4, [2.0, 0.0]))
    assert least([time, memory], [math.inf, 9.0], 0) == (2, 2)
    assert least([time, memory], [math.inf, 3.0], 0) == (1, 3)
    assert least([time, memory], [math.inf, 2.0], 0) is None


@given(st.integers(1, 9), st.integers(1, 9))
def test_the_number_of_cuts_is_counted(layers: int, stages: int) -> None:
    """C(L - 1, p - 1), none where a stage would stay empty."""
    made = len(list(every_cut(layers, stages))) if stages <= layers else 0
    assert cut_count(layers, stages) == made


@given(problems(2), COSTS)
def test_the_least_is_the_least_of_all_cuts(rows: list[CostRow], limit: float) -> None:
    """Under a limit on the other row, or none where no cut keeps it."""
    able = [c for c in every_cut(*sizes(rows[0])) if row_max(rows[1], c) <= limit]
    found = least(rows, [math.inf, limit], 0)
    if not able:
        assert found is None
    else:
        assert found in able
        assert row_max(rows[0], found) == min(row_max(rows[0], c) for c in able)


@given(problems(3), COSTS)
def test_the_front_misses_nothing(rows: list[CostRow], limit: float) -> None:
    """For each cut there is one of the front that is no worse in both rows."""
    able = [c for c in every_cut(*sizes(rows[0])) if row_max(rows[2], c) <= limit]
    found = list(front(rows, [math.inf, math.inf, limit], 0, 1))
    assert all(c in able for c in found)
    points = [(row_max(rows[0], c), row_max(rows[1], c)) for c in found]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(points))
    for cut in able:
        d, m = row_max(rows[0], cut), row_max(rows[1], cut)
        assert any(a <= d and b <= m for a, b in points)


@given(problems(1), COSTS)
def test_filling_finds_a_cut_where_there_is_one(rows: list[CostRow], limit: float) -> None:
    """Within the limit, and strictly below it where asked."""
    worst = [row_max(rows[0], c) for c in every_cut(*sizes(rows[0]))]
    assert (fill(rows, [limit], [False]) is not None) == any(w <= limit for w in worst)
    assert (fill(rows, [limit], [True]) is not None) == any(w < limit for w in worst)


@given(problems(1))
def test_the_stages_of_no_cut_cost_less_than_the_mean_together(rows: list[CostRow]) -> None:
    """So the dearest stage of no cut costs less than the mean."""
    row = rows[0]
    for cut in every_cut(*sizes(row)):
        together = sum(row.stage(sum(cut[:i]), sum(cut[: i + 1]), i) for i in range(row.stages))
        assert row.mean * row.stages <= together * (1 + 1e-9) + 1e-9
        assert row.mean <= row_max(row, cut) * (1 + 1e-9) + 1e-9


@given(st.integers(2, 6), st.data())
def test_many_points_at_once_are_each_solved(layers: int, data: st.DataObject) -> None:
    """The least of all cuts that may leave stages empty, so never above the least of all cuts."""
    stages, points = data.draw(st.integers(1, layers)), data.draw(st.integers(1, 4))
    parts = []
    for _part in range(data.draw(st.integers(1, 2))):
        each, ends = (
            np.array(
                data.draw(
                    st.lists(
                        st.lists(COSTS, min_size=size, max_size=size),
                        min_size=points,
                        max_size=points,
                    )
                )
            )
            for size in (layers, stages)
        )
        parts.append((each, ends))
    rows = [
        CostRow.of(*((each[at].tolist(), ends[at].tolist()) for each, ends in parts))
        for at in range(points)
    ]
    even = next(every_cut(layers, stages))
    start = np.array([row_max(row, even) for row in rows])
    found = least_of_many(parts, start)
    for at, row in enumerate(rows):
        best = min(
            row_max(row, tuple(b - a for a, b in pairwise((0, *places, layers))))
            for places in combinations_with_replacement(range(layers + 1), stages - 1)
        )
        assert found[at] == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_a_stage_without_room_for_its_one_layer_is_not_the_end() -> None:
    """Filling puts the dear layer 3 into stage 1, whose ends cost 1 more: 3. The best is 2."""
    row = CostRow.of(([0.0, 0.0, 1.0, 2.0, 0.0], [0.0, 1.0, 0.0]))
    cut = least([row], [math.inf], 0)
    assert cut is not None
    assert row_max(row, cut) == 2.0
