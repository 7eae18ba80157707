"""Cost groups: factors of one change nothing, k on all of them makes every time k times as long."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.costmodel.priced import CASES, CLUSTER, case_names, load, price
from tests.search.oracle import dense

from shardplan.costmodel.bulk import Dtypes, Fleet
from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.cost_groups import (
    BETWEEN_NODES,
    COST_GROUPS,
    HOST,
    IN_NODE,
    ScaledModel,
    groups_of,
)
from shardplan.costmodel.group_bands import group_bands
from shardplan.costmodel.optable import Overlap
from shardplan.costmodel.serving import ServingInput, serve
from shardplan.costmodel.step import StepModel
from shardplan.models.catalog import load_model
from shardplan.models.parallel import Parallelism

_TIMES = ("ttft_s", "tpot_s", "end_to_end_s", "compute_s", "memory_s", "collective_s", "overhead_s")


def _scaled(name: str, engine: str = "vllm-ascend") -> ScaledModel:
    model = load(name, engine=engine).model
    ranks = CASES[name][1].ranks
    return ScaledModel.of(model, load_cluster(CLUSTER, cards=ranks))


def _grid(points: int = 1) -> ServingInput:
    """A grid large enough for the memo, or one point."""
    return ServingInput(
        batch=np.arange(1.0, 10.0)[:, None] if points > 1 else np.array([8.0]),
        chunk=np.linspace(256, 4096, 9)[None, :] if points > 1 else np.array([2048.0]),
        input_len=1024,
        output_len=128,
    )


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("points", [1, 81])
def test_factors_of_one_are_the_models_own_numbers_to_the_bit(name: str, points: int) -> None:
    """Every figure of the steady state, alone and over a grid."""
    scaled, given_ = _scaled(name), _grid(points)
    ones = {group: np.ones((2, 1, 1)[-given_.batch.ndim - 1 :]) for group in COST_GROUPS}
    found = serve(scaled.at(ones), given_)
    expected = serve(scaled.model, given_)
    for one in range(2):
        for name_ in _TIMES:
            values = np.broadcast_to(getattr(found, name_), (2, *expected.tpot_s.shape))
            assert np.array_equal(values[one], getattr(expected, name_)), name_


@settings(max_examples=15)
@given(case_names(), st.floats(0.3, 3.0), st.sampled_from(["vllm-ascend", "torch-graph"]))
def test_all_groups_together_hold_all_the_time(name: str, factor: float, engine: str) -> None:
    """Nothing of a step is outside the groups or in two: all of them k times is time k times."""
    scaled = _scaled(name, engine)
    before = serve(scaled.model, _grid())
    after = serve(scaled.at({group: np.array([factor]) for group in COST_GROUPS}), _grid())
    for key in _TIMES:
        assert getattr(after, key) == pytest.approx(factor * getattr(before, key), rel=1e-9), key


def test_a_slower_group_slows_its_own_part_alone() -> None:
    """Twice the wire time: collectives take twice as long, kernels what they took."""
    scaled = _scaled("dense tp8")
    before = serve(scaled.model, _grid())
    after = serve(scaled.at({IN_NODE: np.array([2.0])}), _grid())
    assert after.collective_s / after.tpot_s > before.collective_s / before.tpot_s
    decode = after.decode_step_s - before.decode_step_s
    mixed = after.mixed_step_s - before.mixed_step_s
    mean = before.mixed_share * mixed + before.pure_share * decode
    assert mean == pytest.approx(before.collective_s)


def test_a_fused_product_is_in_both_of_its_groups() -> None:
    """Its product in `dense`, its wire in the collectives'; together all of it."""
    par, cluster = Parallelism(tp=4), load_cluster("atlas-800t-a2", cards=4)
    priced = price(dense(hidden=4096, heads=32, kv_heads=8, head_dim=128), par, "atlas-800t-a2")
    model = StepModel.of(
        priced.graphs, cluster, priced.model.engine, overlap=Overlap(fused_collectives=True)
    )
    rows = [row for rows in model.rows["prefill"].values() for row in rows if row.fused is not None]
    assert rows
    assert {groups_of(row, cluster) for row in rows} == {("dense", IN_NODE)}
    scaled = ScaledModel.of(model, cluster)
    before = serve(model, _grid())
    after = serve(scaled.at({group: np.array([3.0]) for group in COST_GROUPS}), _grid())
    assert after.tpot_s == pytest.approx(3.0 * before.tpot_s)


def test_collectives_are_told_apart_by_whether_they_leave_a_node() -> None:
    """tp in a node, experts over two."""
    par = Parallelism(tp=8, dp=4, ep=32, sp=True, exchange="alltoall")
    priced = price(load_model("deepseek-v3"), par)
    cluster = load_cluster(CLUSTER, cards=32)
    found = {
        groups_of(row, cluster)
        for rows in priced.model.rows["decode"].values()
        for row in rows
        if row.is_collective
    }
    assert found == {(IN_NODE,), (BETWEEN_NODES,)}


def test_bands_hold_one_and_are_of_the_groups_that_take_time() -> None:
    """Each band is around the price as it is; a dense model on one rank has no wire and expert."""
    scaled, given_ = _scaled("dense tp1"), _grid()
    zero = np.zeros(1, dtype=np.int64)
    fleet = Fleet.of([scaled.model], zero, [Dtypes("bf16", "bf16", "flash")], zero)
    found = group_bands(fleet, load_cluster(CLUSTER, cards=1), given_, serve(fleet, given_))
    assert set(found) == {"dense", "attention", "other kernels", HOST}
    assert all(low < 1.0 < high for low, high in found.values())
    assert all(low * high == pytest.approx(1.0) for low, high in found.values())
