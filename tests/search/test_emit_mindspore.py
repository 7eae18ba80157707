"""Target `mindspore`: the file that we write says of each weight what the graph says."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.search.emit_cases import emit_plan, moe, tiny_llama

from shardplan.models.errors import InputError
from shardplan.models.weights import place
from shardplan.search.emit import emit
from shardplan.search.emit.strategy_proto import ParameterLayout, decode, encode
from shardplan.search.emit.weights import applied, rank_grid, weights
from shardplan.search.plan import Plan

HAS_MINDSPORE = importlib.util.find_spec("mindspore") is not None
RUN = Path(__file__).parent / "mindspore_run.py"
SPLITS: list[dict[str, Any]] = [
    {"tp": 4},
    {"tp": 8},
    {"tp": 2, "dp": 2},
    {"tp": 2, "dp": 2, "order": ("pp", "tp", "cp", "dp")},
    {"tp": 2, "pp": 2},
]


def slice_of(whole: np.ndarray[Any, Any], layout: ParameterLayout, rank: int) -> Any:
    """A rank's part by MindSpore's rule: mesh dims counted from the right, -1 for whole."""
    at = np.unravel_index(rank % math.prod(layout.mesh), layout.mesh)
    for dim, axis in enumerate(layout.cut):
        if axis >= 0:
            place = len(layout.mesh) - 1 - axis
            whole = np.split(whole, layout.mesh[place], axis=dim)[int(at[place])]
    return whole


layouts = st.builds(
    ParameterLayout,
    name=st.text(max_size=200),
    mesh=st.lists(st.integers(1, 2**20), max_size=5).map(tuple),
    cut=st.lists(st.integers(-1, 5), max_size=5).map(tuple),
)


@given(st.lists(layouts, max_size=5), st.integers(0, 300))
def test_what_is_written_is_read_back(found: list[ParameterLayout], stage: int) -> None:
    """Any layout, any length of number."""
    assert decode(encode(found, stage=stage)) == (stage, found)


@given(st.binary(max_size=60))
def test_broken_files_are_one_clear_error(data: bytes) -> None:
    """Random bytes are read or refused."""
    with contextlib.suppress(InputError):
        decode(data)


def test_the_bytes_are_those_of_protobuf() -> None:
    """Worked by hand: field 1 = 0; field 3 of 27 bytes: the name, then the layout."""
    data = encode([ParameterLayout(name="w", mesh=(4,), cut=(0, -1))])
    layout = b"\x0a\x02\x08\x04" + b"\x12\x0d\x08\x00\x08" + b"\xff" * 9 + b"\x01"
    layout += b"\x1a\x00" + b"\x28\x00\x30\x00\x38\x00"
    item = b"\x0a\x01w" + b"\x12" + bytes([len(layout)]) + layout
    assert data == b"\x08\x00" + b"\x1a" + bytes([len(item)]) + item


def _read(folder: Path) -> dict[str, ParameterLayout]:
    stage, found = decode((folder / "strategy.ckpt").read_bytes())
    assert stage == 0
    return {one.name: one for one in found}


@pytest.mark.parametrize("way", SPLITS[:4])
def test_a_rank_gets_the_graphs_slice(tmp_path: Path, way: dict[str, Any]) -> None:
    """MindSpore's rule on our file gives what `place` gives the same rank, for every weight."""
    plan = emit_plan(model=tiny_llama(tmp_path), **way)
    emit(plan, "mindspore", tmp_path / "out")
    graph, found = applied(plan, "test"), _read(tmp_path / "out")
    axes, sizes = rank_grid(graph)
    for one in weights(graph, "test"):
        whole = np.arange(math.prod(one.shape), dtype=np.float64).reshape(one.shape)
        dims = tuple(f"d{i}" for i in range(whole.ndim))
        cut = tuple((a, dims[i]) for i, names in enumerate(one.cut) for a in names)
        cut = tuple(sorted(cut, key=lambda pair: graph.mesh.axes.index(pair[0])))
        parts = place(whole, dims, cut, graph.mesh)
        for rank in range(graph.mesh.ranks):
            here = dict(zip(axes, np.unravel_index(rank, sizes), strict=True))
            mine = parts[tuple(here[axis] for axis in graph.mesh.axes)]
            assert np.array_equal(slice_of(whole, found[one.name], rank), mine), one.name


def test_stages_hold_their_own_layers(tmp_path: Path) -> None:
    """Names begin with the stage; the embedding is on the first, the head on the last."""
    plan = emit_plan(model=tiny_llama(tmp_path), tp=2, pp=2)
    emit(plan, "mindspore", tmp_path / "out")
    names = set(_read(tmp_path / "out"))
    assert "0-model.embed_tokens.weight" in names
    assert "1-lm_head.weight" in names
    assert "0-model.layers.1.mlp.up_proj.weight" in names
    assert "1-model.layers.2.mlp.up_proj.weight" in names
    assert "0-model.layers.2.mlp.up_proj.weight" not in names


def test_experts_are_cut_along_their_stack(tmp_path: Path) -> None:
    """ep 8 over dp 2 and tp 4: one mesh dim of 8 cuts the experts."""
    model = moe(name="mixtral-8x7b", architecture="MixtralForCausalLM", layers=32)
    emit(emit_plan(model=model, tp=4, dp=2, ep=8), "mindspore", tmp_path)
    found = _read(tmp_path)
    one = found["model.layers.0.block_sparse_moe.experts.w1.weight"]
    assert (one.mesh, one.cut) == ((8,), (0, -1, -1))
    assert found["model.layers.0.self_attn.q_proj.weight"].mesh == (2, 4)


@pytest.mark.parametrize(
    ("changes", "rule", "hint"),
    [
        ({"tp": 2, "pp": 2, "order": ("dp", "pp", "cp", "tp")}, "stage by stage", "pp>dp>cp>tp"),
        ({"tp": 3}, "num_attention_heads", "try 1, 2, 4"),
    ],
)
def test_what_the_file_cannot_say_is_refused(
    tmp_path: Path, changes: dict[str, Any], rule: str, hint: str
) -> None:
    """With the reason and the nearest plan, and nothing written."""
    with pytest.raises(InputError) as caught:
        emit(emit_plan(**changes), "mindspore", tmp_path / "out")
    assert rule in str(caught.value)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MINDSPORE, reason="needs mindspore")
@pytest.mark.parametrize("way", SPLITS)
def test_mindspore_slices_as_the_file_says(tmp_path: Path, way: dict[str, Any]) -> None:
    """Its own `transform_checkpoint_by_rank`, through the emitted script."""
    plan: Plan = emit_plan(model=tiny_llama(tmp_path), **way)
    emit(plan, "mindspore", tmp_path / "out")
    graph = applied(plan, "test")
    shapes = {one.name: one.shape for one in weights(graph, "test")}
    (tmp_path / "shapes.json").write_text(json.dumps(shapes), encoding="utf-8")
    subprocess.run(
        [sys.executable, str(RUN), str(tmp_path)], check=True, capture_output=True, timeout=600
    )
    found, per_stage = _read(tmp_path / "out"), plan.strategy.ranks // plan.strategy.pp
    for rank in range(plan.strategy.ranks):
        parts = np.load(tmp_path / f"rank{rank}.npz")
        mark = f"{rank // per_stage}-" if plan.strategy.pp > 1 else ""
        mine = {name for name in shapes if mark + name in found}
        assert set(parts.files) == mine
        for name in mine:
            whole = np.arange(math.prod(shapes[name]), dtype=np.float32).reshape(shapes[name])
            assert np.array_equal(parts[name], slice_of(whole, found[mark + name], rank)), name
