"""Weight types by group of layers, from the question to the plan, the table and the checkpoint."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from tests.search.emit_cases import emit_plan, moe

import shardplan
from shardplan.models.errors import InputError
from shardplan.search.api import search
from shardplan.search.emit import emit
from shardplan.search.main import run
from shardplan.search.request import Asked, resolve

MIXED = "w8a8,experts=w4a8"


def asked(weight_dtype: str, model: str = "deepseek-v3", **more: Any) -> tuple[str, ...]:
    found = resolve(
        Asked(model=model, cluster="atlas-800i-a3", nodes=2, weight_dtype=weight_dtype, **more)
    )
    return tuple(dict.fromkeys(one.weight_dtype for one in found.choices))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("w8a8", ("w8a8",)),
        ("w8a8, experts=w4a8 , ffn=w8a8", (MIXED,)),
        ("w8a8|w8a8,experts=w4a8", ("w8a8", MIXED)),
        ("w8a8,experts=w4a8 | w4a8,attention=w8a8,ffn=w8a8,shared=w8a8", (MIXED,)),
        ("auto,experts=w4a8", (MIXED,)),  # the checkpoint is fp8, which the A3 runs as w8a8
    ],
)
def test_a_question_names_types_by_layers_and_several_to_search(
    text: str, wanted: tuple[str, ...]
) -> None:
    assert asked(text) == wanted


def test_layers_that_the_model_has_not_are_dropped() -> None:
    assert asked("w8a8|w8a8,experts=w4a8", model="qwen3-8b") == ("w8a8",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w8a8,experts=fp8", "runs weights as.*weight_dtype='fp8'"),
        ("w8a8,expert=w4a8", "attention, ffn, shared, experts"),
        ("w8a8|", "runs weights as"),
        ("experts=w4a8", "begins with the type of all layers"),
    ],
)
def test_a_part_that_the_device_or_the_model_cannot_have_is_said(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        asked(text)


def test_a_switch_may_be_on_where_one_of_the_types_has_it() -> None:
    """Fused collectives take 16-bit weights: they are searched there and refused for int8."""
    found = resolve(
        Asked(
            model="qwen3-32b",
            cluster="atlas-800t-a2",
            weight_dtype="w8a8|bf16",
            fused_collectives="auto",
        )
    )
    assert {one.weight_dtype for one in found.choices if one.fused_collectives} == {"w8a8", "bf16"}


@pytest.mark.slow
def test_several_types_are_searched_and_the_best_of_them_wins() -> None:
    common: dict[str, Any] = {"cards": 2, "input_len": 512, "output_len": 64, "concurrency": 4}
    alone = {
        one: search("qwen3-8b", "atlas-800t-a2", weight_dtype=one, **common).plan
        for one in ("bf16", "bf16,ffn=w8a8")
    }
    both = search("qwen3-8b", "atlas-800t-a2", weight_dtype="bf16|bf16,ffn=w8a8", **common).plan
    best = max(alone.values(), key=lambda plan: plan.performance.output_tokens_per_s)
    assert both.performance == best.performance
    assert both.strategy == best.strategy
    assert both.certificate.space["weight_dtype"] == ["bf16", "bf16,ffn=w8a8"]
    assert both.certificate.space_size == sum(p.certificate.space_size for p in alone.values())


def point(weight_dtype: str, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": "qwen3-30b-a3b",
        "cluster": "atlas-800i-a3",
        "tp": 4,
        "phase": "decode",
        "batch": 32,
        "tokens": 2048,
        "weight_dtype": weight_dtype,
    }
    return shardplan.estimate(**(base | more))


def test_an_estimate_of_one_type_by_layers_is_the_plain_one() -> None:
    plain, spelled, mixed = (
        point(one) for one in ("w8a8", "w8a8,attention=w8a8,experts=w8a8", MIXED)
    )
    for column in ("step_s", "compute_s", "collective_s", "overhead_s", "memory_bytes"):
        assert spelled[column] == plain[column]
    assert mixed["memory_bytes"] < plain["memory_bytes"]
    assert mixed["step_s"] != plain["step_s"]


def test_rows_of_a_table_name_types_by_layers(tmp_path: Path) -> None:
    rows = [
        {"model": "qwen3-30b-a3b", "cluster": "atlas-800i-a3", "tp": 4, "weight_dtype": one}
        for one in ("w8a8", MIXED, "w8a8,experts=fp8", "w8a8,heads=bf16", "a|b")
    ]
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(text.getvalue(), encoding="utf-8")
    assert run(["estimate", "--points", str(source), "--out", str(out)]) == 0
    found = list(csv.DictReader(out.open(encoding="utf-8")))
    assert [one["status"] == "ok" for one in found] == [True, True, False, False, False]
    assert float(found[1]["memory_bytes"]) < float(found[0]["memory_bytes"])


def test_the_checkpoint_has_a_scheme_for_each_group(tmp_path: Path) -> None:
    plan = emit_plan(tp=4, dp=2, ep=8, weight_dtype=MIXED, model=moe())
    emit(plan, "vllm-ascend", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "attention layers W8A8 or W8A8_DYNAMIC (w8a8)" in text
    assert "routed experts W4A8_DYNAMIC (w4a8)" in text
    script = (tmp_path / "out" / "serve_node0.sh").read_text(encoding="utf-8")
    assert "--quantization ascend" in script
    assert "--dtype" not in script


def test_layers_in_16_bit_are_float_beside_quantized_ones(tmp_path: Path) -> None:
    plan = emit_plan(tp=4, dp=2, ep=8, weight_dtype="bf16,experts=w4a16", model=moe())
    emit(plan, "vllm-ascend", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "attention layers FLOAT (bf16)" in text
    assert "routed experts W4A16 (w4a16)" in text


def test_a_group_without_a_scheme_is_refused(tmp_path: Path) -> None:
    """W8A16 serves linear layers alone."""
    plan = emit_plan(tp=4, dp=2, ep=8, weight_dtype="w8a8,experts=w8a16", model=moe())
    with pytest.raises(InputError, match="no weight scheme of this dtype for routed experts"):
        emit(plan, "vllm-ascend", tmp_path / "out")
