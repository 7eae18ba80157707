"""Cluster files of CANN and HCCL: all published schemas, as leniently as their samples ask for."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.search.emit_cases import emit_plan

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.cluster_files import ListedNode, parse_cluster_file, read_cluster_file
from shardplan.costmodel.errors import DataFileError
from shardplan.search.emit import emit
from shardplan.search.emit.rank_table import RankDevice, Server, dump_json, rank_table

DATAFLOW = """{
  "cluster": [{
    "cluster_nodes": [
      {"node_id": 0, "node_type": "ATLAS900", "ipaddr": "10.0.0.1", "port": 2509, // the master
       "memory": 25165824, "is_local": true, "deploy_res_path": "/opt//x",
       "item_list": [{"item_id": 0, "device_id": 4, "ipaddr": "10.1.0.1"},
                     {"item_id": 1, "device_id": 5, "ipaddr": "10.1.0.2"},]},
    ],
    "nodes_topology": {"protocol": "RDMA:200Gb", "type": "star",
      "topos": [{"plane_id": 0, "devices": [0, 1]},]}
  }],
  "node_def": [{"node_type": "ATLAS900", "resource_type": "Aarch", "support_links": "[HCCS,]",
    "item_type": "Ascend910B1", "item_topology": [{"links_mode": "HCCS", "links": [[0, 1]]}]}],
  "item_def": [{"item_type": "Ascend910B1", "resource_type": "Ascend", "memory": "[DDR:64GB]",
    "aic_type": "[DAVINCI_V100:24]"}] /* one kind */
}"""

OPEN_SOURCE = """{"RankTable": {"status": "completed", "version": "1.2", "server_count": "2",
  "server_list": [
    {"server_id": "a", "device": [{"device_id": "1", "rank_id": "1"},
                                  {"device_id": "0", "rank_id": "0"}]},
    {"server_id": "b", "host_ip": "10.0.0.2", "device": [{"device_id": "3", "rank_id": "2"}]}]},
  "HcclCommConfig": {"hcclCommName": "all"}}"""


def _numa(nodes: int, items: int, soc: str = "Ascend910B2") -> str:
    cluster_nodes = [
        {"node_id": n, "node_type": "X", "item_list": [{"item_id": i} for i in range(items)]}
        for n in range(nodes)
    ]
    return json.dumps(
        {"cluster": [{"cluster_nodes": cluster_nodes}], "item_def": [{"item_type": soc}]}
    )


def test_a_dataflow_file_with_its_samples_faults() -> None:
    """Comments, commas before brackets, a path and a list that look like either."""
    found = parse_cluster_file(DATAFLOW, "x")
    assert found.nodes == (ListedNode(name="0", address="10.0.0.1", devices=(4, 5)),)
    assert found.soc_version == "Ascend910B1"


def test_a_file_of_the_open_source_compiler() -> None:
    """Devices in the order of their ranks."""
    assert parse_cluster_file(OPEN_SOURCE, "x").nodes == (
        ListedNode(name="a", address="", devices=(0, 1)),
        ListedNode(name="b", address="10.0.0.2", devices=(3,)),
    )


@pytest.mark.parametrize(
    ("changes", "options", "nodes", "devices"),
    [
        ({"tp": 4}, {}, ["127.0.0.1"], (0, 1, 2, 3)),
        (
            {"tp": 16},
            {
                "addresses": "10.0.0.1,10.0.0.2",
                "device_addresses": ",".join(f"10.1.0.{i}" for i in range(16)),
            },
            ["10.0.0.1", "10.0.0.2"],
            tuple(range(8)),
        ),
        (
            {"soc": "Ascend310P3", "tp": 4, "weight_dtype": "fp16", "kv_dtype": "fp16"},
            {},
            [""],
            (0, 1, 2, 3),
        ),
    ],
)
def test_what_we_write_is_read_back(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], nodes: list[str], devices: Any
) -> None:
    """numa_config.json and the rank table of a plan list the same cluster."""
    plan = emit_plan(**changes)
    emit(plan, "atc", tmp_path, **options)
    numa = read_cluster_file(tmp_path / "numa_config.json")
    assert [node.address for node in numa.nodes] == nodes
    assert {node.devices for node in numa.nodes} == {devices}
    assert numa.soc_version == plan.cluster.soc_versions[0]
    table = read_cluster_file(tmp_path / "rank_table.json")
    assert [node.devices for node in table.nodes] == [node.devices for node in numa.nodes]
    assert table.ranks == numa.ranks == plan.strategy.ranks


def test_a_supernode_table_is_read_back() -> None:
    """Version 1.2."""
    devices = tuple(
        RankDevice(device_id=i, device_ip=f"10.0.0.{i}", super_device_id=i) for i in range(2)
    )
    server = Server(server_id="s", host_ip="10.0.1.1", devices=devices)
    text = dump_json(rank_table([server], super_pod_id="0"))
    assert parse_cluster_file(text, "x").nodes == (
        ListedNode(name="s", address="10.0.1.1", devices=(0, 1)),
    )


def test_a_cluster_file_stands_for_a_cluster(tmp_path: Path) -> None:
    """Three Atlas 800T A2; a rank table needs the device."""
    path = tmp_path / "numa_config.json"
    path.write_text(_numa(3, 8), encoding="utf-8")
    assert load_cluster(path) == load_cluster("atlas-800t-a2", nodes=3)
    assert load_cluster(str(path), nodes=2) == load_cluster("atlas-800t-a2", nodes=2)
    servers = [
        Server(
            server_id=f"n{n}",
            devices=tuple(RankDevice(device_id=i, device_ip=f"10.0.{n}.{i}") for i in range(8)),
        )
        for n in range(2)
    ]
    path.write_text(dump_json(rank_table(servers)), encoding="utf-8")
    assert load_cluster(path, device="910a") == load_cluster("atlas-800-9000", nodes=2)
    with pytest.raises(DataFileError, match=r"no soc_version.*Ascend910B2"):
        load_cluster(path)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (_numa(1, 2), r"whole servers.*atlas-800t-a2, with --nodes 1 --device 910b2 --cards 2"),
        (_numa(2, 16, "Ascend910_9382"), "atlas-800i-a3, cloudmatrix-384"),
        (_numa(1, 8, "Ascend999"), "known device"),
        (_numa(1, 0), "each device of a node once"),
        (_numa(0, 8), "each node once"),
        ('{"cluster": [{}]}', "lacks a key"),
        ('{"cluster": 3, "item_def": [{"item_type": "x"}]}', "lacks a key"),
        ('{"version": "2.0", "rank_list": []}', "rank tables 1.0 and 1.2"),
        ("[]", "lacks a key"),
        ("not json", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
    ],
)
def test_broken_or_unknown_files_are_one_clear_error(tmp_path: Path, text: str, rule: str) -> None:
    """With the place, the rule, and what to try."""
    path = tmp_path / "cluster.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataFileError, match=rule):
        load_cluster(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Absent, a folder, no text."""
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "folder.json").mkdir()
    for name in ("none", "folder", "bytes"):
        with pytest.raises(DataFileError, match=name):
            load_cluster(tmp_path / f"{name}.json")


_KEYS = ["cluster", "cluster_nodes", "item_def", "item_list", "item_id", "item_type", "node_id"]
_KEYS += ["RankTable", "server_list", "server_id", "device", "device_id", "rank_id"]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(_KEYS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_read_or_refused(value: object) -> None:
    """No other error."""
    with contextlib.suppress(DataFileError):
        parse_cluster_file(json.dumps(value), "x")
