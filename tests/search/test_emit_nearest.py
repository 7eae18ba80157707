"""A refusal names the nearest of the plan's own strategies that the target takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.search.emit_cases import emit_plan

from shardplan.models.errors import InputError
from shardplan.search.emit import emit
from shardplan.search.plan import Candidate, Plan

PLANS = Path(__file__).resolve().parents[2] / "results" / "plans"


def _candidate(plan: Plan, rate: float, **strategy: Any) -> Candidate:
    """A strategy with a share of the plan's rate."""
    slower = plan.performance.output_tokens_per_s * rate
    return Candidate(
        strategy=plan.strategy.model_copy(update={"stage_layers": (), **strategy}),
        performance=plan.performance.model_copy(update={"output_tokens_per_s": slower}),
        memory_bytes=1.0,
        objective=slower,
    )


def test_the_first_that_the_target_takes_is_named(tmp_path: Path) -> None:
    """Stages are refused, in the plan and in the first of the others."""
    plan = emit_plan(tp=4, pp=2, stage_layers=(40, 40))
    others = (_candidate(plan, 0.9, tp=2, pp=4), _candidate(plan, 0.8, tp=8, pp=1))
    plan = plan.model_copy(update={"alternatives": others, "pareto": ()})
    with pytest.raises(InputError) as caught:
        emit(plan, "sglang", tmp_path / "out")
    assert caught.value.rule == "sglang cannot express this plan: no pipeline stages on Ascend"
    assert caught.value.got == "pp=2"
    assert caught.value.hint == (
        "search with --only pp=1; of this plan's other strategies it takes "
        "tp8 pp1 dp1: 80% of the rate"
    )
    assert not (tmp_path / "out").exists()


def test_nothing_is_named_where_nothing_fits(tmp_path: Path) -> None:
    plan = emit_plan(soc="").model_copy(update={"alternatives": (), "pareto": ()})
    plan = plan.model_copy(update={"alternatives": (_candidate(plan, 0.5, tp=4),)})
    with pytest.raises(InputError) as caught:
        emit(plan, "vllm-ascend", tmp_path / "out")
    assert "other strategies" not in caught.value.hint


def test_pools_are_named_with_their_counts(tmp_path: Path) -> None:
    """The committed plan of 384 dies has prefill stages; one without them is named."""
    plan = Plan.load(PLANS / "deepseek-v3_cloudmatrix-384_disagg" / "plan.json")
    flat = {"pp": 1, "tp": 16, "stage_layers": ()}
    other = _candidate(plan, 0.5).model_copy(
        update={
            "prefill": plan.pools[0].strategy.model_copy(update=flat),
            "prefill_instances": 16,
            "decode_instances": 1,
        }
    )
    plan = plan.model_copy(update={"alternatives": (_candidate(plan, 0.9), other)})
    with pytest.raises(InputError) as caught:
        emit(plan, "sglang", tmp_path / "out")
    assert "no pipeline stages" in caught.value.rule
    assert "16 x tp16 pp1 dp1" in caught.value.hint
    assert caught.value.hint.endswith("decode: 50% of the rate")
