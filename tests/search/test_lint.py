"""`shardplan lint`: what is read of a configuration, what is said of it, and bad input."""

from __future__ import annotations

import contextlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardplan
from shardplan.models.errors import InputError
from shardplan.search.asked import Asked
from shardplan.search.cli_lint import read
from shardplan.search.configuration import Configuration
from shardplan.search.lint import lint
from shardplan.search.lint_case import model_of
from shardplan.search.lint_report import LintReport
from shardplan.search.main import run
from shardplan.search.read_mindie import read_mindie
from shardplan.search.read_vllm import read_vllm
from shardplan.search.rulebook import rules

SAMPLES = Path(__file__).parent / "lint_samples"
PLAIN = "vllm serve meta-llama/Llama-3.1-8B-Instruct"


def judged(command: str, cluster: str = "atlas-800t-a2", **asked: Any) -> LintReport:
    """The report of one command, without a search."""
    (config,) = read_vllm(command, "the command")
    return lint(config, Asked(model="", cluster=cluster, **asked), best=False)


def rules_of(report: LintReport) -> set[str]:
    """Ids of all that speaks against a configuration."""
    return {one.rule for one in report.findings if one.level != "note"}


def test_a_published_recipe_is_read_whole() -> None:
    (config,) = read(str(SAMPLES / "deepseek_single.sh"), "")
    assert (config.tp, config.dp, config.pp, config.mtp) == (4, 4, 1, 3)
    assert config.experts_parallel
    assert config.exchange == "alltoall"
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (16, 4096)
    assert (config.max_model_len, config.memory_fraction) == (16384, 0.92)
    assert config.quantized is True
    assert config.engine_profile == "vllm-ascend"
    assert config.unread == ()
    report = lint(config, Asked(model="", cluster="atlas-800i-a3"), best=False)
    assert report.model == "deepseek-v3"
    assert report.runs
    assert report.strategy is not None
    assert report.strategy.weight_dtype == "w8a8"
    assert report.slots == 16


def test_a_template_is_read_with_what_it_is_called_with() -> None:
    path = str(SAMPLES / "pool_template.sh")
    with pytest.raises(InputError, match="--arguments"):
        read(path, "")
    (config,) = read(path, "0,1 9000 2 0 10.0.0.1 8")
    assert (config.tp, config.dp, config.role, config.sp) == (8, 2, "prefill", True)
    assert config.engine_profile == "vllm-ascend-eager"


@pytest.mark.parametrize(
    ("command", "field", "value"),
    [
        (f"{PLAIN} -tp 8", "tp", 8),
        (f"{PLAIN} --tensor_parallel_size=4", "tp", 4),
        (f"A=1 exec {PLAIN} -dp 2 & echo done", "dp", 2),
        (f"N=4\n{PLAIN} -pp $N", "pp", 4),
        (f"{PLAIN} -pp ${{N:-2}}", "pp", 2),
        (f"{PLAIN} \\\n  --max-num-seqs 7", "max_num_seqs", 7),
        (f"{PLAIN} --kv-cache-dtype int8", "kv_dtype", "int8"),
        (f"{PLAIN} --dtype float16", "weight_dtype", "fp16"),
        (f"{PLAIN} --enforce-eager", "engine_profile", "vllm-ascend-eager"),
        (f"{PLAIN} --some-new-flag 3", "unread", ("--some-new-flag",)),
        ("python -m vllm.entrypoints.openai.api_server --model x/y -tp 2", "model", "x/y"),
        (
            PLAIN + """ --additional-config '{"enable_matmul_allreduce": true}'""",
            "fused_collectives",
            True,
        ),
    ],
)
def test_every_way_of_saying_it_is_read(command: str, field: str, value: object) -> None:
    (config,) = read_vllm(command, "the command")
    assert getattr(config, field) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo hello", "no `vllm serve` command"),
        (f"{PLAIN} -tp many", "whole number"),
        (f"{PLAIN} -tp 0", "whole number"),
        (f"{PLAIN} --gpu-memory-utilization 1.5", "at most 1"),
        (f"{PLAIN} --speculative-config '{{bad'", "JSON object"),
        (f"{PLAIN} --speculative-config 3", "JSON object"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_vllm(text, "the command")


@given(st.text(max_size=200))
def test_no_text_ends_in_anything_but_a_clear_error(text: str) -> None:
    for reader in (read_vllm, read_mindie):
        with contextlib.suppress(InputError):
            reader(text, "a text")


@pytest.mark.parametrize(
    ("path", "preset"),
    [
        ("/weights/DeepSeek-V3-w8a8-mtp-QuaRot", "deepseek-v3"),
        ("Qwen/Qwen3-32B", "qwen3-32b"),
        ("/model/Qwen3-32B-W8A8/", "qwen3-32b"),
        ("vllm-ascend/Qwen3-235B-A22B-W8A8", "qwen3-235b-a22b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("/weights/DeepSeek-V3.9", None),
        ("my-own-model", None),
    ],
)
def test_a_model_is_known_by_its_name_or_not_guessed(path: str, preset: str | None) -> None:
    assert model_of(path) == preset


def test_an_unknown_model_must_be_named() -> None:
    with pytest.raises(InputError, match="--model"):
        judged("vllm serve my-own-model")


def test_what_does_not_fit_says_by_how_much_and_what_helps() -> None:
    report = judged("vllm serve meta-llama/Llama-3.1-70B -tp 1")
    (memory,) = [one for one in report.findings if one.rule == "memory"]
    assert "GiB needed" in memory.got
    assert memory.hint
    assert not report.runs
    assert report.performance is None


def test_a_split_that_does_not_divide_is_an_error() -> None:
    report = judged(f"{PLAIN} -tp 6")
    assert not report.runs
    assert "cards=6" in report.findings[0].got
    assert not judged("vllm serve deepseek-ai/DeepSeek-V3 -tp 4 -dp 2 -pp 62", nodes=62).runs


def test_rules_are_named_with_their_source() -> None:
    report = judged(f"{PLAIN} -tp 16", nodes=2)
    broken = [one for one in report.findings if one.rule in rules()]
    assert broken
    assert all(one.source == rules()[one.rule].source for one in broken)


def test_stages_and_groups_are_numbered_as_the_engine_does() -> None:
    report = judged(f"{PLAIN} -tp 2 -pp 2 -dp 2")
    assert "order-engine" not in rules_of(report)
    assert report.runs


def test_sizes_that_contradict_one_another_are_errors() -> None:
    command = f"{PLAIN} -tp 2 --max-num-seqs 512 --max-num-batched-tokens 256 --max-model-len 512"
    report = judged(command)
    assert {"step", "context"} <= rules_of(report)
    assert not report.runs


def test_fewer_sequences_than_may_be_scheduled_are_priced() -> None:
    report = judged(
        "vllm serve meta-llama/Llama-3.1-70B -tp 4 --max-num-seqs 1024"
        " --max-num-batched-tokens 2048"
    )
    assert "cache" in rules_of(report)
    assert report.runs
    assert report.slots is not None
    assert 0 < report.slots < 1024


def test_a_limit_that_is_missed_is_a_warning() -> None:
    report = judged(f"{PLAIN} -tp 1 --max-num-seqs 256", tpot_ms=1.0)
    assert "tpot" in rules_of(report)
    assert report.runs


def mindie(**changes: Any) -> Configuration:
    """The sample with `part__key` set to other values."""
    whole = json.loads((SAMPLES / "mindie.json").read_text(encoding="utf-8"))
    backend = whole["BackendConfig"]
    parts = {
        "model": backend["ModelDeployConfig"]["ModelConfig"][0],
        "deploy": backend["ModelDeployConfig"],
        "schedule": backend["ScheduleConfig"],
        "backend": backend,
    }
    for name, value in changes.items():
        part, _, key = name.partition("__")
        parts[part][key] = value
    return read_mindie(json.dumps(whole), "config.json")


def test_a_mindie_example_is_read_and_keeps_its_rules() -> None:
    config = mindie()
    assert (config.tp, config.dp, config.ranks, config.max_num_seqs) == (4, 1, 4, 200)
    assert config.broken == ()
    report = lint(config, Asked(model="", cluster="atlas-800t-a2"), best=False)
    assert report.engine_profile == "mindie"
    assert report.runs


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__tp": 2}, "worldSize"),
        ({"model__moe_ep": 2, "model__moe_tp": 4}, "moe_tp"),
        ({"schedule__cacheBlockSize": 100}, "multiple of 16"),
        ({"schedule__maxPrefillTokens": 1024}, "longest prompt"),
        ({"schedule__maxPrefillBatchSize": 300}, "maxBatchSize"),
        ({"backend__npuDeviceIds": [[0, 1]]}, "npuDeviceIds"),
        ({"model__cp": 2, "model__dp": 2, "model__tp": 1}, "context parallelism"),
    ],
)
def test_rules_of_mindie_are_checked(changes: dict[str, Any], said: str) -> None:
    broken = mindie(**changes).broken
    assert any(said in rule + got for rule, got, _ in broken)


def test_a_plan_of_the_search_is_its_own_best(tmp_path: Path) -> None:
    plan = shardplan.search("llama-3.1-8b", "atlas-800t-a2", cards=2, tpot_ms=40).plan
    plan.save(tmp_path / "plan.json")
    (config,) = read(str(tmp_path / "plan.json"), "")
    report = lint(config, Asked(model="llama-3.1-8b", cluster="atlas-800t-a2", tpot_ms=40.0))
    assert report.runs
    assert report.performance is not None
    assert report.performance.output_tokens_per_s == pytest.approx(
        plan.performance.output_tokens_per_s, rel=1e-9
    )
    assert report.best is not None
    assert report.best.gain == pytest.approx(1.0, rel=1e-9)


def test_the_command_prints_and_exits_as_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["lint", f"{PLAIN} -tp 2", "--cluster", "atlas-800t-a2"]
    assert run([*words, "--no-best"]) == 0
    assert "nothing speaks against it" in capsys.readouterr().out
    assert run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["best"]["gain"] >= 1.0
    bad = shlex.split('lint "vllm serve meta-llama/Llama-3.1-70B -tp 1" --cluster atlas-800t-a2')
    assert run(bad) == 3
    assert "[memory]" in capsys.readouterr().out
    assert run(["lint", "nowhere.sh", "--cluster", "atlas-800t-a2"]) == 2
    assert "check the path" in capsys.readouterr().err
