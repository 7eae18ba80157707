"""Level 3: the modules of ranks on real gloo processes, and PyTorch's own pipeline runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardplan.models.catalog import load_model
from shardplan.models.errors import InputError
from shardplan.models.parallel import Parallelism
from shardplan.models.shrink import shrink

pytest.importorskip("torch")
pytest.importorskip("transformers")

from shardplan.models.fx.processes import prove_processes

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("llama-2-13b", {"tp": 2, "sp": True}),
        ("mixtral-8x7b", {"tp": 2, "pp": 2, "ep": 2, "exchange": "alltoall"}),
    ],
)
def test_processes_give_what_the_unsplit_model_gives(model: str, sizes: dict[str, Any]) -> None:
    (check,) = prove_processes(shrink(load_model(model), Parallelism(**sizes)))
    assert check.passed, check.detail


def test_more_processes_than_a_machine_should_start_are_refused() -> None:
    with pytest.raises(InputError, match="--level 2"):
        prove_processes(shrink(load_model("llama-2-13b"), Parallelism(tp=8, pp=2)))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["pipelining_worker.py", "dtensor_worker.py"])
def test_pytorchs_own_runtimes_agree(script: str, tmp_path: Path) -> None:
    """Each script asserts in processes of its own: process groups are global to one."""
    source = Path(__file__).parents[3] / "src"
    run = subprocess.run(
        [sys.executable, str(HERE / script), str(tmp_path)],
        env={"PYTHONPATH": str(source), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "agrees" in run.stdout
