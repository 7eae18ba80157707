"""A user's device or cluster file that breaks a rule is refused in one line that says which."""

from __future__ import annotations

import copy
import os
import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.catalog import (
    cluster_from_table,
    device_from_table,
    load_cluster,
    load_device,
)
from shardplan.costmodel.datafile import MAX_FILE_BYTES
from shardplan.costmodel.errors import DataFileError
from shardplan.costmodel.hardware import Device
from shardplan.models.errors import InputError

DATA = resources.files("shardplan.costmodel") / "data"


def table(folder: str, name: str) -> dict[str, Any]:
    return tomllib.loads((DATA / folder / f"{name}.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "must not be empty"),
        (b"# only a comment\n", "must not be empty"),
        (b"name = \n", "must be TOML.*line 1"),
        (b"a = 1\na = 2\n", "must be TOML.*line 2"),
        (b"\xff\xfe\x00", "must be UTF-8.*byte 0"),
        (b"x = " + b"[" * 20000, "must be TOML"),
        (b"x = " + b"9" * 5000, "must be TOML"),
        (b"[" * 300, "must be TOML"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    for load in (load_device, load_cluster):
        with pytest.raises(DataFileError, match=said) as caught:
            load(file)
        assert "bad.toml" in str(caught.value)


def test_a_huge_file_is_refused_without_being_read(tmp_path: Path) -> None:
    file = tmp_path / "huge.toml"
    with file.open("wb") as out:
        out.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(DataFileError, match="not be larger than 4194304 bytes"):
        load_device(file)


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    for path in ("none.toml", "", "pipe.toml", "a\0b.toml", "n" * 300 + ".toml"):
        with pytest.raises(DataFileError, match="device file must"):
            load_device(tmp_path / path)


def fact(value: object) -> dict[str, object]:
    return {"value": value, "kind": "assumed", "source": "test"}


def edited(path: str, value: object) -> dict[str, Any]:
    """The 910b2 table with one entry replaced (None: removed)."""
    device = table("devices", "910b2")
    *heads, last = path.split(".")
    inner = device
    for head in heads:
        inner = inner[head]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return device


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("hbm_gb", 64, "unknown key .*hbm_gb.*did you mean hbm_gib"),
        ("hbm_gib", None, "lacks a key .*hbm_gib"),
        ("hbm_gib", 64, "needs its kind and source"),
        ("hbm_gib.source", None, "lacks a key .*hbm_gib: source"),
        ("hbm_gib.source", "  ", r"not blank.*hbm_gib\.source"),
        ("hbm_gib.kind", "guess", "one of datasheet, measured, derived, assumed"),
        ("hbm_gib.unit", "GiB", "unknown key .*hbm_gib: unit"),
        ("hbm_gib.value", -64, "between 0.125 and"),
        ("hbm_gib.value", 0, "between 0.125 and"),
        ("hbm_gib.value", float("nan"), "between"),
        ("hbm_gib.value", float("inf"), "between"),
        ("hbm_gib.value", 10**400, "between"),
        ("hbm_gib.value", "64", "a number is needed"),
        ("hbm_gib.value", True, "a number is needed"),
        ("cube_cores.value", 24.0, "a whole number is needed"),
        ("weight_dtypes.value", ["bf16", "fp9"], "one of fp32, fp16"),
        ("weight_dtypes.value", [], "not empty"),
        ("weight_dtypes.value", ["bf16", "bf16"], "not repeat"),
        ("weight_dtypes.value", ["fp8"], "needs a matrix rate.*add fp8_tflop_per_s"),
        ("vendor", "amd", "one of ascend, nvidia"),
        ("name", 3, "not blank.*name"),
        ("title", "two\nlines", "one line.*title"),
        ("hbm\ngib", fact(64), "unknown key"),
    ],
)
def test_a_device_that_breaks_a_rule_is_refused(path: str, value: object, said: str) -> None:
    with pytest.raises(DataFileError, match=said) as caught:
        device_from_table(edited(path, value), "x.toml")
    assert "x.toml" in str(caught.value)


LIKE = {"name": "mine", "title": "My own", "like": "910b2"}


def test_a_device_like_another_takes_what_it_does_not_state(tmp_path: Path) -> None:
    """From a shipped one in any case, or from a file beside it; with the sources of each."""
    clock = {"value": 1500, "kind": "measured", "source": "our own machine"}
    base = load_device("910b2")
    own = device_from_table({**LIKE, "like": "910B2", "clock_mhz": clock}, "x.toml")
    assert (own.name, own.clock_hz, own.facts["clock_hz"].source) == (
        "mine",
        1.5e9,
        "our own machine",
    )
    assert own.hbm_bytes == base.hbm_bytes
    assert own.facts["hbm_bytes"] == base.facts["hbm_bytes"]
    assert own.soc_versions == base.soc_versions
    beside = tmp_path / "full.toml"
    beside.write_text((DATA / "devices" / "910b4.toml").read_text(encoding="utf-8"), "utf-8")
    file = tmp_path / "own.toml"
    file.write_text('name = "own"\ntitle = "Own"\nlike = "full.toml"\n', encoding="utf-8")
    assert load_device(file).hbm_bytes == load_device("910b4").hbm_bytes
    cluster = cluster_from_table(
        {**table("clusters", "atlas-800t-a2"), "device": {**LIKE, "like": "full.toml"}},
        "x.toml",
        folder=tmp_path,
    )[0]
    assert cluster.device.hbm_bytes == load_device("910b4").hbm_bytes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"like": "910b9"}, "unknown device.*did you mean 910b"),
        ({"like": 7}, "like"),
        ({"like": "nowhere.toml"}, "nowhere.toml"),
        ({"like": "itself.toml"}, "states every fact itself.*itself.toml"),
        ({"name": None}, "lacks a key.*name"),
        ({"hbm_gb": {"value": 1}}, "unknown key.*hbm_gb.*did you mean hbm_gib"),
        ({"clock_mhz": {"value": 1500, "kind": "measured"}}, "clock_mhz.*source"),
    ],
)
def test_a_device_like_another_keeps_the_rules(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    """Its own facts have sources, and what it is like is a device in full."""
    text = 'name = "x"\ntitle = "X"\nlike = "910b2"\n'
    (tmp_path / "itself.toml").write_text(text, encoding="utf-8")
    wrong = {key: value for key, value in {**LIKE, **change}.items() if value is not None}
    with pytest.raises(InputError, match=said):
        device_from_table(wrong, "x.toml", folder=tmp_path)


@pytest.mark.parametrize(
    ("tier", "key", "value", "said"),
    [
        (0, "ranks", fact(3), "exactly the ranks of a node|whole number of the tiers"),
        (0, "ranks", "all", "needs its kind and source"),
        (1, "ranks", fact(12), "whole number of the tiers inside it"),
        (1, "ranks", fact(16), "must join all ranks"),
        (1, "name", "mesh", "names must differ"),
        (0, "topology", "torus", "one of pair, mesh"),
        (0, "link_gb_per_s", fact(500), "must not exceed `gb_per_s`"),
        (0, "speed", fact(1), "unknown key"),
    ],
)
def test_a_tier_that_breaks_a_rule_is_refused(
    tier: int, key: str, value: object, said: str
) -> None:
    cluster = table("clusters", "atlas-800t-a2")
    cluster["tiers"][tier][key] = value
    with pytest.raises(DataFileError, match=said):
        cluster_from_table(cluster, "x.toml")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("nodes", fact(999), "must not exceed `max_nodes`"),
        ("rank_counts", fact([1, 2]), "must be `ranks_per_node`"),
        ("rank_counts", fact([0, 8]), "between 1 and"),
        ("tiers", fact(1), "list of tables"),
        ("tiers", [3], "a table is needed"),
        ("device", 7, "not blank.*device"),
        ("device", {"name": "x"}, "lacks a key"),
    ],
)
def test_a_cluster_that_breaks_a_rule_is_refused(key: str, value: object, said: str) -> None:
    cluster = {**table("clusters", "atlas-800t-a2"), key: value}
    with pytest.raises(DataFileError, match=said):
        cluster_from_table(cluster, "x.toml")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


def result_or_refusal(load: Callable[[], object]) -> object:
    """What `load` gives, or the text of its refusal; any other exception is a bug and passes."""
    try:
        return load()
    except InputError as error:
        return str(error)


def is_one_line(outcome: object) -> bool:
    return isinstance(outcome, str) and outcome.isprintable()


def mutated(start: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """A copy of a valid table with an entry at some depth replaced, removed or added."""
    out = copy.deepcopy(start)
    inner: Any = out
    while True:
        keys = sorted(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(inner[key], dict | list) and inner[key] and data.draw(st.booleans()):
            inner = inner[key]
            continue
        if data.draw(st.booleans()):
            inner[key] = data.draw(JUNK)
        elif isinstance(inner, dict) and data.draw(st.booleans()):
            inner[data.draw(st.text(max_size=6))] = data.draw(JUNK)
        else:
            del inner[key]
        return out


@given(data=st.data())
def test_any_mutation_of_a_device_loads_or_is_refused_in_one_line(data: st.DataObject) -> None:
    device = mutated(table("devices", "910b2"), data)
    outcome = result_or_refusal(lambda: device_from_table(device, "fuzz.toml"))
    assert isinstance(outcome, Device) or is_one_line(outcome)


@given(data=st.data())
def test_any_mutation_of_a_cluster_loads_or_is_refused_in_one_line(data: st.DataObject) -> None:
    cluster = mutated(table("clusters", "cloudmatrix-384"), data)
    outcome = result_or_refusal(lambda: cluster_from_table(cluster, "fuzz.toml"))
    assert isinstance(outcome, tuple) or is_one_line(outcome)
    if isinstance(outcome, tuple):
        loaded, nodes = outcome
        assert 1 <= nodes <= loaded.max_nodes
        assert loaded.ranks == loaded.tiers[-1].ranks
