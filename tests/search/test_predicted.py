"""One step of each phase of a plan: it takes what plan.json says, and stages do not overlap."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.search.plan_factory import make_plan

from shardplan.models.errors import InputError
from shardplan.search.plan import Plan
from shardplan.search.predicted import MOST_PIECES, Predicted, known_steps, predicted_steps

PLANS = Path(__file__).resolve().parent.parent.parent / "results" / "plans"
FOLDERS = sorted(one.parent for one in PLANS.glob("*/plan.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_step_takes_what_the_plan_says(folder: Path) -> None:
    """The rows of the breakdown, in all and by kind; a decode step of the performance."""
    plan = Plan.load(folder / "plan.json")
    for step in predicted_steps(plan):
        rows = {row.kind: row.total_s for row in plan.breakdown if row.phase == step.phase}
        assert step.program.step_s == pytest.approx(sum(rows.values()), rel=1e-9)
        kinds: dict[str, float] = {}
        for stage in step.program.stages:
            for one in stage.passes:
                for kernel in one.kernels:
                    kinds[kernel.kind] = kinds.get(kernel.kind, 0.0) + kernel.total_s
        kernels = {kind: value for kind, value in rows.items() if kind in kinds}
        assert kinds == pytest.approx(kernels, rel=1e-9)
        if step.phase == "decode":
            assert step.program.rotation_s == pytest.approx(plan.performance.decode_step_s, 1e-9)


def test_pieces_follow_one_another_without_overlap() -> None:
    """In every stage, of a prompt in pieces and of microbatches that go round."""
    plan = Plan.load(PLANS / "deepseek-v3_cloudmatrix-384_disagg" / "plan.json")
    prefill, _ = known_steps(plan)
    assert len(prefill.program.stages) == 16
    assert prefill.instances == 15
    for piped in (make_plan_of_stages(), prefill):
        starts = piped.starts_s()
        for stage in piped.program.stages:
            begins = [row[stage.stage] for row in starts]
            ends = [begin + stage.seconds for begin in begins]
            for end, begin in zip(ends, begins[1:], strict=False):
                assert begin >= end - 1e-12
            if piped.phase == "decode":
                around = begins[0] + piped.program.rotation_s - piped.program.host_s
                assert around >= ends[-1] - 1e-12


def make_plan_of_stages() -> Predicted:
    """The decode step of a plan in two stages."""
    plan = Plan.load(PLANS / "llama-65b_atlas-800t-a2" / "plan.json")
    way = plan.strategy.model_copy(update={"tp": 4, "pp": 2, "stage_layers": (41, 39)})
    return known_steps(plan.model_copy(update={"strategy": way}))[1]


def test_a_prompt_of_many_pieces_ends_with_the_last_of_them() -> None:
    """Times of the first ones alone are told; the end counts all."""
    plan = Plan.load(PLANS / "llama-65b_atlas-800t-a2" / "plan.json")
    work = plan.request.workload.model_copy(update={"input_len": 10**12})
    asked = plan.request.model_copy(update={"workload": work})
    way = plan.strategy.model_copy(update={"chunk": 1024})
    step = known_steps(plan.model_copy(update={"request": asked, "strategy": way}))[0]
    assert len(step.starts_s()) == MOST_PIECES
    assert step.end_s() == pytest.approx(-(-(10**12) // 1024) * step.program.step_s)


def test_a_plan_from_files_needs_them() -> None:
    """The error says what to name; the report leaves its picture out."""
    plan = Plan.load(PLANS / "llama-65b_atlas-800t-a2" / "plan.json")
    machine = plan.cluster.model_copy(update={"name": "my-machine"})
    own = plan.model_copy(update={"cluster": machine})
    assert known_steps(own) == ()
    with pytest.raises(InputError, match="--cluster FILE"):
        predicted_steps(own)
    found = predicted_steps(own, cluster="atlas-800t-a2")
    assert found[1].program.step_s == pytest.approx(plan.performance.decode_step_s, rel=1e-9)


def test_a_model_of_other_sizes_is_refused() -> None:
    """The toy plan's digest is not that of the preset of its name."""
    assert known_steps(make_plan()) == ()
    with pytest.raises(InputError, match="other sizes"):
        predicted_steps(make_plan())
