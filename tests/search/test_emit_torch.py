"""Target `torch`: the plan file runs on a small model and makes the collectives that we predict."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.search.emit_cases import emit_plan, moe, tiny_llama

from shardplan.models.accounting import predict_communication
from shardplan.models.errors import InputError
from shardplan.search.emit import emit
from shardplan.search.emit.weights import applied

HAS_TORCH = importlib.util.find_spec("torch") is not None
RUN = Path(__file__).parent / "torch_run.py"


def _counts(plan: Any, tokens: int) -> dict[str, int]:
    """Collectives of one prompt as the graph has them."""
    found: dict[str, int] = {}
    for one in predict_communication(applied(plan, "torch"), plan.strategy.dp, tokens, tokens):
        found[one.kind] = found.get(one.kind, 0) + 1
    return found


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
@pytest.mark.parametrize(
    ("way", "tied"),
    [
        ({"tp": 4}, False),
        ({"tp": 4, "sp": True}, False),
        ({"tp": 2, "dp": 2}, True),
        ({"tp": 1, "dp": 4}, True),
    ],
)
def test_the_file_makes_the_predicted_collectives(
    tmp_path: Path, way: dict[str, Any], tied: bool
) -> None:
    """On a fake process group of the plan's size, with DTensor's own count."""
    plan = emit_plan(model=tiny_llama(tmp_path, tie_word_embeddings=tied), **way)
    emit(plan, "torch", tmp_path / "out")
    done = subprocess.run(
        [sys.executable, str(RUN), str(tmp_path / "out"), str(plan.strategy.ranks)]
        + ["tied"] * tied,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counted = dict(line.split() for line in done.stdout.splitlines() if line)
    held = int(counted.pop("parameters"))
    assert float(counted.pop("error", "0")) < 1e-5
    assert {name: int(count) for name, count in counted.items()} == _counts(plan, 16)
    graph = applied(plan, "torch")
    norms = (2 * graph.model.spec.layers + 1) * graph.model.spec.hidden
    assert held == (graph.model.parameters() - norms) // way["tp"] + norms


@pytest.mark.parametrize(
    ("changes", "rule", "hint"),
    [
        ({"tp": 4, "pp": 2}, "one stage", "pp=1, for example tp=8"),
        ({"cp": 2}, "no parallel style splits contexts", "cp=1"),
        ({"tp": 16}, "whole kv heads", "try tp=1 or 2 or 4 or 8"),
        ({"tp": 4, "model": moe()}, "experts are no linear modules", "jax"),
        ({"tp": 8, "head_tp": 1}, "all modules over the same ranks", "head_tp=0"),
    ],
)
def test_what_no_style_does_is_refused(
    tmp_path: Path, changes: dict[str, Any], rule: str, hint: str
) -> None:
    """With the reason and the nearest plan, and nothing written."""
    with pytest.raises(InputError) as caught:
        emit(emit_plan(**changes), "torch", tmp_path / "out")
    assert rule in str(caught.value)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_the_mesh_follows_the_plans_rank_order(tmp_path: Path) -> None:
    """tp>dp numbers ranks the other way round."""
    plan = emit_plan(tp=4, dp=2, order=("pp", "tp", "cp", "dp"))
    emit(plan, "torch", tmp_path)
    text = (tmp_path / "parallel_plan.py").read_text(encoding="utf-8")
    assert '(device_type, (4, 2), mesh_dim_names=("tp", "dp"))' in text
