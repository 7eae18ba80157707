"""Target `vllm-ascend`: the commands that a plan becomes, as a shell would run them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.search.emit_cases import emit_plan, moe, only, parser_of, run_script, start

from shardplan.models.errors import InputError
from shardplan.search.emit import emit
from shardplan.search.emit.vllm_layout import launches, split_servers


def test_a_dense_plan_on_one_node(tmp_path: Path) -> None:
    """tp 8: one server on eight cards; 1000 + 300 tokens are 11 blocks of 128; no addresses."""
    flags, environment = only(emit_plan(), tmp_path)
    assert flags.tensor_parallel_size == "8"
    assert flags.pipeline_parallel_size == "1"
    assert flags.data_parallel_size == "1"
    assert flags.max_num_seqs == "24"
    assert flags.max_num_batched_tokens == "4096"
    assert flags.max_model_len == "1408"
    assert flags.block_size == "128"
    assert flags.gpu_memory_utilization == "0.9"
    assert flags.dtype == "bfloat16"
    assert flags.port == "8000"
    assert flags.served_model_name == "llama-3.1-70b"
    assert flags.distributed_executor_backend == "mp"
    absent = ("quantization", "nnodes", "data_parallel_address", "additional_config")
    assert [getattr(flags, name) for name in absent] == [None] * 4
    assert [flags.headless, flags.enforce_eager, flags.enable_expert_parallel] == [False] * 3
    assert json.loads(flags.compilation_config) == {
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24],
    }
    assert environment["ASCEND_RT_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
    assert environment["HCCL_OP_EXPANSION_MODE"] == "AIV"
    assert environment["HCCL_BUFFSIZE"] == "200"
    assert environment["TASK_QUEUE_ENABLE"] == "1"
    assert environment["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    assert "HCCL_IF_IP" not in environment


def test_uneven_stages_in_one_node(tmp_path: Path) -> None:
    """The plan's own cut of 80 layers, not vLLM's default."""
    flags, environment = only(emit_plan(tp=4, pp=2, stage_layers=(41, 39)), tmp_path)
    assert flags.pipeline_parallel_size == "2"
    assert environment["VLLM_PP_LAYER_PARTITION"] == "41,39"


@pytest.mark.parametrize("node", [0, 1])
def test_a_copy_over_two_nodes(tmp_path: Path, node: int) -> None:
    """tp 8 pp 2: one model copy fills two nodes; the second has no API."""
    plan = emit_plan(tp=8, pp=2, stage_layers=(40, 40))
    flags, environment = only(plan, tmp_path, node)
    assert (flags.nnodes, flags.node_rank) == ("2", str(node))
    assert (flags.master_addr, flags.master_port) == ("10.0.0.1", "29501")
    assert flags.headless is bool(node)
    assert flags.port == (None if node else "8000")
    assert flags.data_parallel_size is None
    assert environment["HCCL_IF_IP"] == "10.0.0.2"
    for name in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"):
        assert environment[name] == "eth0"


def test_copies_over_several_nodes_are_servers_of_their_own(tmp_path: Path) -> None:
    """dp 2 of tp 8 pp 2: nodes 0-1 and 2-3, each pair with its own head and endpoint."""
    plan = emit_plan(tp=8, pp=2, dp=2)
    flags, _ = only(plan, tmp_path, 2)
    assert (flags.nnodes, flags.node_rank, flags.port) == ("2", "0", "8000")
    text = (tmp_path / "out" / "serve_node3.sh").read_text(encoding="utf-8")
    assert "address of node 2" in text
    assert "http://NODE2:8000" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("node", [0, 1])
def test_experts_over_two_nodes(tmp_path: Path, node: int) -> None:
    """tp 8 dp 2 ep 16: one server, a data-parallel group a node, experts over all 16 ranks."""
    flags, environment = only(emit_plan(dp=2, ep=16, model=moe()), tmp_path, node)
    assert flags.enable_expert_parallel
    assert (flags.data_parallel_size, flags.data_parallel_size_local) == ("2", "1")
    assert flags.data_parallel_start_rank == ("1" if node else None)
    assert flags.data_parallel_address == "10.0.0.1"
    assert flags.data_parallel_rpc_port == "13389"
    assert flags.headless is bool(node)
    assert environment["HCCL_BUFFSIZE"] == "1024"


def test_experts_split_by_tp_are_servers_of_their_own(tmp_path: Path) -> None:
    """ep 1 dp 2: vLLM would split experts over both groups, so each group is a server."""
    first, second = start(emit_plan(tp=4, dp=2, ep=1, model=moe()), tmp_path)
    for index, (flags, call) in enumerate((first, second)):
        assert not flags.enable_expert_parallel
        assert flags.data_parallel_size == "1"
        assert flags.port == str(8000 + index)
        devices = ",".join(str(4 * index + i) for i in range(4))
        assert call.environment["ASCEND_RT_VISIBLE_DEVICES"] == devices
    with pytest.raises(subprocess.CalledProcessError, match="returned non-zero"):
        run_script(tmp_path / "out" / "bench.sh", "vllm", MODEL="m")
    (call,) = run_script(tmp_path / "out" / "bench.sh", "vllm", MODEL="m", BASE_URL="http://b:1")
    assert "http://b:1" in call.words


def test_a_quantized_plan_needs_a_quantized_checkpoint(tmp_path: Path) -> None:
    """ModelSlim's description chooses schemes and cache; no default checkpoint is guessed."""
    source = "https://huggingface.co/Qwen/Qwen3-8B/blob/main/config.json"
    plan = emit_plan(
        weight_dtype="w8a8", kv_dtype="int8", model={"name": "qwen3-8b", "source": source}
    )
    flags, _ = only(plan, tmp_path)
    assert flags.quantization == "ascend"
    assert flags.dtype is None
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "W8A8 or W8A8_DYNAMIC" in text
    assert '"kv_cache_type": "C8"' in text
    with pytest.raises(subprocess.CalledProcessError):
        run_script(tmp_path / "out" / "serve_node0.sh", "vllm")


def test_a_published_16_bit_checkpoint_is_the_default(tmp_path: Path) -> None:
    """A preset's repository, unless MODEL names another; never an fp8 one for a bf16 plan."""
    source = "https://huggingface.co/{}/blob/main/config.json"
    model = {"name": "qwen3-8b", "source": source.format("Qwen/Qwen3-8B")}
    emit(emit_plan(model=model), "vllm-ascend", tmp_path / "a")
    (call,) = run_script(tmp_path / "a" / "serve_node0.sh", "vllm")
    assert call.words[:2] == ["serve", "Qwen/Qwen3-8B"]
    wide = {"name": "deepseek-v3", "source": source.format("deepseek-ai/DeepSeek-V3")}
    emit(emit_plan(ep=8, model=moe(**wide)), "vllm-ascend", tmp_path / "b")
    with pytest.raises(subprocess.CalledProcessError):
        run_script(tmp_path / "b" / "serve_node0.sh", "vllm")


def test_eager_mode_captures_no_graph(tmp_path: Path) -> None:
    """The profile that the plan was priced with decides."""
    flags, _ = only(emit_plan(request={"engine_profile": "vllm-ascend-eager"}), tmp_path)
    assert flags.enforce_eager
    assert flags.compilation_config is None


def test_sequence_parallelism_captures_multiples_of_tp(tmp_path: Path) -> None:
    """The plugin refuses sizes that tp does not divide; 24 and below over tp 8."""
    flags, _ = only(emit_plan(sp=True), tmp_path)
    assert json.loads(flags.additional_config) == {"enable_flashcomm1": True}
    assert json.loads(flags.compilation_config)["cudagraph_capture_sizes"] == [8, 16, 24]


def test_drafts_and_split_tokens_capture_multiples_of_both(tmp_path: Path) -> None:
    """vLLM rounds sizes up to the 3 tokens that a sequence verifies; tp 8 must divide them too."""
    model = moe(name="deepseek-v3", architecture="DeepseekV3ForCausalLM")
    flags, _ = only(emit_plan(sp=True, ep=8, mtp=2, batch=20, model=model), tmp_path)
    assert json.loads(flags.compilation_config)["cudagraph_capture_sizes"] == [24, 48, 72]


def test_a_310p_plan_computes_in_fp16(tmp_path: Path) -> None:
    """No BF16 on the device, and none of the settings that are for A2 and A3."""
    plan = emit_plan(soc="Ascend310P3", weight_dtype="w8a8", kv_dtype="fp16")
    flags, environment = only(plan, tmp_path)
    assert flags.dtype == "float16"
    assert "HCCL_OP_EXPANSION_MODE" not in environment


@pytest.mark.parametrize(
    ("lengths", "context", "expected"),
    [((1000, 24), 131072, "1024"), ((1000, 25), 131072, "1152"), ((1000, 25), 1100, "1100")],
)
def test_the_longest_request_fills_whole_blocks(
    tmp_path: Path, lengths: tuple[int, int], context: int, expected: str
) -> None:
    """Rounded up to 128 tokens, but not beyond what the model was made for."""
    work = {"input_len": lengths[0], "output_len": lengths[1]}
    flags, _ = only(emit_plan(workload=work, model={"max_context": context}), tmp_path)
    assert flags.max_model_len == expected


def test_settings_of_the_user_win(tmp_path: Path) -> None:
    """Variables that are set already, and flags after the script's name."""
    emit(emit_plan(), "vllm-ascend", tmp_path / "out")
    script = tmp_path / "out" / "serve_node0.sh"
    (call,) = run_script(script, "vllm", MODEL="m", HCCL_BUFFSIZE="512", HOST="127.0.0.1")
    assert call.environment["HCCL_BUFFSIZE"] == "512"
    assert call.words[call.words.index("--host") + 1] == "127.0.0.1"
    assert script.read_text(encoding="utf-8").endswith('"$@"\n')


def test_the_load_test_is_the_plans_workload(tmp_path: Path) -> None:
    """A quarter of 1000 prompt tokens is shared; 24 in flight, four rounds, 2.5 requests/s."""
    work = {"prefix_hit": 0.25, "request_rate": 2.5}
    emit(emit_plan(workload=work), "vllm-ascend", tmp_path / "out")
    (call,) = run_script(tmp_path / "out" / "bench.sh", "vllm", MODEL="m")
    assert call.words[:2] == ["bench", "serve"]
    flags = parser_of("vllm_flags", "bench").parse_args(call.words[2:])
    assert flags.base_url == "http://127.0.0.1:8000"
    assert (flags.random_prefix_len, flags.random_input_len) == ("250", "750")
    assert flags.random_output_len == "300"
    assert (flags.max_concurrency, flags.num_prompts) == ("24", "96")
    assert flags.request_rate == "2.5"
    assert flags.ignore_eos
    serve, _ = only(emit_plan(workload=work), tmp_path)
    assert serve.enable_prefix_caching


def test_the_first_request_of_the_readme_is_json(tmp_path: Path) -> None:
    """It names the model as the server does."""
    emit(emit_plan(), "vllm-ascend", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    body = text.partition("-d '")[2].partition("'")[0]
    assert json.loads(body)["model"] == "llama-3.1-70b"


HOSTILE = [
    "'; touch pwned #",
    '"$(touch pwned)"',
    "a\ntouch pwned\n",
    "`touch pwned`",
    "../../../etc/passwd",
    "\ud800\x00\u202e",
    "",
    "-rf",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(tmp_path: Path, name: str) -> None:
    """Neither the shell, the file system nor the README acts on what a model calls itself."""
    source = f"https://huggingface.co/a/b{name}/blob/main"
    plan = emit_plan(
        model={"name": name, "source": source, "architecture": name},
        request={"engine_profile": name},
    )
    plan = plan.model_copy(
        update={"cluster": plan.cluster.model_copy(update={"title": name, "device": name})}
    )
    paths = emit(plan, "vllm-ascend", tmp_path / "out")
    assert {path.parent for path in paths} == {tmp_path / "out"}
    for script in ("serve_node0.sh", "bench.sh"):
        subprocess.run(["bash", "-n", str(tmp_path / "out" / script)], check=True)
        for call in run_script(tmp_path / "out" / script, "vllm", MODEL="m"):
            served = call.words[call.words.index("--served-model-name") + 1]
            assert served
            assert not set(served) & set("'\"`$;/\n ")
    assert not list(tmp_path.rglob("pwned"))
    assert "\ntouch" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", ["a b'c", "$(touch pwned)", "x; touch pwned"])
def test_a_hostile_checkpoint_folder_is_one_word(tmp_path: Path, model: str) -> None:
    """What the user's own variable holds is never read by the shell again."""
    emit(emit_plan(), "vllm-ascend", tmp_path / "out")
    (call,) = run_script(tmp_path / "out" / "serve_node0.sh", "vllm", MODEL=model)
    assert call.words[1] == model
    assert not list(tmp_path.rglob("pwned"))


def test_a_checkpoint_that_looks_like_a_flag_is_refused(tmp_path: Path) -> None:
    """By the script, before vLLM reads it as one."""
    emit(emit_plan(), "vllm-ascend", tmp_path / "out")
    with pytest.raises(subprocess.CalledProcessError):
        run_script(tmp_path / "out" / "serve_node0.sh", "vllm", MODEL="--trust-remote-code")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"soc": "Ascend910A"}, "device is not supported", "target atc"),
    ({"soc": ""}, "not an Ascend device", "Ascend cluster"),
    ({"cp": 2}, "context parallelism", "cp=1"),
    ({"tp": 1, "dp": 8, "ep": 8, "o_tp": 8, "model": moe()}, "ranks of their own", "o_tp=0"),
    ({"sp": True, "ep": 8, "shared_tp": 1, "model": moe()}, "ranks of their own", "shared_tp=0"),
    ({"tp": 1, "dp": 8, "head_tp": 8}, "models with experts and tp=1", "head_tp=0"),
    ({"tp": 4, "dp": 2, "ep": 8, "ffn_tp": 8, "model": moe()}, "experts and tp=1", "ffn_tp=0"),
    ({"tp": 1, "dp": 8, "head_tp": 4, "model": moe()}, "of one server", "ep=8"),
    ({"attention": "naive"}, "always fused", "flash"),
    ({"tp": 1, "sp": True}, "needs tensor parallelism", "sp=off"),
    ({"sp": True, "model": moe()}, "needs expert parallelism", "ep=8"),
    ({"dp": 2, "ep": 4, "model": moe()}, "expert group", "ep=1, 8, 16"),
    ({"tp": 4, "dp": 3, "ep": 8, "model": moe()}, "expert group", "ep=1, 4, 12"),
    ({"pp": 2, "dp": 2, "ep": 16, "model": moe()}, "several nodes", "ep=8"),
    ({"tp": 3, "dp": 3}, "fit inside one node", "1, 2, 4, 8"),
    ({"batch": 64, "chunk": 32}, "at least max_num_seqs", "64"),
    ({"workload": {"input_len": 200_000}}, "fit the model's context", "shorter"),
    ({"weight_dtype": "w4a16"}, "dense models", "w4a8, w8a16, w8a8"),
    ({"weight_dtype": "w8a16", "ep": 8, "model": moe()}, "with experts", "w4a16, w4a8, w8a8"),
    ({"soc": "Ascend310P3", "weight_dtype": "w8a16"}, "no weight scheme", "w8a8"),
    ({"soc": "Ascend950PR_9589", "kv_dtype": "fp8"}, "no such KV cache", "bf16"),
    ({"soc": "Ascend310P3", "kv_dtype": "int8"}, "no such KV cache", "fp16"),
    (
        {"kv_dtype": "int8", "ep": 8, "model": moe(architecture="DeepseekV3ForCausalLM")},
        "latent attention keeps",
        "bf16",
    ),
    (
        {"soc": "Ascend310P3", "ep": 8, "model": moe(architecture="DeepseekV2ForCausalLM")},
        "no latent attention",
        "A2 or A3",
    ),
]


@pytest.mark.parametrize(("changes", "rule", "hint"), REFUSED)
def test_what_the_engine_cannot_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], rule: str, hint: str
) -> None:
    """With the reason, the nearest plan that it can, and nothing written."""
    with pytest.raises(InputError) as caught:
        emit(emit_plan(**changes), "vllm-ascend", tmp_path / "out")
    assert rule in str(caught.value)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


SIZES = st.sampled_from([1, 2, 4, 8])


@given(
    tp=SIZES,
    pp=SIZES,
    dp=SIZES,
    wide=st.booleans(),
    experts=st.sampled_from(["no", "1", "half", "n"]),
)
def test_every_rank_of_the_plan_runs_once(
    tp: int, pp: int, dp: int, wide: bool, experts: str
) -> None:
    """Servers times their ranks are the plan's; no device is used twice, no group is lost."""
    soc = "Ascend910_9382" if wide else "Ascend910B2"
    ep = {"n": tp * dp, "half": max(tp * dp // 2, tp)}.get(experts, 1)
    plan = emit_plan(soc=soc, tp=tp, pp=pp, dp=dp, ep=ep, model=None if experts == "no" else moe())
    if plan.strategy.ranks > plan.cluster.ranks:
        return
    try:
        split = split_servers(plan)
    except InputError:
        assert tp * pp > plan.cluster.ranks_per_node
        assert ep > tp
        return
    todo = launches(plan, split)
    used = [(one.slot.node, device) for one in todo for device in one.slot.devices]
    assert len(used) == len(set(used)) == plan.strategy.ranks
    assert split.servers * split.groups == dp
    assert split.servers == plan.strategy.parallelism().replicas
    assert {one.server for one in todo} == set(range(split.servers))
    heads = [(one.head, one.port_offset) for one in todo if one.index == 0]
    assert len(heads) == len(set(heads)) == split.servers


def test_a_plan_over_the_whole_cluster_has_a_script_a_node(tmp_path: Path) -> None:
    """64 A3 dies as tp 2 dp 32 with experts over all: four nodes, ranks 0, 8, 16, 24."""
    plan = emit_plan(soc="Ascend910_9382", tp=2, dp=32, ep=64, model=moe())
    emit(plan, "vllm-ascend", tmp_path / "out")
    names = {name for name in os.listdir(tmp_path / "out") if name.startswith("serve")}
    assert names == {f"serve_node{i}.sh" for i in range(4)}
    starts = [only(plan, tmp_path, node)[0].data_parallel_start_rank for node in range(4)]
    assert starts == [None, "8", "16", "24"]
