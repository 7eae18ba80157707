"""Plans that number their ranks otherwise: where the emitted processes really run."""

from __future__ import annotations

import json
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
from tests.search.emit_cases import emit_plan, run_script

from shardplan.models.errors import InputError
from shardplan.models.parallel import AXES
from shardplan.search.emit import emit
from shardplan.search.emit.placing import TARGET_ORDER, plan_ranks


def devices(out: Path, node: int) -> list[str]:
    address = {
        "MODEL": "m",
        "LINGER": "0.3",
        "HEAD_ADDRESS": "10.0.0.1",
        "NODE_ADDRESS": "10.0.0.1",
        "NIC": "eth0",
    }
    calls = run_script(out / f"serve_node{node}.sh", "vllm", **address)
    return sorted(call.environment["ASCEND_RT_VISIBLE_DEVICES"] for call in calls)


@pytest.mark.parametrize("order", list(permutations(AXES)))
def test_ranks_of_a_plan_follow_its_order(order: tuple[str, ...]) -> None:
    way = emit_plan(tp=2, pp=3, dp=4, order=order).strategy
    sizes = {"tp": 2, "pp": 3, "dp": 4, "cp": 1}
    ids = {
        tuple(sorted(zip(order, place, strict=True))): rank
        for rank, place in enumerate(product(*(range(sizes[axis]) for axis in order)))
    }
    wanted = [
        ids[tuple(sorted(zip(TARGET_ORDER, place, strict=True)))]
        for place in product(*(range(sizes[axis]) for axis in TARGET_ORDER))
    ]
    assert list(plan_ranks(way)) == wanted


def test_the_engines_own_order_keeps_its_placement(tmp_path: Path) -> None:
    """Both stages of a group inside its node: what vLLM does by itself."""
    emit(emit_plan(tp=4, pp=2, dp=2, order=TARGET_ORDER), "vllm-ascend", tmp_path / "out")
    assert devices(tmp_path / "out", 0) == ["0,1,2,3,4,5,6,7"]


def test_a_copy_whose_stages_lie_on_other_nodes_runs_there(tmp_path: Path) -> None:
    """Two copies of two stages of 8, stages outermost: copy 0 has nodes 0 and 2, copy 1 the rest.

    (pp, dp) with cp between them is the default order in other words, but one that was chosen.
    """
    plan = emit_plan(tp=8, pp=2, dp=2, order=("pp", "cp", "dp", "tp"))
    emit(plan, "vllm-ascend", tmp_path / "out")
    heads = [
        (tmp_path / "out" / f"serve_node{node}.sh").read_text("utf-8").count("--node-rank 0")
        for node in range(4)
    ]
    assert heads == [1, 1, 0, 0]


def test_interleaved_servers_list_their_devices(tmp_path: Path) -> None:
    """Copies of one model with experts split by tp are servers of their own: gaps are fine."""
    moe = {"active_parameters": 1_000_000_000}
    plan = emit_plan(tp=4, dp=2, order=("pp", "tp", "cp", "dp"), model=moe)
    emit(plan, "vllm-ascend", tmp_path / "out")
    assert devices(tmp_path / "out", 0) == ["0,2,4,6", "1,3,5,7"]


@pytest.mark.parametrize(
    "changes",
    [
        {"tp": 4, "pp": 2, "dp": 2, "order": ("pp", "cp", "dp", "tp")},  # a copy on two nodes
    ],
)
def test_an_order_that_the_engine_cannot_start_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=r"ascending order.*search with the order dp>pp>cp>tp"):
        emit(emit_plan(**changes), "vllm-ascend", tmp_path / "out")


def test_rank_tables_of_the_compilers_replicas_follow_the_order(tmp_path: Path) -> None:
    plan = emit_plan(tp=4, dp=2, order=("pp", "tp", "cp", "dp"))
    emit(plan, "atc", tmp_path / "out")
    for replica, wanted in ((0, ["0", "2", "4", "6"]), (1, ["1", "3", "5", "7"])):
        table = json.loads((tmp_path / "out" / f"rank_table_replica{replica}.json").read_text())
        found = table["server_list"][0]["device"]
        assert [one["device_id"] for one in found] == wanted
        assert [one["rank_id"] for one in found] == ["0", "1", "2", "3"]
