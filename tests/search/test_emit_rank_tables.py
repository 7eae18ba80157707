"""HCCL rank tables of vLLM's servers: who is in them, what they are for, what has none."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.search.emit_cases import emit_plan, moe, run_script

from shardplan.costmodel.catalog import load_cluster
from shardplan.models.errors import InputError
from shardplan.search.ask import search
from shardplan.search.emit import emit
from shardplan.search.plan import Plan

VARIABLE = "RANK_TABLE_FILE"


def _addresses(nodes: int, ranks: int, per_node: int = 8) -> dict[str, Any]:
    """10.0.0.<node> and 10.1.<node>.<device>."""
    devices = (f"10.1.{rank // per_node}.{rank % per_node + 1}" for rank in range(ranks))
    return {
        "addresses": ",".join(f"10.0.0.{node + 1}" for node in range(nodes)),
        "device_addresses": ",".join(devices),
    }


def _table(path: Path) -> list[tuple[str, list[tuple[int, str, int]]]]:
    """(server, [(device, address, rank)]) of version 1.0."""
    read = json.loads(path.read_text(encoding="utf-8"))
    assert (read["version"], read["server_count"]) == ("1.0", str(len(read["server_list"])))
    return [
        (
            one["server_id"],
            [(int(d["device_id"]), d["device_ip"], int(d["rank_id"])) for d in one["device"]],
        )
        for one in read["server_list"]
    ]


def test_a_copy_over_two_nodes_has_a_table(tmp_path: Path) -> None:
    """Ranks as vLLM numbers them; a cluster is read from it; no script sets a variable."""
    plan = emit_plan(tp=8, pp=2, stage_layers=(40, 40))
    emit(plan, "vllm-ascend", tmp_path / "out", **_addresses(2, 16))
    table = _table(tmp_path / "out" / "rank_table0.json")
    assert [host for host, _ in table] == ["10.0.0.1", "10.0.0.2"]
    for node, (_, devices) in enumerate(table):
        assert devices == [(i, f"10.1.{node}.{i + 1}", 8 * node + i) for i in range(8)]
    found = load_cluster(str(tmp_path / "out" / "rank_table0.json"), device="910b2")
    assert (found.nodes, found.ranks_per_node) == (2, 8)
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"set {VARIABLE} to the whole path" in page
    assert "rank_table0.json on node 0, 1" in page
    for node in (0, 1):
        script = tmp_path / "out" / f"serve_node{node}.sh"
        where = {"MODEL": "m", "HEAD_ADDRESS": "h", "NODE_ADDRESS": "n", "NIC": "eth0"}
        (call,) = run_script(script, "vllm", **where)
        assert VARIABLE not in call.environment
        (call,) = run_script(script, "vllm", **where, RANK_TABLE_FILE="/t.json")
        assert call.environment[VARIABLE] == "/t.json"


def test_each_server_has_its_own(tmp_path: Path) -> None:
    """dp 2 of tp 8 pp 2: nodes 0-1 and 2-3; ranks count from 0 in each."""
    plan = emit_plan(tp=8, pp=2, dp=2)
    emit(plan, "vllm-ascend", tmp_path / "out", **_addresses(4, 32))
    tables = [_table(tmp_path / "out" / f"rank_table{server}.json") for server in (0, 1)]
    assert [[host for host, _ in one] for one in tables] == [
        ["10.0.0.1", "10.0.0.2"],
        ["10.0.0.3", "10.0.0.4"],
    ]
    for table in tables:
        ranks = [rank for _, devices in table for _, _, rank in devices]
        assert ranks == list(range(16))
    assert tables[1][1][1][7] == (7, "10.1.3.8", 15)


def test_experts_over_nodes_are_one_world(tmp_path: Path) -> None:
    """tp 8 dp 2 ep 16: both data-parallel groups are in one table."""
    plan = emit_plan(dp=2, ep=16, model=moe())
    emit(plan, "vllm-ascend", tmp_path / "out", **_addresses(2, 16))
    table = _table(tmp_path / "out" / "rank_table0.json")
    assert [rank for _, devices in table for _, _, rank in devices] == list(range(16))
    assert not (tmp_path / "out" / "rank_table1.json").exists()


def test_without_addresses_the_page_says_how_they_are_had(tmp_path: Path) -> None:
    """Of a plan that could use one; of one node nothing is said."""
    emit(emit_plan(tp=8, pp=2, stage_layers=(40, 40)), "vllm-ascend", tmp_path / "two")
    page = (tmp_path / "two" / "README.md").read_text(encoding="utf-8")
    assert "hccn_tool -i DEVICE_ID -ip -g" in page
    assert "--option device_addresses=" in page
    emit(emit_plan(), "vllm-ascend", tmp_path / "one")
    assert "hccn_tool" not in (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*/rank_table*"))


@cache
def _pools() -> Plan:
    """One prefill instance over nodes 0 and 1, four decode instances on node 2."""
    asked: dict[str, Any] = {"nodes": 4, "input_len": 512, "output_len": 64, "concurrency": 16}
    plan: Plan = search("llama-3.1-8b", "atlas-800t-a2", serving="disagg", **asked).plan
    prefill, decode = plan.pools
    ways = (
        {"tp": 8, "pp": 2, "dp": 1, "ep": 1, "stage_layers": (16, 16)},
        {"tp": 2, "pp": 1, "dp": 1, "ep": 1, "stage_layers": (32,)},
    )
    pools = tuple(
        pool.model_copy(
            update={"instances": count, "strategy": pool.strategy.model_copy(update=way)}
        )
        for pool, count, way in zip((prefill, decode), (1, 4), ways, strict=True)
    )
    return plan.model_copy(update={"pools": pools})


def test_an_instance_of_a_pool_over_nodes_has_a_table(tmp_path: Path) -> None:
    """Those inside a node have none; addresses of prefill come first."""
    emit(_pools(), "vllm-ascend", tmp_path / "out", **_addresses(3, 24))
    assert [one.name for one in (tmp_path / "out").glob("rank_table*")] == [
        "rank_table_prefill0.json"
    ]
    table = _table(tmp_path / "out" / "rank_table_prefill0.json")
    assert [host for host, _ in table] == ["10.0.0.1", "10.0.0.2"]
    addresses = [address for _, devices in table for _, address, _ in devices]
    assert all(one < other for one, other in pairwise(addresses))
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "rank_table_prefill0.json on prefill node 0, 1" in page
    emit(_pools(), "vllm-ascend", tmp_path / "bare")
    page = (tmp_path / "bare" / "README.md").read_text(encoding="utf-8")
    assert "of pools: prefill, then decode" in page


TWO: dict[str, Any] = {"tp": 8, "pp": 2, "stage_layers": (40, 40)}


@pytest.mark.parametrize(
    ("way", "given", "match"),
    [
        (TWO, {"addresses": "10.0.0.1,10.0.0.2"}, "give both options"),
        (TWO, _addresses(2, 15), "device_addresses holds 16"),
        (TWO, _addresses(3, 16), "addresses holds 2"),
        (TWO, _addresses(2, 16) | {"addresses": "a,b"}, "is an IP address"),
        ({}, _addresses(1, 8), "a server over several nodes that RoCE joins"),
    ],
)
def test_what_makes_no_table_is_refused(
    tmp_path: Path, way: dict[str, Any], given: dict[str, Any], match: str
) -> None:
    """And nothing is written."""
    with pytest.raises(InputError, match=match):
        emit(emit_plan(**way), "vllm-ascend", tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_supernode_has_none(tmp_path: Path) -> None:
    """Tables of version 1.0 would send its traffic over the device ports."""
    plan = emit_plan(**TWO)
    plan = plan.model_copy(
        update={"cluster": plan.cluster.model_copy(update={"fast_ranks": plan.cluster.ranks})}
    )
    emit(plan, "vllm-ascend", tmp_path / "out")
    assert "hccn_tool" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="that RoCE joins"):
        emit(plan, "vllm-ascend", tmp_path / "no", **_addresses(2, 16))
