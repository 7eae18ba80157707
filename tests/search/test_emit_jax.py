"""Target `jax`: the specs cut weights as the graph does, and XLA inserts the plan's collectives."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.search.emit_cases import emit_plan, moe, tiny_llama

from shardplan.models.errors import InputError
from shardplan.search.emit import emit

HAS_JAX = importlib.util.find_spec("jax") is not None
RUN = Path(__file__).parent / "jax_run.py"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_JAX, reason="needs jax")
@pytest.mark.parametrize(
    ("way", "sums"),
    [({"tp": 8, "dp": 1}, 8), ({"tp": 4, "dp": 2}, 8), ({"tp": 1, "dp": 8}, 0)],
)
def test_xla_makes_the_plans_collectives(tmp_path: Path, way: dict[str, Any], sums: int) -> None:
    """8 virtual devices, 4 layers: two sums a layer, as the graph has them; the numbers agree."""
    plan = emit_plan(model=tiny_llama(tmp_path), **way)
    emit(plan, "jax", tmp_path / "out")
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, str(RUN), str(tmp_path / "out")],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {name: float(value) for name, value in map(str.split, done.stdout.splitlines())}
    assert found["error"] < 1e-4
    assert found["layer_all_reduce"] == sums


def test_weights_are_cut_as_the_graph_says(tmp_path: Path) -> None:
    """Queries over tp0 and tp1, keys over tp0, experts over dp1 and tp0."""
    emit(emit_plan(model={"name": "llama-3.1-8b"}, tp=16), "jax", tmp_path / "a")
    text = (tmp_path / "a" / "partition_specs.py").read_text(encoding="utf-8")
    assert '"self_attn.q_proj.weight": P(("tp0", "tp1")),' in text
    assert '"self_attn.k_proj.weight": P("tp0"),' in text
    assert '"self_attn.o_proj.weight": P(None, ("tp0", "tp1")),' in text
    emit(emit_plan(model=moe(), tp=4, dp=2, ep=8), "jax", tmp_path / "b")
    text = (tmp_path / "b" / "partition_specs.py").read_text(encoding="utf-8")
    assert '"mlp.experts.gate_proj.weight": P(("dp1", "tp0")),' in text
    compile(text, "partition_specs.py", "exec")


def test_devices_follow_the_plans_rank_order(tmp_path: Path) -> None:
    """tp>dp: ranks of one dp group are dp apart."""
    emit(emit_plan(tp=4, dp=2, order=("pp", "tp", "cp", "dp")), "jax", tmp_path)
    text = (tmp_path / "partition_specs.py").read_text(encoding="utf-8")
    assert "ranks.reshape((4, 2)).transpose((1, 0)), AXES" in text
    assert 'AXES = ("dp0", "tp0",)' in text


@pytest.mark.parametrize(
    ("changes", "rule", "hint"),
    [
        ({"tp": 4, "pp": 2}, "one stage", "pp=1, for example tp=8"),
        ({"tp": 16, "pp": 2}, "one stage", "pp=1"),
    ],
)
def test_stages_are_refused(tmp_path: Path, changes: dict[str, Any], rule: str, hint: str) -> None:
    """With the nearest plan, and nothing written."""
    with pytest.raises(InputError) as caught:
        emit(emit_plan(**changes), "jax", tmp_path / "out")
    assert rule in str(caught.value)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()
