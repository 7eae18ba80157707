"""Target `megatron`: the arguments say what the plan says, in Megatron's own terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.search.emit_cases import emit_plan, moe, parser_of, run_script

from shardplan.models.errors import InputError
from shardplan.search.emit import emit

MOE = {"model": moe()}


def _started(folder: Path, **changes: Any) -> dict[str, Any]:
    """What the script would start torchrun with."""
    emit(emit_plan(**changes), "megatron", folder / "out")
    script = folder / "out" / "megatron.sh"
    (call,) = run_script(script, "torchrun", SCRIPT="serve.py", NODE_RANK="1")
    assert "serve.py" in call.words
    words = [word for word in call.words if word != "serve.py"]
    return vars(parser_of("megatron", "megatron").parse_args(words))


def test_sizes_nodes_and_uneven_stages(tmp_path: Path) -> None:
    """tp 8, 3 stages of 26, 28 and 26 layers on three nodes."""
    found = _started(tmp_path, tp=8, pp=3, stage_layers=(26, 28, 26), sp=True)
    assert found["tensor_model_parallel_size"] == "8"
    assert found["pipeline_model_parallel_size"] == "3"
    assert found["decoder_first_pipeline_num_layers"] == "26"
    assert found["decoder_last_pipeline_num_layers"] == "26"
    assert found["sequence_parallel"]
    assert not found["use_tp_pp_dp_mapping"]
    assert (found["nnodes"], found["nproc_per_node"], found["node_rank"]) == ("3", "8", "1")
    assert found["expert_model_parallel_size"] is None


def test_experts_over_ranks(tmp_path: Path) -> None:
    """ep 2 within tp 4: experts cut 2 ways; ep 16 over dp: whole experts."""
    found = _started(tmp_path / "a", tp=4, ep=2, sp=True, **MOE)
    assert found["expert_model_parallel_size"] == "2"
    assert found["expert_tensor_parallel_size"] == "2"
    found = _started(tmp_path / "b", tp=4, dp=4, ep=16, sp=True, **MOE)
    assert found["expert_model_parallel_size"] == "16"
    assert found["expert_tensor_parallel_size"] == "1"


def test_the_other_rank_order_has_its_flag(tmp_path: Path) -> None:
    """Stages of one group side by side."""
    found = _started(tmp_path, tp=4, pp=2, dp=2, order=("dp", "pp", "cp", "tp"))
    assert found["use_tp_pp_dp_mapping"]


@pytest.mark.parametrize(
    ("changes", "rule", "hint"),
    [
        ({"tp": 2, "pp": 4, "stage_layers": (20, 21, 19, 20)}, "first and the last", "divides"),
        ({"tp": 8, "head_tp": 1}, "all modules over the same ranks", "head_tp=0"),
        ({"tp": 4, "ep": 4, **MOE}, "need sequence parallelism", "sp=on"),
        ({"tp": 4, "dp": 2, "order": ("tp", "dp", "pp", "cp")}, "numbered", "one of them"),
        ({"tp": 4, "dp": 3}, "fill whole nodes", "whole nodes"),
    ],
)
def test_what_megatron_has_no_argument_for_is_refused(
    tmp_path: Path, changes: dict[str, Any], rule: str, hint: str
) -> None:
    """With the reason and the nearest plan, and nothing written."""
    with pytest.raises(InputError) as caught:
        emit(emit_plan(**changes), "megatron", tmp_path / "out")
    assert rule in str(caught.value)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()
