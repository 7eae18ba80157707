"""Estimate: points in, prices out; the numbers agree with the formulas they come from."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.bulk import Fleet
from shardplan.costmodel.catalog import load_cluster, load_device
from shardplan.costmodel.errors import CalibrationError
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.kernels.collectives import collective
from shardplan.costmodel.kernels.matmul import matmul
from shardplan.costmodel.placement import group_tiers
from shardplan.costmodel.step import StepModel
from shardplan.models.catalog import load_model
from shardplan.models.counts import kv_bytes_per_token, parameter_count
from shardplan.models.errors import InputError, LayoutError, UnknownNameError
from shardplan.search import estimate_fleets
from shardplan.search.estimate import (
    OUTPUT_COLUMNS,
    estimate_one,
    price_columns,
    price_points,
)
from shardplan.search.estimate_csv import priced_csv, read_points_csv
from shardplan.search.estimate_detail import explain_one
from shardplan.search.estimate_layout import LayoutMaker
from shardplan.search.estimate_steps import price_steps

BASE: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "cluster": "atlas-800t-a2",
    "tp": 4,
    "phase": "decode",
    "batch": 16,
    "tokens": 2048,
}
SERVE: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "cluster": "atlas-800t-a2",
    "phase": "serve",
    "input_len": 1024,
    "output_len": 256,
}


def test_the_three_parts_make_the_step() -> None:
    """compute + collective + overhead = step, and one rank of tp 4 has collectives to wait for."""
    found = estimate_one(**BASE)
    parts = found["compute_s"] + found["collective_s"] + found["overhead_s"]
    assert found["step_s"] == pytest.approx(parts, rel=1e-12)
    assert found["collective_s"] > 0
    assert estimate_one(**{**BASE, "tp": 1})["collective_s"] == 0


def test_a_decode_step_is_no_faster_than_memory_allows() -> None:
    """On one rank every weight is read once a step: 16 GB at 1.76 TB/s are 9 ms."""
    device = load_device("910b2")
    weights = 2.0 * parameter_count(load_model("llama-3.1-8b"))
    found = estimate_one(**{**BASE, "tp": 1, "batch": 1, "tokens": 16})
    embedding = 2.0 * 128256 * 4096
    assert found["step_s"] > (weights - embedding) / device.hbm_bytes_per_s


def test_memory_is_weights_and_cache_and_what_the_engine_keeps() -> None:
    """tp 1: all weights, 16 sequences of 2048 tokens, under 3 GiB of the rest."""
    found = estimate_one(**{**BASE, "tp": 1})
    spec = load_model("llama-3.1-8b")
    held = 2.0 * parameter_count(spec) + 16 * 2048 * kv_bytes_per_token(spec)
    assert held < found["memory_bytes"] < held + 3 * 2**30
    assert found["fits"] is True


def test_a_strategy_that_does_not_fit_is_priced_and_says_so() -> None:
    """70B in bf16 on one 64 GB card: an engineer still wants the time."""
    found = estimate_one(**{**BASE, "model": "llama-3.1-70b", "tp": 1})
    assert found["status"] == "ok"
    assert found["fits"] is False
    assert "does not fit" in found["message"]
    assert found["memory_bytes"] > found["capacity_bytes"]
    assert found["step_s"] > 0


def test_the_breakdown_and_the_host_make_the_step() -> None:
    """What `estimate` prints adds up."""
    found = explain_one(BASE)
    total = sum(row["total_s"] for row in found["breakdown"]) + found["host_s"]
    assert total == pytest.approx(found["step_s"])
    assert found["host_s"] == pytest.approx(1.2e-3)  # vllm-ascend, a decode step
    assert {row["kind"] for row in found["breakdown"]} >= {"matmul", "attention", "all_reduce"}
    assert found["memory"][0]["total_bytes"] == pytest.approx(found["memory_bytes"])


def test_an_operator_is_priced_as_its_kernel_alone() -> None:
    """`device` stands for a cluster; the weights rotate as in the benchmark."""
    device = load_device("910b2")
    found = estimate_one(op="matmul", device="910b2", m=64, n=4096, k=4096, dtype="w8a8")
    want = matmul(Machine.of(device), 64.0, 4096.0, 4096.0, "w8a8", weights="rotated")
    assert found["step_s"] == pytest.approx(float(want.total_s))
    assert "memory_bytes" not in found


def test_a_collective_is_priced_on_the_cluster_as_the_host_launches_it() -> None:
    """What hccl_test measures on eight cards of one node."""
    cluster = load_cluster("atlas-800t-a2")
    found = estimate_one(op="all_reduce", cluster="atlas-800t-a2", ranks=8, message_bytes=2**24)
    spans = group_tiers(cluster, group=8, stride=1)
    calibration = Machine.of(cluster.device).calibration
    want = collective("all_reduce", spans, float(2**24), calibration, launch="host")
    assert found["step_s"] == found["collective_s"] == pytest.approx(float(want.total_s))


def test_the_message_of_an_all_to_all_is_the_buffer_of_one_rank() -> None:
    """As hccl_test counts it: 32.8 MB on eight cards took 344 us, 125 MB 1,170 us.

    Two figures of github.com/xiaowanCN/aiconfigurator-npu @ 0af81bf5, 910B, one node.
    """
    for size, measured_s in ((32_768_000, 344.35e-6), (125_000_000, 1170.44e-6)):
        found = estimate_one(op="all_to_all", cluster="atlas-800t-a2", ranks=8, message_bytes=size)
        assert found["step_s"] == pytest.approx(measured_s, rel=0.35)


@pytest.mark.parametrize(
    "point",
    [
        {"op": "attention_prefill", "batch": 1, "tokens": 4096, "heads": 32, "kv_heads": 8},
        {"op": "attention_decode", "batch": 8, "tokens": 4096, "heads": 32, "kv_heads": 0},
        {"op": "mla_prefill", "batch": 1, "tokens": 2048, "heads": 16},
        {"op": "mla_decode", "batch": 8, "tokens": 2048, "heads": 16},
        {"op": "moe", "tokens": 64, "hidden": 2048, "ffn": 768, "experts": 128, "topk": 8, "ep": 4},
    ],
    ids=lambda point: point["op"],
)
def test_every_operator_has_a_price(point: dict[str, Any]) -> None:
    """Microseconds to milliseconds, and more tokens take longer."""
    small = estimate_one(device="910b2", **point)["step_s"]
    large = estimate_one(device="910b2", **{**point, "tokens": 4 * point["tokens"]})["step_s"]
    assert 1e-6 < small < large < 1.0


def test_kv_heads_of_zero_means_as_many_as_heads() -> None:
    """The measured tables write multi-head attention so."""
    point = {"op": "attention_decode", "device": "910b2", "batch": 8, "tokens": 1024, "heads": 16}
    assert estimate_one(**point, kv_heads=0) == estimate_one(**point, kv_heads=16)


def test_a_device_replaces_the_clusters_own() -> None:
    """The same server is sold with several bins: the slower one is slower."""
    fast, slow = estimate_one(**BASE), estimate_one(**{**BASE, "device": "910b4"})
    assert slow["step_s"] > fast["step_s"]
    assert slow["capacity_bytes"] == pytest.approx(fast["capacity_bytes"] / 2)


def test_int8_cache_and_weights_are_smaller_and_faster_to_read() -> None:
    """At a long context and large batch the cache is most of a step."""
    point = {**BASE, "tp": 1, "batch": 32, "tokens": 8192}
    plain = estimate_one(**point)
    cache = estimate_one(**point, kv_dtype="int8")
    weights = estimate_one(**point, weight_dtype="w8a8")
    assert cache["memory_bytes"] < plain["memory_bytes"] > weights["memory_bytes"]
    assert weights["step_s"] < plain["step_s"]


def test_rows_priced_together_equal_rows_priced_alone() -> None:
    """Grouping changes the work, not the numbers."""
    points = [
        {**BASE, "batch": batch, "tokens": tokens, "tp": tp, "phase": phase, "weight_dtype": dtype}
        for batch, tokens in ((1, 128), (7, 999))
        for tp in (1, 2)
        for phase in ("prefill", "decode")
        for dtype in ("", "w8a8")
    ]
    together = price_points(pd.DataFrame(points))
    for row, point in enumerate(points):
        alone = estimate_one(**point)
        for name in ("step_s", "compute_s", "collective_s", "memory_bytes"):
            assert together.loc[row, name] == pytest.approx(alone[name], rel=1e-12)


def test_input_columns_pass_through_and_answers_follow() -> None:
    """Unknown columns too, in their order, untouched."""
    frame = pd.DataFrame([{"note": "a,b", **BASE, "measured_s": 0.5}])
    priced = price_points(frame)
    assert list(priced.columns) == [*frame.columns, *OUTPUT_COLUMNS]
    pd.testing.assert_frame_equal(priced[list(frame.columns)], frame)


def test_a_bad_row_gets_its_own_status_and_stops_no_other() -> None:
    """Each with the code of its own error."""
    bad: list[tuple[str, dict[str, Any]]] = [
        ("ok", {}),
        ("unknown_name", {"model": "llama-3.1-8"}),
        ("unknown_name", {"cluster": "nowhere"}),
        ("unknown_name", {"phase": "decoding"}),
        ("unknown_name", {"weight_dtype": "fp8"}),
        ("illegal_strategy", {"tp": 3}),
        ("illegal_strategy", {"ep": 2}),
        ("illegal_strategy", {"shared_tp": 1}),
        ("illegal_strategy", {"o_tp": 3}),
        ("illegal_strategy", {"nodes": 1, "tp": 8, "pp": 2}),
        ("bad_input", {"batch": 0}),
        ("bad_input", {"batch": -1}),
        ("bad_input", {"tokens": "many"}),
        ("bad_input", {"tokens": 2.5}),
        ("bad_input", {"tokens": 2**31}),
        ("bad_input", {"tokens": math.inf}),
        ("bad_input", {"nodes": 10**6}),
        ("bad_input", {"model": None}),
        ("bad_input", {"cluster": None}),
        ("ok", {"weight_dtype": "auto", "attention": None}),
    ]
    frame = pd.DataFrame([{**BASE, **change} for _, change in bad], dtype=object)
    priced = price_points(frame)
    assert list(priced["status"]) == [status for status, _ in bad]
    assert priced.loc[priced["status"] != "ok", "step_s"].isna().all()
    assert (priced.loc[priced["status"] == "ok", "step_s"] > 0).all()
    assert (priced.loc[priced["status"] != "ok", "message"].str.len() > 10).all()


def test_one_point_raises_its_own_error() -> None:
    """The Python call is for one strategy: an error is an exception."""
    with pytest.raises(UnknownNameError, match="did you mean"):
        estimate_one(**{**BASE, "model": "llama-3.1-8"})
    with pytest.raises(LayoutError, match="tp must divide"):
        estimate_one(**{**BASE, "tp": 5})
    with pytest.raises(InputError, match="unknown column"):
        estimate_one(**BASE, batchsize=4)


@given(
    batch=st.integers(1, 256),
    tokens=st.integers(1, 16384),
    phase=st.sampled_from(["prefill", "decode"]),
    tp=st.sampled_from([1, 2, 4, 8]),
)
def test_more_work_takes_longer_and_never_less_memory(
    batch: int, tokens: int, phase: str, tp: int
) -> None:
    """Twice the sequences or the tokens: no less time (1 % for tile effects), no less memory."""
    point = {**BASE, "batch": batch, "tokens": tokens, "phase": phase, "tp": tp}
    once = estimate_one(**point)
    for name in ("batch", "tokens"):
        twice = estimate_one(**{**point, name: 2 * point[name]})
        assert twice["step_s"] >= once["step_s"] * 0.99
        assert twice["memory_bytes"] >= once["memory_bytes"]
    assert np.isfinite(once["step_s"])


def test_every_price_says_how_sure_it_is() -> None:
    """Shares of one whole and a band around the step, in every phase."""
    op = {"op": "matmul", "device": "910b2", "m": 64, "n": 4096, "k": 4096}
    for point in (BASE, {**BASE, "phase": "prefill"}, SERVE, op):
        found = estimate_one(**point)
        assert found["step_low_s"] < found["step_s"] < found["step_high_s"]
        kinds = ("measured", "fitted", "derived", "assumed")
        assert sum(found[f"basis_{kind}"] for kind in kinds) == pytest.approx(1.0)
        assert ("output_tokens_per_s_low" in found) == (point is SERVE)
        told = explain_one(point)["confidence"]
        assert found["step_s"] * told["high_factor"] == pytest.approx(found["step_high_s"])
        assert told["weakest"]["advice"]


def test_a_rate_that_is_offered_is_also_the_most_that_is_served() -> None:
    """With slots to spare the band ends at the offered rate; without, it is that of the steps."""
    capacity = estimate_one(**SERVE)["requests_per_s"]
    calm = estimate_one(**SERVE, request_rate=capacity / 10)
    assert calm["output_tokens_per_s_low"] == calm["output_tokens_per_s"]
    assert calm["output_tokens_per_s_high"] == calm["output_tokens_per_s"]
    busy = estimate_one(**SERVE, request_rate=capacity * 0.9)
    assert busy["output_tokens_per_s_low"] < busy["output_tokens_per_s"]
    full = estimate_one(**SERVE)
    assert full["output_tokens_per_s_high"] / full["output_tokens_per_s"] == pytest.approx(
        full["step_high_s"] / full["step_s"]
    )


def test_op_tables_move_between_clusters_as_they_are_made_anew() -> None:
    """Layouts share what does not depend on the cluster; collectives get its tiers."""
    maker = LayoutMaker()
    columns: dict[str, Any] = {"nodes": None, "device": None, "engine_profile": "vllm-ascend"}
    drafts = {"tp": 2, "pp": 1, "dp": 4, "ep": 8, "mtp": 2}
    for model, axes in (
        ("llama-3.1-8b", {"tp": 4, "pp": 1, "dp": 2, "ep": 1}),
        ("llama-3.1-8b", {"tp": 4, "pp": 2, "dp": 1, "ep": 1}),
        ("qwen3-30b-a3b", {"tp": 2, "pp": 2, "dp": 4, "ep": 8}),
        ("glm-4.5", drafts),
        ("llama-3.1-8b", {"tp": 2, "pp": 1, "dp": 4, "ep": 1, "head_tp": 8, "o_tp": 4}),
        ("llama-3.1-8b", {"tp": 4, "pp": 1, "dp": 1, "ep": 1, "cp": 2}),
    ):
        for cluster in ("atlas-800t-a2", "atlas-800i-a3", "atlas-800i-a2"):
            for layout in maker.make(model=model, cluster=cluster, **{"mtp": 0, **axes}, **columns):
                anew = StepModel.of(layout.model.graphs, layout.cluster, layout.engine)
                assert layout.model.rows == anew.rows


def test_what_cannot_be_priced_refuses_its_own_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one machine are priced in one go; an error is brought home to its setting."""

    def refusing(fleet: Fleet, *rest: Any, **given_: Any) -> Any:
        tps = {fleet.models[place].graphs["decode"].parallel.tp for place in fleet.which}
        dtypes = {fleet.choices[place].weight_dtype for place in fleet.choice}
        if 2 in tps and "w8a8" in dtypes:
            raise CalibrationError("a calibration has no section for this kernel", got="here")
        return price_steps(fleet, *rest, **given_)

    points = [
        {**BASE, "tp": tp, "weight_dtype": dtype, "batch": batch}
        for tp in (1, 2, 4)
        for dtype in ("bf16", "w8a8")
        for batch in (1, 2)
    ]
    whole = price_points(pd.DataFrame(points))
    monkeypatch.setattr(estimate_fleets, "price_steps", refusing)
    priced = price_points(pd.DataFrame(points))
    bad = [point["tp"] == 2 and point["weight_dtype"] == "w8a8" for point in points]
    assert list(priced["status"] != "ok") == bad
    good = ~np.asarray(bad)
    pd.testing.assert_frame_equal(priced[good], whole[good], rtol=1e-12)


def test_cells_that_need_quotes_come_back_from_csv_as_they_were(tmp_path: Path) -> None:
    """Commas, quotes and line ends in a note, beside numbers and messages."""
    note = 'a, "b"\nc'
    names = ["note", *BASE]
    with (tmp_path / "in.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([names, [note, *BASE.values()], ["plain", *BASE.values()]])
    table = read_points_csv(tmp_path / "in.csv")
    text = priced_csv(table, price_columns(table.columns, table.rows))
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["note"] for row in rows] == [note, "plain"]
    assert list(rows[0]) == [*names, *OUTPUT_COLUMNS]
    assert rows[0]["step_s"] == f"{estimate_one(**BASE)['step_s']:.9g}"
    assert "engine_profile=" in rows[0]["message"]
