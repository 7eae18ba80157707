"""Switches of the engine in what is emitted: set where the target has them, refused elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.search.emit_cases import emit_plan, moe, run_script

from shardplan.models.errors import InputError
from shardplan.search.emit import emit
from shardplan.search.emit.atc import files as atc_files
from shardplan.search.emit.vllm_ascend import files
from shardplan.search.plan import Plan


def additional_config(plan: Plan, folder: Path) -> dict[str, Any]:
    """What the plugin would read as its additional config."""
    emit(plan, "vllm-ascend", folder)
    (call,) = run_script(folder / "serve_node0.sh", "vllm", MODEL="/checkpoint")
    given: dict[str, Any] = json.loads(call.words[call.words.index("--additional-config") + 1])
    return given


def test_switches_of_the_plugin_are_set_as_the_plan_has_them(tmp_path: Path) -> None:
    """All in the one JSON object that the plugin reads."""
    plan = emit_plan(fused_collectives=True, weight_prefetch=True)
    assert additional_config(plan, tmp_path / "both") == {
        "weight_prefetch_config": {"enabled": True},
        "enable_matmul_allreduce": True,
    }
    plan = emit_plan(sp=True, weight_prefetch=True)
    assert additional_config(plan, tmp_path / "sp") == {
        "enable_flashcomm1": True,
        "weight_prefetch_config": {"enabled": True},
    }


def test_modules_over_data_parallel_ranks_are_set_where_the_plugin_has_them(
    tmp_path: Path,
) -> None:
    """The LM head over 8 of 16 ranks, dense layers over all; the sizes count dp ranks."""
    sizes: dict[str, Any] = {
        "tp": 1,
        "dp": 16,
        "ep": 16,
        "head_tp": 8,
        "ffn_tp": 16,
        "shared_tp": 1,
    }
    plan = emit_plan(model=moe(), soc="Ascend910_9382", **sizes)
    assert additional_config(plan, tmp_path / "out")["finegrained_tp_config"] == {
        "lmhead_tensor_parallel_size": 8,
        "mlp_tensor_parallel_size": 16,
    }


def test_a_switch_that_is_off_is_not_written() -> None:
    assert "--additional-config" not in files(emit_plan())["serve_node0.sh"]


def test_what_a_switch_was_priced_with_is_said() -> None:
    readme = files(emit_plan(fused_collectives=True, weight_prefetch=True))["README.md"]
    assert "enable_matmul_allreduce" in readme
    assert "assumed rate" in readme
    plan = emit_plan(fused_collectives=True)
    assert "an engine's switches" in atc_files(plan)["README.md"]
    assert "an engine's switches" not in atc_files(emit_plan())["README.md"]


def test_experts_are_prefetched_without_sequence_parallelism(tmp_path: Path) -> None:
    plan = emit_plan(model=moe(), soc="Ascend910_9382", ep=8, weight_prefetch=True)
    assert additional_config(plan, tmp_path / "out")["weight_prefetch_config"] == {"enabled": True}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fused_collectives": True, "soc": "Ascend910_9382"}, "Atlas A2 with tp 2, 4 or 8"),
        ({"fused_collectives": True, "tp": 1, "dp": 8}, "Atlas A2 with tp 2, 4 or 8"),
        ({"fused_collectives": True, "sp": True}, "no sequence parallelism"),
        ({"fused_collectives": True, "weight_dtype": "w8a8"}, "16-bit weights"),
        ({"weight_prefetch": True}, "needs sequence parallelism or fused"),
        ({"weight_prefetch": True, "soc": "Ascend310P3"}, "A2, A3 and 950"),
    ],
)
def test_a_switch_that_the_plugin_does_not_have_is_refused(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        files(emit_plan(**changes))
