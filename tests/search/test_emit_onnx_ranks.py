"""Target `onnx`: models of the ranks compute what the file computes, with the plan's own moves."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.search.onnx_files import ROWS, WIDTH, mlp

from shardplan.models.errors import InputError
from shardplan.search.ask import search
from shardplan.search.emit import emit
from shardplan.search.oplevel.ask import OperatorResult
from shardplan.search.oplevel.plan import OperatorPlan
from shardplan.search.targets import OF_GRAPHS

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
CLUSTER = "atlas-800t-a2"
TIGHT = 0.9 * 2**20
"""Bytes that two thirds of the weights fit in."""


def plan_of(path: Path, mesh: tuple[int, ...] = (4,), **more: Any) -> OperatorPlan:
    """Of a file, in little memory."""
    asked = {"memory_bytes": TIGHT, "operators": True, **more}
    found = search(path, CLUSTER, mesh=mesh, **asked)
    assert isinstance(found, OperatorResult)
    return found.plan


def runs_alike(path: Path, folder: Path, feed: dict[str, Any]) -> float:
    """Largest error of any output of any rank, relative to its largest number."""
    from tests.models.onnxout.lockstep import run_ranks, run_whole

    whole, error = run_whole(path, feed), 0.0
    for values in run_ranks(folder, feed):
        for name, value in values.items():
            known = whole[name].astype(np.float64)
            error = max(error, float(np.abs(value - known).max() / np.abs(known).max()))
    return error


@pytest.mark.parametrize("mesh", [(2,), (4,), (2, 2)])
def test_the_ranks_compute_what_the_file_computes(mesh: tuple[int, ...], tmp_path: Path) -> None:
    """In float16, by onnxruntime; collectives are the plan's."""
    path = mlp(tmp_path / "mlp.onnx")
    plan = plan_of(path, mesh)
    paths = plan.emit("onnx", tmp_path / "ranks")
    names = {one.name for one in paths}
    ranks = int(np.prod(mesh))
    assert {"README.md", "annotated.onnx", "ranks.json", f"rank{ranks - 1:04d}.onnx"} <= names
    rng = np.random.default_rng(1)
    feed = {"x": rng.standard_normal((ROWS, WIDTH)).astype(np.float16)}
    assert runs_alike(path, tmp_path / "ranks", feed) < 5e-3
    said = Counter({row.kind: row.times for row in plan.moves})
    text = (tmp_path / "ranks" / "README.md").read_text(encoding="utf-8")
    for kind, count in said.items():
        assert f"{count} {kind}" in text
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stages"), [("encoder", 1), ("decoder", 2), ("decoder", 1)])
def test_exported_models_in_stages(name: str, stages: int, tmp_path: Path) -> None:
    """Attention written out, layers over stages; float32."""
    pytest.importorskip("torch")
    from tests.models.frontends import onnx_cases

    path = getattr(onnx_cases, name)(tmp_path / f"{name}.onnx")
    free = plan_of(path, (2,), weight_dtype="bf16", memory_bytes=None, stages=stages)
    held = free.stages[0].total_bytes * 0.7
    plan = plan_of(path, (2,), weight_dtype="bf16", memory_bytes=held, stages=stages)
    assert plan.moves
    plan.emit("onnx", tmp_path / "ranks")
    model = onnx.load(path)
    rng = np.random.default_rng(2)
    feed = {
        one.name: rng.integers(0, 8, [dim.dim_value for dim in one.type.tensor_type.shape.dim])
        for one in model.graph.input
    }
    assert runs_alike(path, tmp_path / "ranks", feed) < 1e-5
    told = json.loads((tmp_path / "ranks" / "ranks.json").read_text(encoding="utf-8"))
    assert told["stages"] == stages


@pytest.mark.slow
def test_the_plan_of_a_decoder_is_written_for_one_replica(tmp_path: Path) -> None:
    """tp and pp of a deployment; what else it splits is refused."""
    pytest.importorskip("torch")
    from tests.models.frontends.onnx_cases import decoder

    path = decoder(tmp_path / "decoder.onnx")
    plan = search(str(path), CLUSTER, cards=1).plan
    emit(plan, "onnx", tmp_path / "one")
    strategy = plan.strategy.model_copy(update={"tp": 2, "pp": 2, "stage_layers": (1, 1)})
    plan.model_copy(update={"strategy": strategy}).emit("onnx", tmp_path / "four")
    ids = {"ids": np.arange(16).reshape(2, 8) % 8}
    names = [one.name for one in onnx.load(path).graph.input]
    feed = dict(zip(names, ids.values(), strict=True))
    assert runs_alike(path, tmp_path / "four", feed) < 1e-5
    wide = plan.strategy.model_copy(update={"dp": 2})
    with pytest.raises(InputError, match=r"one replica.*dp=2"):
        plan.model_copy(update={"strategy": wide}).emit("onnx", tmp_path / "none")


def test_nothing_is_left_of_what_fails(tmp_path: Path) -> None:
    """Another model, missing weights, other shapes, a folder in use: one error, nothing written."""
    path = mlp(tmp_path / "mlp.onnx")
    plan = plan_of(path)
    out = tmp_path / "ranks"
    other = mlp(tmp_path / "other.onnx", ffn=2048)
    with pytest.raises(InputError, match="the graph that it was made of"):
        plan.emit("onnx", out, model=str(other))
    with pytest.raises(InputError, match="ONNX file"):
        plan.emit("onnx", out, model="mlp.pt2")
    with pytest.raises(InputError, match="no such file"):
        plan.emit("onnx", out, model=str(tmp_path / "none.onnx"))
    with pytest.raises(InputError, match="no such option"):
        plan.emit("onnx", out, staging=str(tmp_path))
    with pytest.raises(InputError, match="yes or no"):
        plan.emit("onnx", out, annotated="maybe")
    with pytest.raises(InputError, match="NAME=N"):
        plan.emit("onnx", out, sizes="rows")
    path.unlink()
    mlp(path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").write_bytes(b"short")
    with pytest.raises(InputError, match="external data ends before"):
        plan.emit("onnx", out)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["mlp.onnx", "other.onnx", "w.bin"]


def test_weights_outside_of_the_file_are_cut_where_they_lie(tmp_path: Path) -> None:
    """The whole model is then not written a second time."""
    path = mlp(
        tmp_path / "mlp.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    names = {one.name for one in plan_of(path).emit("onnx", tmp_path / "ranks")}
    assert "annotated.onnx" not in names
    feed = {"x": np.ones((ROWS, WIDTH), np.float16)}
    assert runs_alike(path, tmp_path / "ranks", feed) < 5e-3


def test_pinned_ends_are_refused(tmp_path: Path) -> None:
    """Models of ranks take whole inputs."""
    plan = plan_of(mlp(tmp_path / "mlp.onnx"), pins={"x": {"x": 0}}, memory_bytes=None)
    with pytest.raises(InputError, match="inputs come whole"):
        plan.emit("onnx", tmp_path / "ranks")


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the folder."""
    plan = plan_of(mlp(tmp_path / "mlp.onnx"))
    first, second = (
        {one.name: one.read_bytes() for one in plan.emit("onnx", tmp_path / name)}
        for name in ("one", "two")
    )
    assert first == second
    assert set(OF_GRAPHS) == {"onnx"}
