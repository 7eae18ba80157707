"""Plans with prefill and decode pools: files, proof, both ways of serving, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.search.emit_cases import run_script

from shardplan.models.errors import InfeasibleError, InputError, LayoutError
from shardplan.search.api import SearchResult, search
from shardplan.search.emit import emit
from shardplan.search.output import write_result
from shardplan.search.plan import Plan
from shardplan.search.proof import verify_plan
from shardplan.search.trials import read_trials

_ASKED: dict[str, Any] = {"input_len": 1024, "output_len": 128, "ttft_ms": 800, "tpot_ms": 40}


def _search(cluster: str = "atlas-800t-a2", **asked: Any) -> SearchResult:
    model = asked.pop("model", "llama-3.1-8b")
    return search(model, cluster, **{**_ASKED, "serving": "disagg", **asked})


@pytest.fixture(scope="module")
def found() -> SearchResult:
    """Llama-3.1-8B over one node of eight."""
    return _search()


@pytest.fixture(scope="module")
def mixed() -> SearchResult:
    """Prefill on four A2 cards, decode on two A3 dies."""
    return _search("atlas-800i-a3", cards=2, prefill_cluster="atlas-800t-a2", prefill_cards=4)


def test_both_pools_are_told(found: SearchResult) -> None:
    """Counts, cards, rates: the pools serve what the deployment promises."""
    plan = found.plan
    prefill, decode = plan.pools
    assert (prefill.role, decode.role) == ("prefill", "decode")
    used = sum(pool.instances * pool.strategy.ranks for pool in plan.pools)
    assert used <= plan.request.cards
    rate = plan.performance.requests_per_s
    for pool in plan.pools:
        most = pool.instances * pool.times.requests_per_s
        assert pool.times.used == pytest.approx(rate / most)
        assert rate <= most * (1 + 1e-9)
        assert max(row.total_bytes for row in pool.memory) <= pool.memory[0].capacity_bytes
    assert plan.strategy == decode.strategy
    assert plan.transfer is not None
    assert plan.transfer.request_bytes == pytest.approx(1024 * plan.model.kv_bytes_per_token)
    assert plan.performance.tpot_s == decode.times.step_s <= 0.04
    assert plan.performance.ttft_s <= 0.8 * (1 + 1e-8)
    assert plan.certificate.gap == 0


def test_a_prefill_instance_holds_what_the_ledger_says(found: SearchResult) -> None:
    """The plan's ledger is the one that the search held against the card."""
    rows = [max(row.total_bytes for row in pool.memory) for pool in found.plan.pools]
    assert max(rows) == pytest.approx(float(found.trials["memory_bytes"].iloc[0]))


def test_the_files_are_read_as_they_were_written(found: SearchResult, tmp_path: Path) -> None:
    """plan.json, and trials.csv with the columns of both pools."""
    write_result(found, tmp_path / "out")
    assert Plan.load(tmp_path / "out" / "plan.json").dumps() == found.plan.dumps()
    first = read_trials(tmp_path / "out" / "trials.csv").iloc[0]
    prefill, decode = found.plan.pools
    assert first["serving"] == "disagg"
    assert (first["prefill_instances"], first["decode_instances"]) == (
        prefill.instances,
        decode.instances,
    )
    assert first["prefill_cards"] == prefill.instances * prefill.strategy.ranks
    assert (first["prefill_tp"], first["tp"]) == (prefill.strategy.tp, decode.strategy.tp)
    assert (first["prefill_chunk"], first["batch"]) == (
        prefill.strategy.chunk,
        decode.strategy.batch,
    )
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Prefill and decode pools" in page


def test_the_same_question_gives_the_same_bytes(found: SearchResult) -> None:
    """plan.json and the table of trials."""
    again = _search()
    assert again.plan.dumps() == found.plan.dumps()
    assert again.trials.equals(found.trials)


def test_layers_are_cut_as_they_serve_best(tmp_path: Path) -> None:
    """61 layers in a prefill pool of 16 stages, the ends of which have less room for them."""
    asked = {"cards": 64, "output_len": 256, "ttft_ms": 2000, "tpot_ms": 100}
    found = _search("cloudmatrix-384", model="deepseek-v3", **asked)
    prefill, _ = found.plan.pools
    cut = prefill.strategy.stage_layers
    assert (prefill.strategy.pp, sum(cut)) == (16, 61)
    assert cut[0] < cut[1]
    assert cut[-1] < cut[1]
    assert tuple(row.layers for row in prefill.memory) == cut
    proof = found.plan.certificate
    assert proof.gap == 0
    assert proof.space["prefill_stage_layers"] == ["any"]
    assert proof.pruned_by["cut"] > 0
    assert proof.evaluated + proof.pruned == proof.space_size
    assert verify_plan(found.plan).passed
    texts = [path.read_text("utf-8") for path in emit(found.plan, "vllm-ascend", tmp_path / "out")]
    assert any(f"VLLM_PP_LAYER_PARTITION:-{','.join(map(str, cut))}" in text for text in texts)


def test_contexts_and_modules_lie_on_ranks_of_their_own(tmp_path: Path) -> None:
    """A long prompt is computed sooner by ranks that share it; no start script says so yet."""
    asked = {"nodes": 4, "input_len": 16000, "objective": "latency", "cp": "auto"}
    limits = {"ttft_ms": None, "tpot_ms": None}
    plan = _search("atlas-800i-a3", model="deepseek-v3", **asked, **limits).plan
    prefill, decode = plan.pools
    assert prefill.strategy.cp > 1
    assert prefill.strategy.pp == decode.strategy.pp == 1
    assert plan.certificate.space["prefill_cp"][:2] == [1, 2]
    assert verify_plan(plan).passed
    with pytest.raises(InputError, match="context parallelism"):
        emit(plan, "vllm-ascend", tmp_path / "out")
    apart = _search("atlas-800i-a3", model="deepseek-v3", nodes=4, tpot_ms=100, module_tp="auto")
    assert len(apart.plan.certificate.space["decode_head_tp"]) > 1
    assert apart.plan.certificate.gap == 0


def test_tokens_are_predicted_ahead_in_both_pools(tmp_path: Path) -> None:
    """Decode drafts and verifies; prefill holds the layer, whose cache is sent with the others."""
    asked = {"nodes": 4, "mtp": 2, "output_len": 256, "tpot_ms": 60, "ttft_ms": 2000}
    plan = _search("atlas-800i-a3", model="deepseek-v3", **asked).plan
    prefill, decode = plan.pools
    assert (prefill.strategy.mtp, decode.strategy.mtp) == (1, 2)
    assert decode.strategy.chunk == 3 * decode.strategy.batch
    assert plan.transfer is not None
    layers = (plan.model.layers + 1) / plan.model.layers
    assert plan.transfer.request_bytes == pytest.approx(
        1024 * plan.model.kv_bytes_per_token * layers
    )
    share = plan.request.workload.mtp_acceptance
    assert share is not None
    gained = 1 + share + share**2
    assert plan.performance.tpot_s == pytest.approx(decode.times.step_s / gained)
    assert verify_plan(plan).passed
    written = emit(plan, "vllm-ascend", tmp_path / "out")
    for role, depth in (("prefill", 1), ("decode", 2)):
        texts = [path.read_text("utf-8") for path in written if f"serve_{role}" in path.name]
        assert all(f'"num_speculative_tokens": {depth}' in text for text in texts)
    alone = prefill.model_copy(update={"strategy": prefill.strategy.model_copy(update={"mtp": 0})})
    with pytest.raises(InputError, match="or neither"):
        emit(plan.model_copy(update={"pools": (alone, decode)}), "vllm-ascend", tmp_path / "no")


def test_a_time_limit_says_what_it_leaves_open() -> None:
    """Nothing found in time is no answer; both ways of serving share the time."""
    with pytest.raises(InfeasibleError, match="within the time limit"):
        _search(time_limit=0)
    done = _search(time_limit=60)
    assert done.plan.certificate.gap == 0
    both = search("llama-3.1-8b", "atlas-800t-a2", **_ASKED, serving="auto", time_limit=60)
    assert len(both.plan.servings) == 2
    assert "shared the time limit of 60 s" in both.plan.notes[-1]
    with pytest.raises(InfeasibleError, match=r"time_limit=0 s"):
        search("llama-3.1-8b", "atlas-800t-a2", **_ASKED, serving="auto", time_limit=0)


def test_quantizing_is_shown_and_never_applied(found: SearchResult) -> None:
    """int8 weights serve more; the plan keeps the checkpoint's."""
    gains = {(row.weight_dtype, row.kv_dtype): row.gain for row in found.plan.quantization}
    assert all(pool.strategy.weight_dtype == "bf16" for pool in found.plan.pools)
    smaller = gains["w8a8", "bf16"]
    assert smaller is not None
    assert smaller > 1.0


def test_the_proof_is_of_both_pools(found: SearchResult) -> None:
    """`verify` proves either strategy, and refuses a plan whose prefill cannot be laid out."""
    proof = verify_plan(found.plan)
    assert proof.passed
    assert {text.split(":")[0] for text in proof.checks} == {"prefill", "decode"}
    prefill, decode = found.plan.pools
    wrong = prefill.model_copy(
        update={"strategy": prefill.strategy.model_copy(update={"tp": 3, "stage_layers": ()})}
    )
    with pytest.raises(LayoutError):
        verify_plan(found.plan.model_copy(update={"pools": (wrong, decode)}))


def test_pools_may_stand_on_different_devices(mixed: SearchResult) -> None:
    """Each on its own cards, joined by the slower NIC."""
    prefill, decode = mixed.plan.pools
    assert (prefill.cluster.device, decode.cluster.device) == ("910b2", "a3-die")
    assert prefill.instances * prefill.strategy.ranks <= 4
    assert decode.instances * decode.strategy.ranks <= 2
    assert mixed.plan.transfer is not None
    assert mixed.plan.transfer.tier == "roce"
    assert verify_plan(mixed.plan, level=0).passed


def test_auto_is_the_better_of_both() -> None:
    """Both are told; the chosen one is no worse than either."""
    both = _search(serving="auto", cards=2).plan
    alone = {serving: _search(serving=serving, cards=2).plan for serving in ("agg", "disagg")}
    best = max(one.performance.output_tokens_per_s for one in alone.values())
    assert both.performance.output_tokens_per_s == best
    assert [row.serving for row in both.servings] == ["agg", "disagg"]
    for row in both.servings:
        assert row.objective == pytest.approx(alone[row.serving].performance.output_tokens_per_s)
        assert row.gain is not None
        assert row.gain <= 1.0 + 1e-12


def test_auto_takes_what_there_is() -> None:
    """One card holds no two instances; both failing is the aggregated search's error."""
    plan = _search(serving="auto", cards=1).plan
    assert not plan.pools
    assert plan.servings[1].objective is None
    with pytest.raises(InfeasibleError, match="TPOT"):
        _search(serving="auto", cards=1, tpot_ms=0.1)


def test_fewer_cards_do_not_serve_the_rate() -> None:
    """The objective `cards` gives the fewest: one card less is infeasible."""
    plan = _search(objective="cards", rate=30.0).plan
    used = sum(pool.instances * pool.strategy.ranks for pool in plan.pools)
    assert plan.performance.requests_per_s >= 30.0
    assert 2 < used <= 8
    with pytest.raises(InfeasibleError, match="rate binds"):
        _search(cards=2, rate=30.0)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"ttft_ms": 10}, "prefill binds"),
        ({"tpot_ms": 1}, "decode binds"),
        ({"rate": 1e4}, "rate binds, by the"),
        ({"concurrency": 5000}, "ttft binds"),
        ({"input_len": 200_000}, "context binds"),
        ({"cluster": "atlas-300i-duo", "cards": 2, "weight_dtype": "fp16"}, "pd-310p"),
    ],
    ids=str,
)
def test_what_binds_is_said(asked: dict[str, Any], words: str) -> None:
    """Which pool, by how much."""
    with pytest.raises(InfeasibleError, match=words):
        _search(**asked)


@pytest.mark.parametrize(
    "asked",
    [
        {"ttft_ms": 10},
        {"tpot_ms": 1},
        {"rate": 1e4},
        {"concurrency": 5000},
        {"model": "qwen3-32b", "cards": 2},
        {
            "model": "llama-3.1-70b",
            "prefill_cluster": "atlas-800i-a3",
            "prefill_cards": 1,
            "ttft_ms": 2000,
            "tpot_ms": 100,
        },
    ],
    ids=str,
)
def test_following_a_hint_gives_a_plan(asked: dict[str, Any]) -> None:
    """Its options are typed as they stand."""
    with pytest.raises(InfeasibleError) as caught:
        _search(**asked)
    found = re.findall(r"--([a-z-]+) ([0-9.e+]+)", caught.value.hint)
    assert found
    better = {name.replace("-", "_"): float(value) for name, value in found}
    for name, value in better.items():
        better[name] = value if name in ("rate", "ttft_ms", "tpot_ms") else int(value)
    assert _search(**{**asked, **better}).plan.pools


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ({"cards": 1}, "--serving agg"),
        ({"prefill_cluster": "atlas-300i-duo"}, "--kv-dtype fp16"),
        ({"prefill_cluster": "hgx-h100"}, "torch-graph"),
    ],
    ids=str,
)
def test_pools_that_cannot_work_together_are_refused(asked: dict[str, Any], hint: str) -> None:
    """Bad input, with what to try."""
    with pytest.raises(InputError) as caught:
        _search(**asked)
    assert hint in caught.value.hint


def test_every_instance_is_a_server_of_its_own(found: SearchResult, tmp_path: Path) -> None:
    """Roles, devices and ports of the commands, and all heads behind the proxy."""
    emit(found.plan, "vllm-ascend", tmp_path / "out")
    seen: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": []}
    devices: list[str] = []
    ports: list[str] = []
    for script in sorted((tmp_path / "out").glob("serve_*.sh")):
        for call in run_script(script, "vllm", MODEL="/model", LINGER="1"):
            at = call.words.index("--kv-transfer-config")
            seen[script.name.split("_")[1]].append(json.loads(call.words[at + 1]))
            devices += call.environment["ASCEND_RT_VISIBLE_DEVICES"].split(",")
            ports.append(call.words[call.words.index("--port") + 1])
    prefill, decode = found.plan.pools
    assert [len(seen[pool.role]) for pool in found.plan.pools] == [
        prefill.instances,
        decode.instances,
    ]
    assert {one["kv_role"] for one in seen["prefill"]} == {"kv_producer"}
    assert {one["kv_role"] for one in seen["decode"]} == {"kv_consumer"}
    every = [*seen["prefill"], *seen["decode"]]
    assert len({one["engine_id"] for one in every}) == len(every)
    assert len({one["kv_port"] for one in every}) == len(every) == len(set(ports))
    assert min(int(one["kv_port"]) for one in every) >= 28000
    assert len(devices) == len(set(devices))
    sizes = every[0]["kv_connector_extra_config"]
    assert sizes["prefill"]["tp_size"] == prefill.strategy.tp
    assert sizes["decode"] == {"dp_size": 1, "tp_size": decode.strategy.tp}
    proxy = run_script(tmp_path / "out" / "proxy.sh", "python3", PROXY="p.py", NODE_ADDRESSES="h")
    words = proxy[0].words
    assert words.count("h") == len(every)
    assert set(ports) <= set(words)


@pytest.mark.parametrize("target", ["docker-compose", "k8s", "mindie", "sglang", "vllm-ascend"])
def test_more_instances_than_cards_are_refused(
    found: SearchResult, tmp_path: Path, target: str
) -> None:
    """A plan.json from anywhere may say a thousand million."""
    prefill, decode = found.plan.pools
    many = prefill.model_copy(update={"instances": 10**9})
    with pytest.raises(InputError, match="instances of a pool fit its cluster"):
        emit(found.plan.model_copy(update={"pools": (many, decode)}), target, tmp_path / "out")


def test_targets_that_cannot_express_pools_say_so(
    found: SearchResult, mixed: SearchResult, tmp_path: Path
) -> None:
    """One graph for the compiler; one hardware generation for the connector."""
    with pytest.raises(InputError, match="not pools"):
        emit(found.plan, "atc", tmp_path / "atc")
    with pytest.raises(InputError, match="one hardware generation"):
        emit(mixed.plan, "vllm-ascend", tmp_path / "mixed")


def test_a_limit_on_a_percentile_leaves_room_in_both_pools() -> None:
    """The mean keeps half of what its 99th percentile may be, and what is served falls."""
    loose = _search(cards=4).plan
    tight = _search(cards=4, tpot_ms=None, ttft_p99_ms=800.0, tpot_p99_ms=40.0).plan
    assert tight.performance.output_tokens_per_s < loose.performance.output_tokens_per_s
    assert tight.performance.ttft_s < loose.performance.ttft_s
    assert tight.performance.tpot_s <= 0.04
    assert tight.certificate.gap == 0.0
    assert any("99th percentiles of pools" in note for note in tight.notes)


@pytest.mark.parametrize(
    ("name", "words"), [("ttft_p99_ms", "TTFT p99 limit"), ("tpot_p99_ms", "TPOT p99 limit")]
)
def test_a_percentile_that_no_pool_keeps_is_told(name: str, words: str) -> None:
    with pytest.raises(InfeasibleError, match=words) as caught:
        _search(**{"cards": 4, name: 1.0})  # type: ignore[arg-type]  # options of a search
    assert f"--{name.replace('_', '-')}" in str(caught.value)
