"""Emitting: targets are found by name, and a folder gets all of a target's files or none."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
from tests.search.emit_cases import emit_plan, tiny_llama

from shardplan.models.errors import InputError, UnknownNameError
from shardplan.search import targets as module
from shardplan.search.emit import emit
from shardplan.search.emit.common import table
from shardplan.search.plan import Plan
from shardplan.search.targets import BUILT_IN, GROUP, OF_GRAPHS, target_names

ROOT = Path(__file__).resolve().parents[2]


def _register(monkeypatch: pytest.MonkeyPatch, value: str, name: str = "toy") -> None:
    found = EntryPoints([EntryPoint(name=name, value=value, group=GROUP)])
    monkeypatch.setattr(module, "entry_points", lambda group: found.select(group=group))


def test_files_are_written_sorted_and_scripts_can_be_run(tmp_path: Path) -> None:
    """The plan's own method does the same as the function."""
    paths = emit_plan().emit("atc", tmp_path / "new" / "folder", cann=7)
    assert paths == sorted(paths)
    assert {path.name for path in paths} == set(os.listdir(tmp_path / "new" / "folder"))
    for path in paths:
        assert os.access(path, os.X_OK) is (path.suffix == ".sh"), path.name


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    """Nothing of the day, the machine or the folder gets into the files."""
    for target in BUILT_IN:
        first, second = (
            {path.name: path.read_bytes() for path in emit(emit_plan(), target, tmp_path / name)}
            for name in (f"{target}-1", f"{target}-2")
        )
        assert first == second


def test_a_folder_in_use_is_kept_unless_forced(tmp_path: Path) -> None:
    """Without force nothing in it changes; with force other files stay."""
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(InputError, match=r"must be empty.*force"):
        emit(emit_plan(), "atc", tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]
    emit(emit_plan(), "atc", tmp_path, force=True)
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "keep"
    assert (tmp_path / "atc.sh").is_file()


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """A folder stands where a later file should go: the earlier files are taken back."""
    (tmp_path / "parallel_option.json").mkdir()
    (tmp_path / "parallel_option.json" / "inner").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be written"):
        emit(emit_plan(), "atc", tmp_path, force=True)
    assert os.listdir(tmp_path) == ["parallel_option.json"]


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_in_the_way_is_an_error(tmp_path: Path, inside: bool) -> None:
    """The output is no folder, or lies below something that is none."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    out = tmp_path / "file" / "deeper" if inside else tmp_path / "file"
    with pytest.raises(InputError):
        emit(emit_plan(), "atc", out)


def test_a_null_byte_in_the_folder_is_an_error() -> None:
    """Python raises ValueError for it, which a user must not see."""
    with pytest.raises(InputError, match="folder"):
        emit(emit_plan(), "atc", Path("a\0b"))


def test_unknown_targets_and_options_name_what_there_is(tmp_path: Path) -> None:
    """Close names are proposed, options are listed."""
    with pytest.raises(UnknownNameError, match="did you mean vllm-ascend"):
        emit(emit_plan(), "vllm_ascend", tmp_path)
    with pytest.raises(
        InputError, match=r"no such option \(can\); options: door, cann, soc_version"
    ):
        emit(emit_plan(), "atc", tmp_path, can=8)
    with pytest.raises(InputError, match="options: none"):
        emit(emit_plan(), "sglang", tmp_path, cann=8)


def test_another_package_can_add_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found through the entry-point group, with its own options."""
    _register(monkeypatch, "tests.search.emit_cases:toy_target")
    assert target_names() == tuple(sorted({*BUILT_IN, *OF_GRAPHS, "toy"}))
    blob, script, text = emit(emit_plan(tp=4), "toy", tmp_path, greeting="good-day")
    assert blob == tmp_path / "parts" / "ranks.bin"
    assert blob.read_bytes() == bytes(range(4))
    assert "echo good-day" in script.read_text(encoding="utf-8")
    assert text.read_text(encoding="utf-8") == "4\n"


def test_a_built_in_name_cannot_be_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that registers `atc` changes nothing."""
    _register(monkeypatch, "tests.search.emit_cases:toy_target", name="atc")
    assert target_names() == tuple(sorted({*BUILT_IN, *OF_GRAPHS}))


def test_a_target_that_does_not_load_is_told_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken package is no traceback."""
    _register(monkeypatch, "no.such.module:target")
    with pytest.raises(InputError, match="toy: ModuleNotFoundError"):
        emit(emit_plan(), "toy", tmp_path)


@pytest.mark.parametrize(
    "name", ["../up.sh", "/etc/x", "a/../b", "a/b/c", "a/", ".hidden", "", "a\nb"]
)
def test_no_file_leaves_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever a third party's target calls its files."""
    monkeypatch.setattr("tests.search.emit_cases.toy_target", lambda plan: {name: "text"})
    _register(monkeypatch, "tests.search.emit_cases:toy_target")
    with pytest.raises(InputError, match="plain file name"):
        emit(emit_plan(), "toy", tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("target", sorted(BUILT_IN))
def test_a_hostile_name_stays_text_in_every_target(tmp_path: Path, target: str) -> None:
    """Scripts and modules parse, and nothing of the name can run in them."""
    name = '../x"""\nimport pwned\n\'"`touch pwned`$(touch pwned); touch pwned #'
    plan = emit_plan(model={**tiny_llama(tmp_path), "name": name}, tp=2)
    for path in emit(plan, target, tmp_path / "out"):
        assert path.parent == tmp_path / "out"
        if path.suffix == ".py":
            found = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            imports = [node for node in found if isinstance(node, ast.Import)]
            assert "pwned" not in {alias.name for node in imports for alias in node.names}
        if path.suffix == ".sh":
            subprocess.run(["bash", "-n", str(path)], check=True)
        if path.suffix in (".sh", ".md"):
            text = path.read_text(encoding="utf-8")
            assert "`touch" not in text
            assert "$(touch" not in text


@pytest.mark.parametrize("target", ["k8s", "mindie", "ray", "sglang", "vllm-ascend"])
@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("cluster", {"hbm_bytes": 1e-300}),
        ("cluster", {"hbm_bytes": float("nan")}),
        ("performance", {"output_tokens_per_s": 0.0}),
        ("memory", {"capacity_bytes": float("inf")}),
        ("memory", {"activations_bytes": float("nan")}),
        ("strategy", {"order": ("tp", "tp", "pp")}),
    ],
)
def test_numbers_that_no_search_gives_are_refused(
    tmp_path: Path, target: str, part: str, change: dict[str, Any]
) -> None:
    """Of a plan.json written by hand: one clear line, nothing half-written."""
    plan = emit_plan()
    found = getattr(plan, part)
    made = (
        tuple(row.model_copy(update=change) for row in found)
        if part == "memory"
        else found.model_copy(update=change)
    )
    with pytest.raises(InputError):
        emit(plan.model_copy(update={part: made}), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "sizes", [{"tp": 0}, {"dp": -1}, {"batch": 0}, {"dp": 10**9}, {"pp": 2, "stage_layers": (80,)}]
)
@pytest.mark.parametrize("target", sorted(BUILT_IN))
def test_a_plan_with_impossible_sizes_is_refused(
    tmp_path: Path, target: str, sizes: dict[str, Any]
) -> None:
    """A plan.json edited by hand ends in one clear line."""
    data = json.loads(emit_plan().dumps())
    data["strategy"].update(sizes)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError):
        emit(Plan.load(file), target, tmp_path / "out")


def test_the_installed_package_registers_the_built_in_targets() -> None:
    """So that other tools which read the group see ours too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"][GROUP] == {**BUILT_IN, **OF_GRAPHS}


def _facts(value: object, where: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Tables of a data file that hold something besides other tables."""
    if isinstance(value, dict):
        if any(not isinstance(item, dict | list) for item in value.values()):
            yield where, value
        for key, item in value.items():
            yield from _facts(item, f"{where}.{key}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _facts(item, f"{where}[{index}]")


@pytest.mark.parametrize(
    "name",
    [
        "ascend_families",
        "atc",
        "containers",
        "hf_names",
        "megatron",
        "modelslim",
        "ray",
        "sglang",
        "sglang_flags",
        "vllm_ascend",
        "vllm_flags",
    ],
)
def test_every_fact_has_a_source_and_every_number_a_kind(name: str) -> None:
    """In the tables that the targets are written from."""
    kinds = {"datasheet", "measured", "derived", "assumed"}
    seen = 0
    for where, facts in _facts(dict(table(name)), name):
        prefix = "" if "source" in facts else "families_"
        assert str(facts[f"{prefix}source"]).strip(), where
        numbers = [key for key, item in facts.items() if isinstance(item, int | float)]
        if numbers:
            assert facts[f"{prefix}kind"] in kinds, where
        seen += 1
    assert seen > 1
