"""Target `sglang`: the commands that a plan becomes, as a shell would run them."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.search.emit_cases import HERE, emit_plan, moe, parser_of, run_script

from shardplan.models.errors import InputError
from shardplan.search.api import search
from shardplan.search.emit import emit
from shardplan.search.plan import Plan

Started = tuple[argparse.Namespace, dict[str, str]]


def _parsed(words: list[str]) -> argparse.Namespace:
    assert words[:2] == ["-m", "sglang.launch_server"]
    return parser_of("sglang_flags", "serve").parse_args(_joined(words[2:]))


def _joined(words: list[str]) -> list[str]:
    """With the sizes of decode graphs, several words, as one."""
    name = "--cuda-graph-bs-decode"
    if name not in words:
        return words
    at = words.index(name) + 1
    end = next((i for i in range(at, len(words)) if words[i].startswith("--")), len(words))
    return [*words[:at], ",".join(words[at:end]), *words[end:]]


def _started(plan: Plan, folder: Path, node: int = 0) -> list[Started]:
    emit(plan, "sglang", folder / "out", force=True)
    script = folder / "out" / f"serve_node{node}.sh"
    linger = {"LINGER": "0.5"} if "wait -n" in script.read_text(encoding="utf-8") else {}
    calls = run_script(script, "python3", **HERE, **linger)
    calls.sort(key=lambda one: one.environment["ASCEND_RT_VISIBLE_DEVICES"])
    return [(_parsed(call.words), call.environment) for call in calls]


def test_a_dense_plan_on_one_node(tmp_path: Path) -> None:
    """tp 8; memory for weights and cache is what the ledger leaves of the card."""
    ((flags, environment),) = _started(emit_plan(), tmp_path)
    assert (flags.model_path, flags.served_model_name) == ("checkpoint", "llama-3.1-70b")
    assert (flags.device, flags.attention_backend) == ("npu", "ascend")
    assert (flags.tp_size, flags.pp_size, flags.dp_size) == ("8", "1", None)
    assert (flags.max_running_requests, flags.chunked_prefill_size) == ("24", "4096")
    assert (flags.context_length, flags.page_size) == ("1408", "128")
    assert flags.cuda_graph_bs_decode == "1,2,4,8,16,24"
    assert flags.dtype == "bfloat16"
    assert flags.disable_radix_cache
    assert 0.5 < float(flags.mem_fraction_static) < 0.9
    assert (flags.nnodes, flags.quantization) == (None, None)
    assert environment["HCCL_BUFFSIZE"] == "200"
    assert environment["ASCEND_RT_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize("node", [0, 3])
def test_experts_over_four_nodes(tmp_path: Path, node: int) -> None:
    """tp 2 dp 32 ep 64: SGLang's tp_size counts all 64 ranks, its batch those of 32 groups."""
    way: dict[str, Any] = {"tp": 2, "dp": 32, "ep": 64, "exchange": "alltoall", "batch": 16}
    plan = emit_plan(soc="Ascend910_9382", model=moe(), **way)
    ((flags, environment),) = _started(plan, tmp_path, node)
    assert (flags.tp_size, flags.dp_size, flags.ep_size) == ("64", "32", "64")
    assert flags.enable_dp_attention
    assert flags.enable_dp_lm_head
    assert flags.enable_dense_mlp_attn_tp
    assert (flags.moe_a2a_backend, flags.deepep_mode) == ("deepep", "auto")
    assert (flags.nnodes, flags.node_rank) == ("4", str(node))
    assert flags.dist_init_addr == "10.0.0.1:5000"
    assert flags.max_running_requests == str(16 * 32)
    assert flags.chunked_prefill_size == str(4096 * 32)
    assert environment["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] == "16"
    assert environment["HCCL_IF_IP"] == "10.0.0.2"


def test_modules_over_all_ranks_of_a_server(tmp_path: Path) -> None:
    """The LM head and dense layers over the server's ranks are what the engine does unasked."""
    way: dict[str, Any] = {"tp": 1, "dp": 8, "ep": 8, "exchange": "alltoall", "model": moe()}
    ((by_tp, _),) = _started(emit_plan(**way), tmp_path)
    assert by_tp.enable_dp_lm_head
    assert by_tp.moe_dense_tp_size == "1"
    ((over_all, _),) = _started(emit_plan(**way, head_tp=8, ffn_tp=8), tmp_path)
    assert not over_all.enable_dp_lm_head
    assert over_all.moe_dense_tp_size is None


def test_copies_are_servers_of_their_own(tmp_path: Path) -> None:
    """dp 2 of tp 4: four cards and a port each, nginx before them."""
    first, second = _started(emit_plan(tp=4, dp=2), tmp_path)
    assert [flags.port for flags, _ in (first, second)] == ["30000", "30001"]
    assert second[1]["ASCEND_RT_VISIBLE_DEVICES"] == "4,5,6,7"
    balancer = (tmp_path / "out" / "balancer.conf").read_text(encoding="utf-8")
    assert "server 127.0.0.1:30001;" in balancer


def test_servers_of_groups_on_one_node_share_no_port(tmp_path: Path) -> None:
    """Each takes seven ports from its own, or from port + 233, where it is told no address."""
    way: dict[str, Any] = {"soc": "Ascend910_9382", "tp": 1, "dp": 16, "ep": 8, "model": moe()}
    servers = _started(emit_plan(**way), tmp_path)
    found: set[int] = set()
    for flags, _ in servers:
        host, _, port = (flags.dist_init_addr or f"127.0.0.1:{int(flags.port) + 233}").partition(
            ":"
        )
        own = {int(flags.port), *range(int(port), int(port) + 7)}
        assert host == "127.0.0.1"
        assert not found & own
        found |= own
    assert len(servers) == 2


@pytest.mark.parametrize(("chunk", "told"), [(4096, 4096), (2896, 2816), (100, 128)])
def test_a_chunk_is_whole_pages(tmp_path: Path, chunk: int, told: int) -> None:
    """SGLang ends with an assertion otherwise."""
    ((flags, _),) = _started(emit_plan(chunk=chunk), tmp_path)
    assert flags.chunked_prefill_size == str(told)


def test_quantized_eager_and_cached(tmp_path: Path) -> None:
    """What each setting of a plan turns on."""
    plan = emit_plan(
        weight_dtype="w8a8",
        request={"engine_profile": "vllm-ascend-eager"},
        workload={"prefix_hit": 0.5},
    )
    ((flags, _),) = _started(plan, tmp_path)
    assert flags.quantization == "modelslim"
    assert flags.dtype is None
    assert flags.disable_decode_cuda_graph
    assert flags.cuda_graph_bs_decode is None
    assert not flags.disable_radix_cache
    assert (tmp_path / "out" / "quantize.sh").is_file()


def test_tokens_predicted_ahead(tmp_path: Path) -> None:
    """A chain of two drafts is verified in steps of three tokens."""
    model = moe(name="deepseek-v3", architecture="DeepseekV3ForCausalLM")
    plan = emit_plan(tp=1, dp=8, ep=8, exchange="alltoall", mtp=2, batch=8, model=model)
    ((flags, environment),) = _started(plan, tmp_path)
    assert flags.speculative_algorithm == "NEXTN"
    ahead = (flags.speculative_num_steps, flags.speculative_num_draft_tokens)
    assert ahead == ("2", "3")
    assert environment["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] == "24"


def test_pools_and_their_router(tmp_path: Path) -> None:
    """Roles, ports and devices of every instance, and all heads behind the router."""
    asked: dict[str, Any] = {"input_len": 1024, "output_len": 128, "ttft_ms": 800, "tpot_ms": 40}
    plan = search("llama-3.1-8b", "atlas-800t-a2", serving="disagg", **asked).plan
    emit(plan, "sglang", tmp_path / "out")
    seen: dict[str, list[argparse.Namespace]] = {"prefill": [], "decode": []}
    devices: list[str] = []
    for script in sorted((tmp_path / "out").glob("serve_*.sh")):
        where = {"MODEL": "m", "PREFILL_ADDRESS": "10.0.0.9", "LINGER": "1"}
        for call in run_script(script, "python3", **where):
            flags = _parsed(call.words)
            seen[flags.disaggregation_mode].append(flags)
            devices += call.environment["ASCEND_RT_VISIBLE_DEVICES"].split(",")
            assert call.environment["ASCEND_MF_STORE_URL"] == "tcp://10.0.0.9:24669"
            assert flags.disaggregation_transfer_backend == "ascend"
    assert {pool.role: pool.instances for pool in plan.pools} == {
        role: len(flags) for role, flags in seen.items()
    }
    assert len(devices) == len(set(devices))
    doors = {flags.disaggregation_bootstrap_port for flags in seen["prefill"]}
    assert len(doors) == len(seen["prefill"])
    assert {flags.disaggregation_bootstrap_port for flags in seen["decode"]} == {None}
    (call,) = run_script(tmp_path / "out" / "router.sh", "python3", NODE_ADDRESSES="h")
    ports = {f"http://h:{flags.port}" for flags in (*seen["prefill"], *seen["decode"])}
    assert ports <= set(call.words)
    assert doors <= set(call.words)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"soc": "Ascend310P3"}, "device is not supported", "vllm-ascend"),
    ({"soc": ""}, "not an Ascend device", "vllm-ascend"),
    ({"tp": 4, "pp": 2, "stage_layers": (40, 40)}, "no pipeline stages", "pp=1"),
    ({"cp": 2}, "no context parallelism", "cp=1"),
    ({"sp": True}, "sequence parallelism", "sp=off"),
    ({"attention": "naive"}, "always fused", "flash"),
    ({"weight_prefetch": True, "sp": False}, "no weight prefetch", "both off"),
    ({"tp": 1, "dp": 8, "ep": 8, "o_tp": 8, "model": moe()}, "only the LM head", "o_tp=0"),
    ({"mtp": 1}, "predicted ahead with", "mtp off"),
    ({"kv_dtype": "int8"}, "no such KV cache", "bf16"),
    ({"weight_dtype": "w8a16"}, "no weight scheme", "w8a8"),
    ({"dp": 2, "ep": 4, "model": moe()}, "expert group", "ep=1, 8, 16"),
    ({"workload": {"input_len": 200_000}}, "fit the model's context", "shorter"),
]


@pytest.mark.parametrize(("changes", "rule", "hint"), REFUSED)
def test_what_the_engine_cannot_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], rule: str, hint: str
) -> None:
    """With the reason, the nearest plan that it can, and nothing written."""
    with pytest.raises(InputError) as caught:
        emit(emit_plan(**changes), "sglang", tmp_path / "out")
    assert rule in str(caught.value)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_looks_like_a_flag_is_refused(tmp_path: Path) -> None:
    """By the script, before the engine reads it as one; a folder with spaces is one word."""
    emit(emit_plan(), "sglang", tmp_path / "out")
    script = tmp_path / "out" / "serve_node0.sh"
    with pytest.raises(subprocess.CalledProcessError):
        run_script(script, "python3", MODEL="--trust-remote-code")
    (call,) = run_script(script, "python3", MODEL="a b; $(touch pwned)")
    assert call.words[call.words.index("--model-path") + 1] == "a b; $(touch pwned)"
    assert not list(tmp_path.rglob("pwned"))
