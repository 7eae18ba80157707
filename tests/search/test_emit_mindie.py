"""Target `mindie`: settings as the server reads them, and the scripts that start it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.search.emit_cases import emit_plan, moe, parser_of, run_script

from shardplan.models.errors import InputError
from shardplan.search.api import search
from shardplan.search.emit import emit
from shardplan.search.emit.schemas import schema
from shardplan.search.plan import Plan
from shardplan.search.read_mindie import read_mindie


def _latent(**changes: Any) -> dict[str, Any]:
    return moe(name="deepseek-v3", architecture="DeepseekV3ForCausalLM", **changes)


def _valid(definition: str, value: object) -> None:
    """Against the same file with the reference implementation of JSON Schema."""
    whole = {**schema("mindie"), "$ref": f"#/$defs/{definition}"}
    jsonschema.Draft202012Validator(whole).validate(value)


def _config(plan: Plan, folder: Path, node: int = 0, **options: Any) -> dict[str, Any]:
    """The settings of a node; what `shardplan lint` makes of them breaks no rule of the engine."""
    emit(plan, "mindie", folder / "out", force=True, **options)
    text = (folder / "out" / f"config_node{node}.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    _valid("Config", loaded)
    read = read_mindie(text, "config.json")
    way = plan.strategy
    if not loaded["BackendConfig"]["multiNodesInferEnabled"]:
        assert read.broken == ()
    assert (read.tp, read.cp, read.mtp, read.exchange) == (way.tp, way.cp, way.mtp, way.exchange)
    assert (read.max_num_seqs, read.max_num_batched_tokens) == (way.batch, way.chunk)
    return loaded


def _model(config: dict[str, Any]) -> dict[str, Any]:
    (model,) = config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"]
    assert isinstance(model, dict)
    return model


def test_a_dense_plan_on_one_node(tmp_path: Path) -> None:
    """tp 8: one instance; 1000 + 300 tokens are 11 blocks of 128; four prompts fill a step."""
    config = _config(emit_plan(), tmp_path)
    backend = config["BackendConfig"]
    assert backend["npuDeviceIds"] == [list(range(8))]
    assert backend["modelInstanceNumber"] == 1
    lengths = backend["ModelDeployConfig"]
    assert (lengths["maxSeqLen"], lengths["maxInputTokenLen"]) == (1408, 1000)
    model = _model(config)
    assert (model["tp"], model["dp"], model["worldSize"]) == (8, 1, 8)
    assert "moe_ep" not in model
    assert model["modelWeightPath"] == "/data/llama-3.1-70b"
    schedule = backend["ScheduleConfig"]
    assert (schedule["maxPrefillBatchSize"], schedule["maxIterTimes"]) == (4, 408)
    script = tmp_path / "out" / "start_node0.sh"
    (call,) = run_script(script, "mindie_llm_server", NODE_ADDRESS="10.0.0.2")
    assert call.environment["MIES_CONTAINER_IP"] == "10.0.0.2"
    assert call.environment["NPU_MEMORY_FRACTION"] == "0.9"
    assert call.environment["MIES_CONFIG_JSON_PATH"] == str(tmp_path / "out" / "config_node0.json")
    assert (tmp_path / "out" / "config_node0.json").stat().st_mode & 0o777 == 0o640


def test_replicas_are_instances_of_one_server(tmp_path: Path) -> None:
    """dp 2 of tp 4: one process with two device lists, so no balancer."""
    config = _config(emit_plan(tp=4, dp=2), tmp_path)
    assert config["BackendConfig"]["npuDeviceIds"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert config["BackendConfig"]["modelInstanceNumber"] == 2
    assert not (tmp_path / "out" / "balancer.conf").exists()
    config = _config(emit_plan(tp=4, dp=4), tmp_path, node=1)
    assert "NODE1:1025" in (tmp_path / "out" / "balancer.conf").read_text(encoding="utf-8")


def test_experts_over_groups(tmp_path: Path) -> None:
    """tp 2 dp 4 ep 8, sent: no expert is split; two of tp 4 ep 2: each expert over two ranks."""
    plan = emit_plan(tp=2, dp=4, ep=8, exchange="alltoall", model=_latent())
    model = _model(_config(plan, tmp_path))
    assert [model[key] for key in ("tp", "dp", "moe_ep", "moe_tp")] == [2, 4, 8, 1]
    assert model["models"]["deepseekv2"]["ep_level"] == 2
    gathered = _model(_config(emit_plan(tp=4, dp=1, ep=2, model=_latent()), tmp_path))
    assert [gathered[key] for key in ("tp", "dp", "moe_ep", "moe_tp")] == [4, 1, 2, 2]
    assert gathered["models"]["deepseekv2"]["ep_level"] == 1


@pytest.mark.parametrize("node", [0, 1])
def test_an_instance_over_two_nodes(tmp_path: Path, node: int) -> None:
    """Addresses make the rank table; without them the script asks for one."""
    plan = emit_plan(tp=8, dp=2, ep=16, exchange="alltoall", model=_latent())
    devices = ",".join(f"10.1.{i // 8}.{i % 8 + 1}" for i in range(16))
    given = {"addresses": "10.0.0.1,10.0.0.2", "device_addresses": devices}
    config = _config(plan, tmp_path, node, **given)
    assert config["BackendConfig"]["multiNodesInferEnabled"]
    assert _model(config)["worldSize"] == 16
    read = json.loads((tmp_path / "out" / "rank_table0.json").read_text(encoding="utf-8"))
    assert [one["container_ip"] for one in read["server_list"]] == ["10.0.0.1", "10.0.0.2"]
    last = read["server_list"][1]["device"][7]
    assert last == {"device_id": "7", "device_ip": "10.1.1.8", "rank_id": "15"}
    script = tmp_path / "out" / f"start_node{node}.sh"
    where = {"NODE_ADDRESS": "10.0.0.2", "HEAD_ADDRESS": "10.0.0.1"}
    (call,) = run_script(script, "mindie_llm_server", **where)
    assert call.environment["RANK_TABLE_FILE"].endswith("rank_table0.json")
    assert call.environment["MASTER_IP"] == "10.0.0.1"
    assert call.environment["HCCL_DETERMINISTIC"] == "true"
    emit(plan, "mindie", tmp_path / "bare")
    bare = tmp_path / "bare" / f"start_node{node}.sh"
    assert "hccn_tool" in (tmp_path / "bare" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(subprocess.CalledProcessError):
        run_script(bare, "mindie_llm_server", **where)
    (call,) = run_script(bare, "mindie_llm_server", RANK_TABLE_FILE="t.json", **where)
    assert call.environment["RANK_TABLE_FILE"] == "t.json"


def test_device_addresses_follow_the_plans_order(tmp_path: Path) -> None:
    """Two instances of two context parts, parts outermost: instance 0 has nodes 0 and 2."""
    plan = emit_plan(
        dp=2, cp=2, order=("cp", "pp", "dp", "tp"), weight_dtype="w8a8", model=_latent()
    )
    nodes = ",".join(f"10.0.0.{node}" for node in range(4))
    devices = ",".join(f"10.1.{i // 8}.{i % 8}" for i in range(32))
    emit(plan, "mindie", tmp_path / "out", addresses=nodes, device_addresses=devices)
    for table, own in (("rank_table0.json", (0, 2)), ("rank_table1.json", (1, 3))):
        read = json.loads((tmp_path / "out" / table).read_text(encoding="utf-8"))
        for server, node in zip(read["server_list"], own, strict=True):
            assert server["server_id"] == f"10.0.0.{node}"
            ips = [one["device_ip"] for one in server["device"]]
            assert ips == [f"10.1.{node}.{i}" for i in range(8)]


def test_context_prefixes_and_tokens_ahead(tmp_path: Path) -> None:
    """Each has its key; cp brings sp=tp, and plugins share one text."""
    way: dict[str, Any] = {"tp": 4, "cp": 2, "ep": 8, "weight_dtype": "w8a8", "mtp": 1}
    plan = emit_plan(model=_latent(), workload={"prefix_hit": 0.5}, exchange="alltoall", **way)
    model = _model(_config(plan, tmp_path))
    assert [model[key] for key in ("cp", "sp", "moe_ep", "worldSize")] == [2, 4, 8, 8]
    assert json.loads(model["plugin_params"]) == {
        "plugin_type": "mtp,prefix_cache",
        "num_speculative_tokens": 1,
    }
    assert model["models"]["deepseekv2"]["kv_cache_options"] == {"enable_nz": True}
    assert (tmp_path / "out" / "quantize.sh").is_file()


def test_modules_inside_a_node(tmp_path: Path) -> None:
    way: dict[str, Any] = {"tp": 1, "dp": 8, "ep": 8, "exchange": "alltoall"}
    way |= {"head_tp": 8, "o_tp": 8}
    model = _model(_config(emit_plan(model=_latent(), **way), tmp_path))
    assert model["models"]["deepseekv2"]["parallel_options"] == {
        "lm_head_local_tp": 8,
        "o_proj_local_tp": 8,
    }


def test_the_load_test_asks_the_chat_door(tmp_path: Path) -> None:
    emit(emit_plan(), "mindie", tmp_path / "out")
    (call,) = run_script(tmp_path / "out" / "bench.sh", "vllm", MODEL="m")
    flags = parser_of("vllm_flags", "bench").parse_args(call.words[2:])
    assert (flags.backend, flags.endpoint) == ("openai-chat", "/v1/chat/completions")
    assert flags.base_url == "http://127.0.0.1:1025"
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    body = json.loads(text.partition("-d '")[2].partition("'")[0])
    assert body["messages"][0]["role"] == "user"


def _pools(**asked: Any) -> Plan:
    base: dict[str, Any] = {"input_len": 1024, "output_len": 128, "serving": "disagg"}
    return search(
        asked.pop("model", "llama-3.1-8b"), asked.pop("cluster", "atlas-800t-a2"), **base | asked
    ).plan


def test_pools_are_written_for_motor(tmp_path: Path) -> None:
    """Counts, sizes and limits of the plan; roles differ in batch and tokens."""
    plan = _pools(engine_profile="mindie", ttft_ms=800, tpot_ms=40)
    emit(plan, "mindie", tmp_path / "out")
    whole = json.loads((tmp_path / "out" / "user_config.json").read_text(encoding="utf-8"))
    _valid("UserConfig", whole)
    prefill, decode = plan.pools
    deploy = whole["deploy_config"]
    assert (deploy["p_instances_num"], deploy["d_instances_num"]) == (
        prefill.instances,
        decode.instances,
    )
    assert (deploy["p_pod_npu_num"], deploy["d_pod_npu_num"]) == (
        prefill.strategy.ranks,
        decode.strategy.ranks,
    )
    assert deploy["hardware_type"] == "800I_A2"
    controller = whole["mindie_ms_controller_config"]
    assert (controller["digs_prefill_slo"], controller["digs_decode_slo"]) == (800, 40)
    for pool in plan.pools:
        role = whole[f"mindie_server_{pool.role}_config"]
        assert role["ServerConfig"]["inferMode"] == "dmi"
        model = _model(role)
        assert (model["tp"], model["worldSize"]) == (pool.strategy.tp, pool.strategy.ranks)
    env = json.loads((tmp_path / "out" / "mindie_env.json").read_text(encoding="utf-8"))
    assert env["mindie_server_decode_env"]["NPU_MEMORY_FRACTION"] == "0.8"


def test_a_spread_decode_pool_is_a_process_a_group(tmp_path: Path) -> None:
    """DeepSeek on 64 A3 dies: decode groups share experts over several nodes."""
    plan = _pools(
        model="deepseek-v3",
        cluster="atlas-800i-a3",
        nodes=4,
        engine_profile="mindie",
        weight_dtype="w8a8",
    )
    emit(plan, "mindie", tmp_path / "out")
    whole = json.loads((tmp_path / "out" / "user_config.json").read_text(encoding="utf-8"))
    _valid("UserConfig", whole)
    decode = plan.pools[1].strategy
    deploy, role = whole["deploy_config"], whole["mindie_server_decode_config"]
    assert deploy["decode_distribute_enable"] == 1
    assert deploy["single_d_instance_pod_num"] * deploy["d_pod_npu_num"] == decode.ranks
    assert role["ServerConfig"]["distDPServerEnabled"]
    model = _model(role)
    assert (model["worldSize"], model["dp"], model["moe_ep"]) == (decode.tp, decode.dp, decode.ep)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"soc": "Ascend910A"}, "device is not supported", "target atc"),
    ({"tp": 4, "pp": 2, "stage_layers": (40, 40)}, "no pipeline parallelism", "pp=1"),
    ({"ep": 8, "model": moe()}, "DeepSeek-V2 and V3 kind", "ep=1"),
    ({"cp": 2}, "context parallelism runs", "cp=1"),
    ({"cp": 2, "tp": 4, "model": _latent()}, "quantized weights", "w8a8"),
    ({"sp": True}, "not split over tp", "--engine-profile mindie"),
    ({"chunk": 512}, "a prompt runs in one step", "mindie"),
    ({"attention": "naive"}, "always fused", "flash"),
    ({"mtp": 1}, "predicted ahead, with", "mtp off"),
    ({"mtp": 3, "ep": 8, "model": _latent()}, "at most 2 tokens", "mtp off"),
    ({"weight_prefetch": True}, "DeepSeek kind", "prefetch off"),
    ({"workload": {"prefix_hit": 0.5}}, "prefixes are cached for", "prefix_hit=0"),
    ({"kv_dtype": "int8", "soc": "Ascend910_9382"}, "no such KV cache", "bf16"),
    ({"weight_dtype": "w8a16", "soc": "Ascend910_9382"}, "no weight scheme", "w8a8"),
    ({"tp": 1, "dp": 8, "ffn_tp": 8, "ep": 8, "model": _latent()}, "split by tp", "module-tp"),
    ({"soc": "Ascend310P3", "weight_dtype": "w8a8", "batch": 4000}, "at most 2000", "fewer"),
    ({"soc": "Ascend310P3", "tp": 16, "weight_dtype": "w8a8"}, "fits its cluster", "again"),
    ({"tp": 1, "dp": 16, "soc": "Ascend910_9382"}, "at most 10 instances", "larger tp"),
    ({"workload": {"input_len": 200_000}}, "a prompt runs in one step", "mindie"),
    ({"batch": 900_000}, "at most 819200", "ranges"),
]


@pytest.mark.parametrize(("changes", "rule", "hint"), REFUSED)
def test_what_the_engine_cannot_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], rule: str, hint: str
) -> None:
    """With the reason, the nearest plan that it can, and nothing written."""
    with pytest.raises(InputError) as caught:
        emit(emit_plan(**changes), "mindie", tmp_path / "out")
    assert rule in str(caught.value)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", ["data", "/a b", "/a;b", "/../etc", "/a/../b", "/x\n", '/"'])
def test_a_hostile_folder_is_refused(tmp_path: Path, weights: str) -> None:
    with pytest.raises(InputError, match="folder from the root"):
        emit(emit_plan(), "mindie", tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


def test_addresses_are_checked(tmp_path: Path) -> None:
    """As many as there are nodes, each an address."""
    plan = emit_plan(tp=8, dp=2, ep=16, exchange="alltoall", model=_latent())
    for given in ("10.0.0.1", "10.0.0.1,$(touch pwned)"):
        with pytest.raises(InputError):
            emit(plan, "mindie", tmp_path / "out", addresses=given)
