"""A step as kernels in order: the same kernels and seconds as the step model's sums."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.forward import forward_loads, parts_by_kind
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.load import Load
from shardplan.costmodel.optable import NO_OVERLAP, Group, Overlap
from shardplan.costmodel.program import Program, program_of
from shardplan.costmodel.step import StepModel
from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.catalog import load_model
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism

PHASES: tuple[Phase, ...] = ("prefill", "decode")


def made(
    name: str,
    cluster: str | Cluster,
    engine: str,
    phase: Phase,
    axes: dict[str, int],
    overlap: Overlap = NO_OVERLAP,
) -> tuple[StepModel, dict[Group, Load], Program]:
    """The step model, the loads of one pass and its program."""
    par, spec = Parallelism(**axes), load_model(name)  # type: ignore[arg-type]
    place = load_cluster(cluster) if isinstance(cluster, str) else cluster
    graphs = {one: apply(build_graph(spec, one, mtp=par.mtp > 0), par) for one in PHASES}
    model = StepModel.of(graphs, place, load_engine(engine), overlap=overlap)
    decode = phase == "decode"
    loads = forward_loads(
        phase,
        model.engine,
        batch=16.0 if decode else 1.0,
        new=1.0 + par.mtp if decode else 512.0,
        prefix=1024.0 if decode else 0.0,
        weight_dtype="w8a8",
        kv_dtype="bf16",
        attention="flash",
        mtp=par.mtp,
    )
    return model, loads, program_of(model, place, overlap, loads)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    ("name", "cluster", "engine", "axes"),
    [
        ("qwen3-32b", "atlas-800t-a2", "vllm-ascend", {"tp": 4, "pp": 2}),
        ("deepseek-v3", "atlas-800i-a3", "vllm-ascend", {"tp": 2, "dp": 8, "ep": 16, "mtp": 2}),
        ("llama-3.1-8b", "atlas-800i-a2", "mindie", {"tp": 2, "pp": 4}),
    ],
)
def test_kernels_sum_to_the_step_model(
    name: str, cluster: str, engine: str, axes: dict[str, int], phase: Phase
) -> None:
    """By kind, by stage and in all."""
    model, loads, program = made(name, cluster, engine, phase, axes)
    found: dict[str, float] = {}
    for stage in program.stages:
        for one in stage.passes:
            for kernel in one.kernels:
                found[kernel.kind] = found.get(kernel.kind, 0.0) + kernel.total_s
    expected = {kind: float(parts.total_s) for kind, parts in parts_by_kind(model, loads).items()}
    assert found == pytest.approx(expected)
    stages = [model.parts(group, load) for group, load in loads.items()]
    summed = [parts[0].plus(parts[1]) for parts in zip(*stages[:2], strict=True)]
    for more in stages[2:]:
        summed = [one.plus(other) for one, other in zip(summed, more, strict=True)]
    times = [float(one) for one in model.step_s(summed, phase)]
    assert [stage.seconds for stage in program.stages] == pytest.approx(times)
    assert program.step_s == pytest.approx(sum(times) + model.host_s(phase))
    assert program.rotation_s >= program.step_s


def test_kernels_stand_in_computing_order() -> None:
    """A sum comes after the product that it sums, the head after the last layer."""
    _, _, program = made("qwen3-32b", "atlas-800t-a2", "vllm-ascend", "decode", {"tp": 4})
    (stage,) = program.stages
    names = [one.template for one in stage.passes]
    assert (names[0], names[-1], len(names)) == ("embed", "head", 66)
    kinds = [(kernel.name, kernel.kind) for kernel in stage.passes[1].kernels]
    order = [
        ("norm1", "add_rmsnorm"),
        ("q, k, v", "matmul"),
        ("attention", "attention"),
        ("o", "matmul"),
        ("o", "all_reduce"),
        ("gate, up", "matmul"),
        ("down", "matmul"),
        ("down", "all_reduce"),
    ]
    assert [one for one in kinds if one in order] == order


def test_layers_that_are_alike_share_their_kernels() -> None:
    """And a pipeline sends between its stages."""
    _, _, program = made("qwen3-32b", "atlas-800t-a2", "vllm-ascend", "decode", {"tp": 2, "pp": 2})
    first, last = program.stages
    assert first.passes[1].kernels is last.passes[1].kernels
    assert first.passes[-1].template == "send"
    assert [kernel.kind for kernel in first.passes[-1].kernels] == ["send"]


def test_switches_are_in_the_kernels() -> None:
    """A fused product and its all_reduce are one kernel of prefill."""
    overlap = Overlap(fused_collectives=True)
    _, _, program = made("qwen3-32b", "atlas-800t-a2", "vllm-ascend", "prefill", {"tp": 4}, overlap)
    kinds = [kernel.kind for kernel in program.stages[0].passes[1].kernels]
    assert kinds.count("matmul_all_reduce") == 2
    assert "all_reduce" not in kinds


def test_a_host_that_launches_is_waited_for() -> None:
    """A host that needs a millisecond a launch sets the pace of prefill, which no graph replays."""
    place = load_cluster("atlas-800t-a2")
    slow = replace(place, device=replace(place.device, host_launch_s=1e-3))
    model, loads, _ = made("llama-3.1-8b", slow, "vllm-ascend", "prefill", {"tp": 8})
    program = program_of(model, slow, NO_OVERLAP, loads)
    (stage,) = program.stages
    kernels = sum(len(one.kernels) for one in stage.passes)
    assert stage.launch_wait_s > 0.0
    assert stage.seconds == pytest.approx(kernels * 1e-3)
