"""Target `atc`: what the compiler is told, and what it is never asked to do."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.search.emit_cases import emit_plan, moe, parser_of, run_script

from shardplan.models.errors import InputError
from shardplan.search.emit import emit
from shardplan.search.emit.rank_table import RankDevice, Server, rank_table

SPLIT = {
    "--distributed_cluster_build": "1",
    "--enable_graph_parallel": "1",
}


def _json(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _ranks(data: Any) -> list[tuple[str, str, str]]:
    """(server, device, rank) of a rank table."""
    return [
        (server["server_id"], device["device_id"], device["rank_id"])
        for server in data["server_list"]
        for device in server["device"]
    ]


def test_an_a2_plan_names_its_cards_once_and_its_size(tmp_path: Path) -> None:
    """tp 4 on one node: four items, a control address on this host, semi-automatic split."""
    emit(emit_plan(tp=4), "atc", tmp_path)
    node = {
        "node_id": 0,
        "node_type": "ATLAS800",
        "ipaddr": "127.0.0.1",
        "port": 2509,
        "is_local": True,
        "item_list": [{"item_id": i} for i in range(4)],
    }
    assert _json(tmp_path, "numa_config.json") == {
        "cluster": [{"cluster_nodes": [node]}],
        "item_def": [{"item_type": "Ascend910B2"}],
        "node_def": [{"item": [{"item_type": "Ascend910B2"}]}],
    }
    assert _json(tmp_path, "parallel_option.json") == {
        "graph_parallel_option": {
            "auto": False,
            "opt_level": "O2",
            "tensor_parallel_option": {"tensor_parallel_size": 4},
        }
    }
    assert _ranks(_json(tmp_path, "rank_table.json")) == [
        ("node_0", str(i), str(i)) for i in range(4)
    ]


def test_a_310p_plan_counts_cards_and_dies(tmp_path: Path) -> None:
    """tp 4 = two Duo cards of two dies; no address, no node_def."""
    emit(emit_plan(soc="Ascend310P3", tp=4, weight_dtype="fp16", kv_dtype="fp16"), "atc", tmp_path)
    assert _json(tmp_path, "numa_config.json") == {
        "cluster": [
            {
                "cluster_nodes": [
                    {
                        "node_id": 0,
                        "node_type": "ATLAS300",
                        "item_list": [{"item_id": 0}, {"item_id": 1}],
                    }
                ]
            }
        ],
        "item_def": [
            {"device_list": [{"device_id": 0}, {"device_id": 1}], "item_type": "Ascend310P3"}
        ],
    }


def test_the_script_builds_both_phases_with_the_plans_shapes(tmp_path: Path) -> None:
    """1000 prompt tokens pad to 1024, of which 4096 hold four; 1300 in all pad to 1408."""
    emit(emit_plan(), "atc", tmp_path / "out")
    calls = run_script(
        tmp_path / "out" / "atc.sh", "atc", PREFILL_MODEL="a b.onnx", DECODE_MODEL="d.onnx"
    )
    prefill, decode = (vars(parser_of("atc", "atc").parse_args(call.words)) for call in calls)
    assert prefill["model"] == "a b.onnx"
    assert prefill["input_shape"] == ("input_ids:4,1024;attention_mask:4,1024;position_ids:4,1024")
    assert decode["model"] == "d.onnx"
    assert decode["input_shape"] == "input_ids:24,1;attention_mask:24,1408;position_ids:24,1"
    for name, build in (("prefill", prefill), ("decode", decode)):
        assert build["framework"] == "5"
        assert build["soc_version"] == "Ascend910B2"
        assert build["output"] == str(tmp_path / "out" / name)
        assert build["cluster_config"] == str(tmp_path / "out" / "numa_config.json")
        assert build["graph_parallel_option_path"] == str(tmp_path / "out/parallel_option.json")
        assert {key: build[key[2:]] for key in SPLIT} == SPLIT


def test_a_users_own_shapes_win(tmp_path: Path) -> None:
    """The names of ONNX inputs are an assumption that can be corrected without editing."""
    emit(emit_plan(), "atc", tmp_path / "out")
    call, _ = run_script(
        tmp_path / "out" / "atc.sh",
        "atc",
        PREFILL_MODEL="p",
        DECODE_MODEL="d",
        PREFILL_SHAPE="tokens:1,8",
    )
    assert "--input_shape=tokens:1,8" in call.words


def test_one_card_is_built_without_splitting(tmp_path: Path) -> None:
    """tp 1 needs no cluster file and no communication."""
    paths = emit(emit_plan(tp=1), "atc", tmp_path / "out")
    assert [path.name for path in paths] == ["README.md", "atc.sh"]
    call, _ = run_script(tmp_path / "out" / "atc.sh", "atc", PREFILL_MODEL="p", DECODE_MODEL="d")
    assert not [word for word in call.words if word.partition("=")[0] in SPLIT]


def test_replicas_share_a_build_and_have_their_own_ranks(tmp_path: Path) -> None:
    """dp 3 of tp 4: two on the first node, one on the second; each world counts from 0."""
    emit(emit_plan(tp=4, dp=3), "atc", tmp_path)
    assert _ranks(_json(tmp_path, "rank_table_replica1.json")) == [
        ("node_0", str(4 + i), str(i)) for i in range(4)
    ]
    assert _ranks(_json(tmp_path, "rank_table_replica2.json")) == [
        ("node_1", str(i), str(i)) for i in range(4)
    ]
    assert not (tmp_path / "rank_table_replica3.json").exists()
    assert "3 processes" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_rank_table_is_left_out_where_its_addresses_are_unknown(tmp_path: Path) -> None:
    """910A wants the address of every device port; the README says how to get the table."""
    plan = emit_plan(soc="Ascend910A", tp=2, weight_dtype="fp16", kv_dtype="fp16")
    emit(plan, "atc", tmp_path / "without")
    assert not list((tmp_path / "without").glob("rank_table*"))
    assert "hccn_tool" in (tmp_path / "without" / "README.md").read_text(encoding="utf-8")
    emit(plan, "atc", tmp_path / "with", device_addresses="10.0.0.1, 10.0.0.2")
    devices = _json(tmp_path / "with", "rank_table.json")["server_list"][0]["device"]
    assert [device["device_ip"] for device in devices] == ["10.0.0.1", "10.0.0.2"]


def test_several_nodes_are_listed_with_their_addresses(tmp_path: Path) -> None:
    """tp 16 fills two nodes of eight; only the first is the local one."""
    hosts = ["192.168.0.1", "192.168.0.2"]
    ports = [f"10.0.0.{i}" for i in range(16)]
    emit(emit_plan(tp=16), "atc", tmp_path, addresses=hosts, device_addresses=ports)
    (cluster,) = _json(tmp_path, "numa_config.json")["cluster"]
    nodes = cluster["cluster_nodes"]
    assert [node["ipaddr"] for node in nodes] == hosts
    assert [node["is_local"] for node in nodes] == [True, False]
    assert [len(node["item_list"]) for node in nodes] == [8, 8]
    made = _json(tmp_path, "rank_table.json")
    assert made["server_list"][1]["host_ip"] == hosts[1]
    assert _ranks(made)[8] == ("node_1", "0", "8")
    with pytest.raises(InputError, match="give `addresses`, 2 of them"):
        emit(emit_plan(tp=16), "atc", tmp_path / "other")


REFUSED = [
    ({"soc": "Ascend910_9382"}, "device is not supported", "vllm-ascend"),
    ({"soc": "Ascend950PR_9589"}, "device is not supported", "vllm-ascend"),
    ({"soc": ""}, "not an Ascend device", "Ascend cluster"),
    ({"tp": 4, "pp": 2}, "no key for pipeline stages", "pp=1, for example tp=8"),
    ({"tp": 8, "dp": 2, "ep": 16, "model": moe()}, "does not split experts", "ep=1"),
    ({"cp": 2}, "does not split contexts", "cp=1"),
    ({"dp": 2, "head_tp": 16}, "all modules over the same ranks", "head_tp=0"),
    (
        {"tp": 8, "pp": 2},
        "no key for pipeline stages",
        "pp=1, or use door shards, or use target vllm-ascend",
    ),
    ({"tp": 16, "dp": 2}, "replicas of one node each", "dp=1"),
    ({"tp": 3, "dp": 3}, "fit inside one node", "1, 2, 4, 8"),
    ({"tp": 12}, "fill whole nodes", "whole nodes"),
    ({"soc": "Ascend310P3", "tp": 5}, "whole cards", "2, 4, 8"),
]


def test_no_one_is_sent_to_a_target_that_does_not_know_the_device(tmp_path: Path) -> None:
    """vLLM on Ascend does not run on a 910A."""
    with pytest.raises(InputError) as caught:
        emit(emit_plan(soc="Ascend910A", tp=4, pp=2), "atc", tmp_path / "out")
    assert caught.value.hint == "search with --only pp=1, for example tp=8, or use door shards"


def test_sequence_parallelism_is_the_solvers_choice(tmp_path: Path) -> None:
    """Built all the same; the README says what was priced."""
    for sp, word in ((True, "with"), (False, "without")):
        emit(emit_plan(sp=sp), "atc", tmp_path / word)
        text = (tmp_path / word / "README.md").read_text(encoding="utf-8")
        assert f"Megatron's {word} sequence parallelism" in text


@pytest.mark.parametrize(("changes", "rule", "hint"), REFUSED)
def test_what_the_compiler_cannot_express_is_refused(
    tmp_path: Path, changes: dict[str, Any], rule: str, hint: str
) -> None:
    """With the reason, the nearest plan that it can, and nothing written."""
    with pytest.raises(InputError) as caught:
        emit(emit_plan(**changes), "atc", tmp_path / "out")
    assert rule in str(caught.value)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_options_are_checked(tmp_path: Path) -> None:
    """Releases without graph parallelism, names of other devices, addresses that are none."""
    texts = []
    for cann in (7, "8"):
        emit(emit_plan(), "atc", tmp_path / str(cann), cann=cann)
        texts.append((tmp_path / str(cann) / "README.md").read_text(encoding="utf-8"))
    assert "CANN 7.0" in texts[0]
    assert "CANN 8.0 to 8.3" in texts[1]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"cann": 9}, "try 7"),
        ({"soc_version": "Ascend910B1; rm -rf"}, "names of the plan's device"),
        ({"addresses": "not-an-address"}, "IP address"),
        ({"addresses": ["10.0.0.1", "10.0.0.2"]}, "1 different addresses"),
        ({"device_addresses": ["10.0.0.1"] * 8}, "8 different addresses"),
    ]
    for option, rule in wrong:
        with pytest.raises(InputError, match=rule):
            emit(emit_plan(), "atc", tmp_path / "bad", **option)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    """Neither the shell nor the file system sees what a model calls itself."""
    name = "../../x'\"\n`touch pwned`$(touch pwned); touch pwned #"
    plan = emit_plan(model={"name": name, "source": name}, request={"engine_profile": name})
    paths = emit(plan, "atc", tmp_path / "out")
    assert {path.parent for path in paths} == {tmp_path / "out"}
    run_script(tmp_path / "out" / "atc.sh", "atc", PREFILL_MODEL=name, DECODE_MODEL=name)
    assert not list(tmp_path.rglob("pwned"))
    assert "`touch" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(tmp_path / "out" / "atc.sh")], check=True)
    assert shlex.split((tmp_path / "out" / "atc.sh").read_text(encoding="utf-8"), comments=True)


def test_a_supernode_table_is_version_1_2() -> None:
    """Every device has its number in the supernode, the pod lists its servers."""
    server = Server(
        server_id="node_0",
        host_ip="172.16.0.100",
        devices=tuple(
            RankDevice(device_id=i, device_ip=f"192.168.1.{6 + i}", super_device_id=i)
            for i in range(2)
        ),
    )
    made = rank_table([server], super_pod_id="0")
    assert made["version"] == "1.2"
    assert made["super_pod_list"] == [
        {"super_pod_id": "0", "server_list": [{"server_id": "node_0"}]}
    ]
    assert made["server_list"][0]["device"][1] == {
        "device_id": "1",
        "super_device_id": "1",
        "device_ip": "192.168.1.7",
        "rank_id": "1",
    }


@pytest.mark.parametrize(
    ("servers", "rule"),
    [
        ([], "names each server once"),
        ([Server(server_id="a", devices=(RankDevice(device_id=0),))] * 2, "each server once"),
        ([Server(server_id="a", devices=())], "each of its devices once"),
        ([Server(server_id="a", devices=(RankDevice(device_id=0),) * 2)], "devices once"),
        ([Server(server_id="a" * 65, devices=(RankDevice(device_id=0),))], "1 to 64"),
        (
            [Server(server_id=x, devices=(RankDevice(device_id=0),)) for x in "ab"],
            "needs a device_ip",
        ),
        (
            [Server(server_id="a", devices=(RankDevice(device_id=0, super_device_id=1),))],
            "only together",
        ),
        ([Server(server_id="a", devices=(RankDevice(device_id=0, device_ip="x"),))], "IP address"),
    ],
)
def test_a_rank_table_that_hccl_would_refuse_is_not_made(servers: list[Server], rule: str) -> None:
    """Each rule of the format is checked before a file is written."""
    with pytest.raises(InputError, match=rule):
        rank_table(servers)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_ranks_count_up_through_the_servers(counts: list[int]) -> None:
    """Ranks are 0..N-1, contiguous on each server, all values strings."""
    servers = [
        Server(
            server_id=f"node_{s}",
            devices=tuple(RankDevice(device_id=d, device_ip=f"10.0.{s}.{d}") for d in range(count)),
        )
        for s, count in enumerate(counts)
    ]
    made = rank_table(servers)
    ranks = [int(rank) for _, _, rank in _ranks(made)]
    assert ranks == list(range(sum(counts)))
    assert made["server_count"] == str(len(counts))
