"""Questions: every bad one is refused with its rule, its value and what to try."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.models.errors import InputError, UnknownNameError
from shardplan.search.request import Asked, Resolved, resolve, without_limits

MODEL, CLUSTER = "llama-3.1-8b", "atlas-800t-a2"
COUNTS = ("input_len", "output_len", "concurrency", "cards", "nodes", "trials")
NOT_COUNTS = (0, -1, -8, 2**40, 10**400, True, 1.5, 8.0, "x", "8", float("nan"), [1])
RATES = ("rate", "ttft_ms", "tpot_ms")
NOT_RATES = (0, 0.0, -1, -5, float("nan"), float("inf"), 10**400, 1e300, True, "x", [1])
WORDS = ("objective", "engine", "attention", "serving", "weight_dtype", "kv_dtype")
SWITCHES = ("weight_prefetch", "fused_collectives")
ROOT_USER = hasattr(os, "geteuid") and os.geteuid() == 0


def asked(**changes: Any) -> Resolved:
    """The question resolved, with changes."""
    return resolve(Asked(**{"model": MODEL, "cluster": CLUSTER, **changes}))


def refused(**changes: Any) -> InputError:
    """The error of a bad question: rule, value and hint are all there, each of one line."""
    with pytest.raises(InputError) as caught:
        asked(**changes)
    error = caught.value
    assert error.rule
    assert error.got
    assert error.hint
    assert "\n" not in str(error)
    return error


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", NOT_COUNTS, ids=lambda value: repr(value)[:12])
def test_a_count_is_a_whole_number_from_one_on(name: str, value: object) -> None:
    """The message names the option and shows the value, however long it is."""
    error = refused(**{name: value})
    assert f"`{name}`" in error.rule
    assert error.got.startswith(f"{name}={repr(value)[:60]}")
    assert len(str(error)) < 250


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("value", NOT_RATES, ids=lambda value: repr(value)[:12])
def test_a_rate_or_limit_is_a_finite_number_above_zero(name: str, value: object) -> None:
    """Neither NaN nor infinity nor a number that no float holds."""
    error = refused(**{name: value})
    assert f"`{name}` is a number above 0" in error.rule
    assert error.got.startswith(f"{name}={repr(value)[:60]}")


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, float("nan"), float("inf"), True, False, "x", [0]])
def test_a_prefix_hit_is_a_share(value: object) -> None:
    """All of the prompt cannot be in the cache: its last token is always computed."""
    assert "from 0 to below 1" in refused(prefix_hit=value).rule


@pytest.mark.parametrize("value", [-1, 2**32, 2**70, 1.5, True, "x", None])
def test_a_seed_is_one_that_a_sampler_takes(value: object) -> None:
    """Zero is one."""
    assert "`seed`" in refused(seed=value).rule
    assert asked(seed=0).request.seed == 0


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("value", ["zz", "", None, 3, ["auto"]], ids=repr)
def test_a_choice_that_does_not_exist_is_refused(name: str, value: object) -> None:
    """With those that do."""
    error = refused(**{name: value})
    assert error.got == f"{name}={value!r}"
    assert ", " in error.rule


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", ["zz", "", True, 3, ["auto"]], ids=repr)
def test_a_switch_is_off_on_or_auto(name: str, value: object) -> None:
    assert "off, on, auto" in refused(**{name: value}).rule


@pytest.mark.parametrize(
    ("changes", "close"),
    [
        ({"model": "llama-3.1-8"}, "llama-3.1-8b"),
        ({"model": "qwen3-32"}, "qwen3-32b"),
        ({"cluster": "atlas-800t"}, "atlas-800t-a2"),
        ({"device": "910b"}, "910b2"),
        ({"engine_profile": "vllm-asc"}, "vllm-ascend"),
        ({"engine_profile": "mindi"}, "mindie"),
    ],
    ids=str,
)
def test_an_unknown_name_is_answered_with_the_nearest(changes: dict[str, str], close: str) -> None:
    """Names are searched in their own catalogue."""
    error = refused(**changes)
    assert isinstance(error, UnknownNameError)
    assert close in error.close
    assert repr(next(iter(changes.values()))) in error.got


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"weight_dtype": "fp8"}, "try bf16"),
        ({"weight_dtype": "w8a"}, "try w8a8"),
        ({"kv_dtype": "fp8"}, "try bf16"),
        ({"cluster": "atlas-800-9000", "weight_dtype": "bf16"}, "try fp16"),
        ({"cluster": "atlas-800-9000", "kv_dtype": "bf16"}, "try fp16"),
        ({"engine_profile": "vllm"}, "try vllm-ascend"),
        ({"attention": "naive", "engine_profile": "vllm-ascend"}, "torch-graph"),
        ({"objective": "throughputs"}, "try throughput"),
        ({"serving": "disagg", "engine": "tpe"}, "exact"),
        ({"prefill_cluster": "atlas-800i-a3"}, "--serving disagg"),
        ({"serving": "disagg", "prefill_cards": 4}, "--prefill-cluster"),
    ],
    ids=str,
)
def test_what_the_device_or_engine_lacks_is_refused(changes: dict[str, str], hint: str) -> None:
    """The hint is one that it has."""
    assert hint in refused(**changes).hint


@pytest.mark.parametrize(
    ("cards", "hint"),
    [(3, "2 or 4"), (5, "4 or 8"), (7, "4 or 8"), (9, "8 or 16")],
)
def test_a_job_has_a_number_of_cards_that_a_node_gives(cards: int, hint: str) -> None:
    """1, 2, 4, 8, then whole nodes; the hint has the nearest two, and they work."""
    error = refused(cards=cards)
    assert f"cards={cards}" in error.got
    assert hint in error.hint
    for word in hint.split(" or "):
        assert asked(cards=int(word)).request.cards == int(word)


def test_more_cards_than_the_cluster_has_are_refused() -> None:
    """Where the nodes are given; the cluster grows by itself where they are not."""
    error = refused(cards=24, nodes=2)
    assert "more nodes (this cluster has 2)" in error.hint
    assert asked(cards=24).cluster.nodes == 3
    assert "128" in refused(nodes=129).hint


def write(tmp_path: Path, content: bytes) -> str:
    """A workload file."""
    path = tmp_path / "workload.toml"
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"input_len = ", "TOML"),
        (b"\xff\xfe", "UTF-8"),
        (b"a = " + b"[" * 20_000, "TOML"),
        (b"input_len = " + b"9" * 5000, "TOML"),
        (b"prompt = 3", "prompt"),
        (b"[input_len]\nx = 1", "input_len"),
        (b'input_len = "long"', "input_len='long'"),
        (b"input_len = 1.5", "input_len=1.5"),
        (b"input_len = true", "input_len=True"),
        (b"input_len = 2020-01-01", "input_len=datetime"),
        (b"concurrency = 0", "concurrency=0"),
        (b"rate = nan", "rate=nan"),
        (b"rate = inf", "rate=inf"),
        (b"ttft_ms = -5", "ttft_ms=-5"),
        (b"prefix_hit = [0.5]", "prefix_hit=[0.5]"),
        (b"#" * (2**20 + 1), "1 MiB"),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else "",
)
def test_a_workload_file_that_breaks_a_rule_is_refused(
    tmp_path: Path, content: bytes, words: str
) -> None:
    """Its text, its keys, its types and its size."""
    assert words in str(refused(workload=write(tmp_path, content)))


@pytest.mark.parametrize("name", ["nowhere.toml", ".", "a\0b.toml"])
def test_a_workload_without_a_file_is_refused(tmp_path: Path, name: str) -> None:
    """Missing, a folder, or no path at all."""
    assert "workload" in refused(workload=f"{tmp_path}/{name}").rule


@pytest.mark.skipif(ROOT_USER, reason="root reads every file")
def test_a_workload_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    """As the system says."""
    path = write(tmp_path, b"input_len = 3")
    Path(path).chmod(0)
    assert "cannot be read" in refused(workload=path).rule


def test_what_is_said_stands_before_the_file(tmp_path: Path) -> None:
    """And what neither says is a default."""
    path = write(tmp_path, b"input_len = 300\noutput_len = 30\nttft_ms = 500\nrate = 2")
    request = asked(workload=path, output_len=7).request
    assert (request.workload.input_len, request.workload.output_len) == (300, 7)
    assert request.workload.request_rate == 2.0
    assert request.limits.ttft_s == 0.5
    assert request.limits.tpot_s is None


def test_switches_stay_off_and_are_shown_beside_unless_asked_for() -> None:
    """Each alone, for the dtypes that are searched."""
    usual = asked()
    assert not any(choice.switched for choice in usual.choices)
    assert [(c.weight_prefetch, c.fused_collectives) for c in usual.switches] == [
        (False, True),
        (True, False),
    ]
    both = asked(weight_prefetch="auto", fused_collectives="auto")
    assert len(both.choices) == 4 * len(usual.choices)
    assert both.switches == ()
    assert (both.request.weight_prefetch, both.request.fused_collectives) == ("auto", "auto")
    on = asked(fused_collectives="on")
    assert all(choice.fused_collectives for choice in on.choices)


def test_a_switch_that_the_engine_has_on_is_searched_both_ways() -> None:
    """MindIE fuses in prefill unless told not to; not with quantized weights, not on A3."""
    usual = asked(engine_profile="mindie")
    assert {choice.fused_collectives for choice in usual.choices} == {False, True}
    assert any("fused_collectives" in note for note in usual.notes)
    off = asked(engine_profile="mindie", fused_collectives="off")
    assert not any(choice.switched for choice in off.choices)
    for elsewhere in ({"weight_dtype": "w8a8"}, {"cluster": "atlas-800i-a3"}):
        found = asked(engine_profile="mindie", **elsewhere)
        assert not any(choice.fused_collectives for choice in found.choices)


@pytest.mark.parametrize(
    "changes",
    [
        {"fused_collectives": "on", "cluster": "atlas-800i-a3"},
        {"fused_collectives": "on", "weight_dtype": "w8a8"},
        {"weight_prefetch": "on", "cluster": "hgx-h200"},
        {"weight_prefetch": "on", "engine_profile": "torch-graph"},
    ],
)
def test_a_switch_that_is_not_to_be_had_is_refused_with_its_rule(changes: dict[str, str]) -> None:
    assert "is not to be had here" in refused(**changes).rule


def test_default_limits_are_soft_and_stated() -> None:
    """They stand only where nothing else bounds the question, and say when they are dropped."""
    open_ended = asked()
    assert open_ended.soft_limits
    assert open_ended.request.limits.ttft_s == 2.0
    assert any("2000 ms and 100 ms assumed" in note for note in open_ended.notes)
    dropped = without_limits(open_ended)
    assert dropped.request.limits.ttft_s is None
    assert "dropped" in dropped.notes[-1]
    for bound in ({"rate": 1.0}, {"concurrency": 4}, {"ttft_ms": 9.0}, {"objective": "latency"}):
        assert not asked(**bound).soft_limits


def test_a_type_that_the_device_lacks_becomes_one_as_wide() -> None:
    """fp8 to int8 on the A3, bf16 to fp16 on the 910A; said, not silent."""
    deepseek = asked(model="deepseek-v3", cluster="atlas-800i-a3", nodes=2)
    assert deepseek.choices[0].weight_dtype == "w8a8"
    assert "a3-die has no fp8: weights are w8a8, which is as wide" in deepseek.notes
    mixtral = asked(model="mixtral-8x7b", cluster="atlas-800-9000")
    assert (mixtral.choices[0].weight_dtype, mixtral.choices[0].kv_dtype) == ("fp16", "fp16")


@given(
    st.sampled_from((*COUNTS, *RATES, *WORDS, *SWITCHES, "prefix_hit", "seed")),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()),
)
def test_no_value_ends_in_a_traceback(name: str, value: object) -> None:
    """Whatever is given is either taken or refused in words."""
    try:
        asked(**{name: value})
    except InputError:
        return


def test_types_that_the_engine_does_not_run_are_refused_with_those_it_does() -> None:
    """vllm-ascend has no weight-only int8 experts; the rule, and what may be asked instead."""
    with pytest.raises(InputError, match="no weight-only int8 experts") as caught:
        asked(model="mixtral-8x7b", weight_dtype="w8a16")
    assert "--weight-dtype w8a8" in caught.value.hint
    dense = asked(model="qwen3-32b", weight_dtype="w8a16")
    assert dense.choices[0].weight_dtype == "w8a16"


def test_types_are_not_shown_beside_where_no_engine_runs_them() -> None:
    """Latent attention keeps its cache in 16 bit outside a decode pool, and a note says so."""
    found = asked(model="deepseek-v3", cluster="atlas-800i-a3", nodes=2)
    assert found.beside == ()
    assert any("int8 cache of latent attention" in note for note in found.notes)
