"""Devices and clusters: what ships, what a user's file may hold, what a bad one says."""

from __future__ import annotations

import dataclasses
import json
import time
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.calibration import calibration_names
from shardplan.costmodel.catalog import (
    cluster_from_table,
    cluster_names,
    cluster_summary,
    device_names,
    device_summary,
    load_cluster,
    load_device,
    resolve_cards,
)
from shardplan.costmodel.engines import engine_names
from shardplan.costmodel.hardware import Device
from shardplan.models.errors import InputError, UnknownNameError

DATA = resources.files("shardplan.costmodel") / "data"
FOLDERS = ("devices", "clusters", "engines")
GIB = 2**30


def table(folder: str, name: str) -> dict[str, Any]:
    return tomllib.loads((DATA / folder / f"{name}.toml").read_text(encoding="utf-8"))


def shipped() -> list[tuple[str, str]]:
    return [
        (folder, entry.name.removesuffix(".toml"))
        for folder in FOLDERS
        for entry in sorted((DATA / folder).iterdir(), key=lambda item: item.name)
    ]


def numbers(value: object, path: str, inside_fact: bool = False) -> Iterator[str]:
    """Paths of numbers that stand outside a fact."""
    if isinstance(value, dict):
        fact = {"value", "kind", "source"} == set(value)
        for key, item in value.items():
            yield from numbers(item, f"{path}.{key}", inside_fact or fact)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item, path, inside_fact)
    elif isinstance(value, int | float) and not inside_fact:
        yield path


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def as_toml(value: object) -> str:
    """Enough TOML for the tables used here."""
    if isinstance(value, dict):
        inner = ", ".join(f"{key} = {as_toml(item)}" for key, item in value.items())
        return "{ " + inner + " }"
    if isinstance(value, list):
        return "[" + ", ".join(as_toml(item) for item in value) + "]"
    return json.dumps(value)


def dump(value: dict[str, Any]) -> str:
    return "".join(f"{key} = {as_toml(item)}\n" for key, item in value.items())


# --- what ships ---------------------------------------------------------------------------------


def test_every_promised_device_and_cluster_ships() -> None:
    assert set(device_names()) == {
        *("910a", "910b1", "910b2", "910b3", "910b4", "a3-die", "a3-die-560t"),
        *("310p3", "950pr", "950dt", "h100", "h200"),
    }
    assert set(cluster_names()) == {
        *("atlas-800-9000", "atlas-800t-a2", "atlas-800i-a2", "atlas-800i-a3"),
        *("cloudmatrix-384", "atlas-300i-duo", "hgx-h100", "hgx-h200"),
    }


@pytest.mark.parametrize(("folder", "name"), shipped())
def test_every_number_that_ships_stands_in_a_fact(folder: str, name: str) -> None:
    assert list(numbers(table(folder, name), f"{folder}/{name}")) == []


@pytest.mark.parametrize("name", device_names())
def test_a_device_carries_a_fact_for_every_field_that_is_not_a_label(name: str) -> None:
    device = load_device(name)
    labels = {"name", "title", "vendor", "facts", "flop_per_s", "soc_versions"}
    labels |= {"corrections", "corrected_engine"}
    needed = {field.name for field in dataclasses.fields(Device)} - labels
    needed |= {f"flop_per_s.{dtype}" for dtype in device.flop_per_s}
    assert needed <= set(device.facts)
    assert device.name == name
    assert set(device.engine_profiles) <= set(engine_names())
    assert device.calibration in calibration_names()


@pytest.mark.parametrize("name", [n for n in device_names() if not n.startswith("h")])
def test_an_ascend_matrix_rate_is_4096_multiply_adds_a_cycle_a_core(name: str) -> None:
    device = load_device(name)
    assert device.flop_per_s["fp16"] == pytest.approx(8192 * device.cube_cores * device.clock_hz)
    assert device.flop_per_s["int8"] == pytest.approx(2 * device.flop_per_s["fp16"])


@pytest.mark.parametrize(
    ("name", "marketed_tflop_per_s"),
    [("910b2", 376.0), ("910b3", 313.3), ("a3-die", 376.0), ("950pr", 486.6)],
)
def test_cube_and_vector_rates_add_up_to_the_marketed_one(
    name: str, marketed_tflop_per_s: float
) -> None:
    device = load_device(name)
    total = device.flop_per_s["fp16"] + device.vector_flop_per_s
    assert total == pytest.approx(marketed_tflop_per_s * 1e12, rel=1e-3)


def test_units_are_converted_once() -> None:
    device = load_device("910B2")
    assert device.clock_hz == 1.8e9
    assert device.hbm_bytes == 64 * GIB
    assert device.hbm_bytes_per_s == 1.76e12
    assert device.l2_bytes == 192 * 2**20
    assert device.l1_bytes == 512 * 1024
    assert device.launch_s == pytest.approx(2e-6)
    tier = load_cluster("atlas-800t-a2").tiers[0]
    assert (tier.bytes_per_s, tier.link_bytes_per_s, tier.latency_s) == (196e9, 28e9, 0.5e-6)


def test_old_parts_have_no_bf16_and_no_separate_vector_cores() -> None:
    for name in ("910a", "310p3"):
        device = load_device(name)
        assert "bf16" not in device.flop_per_s
        assert not {"bf16", "fp8", "w4a8"} & set(device.weight_dtypes)
        assert "bf16" not in device.kv_dtypes
        assert device.vector_cores == 0
    assert "vllm-ascend" not in load_device("910a").engine_profiles
    assert "fp8" not in load_device("a3-die").weight_dtypes
    assert "fp8" in load_device("950pr").weight_dtypes


def test_cloudmatrix_is_768_dies_and_384_of_them_are_24_nodes() -> None:
    whole = load_cluster("cloudmatrix-384")
    assert (whole.ranks, whole.nodes, [t.ranks for t in whole.tiers]) == (768, 48, [2, 16, 768])
    half = load_cluster("cloudmatrix-384", nodes=24)
    assert (half.ranks, [t.ranks for t in half.tiers]) == (384, [2, 16, 384])
    assert resolve_cards(whole, 384) == 384


def test_a_cluster_keeps_only_the_tiers_that_its_nodes_cross() -> None:
    assert [t.name for t in load_cluster("atlas-800t-a2").tiers] == ["mesh"]
    four = load_cluster("atlas-800t-a2", nodes=4)
    assert [(t.name, t.ranks) for t in four.tiers] == [("mesh", 8), ("roce", 32)]
    old = load_cluster("atlas-800-9000", nodes=2)
    assert [(t.topology, t.ranks) for t in old.tiers] == [("ring", 4), ("pcie", 8), ("roce", 16)]


def test_a_device_replaces_the_clusters_own() -> None:
    cluster = load_cluster("atlas-800t-a2", device="910b3")
    assert (cluster.name, cluster.device.name) == ("atlas-800t-a2", "910b3")
    assert load_cluster("atlas-800t-a2", device=load_device("910b1")).device.name == "910b1"
    with pytest.raises(InputError, match="its own vendor"):
        load_cluster("atlas-800t-a2", device="h100")


def test_loading_a_cluster_takes_less_than_5_ms() -> None:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        cluster_from_table(table("clusters", "atlas-800t-a2"), "x")
        best = min(best, time.perf_counter() - start)
    assert best < 5e-3


def test_summaries_are_json_and_say_where_each_number_comes_from() -> None:
    for name in device_names():
        device = json.loads(json.dumps(device_summary(name)))
        assert device["name"] == name
        assert set(device["hbm_bytes"]) == {"value", "kind", "source"}
        assert device["flop_per_s"]["fp16"]["value"] == load_device(name).flop_per_s["fp16"]
    for name in cluster_names():
        cluster = json.loads(json.dumps(cluster_summary(name)))
        assert cluster["name"] == name
        assert cluster["tiers"][0]["bytes_per_s"]["source"]


# --- nodes and cards ----------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [0, -1, 129, True, 1.5, "2"])
def test_a_number_of_nodes_out_of_range_is_refused(nodes: Any) -> None:
    with pytest.raises(InputError, match="from 1 to 128"):
        load_cluster("atlas-800t-a2", nodes=nodes)


def test_cards_without_nodes_grow_a_cluster_that_is_too_small() -> None:
    assert load_cluster("atlas-800t-a2", cards=32).nodes == 4
    assert load_cluster("atlas-800t-a2", cards=4).nodes == 1
    assert load_cluster("cloudmatrix-384", cards=384).nodes == 48
    assert load_cluster("atlas-800t-a2", nodes=2, cards=32).nodes == 2
    with pytest.raises(InputError, match="from 1 to 128"):
        load_cluster("atlas-800t-a2", cards=10**9)


def test_a_job_takes_allowed_counts_of_a_node_or_whole_nodes() -> None:
    one, two = load_cluster("atlas-800t-a2"), load_cluster("atlas-800t-a2", nodes=2)
    assert resolve_cards(one, None) == 8
    assert [resolve_cards(one, n) for n in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert resolve_cards(two, 16) == 16
    with pytest.raises(InputError) as caught:
        resolve_cards(one, 7)
    assert str(caught.value) == (
        "a job on atlas-800t-a2 takes 1, 2, 4 or 8 cards of a node, or whole nodes (cards=7); "
        "try 4 or 8"
    )
    with pytest.raises(InputError, match="try 8 or 16"):
        resolve_cards(two, 12)
    with pytest.raises(InputError, match=r"try 8, or more nodes \(this cluster has 1\)"):
        resolve_cards(one, 16)
    a3 = load_cluster("atlas-800i-a3")
    assert resolve_cards(a3, 6) == 6
    with pytest.raises(InputError, match="try 2 or 4"):
        resolve_cards(a3, 3)


@pytest.mark.parametrize("cards", [0, -8, True])
def test_a_number_of_cards_below_one_is_refused(cards: int) -> None:
    with pytest.raises(InputError, match="takes 1, 2, 4 or 8 cards"):
        resolve_cards(load_cluster("atlas-800t-a2"), cards)


@given(nodes=st.integers(1, 128), cards=st.integers(-3, 1100))
def test_resolved_cards_always_fit_and_hints_are_always_legal(nodes: int, cards: int) -> None:
    cluster = load_cluster("atlas-800t-a2", nodes=nodes)
    try:
        assert 1 <= resolve_cards(cluster, cards) <= cluster.ranks
    except InputError as error:
        tried = error.hint.removeprefix("try ").split(", or more")[0].split(" or ")
        assert all(resolve_cards(cluster, int(text)) == int(text) for text in tried)


# --- names and files ----------------------------------------------------------------------------


def test_an_unknown_name_gets_the_closest_one() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean .*atlas-800t-a2"):
        load_cluster("atlas-800t-a22")
    with pytest.raises(UnknownNameError, match="910b2"):
        load_device("910b22")
    with pytest.raises(UnknownNameError):
        load_device("")


def test_a_users_cluster_names_its_device_by_name_path_or_table(tmp_path: Path) -> None:
    device = table("devices", "910b3")
    cluster = table("clusters", "atlas-800t-a2")
    written(tmp_path / "mine.toml", dump({**device, "name": "mine"}))
    for own, expected in (("910b4", "910b4"), ("./mine.toml", "mine"), (device, "910b3")):
        file = written(tmp_path / "cluster.toml", dump({**cluster, "device": own}))
        loaded = load_cluster(str(file), nodes=3)
        assert (loaded.device.name, loaded.ranks) == (expected, 24)
    assert load_device(tmp_path / "mine.toml").hbm_bytes == 64 * GIB
    assert load_cluster(tmp_path / "cluster.toml", device=tmp_path / "mine.toml").device.name == (
        "mine"
    )


def test_one_card_alone_is_a_cluster_without_tiers(tmp_path: Path) -> None:
    cluster = table("clusters", "atlas-800t-a2")
    del cluster["tiers"]
    for key in ("ranks_per_node", "max_nodes", "nodes"):
        cluster[key]["value"] = 1
    cluster["rank_counts"]["value"] = [1]
    loaded = load_cluster(written(tmp_path / "one.toml", dump(cluster)))
    assert (loaded.ranks, loaded.tiers, resolve_cards(loaded, None)) == (1, (), 1)
