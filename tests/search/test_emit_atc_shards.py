"""Door `shards` of target `atc`: slices on devices, and the groups that the graph's sums join."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.search.emit_cases import emit_plan, moe, parser_of, run_script

from shardplan.models.accounting import transfers
from shardplan.models.errors import InputError
from shardplan.models.ranks import extents
from shardplan.search.emit import emit
from shardplan.search.emit.atc_shards import comm_groups
from shardplan.search.emit.weights import applied

MIXTRAL = moe(name="mixtral-8x7b", architecture="MixtralForCausalLM", layers=32)


def _emit(folder: Path, **changes: Any) -> Path:
    emit(emit_plan(**changes), "atc", folder / "out", door="shards")
    return folder / "out"


def _json(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _builds(folder: Path) -> list[dict[str, Any]]:
    """Flags of every build that the script would start."""
    script = folder / "atc.sh"
    calls = run_script(script, "atc", PREFILL_SHARDS="p", DECODE_SHARDS="d")
    return [vars(parser_of("atc", "atc").parse_args(call.words)) for call in calls]


def test_slices_lie_on_devices_and_join_one_group(tmp_path: Path) -> None:
    """tp 2: the file of the vendor's guide, and one build a phase."""
    out = _emit(tmp_path, tp=2)
    assert _json(out, "model_relation_config.json") == {
        "deploy_config": [
            {"submodel_name": "export_rank0.air", "deploy_device_id_list": "0:0:0"},
            {"submodel_name": "export_rank1.air", "deploy_device_id_list": "0:0:1"},
        ],
        "model_name_to_instance_id": [
            {"submodel_name": "export_rank0.air", "model_instance_id": 0},
            {"submodel_name": "export_rank1.air", "model_instance_id": 1},
        ],
        "comm_group": [{"group_name": "tp0_group_0", "group_rank_list": "[0,1]"}],
        "rank_table": [
            {"rank_id": 0, "model_instance_id": 0},
            {"rank_id": 1, "model_instance_id": 1},
        ],
    }
    prefill, decode = _builds(out)
    assert (prefill["shard_model_dir"], decode["shard_model_dir"]) == ("p", "d")
    for build in (prefill, decode):
        assert build["distributed_cluster_build"] == "1"
        assert build["framework"] == "1"
        assert build["cluster_config"] == str(out / "numa_config.json")
        assert build["model_relation_config"] == str(out / "model_relation_config.json")
        assert build["model"] is build["enable_graph_parallel"] is None


def test_every_stage_is_a_build_of_its_own(tmp_path: Path) -> None:
    """pp 2 of tp 8, dp 2: two builds a phase, a rank table for each stage and replica."""
    out = _emit(tmp_path, tp=8, pp=2, dp=2, stage_layers=(40, 40))
    builds = _builds(out)
    assert [one["output"].rpartition("/")[2] for one in builds] == [
        "prefill_stage0",
        "prefill_stage1",
        "decode_stage0",
        "decode_stage1",
    ]
    assert [one["shard_model_dir"] for one in builds[:2]] == ["p/stage0", "p/stage1"]
    assert builds[1]["cluster_config"] == str(out / "numa_config_stage1.json")
    assert {path.name for path in out.glob("rank_table*")} == {
        f"rank_table_stage{s}_replica{r}.json" for s in (0, 1) for r in (0, 1)
    }
    assert "stage 1: layers 40 to 79" in (out / "README.md").read_text(encoding="utf-8")


def test_experts_over_data_parallel_groups_are_one_world(tmp_path: Path) -> None:
    """ep 8 over dp 2 and tp 4: eight slices; tokens gathered over dp, sums within tp 4."""
    out = _emit(tmp_path, tp=4, dp=2, ep=8, model=MIXTRAL)
    config = _json(out, "model_relation_config.json")
    groups = {one["group_name"]: one["group_rank_list"] for one in config["comm_group"]}
    assert groups["tp0_group_1"] == "[4,5,6,7]"
    assert groups["dp1_group_3"] == "[3,7]"
    assert len(config["deploy_config"]) == 8
    assert "processes" not in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("way", "model"),
    [
        ({"tp": 8}, None),
        ({"tp": 16}, {"name": "llama-3.1-8b", "layers": 32}),
        ({"tp": 4, "cp": 2}, None),
        ({"tp": 4, "dp": 4, "ep": 8}, MIXTRAL),
        ({"tp": 2, "dp": 4, "ep": 4, "exchange": "alltoall"}, MIXTRAL),
    ],
)
def test_groups_are_those_of_the_graphs_collectives(
    way: dict[str, Any], model: dict[str, Any] | None
) -> None:
    """Every collective's group has its size, and where one world is all ranks its members."""
    plan = emit_plan(model=model, **way)
    graph = applied(plan, "test")
    shared = max(way.get("ep", 1) // way["tp"], 1)
    groups = dict(comm_groups([graph], shared))
    world = shared * way["tp"] * way.get("cp", 1)
    for block in graph.blocks.values():
        for one in transfers(graph, block):
            if one.kind == "send":
                continue
            name = "_".join(axis for axis in graph.mesh.axes if axis in one.axes)
            mine = [ranks for key, ranks in groups.items() if key.startswith(f"{name}_group")]
            assert sorted(sum(mine, ())) == list(range(world))
            assert {len(ranks) for ranks in mine} == {one.ranks}
            if way.get("dp", 1) == shared:
                spread = [0]
                for size, stride in extents(graph.mesh, graph.parallel, one.axes):
                    spread = [at + stride * i for at in spread for i in range(size)]
                assert tuple(sorted(spread)) in mine


@pytest.mark.parametrize(
    ("changes", "rule", "hint"),
    [
        ({"soc": "Ascend910_9382"}, "device is not supported", "vllm-ascend"),
        ({"soc": "Ascend310P3", "tp": 4}, "310P item holds two dies", "door split"),
        ({"tp": 4, "dp": 2, "pp": 2, "ep": 8, "model": MIXTRAL}, "side by side", "pp=1"),
        ({"tp": 1}, "nothing to slice", "door split"),
        ({"tp": 1, "pp": 2, "stage_layers": (40, 40)}, "nothing to slice", "wider tp"),
        ({"tp": 16, "dp": 2, "model": {"name": "llama-3.1-8b"}}, "one node each", "dp=1"),
    ],
)
def test_what_slices_cannot_express_is_refused(
    tmp_path: Path, changes: dict[str, Any], rule: str, hint: str
) -> None:
    """With the reason and the nearest plan, and nothing written."""
    with pytest.raises(InputError) as caught:
        _emit(tmp_path, **changes)
    assert rule in str(caught.value)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_world_of_several_nodes_lists_them(tmp_path: Path) -> None:
    """tp 16 on two nodes: slices 8 to 15 lie on node 1, which has its own address."""
    plan = emit_plan(tp=16, model={"name": "llama-3.1-8b", "layers": 32})
    hosts, ports = "10.0.0.1,10.0.0.2", ",".join(f"10.1.0.{i}" for i in range(16))
    options = {"door": "shards", "addresses": hosts, "device_addresses": ports}
    plan.emit("atc", tmp_path, **options)
    deployed = _json(tmp_path, "model_relation_config.json")["deploy_config"]
    assert deployed[9]["deploy_device_id_list"] == "0:1:1"
    (cluster,) = _json(tmp_path, "numa_config.json")["cluster"]
    assert [node["ipaddr"] for node in cluster["cluster_nodes"]] == hosts.split(",")
    servers = _json(tmp_path, "rank_table.json")["server_list"]
    assert servers[1]["device"][1]["rank_id"] == "9"


def test_a_door_that_is_none_is_refused(tmp_path: Path) -> None:
    """By name."""
    with pytest.raises(InputError, match=r"split or shards.*window"):
        emit(emit_plan(), "atc", tmp_path / "out", door="window")
