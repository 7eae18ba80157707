"""Replicas of a plan under vLLM: servers of their own, each on its ranks and port."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.search.emit_cases import emit_plan, moe, only, start

from shardplan.search.emit import emit


def test_copies_of_a_dense_model_are_servers_of_their_own(tmp_path: Path) -> None:
    """dp 2 of tp 2: two servers on two cards each, an endpoint each, a balancer before them."""
    first, second = start(emit_plan(tp=2, dp=2), tmp_path)
    for index, (flags, call) in enumerate((first, second)):
        assert flags.data_parallel_size == "1"
        assert flags.data_parallel_size_local is None
        assert flags.port == str(8000 + index)
        assert call.environment["ASCEND_RT_VISIBLE_DEVICES"] == f"{2 * index},{2 * index + 1}"
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "2 independent servers" in text
    assert "load balancer" in text
    balancer = (tmp_path / "out" / "balancer.conf").read_text(encoding="utf-8")
    assert "server 127.0.0.1:8000;" in balancer
    assert "server 127.0.0.1:8001;" in balancer


def test_one_server_needs_no_balancer(tmp_path: Path) -> None:
    emit(emit_plan(), "vllm-ascend", tmp_path / "out")
    assert not (tmp_path / "out" / "balancer.conf").exists()
    assert "balancer" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_replicas_with_experts_share_a_node(tmp_path: Path) -> None:
    """dp 16 with ep 8 on 16 dies: two servers of eight groups, experts over the eight dies."""
    plan = emit_plan(soc="Ascend910_9382", tp=1, dp=16, ep=8, exchange="alltoall", model=moe())
    first, second = start(plan, tmp_path)
    for index, (flags, call) in enumerate((first, second)):
        assert flags.enable_expert_parallel
        assert (flags.data_parallel_size, flags.data_parallel_size_local) == ("8", None)
        assert flags.port == str(8000 + index)
        devices = ",".join(str(8 * index + i) for i in range(8))
        assert sorted(call.environment["ASCEND_RT_VISIBLE_DEVICES"]) == sorted(devices)


@pytest.mark.parametrize("node", range(4))
def test_replicas_with_experts_over_nodes(tmp_path: Path, node: int) -> None:
    """dp 32 with ep 16 on nodes of 8: nodes 0-1 and 2-3, ranks 0 to 15 of each counted anew."""
    plan = emit_plan(tp=1, dp=32, ep=16, exchange="alltoall", model=moe())
    flags, _ = only(plan, tmp_path, node)
    assert (flags.data_parallel_size, flags.data_parallel_size_local) == ("16", "8")
    assert flags.data_parallel_start_rank == ("8" if node % 2 else None)
    assert flags.headless is bool(node % 2)
    script = (tmp_path / "out" / f"serve_node{node}.sh").read_text(encoding="utf-8")
    assert f"address of node {node - node % 2}" in script
    balancer = (tmp_path / "out" / "balancer.conf").read_text(encoding="utf-8")
    assert [host in balancer for host in ("NODE0:8000", "NODE1:", "NODE2:8000", "NODE3:")] == [
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(("fast_ranks", "told"), [(16, True), (64, False), (0, False)])
def test_tokens_sent_between_supernodes_take_the_hierarchical_algorithm(
    tmp_path: Path, fast_ranks: int, told: bool
) -> None:
    """ep 32 over two A3 nodes: joined by RoCE the plugin must be told, in one supernode not."""
    plan = emit_plan(soc="Ascend910_9382", tp=8, dp=4, ep=32, exchange="alltoall", model=moe())
    cluster = plan.cluster.model_copy(update={"fast_ranks": fast_ranks})
    flags, _ = only(plan.model_copy(update={"cluster": cluster}), tmp_path)
    config = json.loads(flags.additional_config or "{}")
    assert ("enable_mc2_hierarchy_comm" in config) is told
