"""Target `ray`: a file that Ray Serve takes, with the arguments of the engine's own target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.search.emit_cases import emit_plan, moe, only

from shardplan.models.errors import InputError
from shardplan.search.api import search
from shardplan.search.emit import emit
from shardplan.search.emit.common import known_flags
from shardplan.search.emit.schemas import schema
from shardplan.search.plan import Plan

yaml = pytest.importorskip("yaml")


def _valid(definition: str, value: object) -> None:
    whole = {**schema("ray"), "$ref": f"#/$defs/{definition}"}
    jsonschema.Draft202012Validator(whole).validate(value)


def _configs(plan: Plan, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Configurations of the servers, each held against the schema and the engine's flags."""
    emit(plan, "ray", folder / "ray", force=True, **options)
    whole = yaml.safe_load((folder / "ray" / "serve.yaml").read_text(encoding="utf-8"))
    _valid("ServeDeploySchema", whole)
    (application,) = whole["applications"]
    args = application["args"]
    if plan.pools:
        assert application["import_path"] == "ray.serve.llm:build_pd_openai_app"
        _valid("PDServingArgs", args)
        found = [args["prefill_config"], args["decode_config"]]
    else:
        assert application["import_path"] == "ray.serve.llm:build_openai_app"
        _valid("LLMServingArgs", args)
        found = args["llm_configs"]
    known = known_flags("vllm_flags", "serve")
    for one in found:
        _valid("LLMConfig", one)
        assert {f"--{key.replace('_', '-')}" for key in one["engine_kwargs"]} <= known
    return list(found)


def test_replicas_with_their_devices(tmp_path: Path) -> None:
    """dp 2 of tp 4 pp 2: two replicas of eight NPUs, with the cut of layers in the environment."""
    plan = emit_plan(tp=4, pp=2, dp=2, stage_layers=(41, 39), weight_dtype="w8a8")
    (one,) = _configs(plan, tmp_path, weights="/ckpt/llama")
    assert one["model_loading_config"] == {
        "model_id": "llama-3.1-70b",
        "model_source": "/ckpt/llama",
    }
    deployment = one["deployment_config"]
    assert deployment["num_replicas"] == 2
    assert deployment["ray_actor_options"]["resources"] == {"NPU": 8}
    assert one["runtime_env"]["env_vars"]["VLLM_PP_LAYER_PARTITION"] == "41,39"
    assert one["engine_kwargs"]["quantization"] == "ascend"
    assert not {"host", "port", "served_model_name"} & set(one["engine_kwargs"])


def test_arguments_are_those_of_the_command(tmp_path: Path) -> None:
    """Number by number what `vllm serve` is told, with JSON as objects."""
    plan = emit_plan(sp=True, ep=8, model=moe())
    (one,) = _configs(plan, tmp_path)
    flags, environment = only(plan, tmp_path)
    told = one["engine_kwargs"]
    assert told["tensor_parallel_size"] == int(flags.tensor_parallel_size)
    assert told["max_model_len"] == int(flags.max_model_len)
    assert told["gpu_memory_utilization"] == float(flags.gpu_memory_utilization)
    assert told["compilation_config"] == json.loads(flags.compilation_config)
    assert told["additional_config"] == json.loads(flags.additional_config)
    assert told["enable_expert_parallel"] is True
    variables = one["runtime_env"]["env_vars"]
    assert variables.items() <= environment.items()


def _pools(plan: Plan, **counts: int) -> Plan:
    """With other numbers of instances."""
    pools = tuple(pool.model_copy(update={"instances": counts[pool.role]}) for pool in plan.pools)
    return plan.model_copy(update={"pools": pools})


def test_pools_have_ports_apart(tmp_path: Path) -> None:
    """One instance a pool shares a node with the other; more of less than a node cannot."""
    asked: dict[str, Any] = {"input_len": 1024, "output_len": 128, "ttft_ms": 800, "tpot_ms": 40}
    plan = search("llama-3.1-8b", "atlas-800t-a2", serving="disagg", **asked).plan
    prefill, decode = _configs(_pools(plan, prefill=1, decode=1), tmp_path)
    transfers = [one["engine_kwargs"]["kv_transfer_config"] for one in (prefill, decode)]
    assert [one["kv_role"] for one in transfers] == ["kv_producer", "kv_consumer"]
    assert [one["kv_port"] for one in transfers] == ["28000", "28008"]
    assert not any("engine_id" in one for one in transfers)
    assert prefill["engine_kwargs"]["enforce_eager"] is True
    with pytest.raises(InputError, match=r"do not share a node.*use target k8s"):
        emit(_pools(plan, prefill=2, decode=1), "ray", tmp_path / "no")
    assert not (tmp_path / "no").exists()


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"dp": 2, "ep": 16, "model": moe()}, "one data-parallel group", "ep=8"),
    ({"tp": 8, "pp": 2, "stage_layers": (40, 40)}, "inside one node", "at most 8"),
    ({"cp": 2}, "context parallelism", "cp=1"),
    ({"soc": ""}, "not an Ascend device", "Ascend cluster"),
]


@pytest.mark.parametrize(("changes", "rule", "hint"), REFUSED)
def test_what_ray_cannot_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], rule: str, hint: str
) -> None:
    with pytest.raises(InputError) as caught:
        emit(emit_plan(**changes), "ray", tmp_path / "out")
    assert rule in str(caught.value)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["'; touch pwned #", "a: b\n- c", "!!python/object", "", "*x"])
def test_hostile_names_stay_text(tmp_path: Path, name: str) -> None:
    (one,) = _configs(emit_plan(model={"name": name, "source": name}), tmp_path)
    assert not set(one["model_loading_config"]["model_id"]) & set(" :;'!*\n")


def test_a_hostile_folder_is_refused(tmp_path: Path) -> None:
    for weights in ("x", "/a: b", "/a\n- b", "/../etc"):
        with pytest.raises(InputError, match="folder from the root"):
            emit(emit_plan(), "ray", tmp_path / "out", weights=weights)
