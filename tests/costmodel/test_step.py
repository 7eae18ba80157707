"""The price of a step: parts that sum, layers that repeat, and what must never be faster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.costmodel.priced import CASES, PHASES, Priced, case_names, load, price

from shardplan.costmodel.engines import FUSIONS, load_engine
from shardplan.costmodel.kernels.attention import attention_decode
from shardplan.costmodel.kernels.base import Array, ArrayLike
from shardplan.costmodel.kernels.collectives import collective
from shardplan.costmodel.kernels.matmul import matmul
from shardplan.costmodel.kernels.pointwise import pointwise
from shardplan.costmodel.load import Load, Parts
from shardplan.costmodel.memo import FEW_POINTS, Memo
from shardplan.costmodel.optable import Group
from shardplan.costmodel.step import Kept, StepModel
from shardplan.costmodel.steps import step_seconds
from shardplan.models.catalog import load_model
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism

GROUPS: tuple[Group, ...] = ("token", "attention", "logits")
CLUSTERS = ("atlas-800i-a3", "atlas-800t-a2", "hgx-h200")
LOADS: dict[Phase, tuple[float, float]] = {"prefill": (512.0, 128.0), "decode": (1.0, 2047.0)}
"""(new, prefix) tokens of a sequence."""

_phases = st.sampled_from(PHASES)
_clusters = st.sampled_from(CLUSTERS)
_tokens = st.integers(1, 16384).map(float)
_contexts = st.integers(0, 65536).map(float)
_batches = st.integers(1, 256).map(float)


def step(
    model: StepModel,
    phase: Phase,
    batch: ArrayLike,
    new: ArrayLike | None = None,
    prefix: ArrayLike | None = None,
    **kinds: Any,
) -> tuple[Array, list[Parts]]:
    """Seconds and parts of a step, 16-bit and flash unless said otherwise."""
    usual: dict[str, Any] = {"weight_dtype": "bf16", "kv_dtype": "bf16", "attention": "flash"}
    return step_seconds(
        model,
        phase,
        batch=batch,
        new=LOADS[phase][0] if new is None else new,
        prefix=LOADS[phase][1] if prefix is None else prefix,
        **(usual | kinds),
    )


def seconds(case: Priced, phase: Phase, *sizes: float, **kinds: Any) -> float:
    """The time of one step."""
    return float(step(case.model, phase, *sizes, **kinds)[0])


def test_a_model_that_forgets_prices_the_same() -> None:
    case = load("dense tp8", "atlas-800t-a2")
    model = replace(case.model, memo=Memo(), kept=Kept())
    batches = np.arange(1.0, 2.0 * FEW_POINTS)
    first = step(model, "decode", batches)[0]
    assert model.memo.prices
    model.forget()
    assert not model.memo.prices
    assert not model.kept.sums
    assert np.array_equal(step(model, "decode", batches)[0], first)


@given(name=case_names(), cluster=_clusters, phase=_phases, batch=_batches)
def test_parts_sum_to_the_step(name: str, cluster: str, phase: Phase, batch: float) -> None:
    case = load(name, cluster)
    total, stages = step(case.model, phase, batch)
    assert len(stages) == len(case.graphs[phase].stages)
    assert all(float(part) >= 0.0 for parts in stages for part in parts)
    device = sum(float(parts.total_s) for parts in stages)
    if phase == "decode":  # a replayed graph: nothing but kernels and the host
        assert total == pytest.approx(device + case.model.host_s(phase), rel=1e-12)
    else:
        assert total >= device + case.model.host_s(phase)


def test_a_decode_layer_of_llama_is_priced_kernel_by_kernel_by_hand() -> None:
    """64 sequences at 1000 tokens on one of eight ranks: what each kernel is asked for."""
    case = load("dense tp8")
    machine, own = case.model.machine, {row.kind: row for row in case.rows("decode", "dense")}
    usual = Load.of("decode", case.model.engine, tokens=64.0, batch=64.0, new=1.0, prefix=999.0)
    sums = collective(
        "all_reduce",
        own["all_reduce"].spans,
        64 * 4096 * 2,
        machine.calibration,
        launch="graph",
        in_service=True,
    )
    attends = attention_decode(machine, 64, 1000, 4, 1, 128, kernel="flash", kv_dtype="bf16")
    acts = pointwise(machine, "swiglu", 64 * 1792, 64 * 1792 * 6)
    assert case.model.price(own["all_reduce"], usual).total_s == sums.total_s
    assert case.model.price(own["attention"], usual).total_s == attends.total_s
    assert case.model.price(own["swiglu"], usual).total_s == acts.total_s
    products = [row for row in case.rows("decode", "dense") if row.kind == "matmul"]
    sizes = ((768, 4096), (4096, 512), (3584, 4096), (4096, 1792))
    ours = sorted(float(case.model.price(row, usual).total_s) for row in products)
    known = (matmul(machine, 64, n, k, "bf16", weights="cold").total_s for n, k in sizes)
    assert ours == sorted(map(float, known))


@pytest.mark.parametrize("tokens", [1.0, 64.0, 4096.0])
def test_quantizing_inside_the_norm_saves_the_kernel_but_not_the_written_byte(
    tokens: float,
) -> None:
    """w8a8: the product loses its quantization kernel, the norm writes 1 byte in place of 2."""
    case = load("qk norm tp4", "atlas-800t-a2")
    machine, model = case.model.machine, case.model
    usual = Load.of("decode", model.engine, tokens=tokens, weight_dtype="w8a8")
    product = next(r for r in case.rows("decode", "dense") if r.quantized)
    norm = next(r for r in case.rows("decode", "dense") if r.kind == "add_rmsnorm")
    fed = matmul(machine, tokens, product.n, product.k, "w8a8", weights="cold", quantized=True)
    whole = matmul(machine, tokens, product.n, product.k, "w8a8", weights="cold")
    assert model.price(product, usual).total_s == fed.total_s
    elements = tokens * 5120
    written = pointwise(machine, "quantize", elements, elements)
    read = pointwise(machine, "add_rmsnorm", elements, elements * 6)
    own = float(model.price(norm, usual).total_s)
    assert own == pytest.approx(float(read.total_s + written.compute_s + written.memory_s))
    plain = float(model.price(norm, replace(usual, weight_dtype="bf16")).total_s)
    assert plain == float(pointwise(machine, "add_rmsnorm", elements, elements * 8).total_s)
    assert own + float(fed.total_s) < plain + float(whole.total_s)


def test_the_logits_of_a_prefill_are_those_of_its_sequences() -> None:
    case = load("dense tp8")
    kinds = {row.kind: row for row in case.rows("prefill", "head")}
    usual = Load.of("prefill", case.model.engine, tokens=4.0)
    gather = collective(
        "all_gather",
        kinds["all_gather"].spans,
        4 * 128256 * 2,
        case.model.machine.calibration,
        launch="host",
        in_service=True,
    )
    late_s = case.model.engine.skew_s("prefill", 8)
    assert case.model.price(kinds["all_gather"], usual).total_s == gather.total_s + late_s


@given(name=case_names(), phase=_phases, batch=_batches)
def test_kinds_sum_to_the_stages(name: str, phase: Phase, batch: float) -> None:
    """The breakdown that is printed holds all of the time and every kernel."""
    model = load(name).model
    new, prefix = LOADS[phase]
    own: dict[str, Any] = {"tokens": batch * new, "batch": batch, "new": new, "prefix": prefix}
    for group in GROUPS:
        given_load = Load.of(phase, model.engine, **own)
        stages = model.parts(group, given_load)
        kinds = [parts for _, parts in model.by_kind(group, given_load)]
        assert sum(float(p.total_s) for p in kinds) == pytest.approx(
            sum(float(p.total_s) for p in stages), rel=1e-9
        )
        assert sum(p.kernels for p in kinds) == sum(p.kernels for p in stages)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", CASES)
def test_a_folded_model_costs_what_its_layers_cost_one_by_one(name: str, phase: Phase) -> None:
    case = load(name)
    model, graph = case.model, case.graphs[phase]
    new, prefix = LOADS[phase]
    usual = Load.of(phase, model.engine, tokens=16 * new, batch=16.0, new=new, prefix=prefix)
    folded = [model.parts(group, usual) for group in GROUPS]
    for stage in graph.stages:
        one_by_one = sum(
            float(model.price(row, usual).total_s)
            for block, _ in graph.sequence(stage)
            for row in case.rows(phase, block)
        )
        together = sum(float(parts[stage.index].total_s) for parts in folded)
        assert together == pytest.approx(one_by_one, rel=1e-9)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("preset", ["llama-3.1-8b", "qwen3-30b-a3b", "llama-2-13b"])
def test_twice_the_layers_cost_the_layers_twice(preset: str, phase: Phase) -> None:
    spec, par = load_model(preset), Parallelism(tp=2)
    one, two, four = (
        seconds(price(replace(spec, layers=n * spec.layers), par), phase, 8) for n in (1, 2, 4)
    )
    assert four - two == pytest.approx(2 * (two - one), rel=1e-9)
    assert two - one > 0.5 * one


@given(
    name=case_names(), cluster=_clusters, batch=_batches, one=_contexts, more=st.integers(1, 65536)
)
def test_a_longer_context_is_never_faster(
    name: str, cluster: str, batch: float, one: float, more: int
) -> None:
    case = load(name, cluster)
    for phase, new in zip(PHASES, (256.0, 1.0), strict=True):
        short = seconds(case, phase, batch, new, one)
        assert seconds(case, phase, batch, new, one + more) >= 0.985 * short


@given(name=case_names(), cluster=_clusters, one=_tokens, more=st.integers(1, 16384))
def test_a_longer_prompt_is_never_faster(name: str, cluster: str, one: float, more: int) -> None:
    """Up to 1.5 %: the fitted matmul surface is not monotonic in the rows."""
    case = load(name, cluster)
    for batch in (1, 8):
        longer = seconds(case, "prefill", batch, one + more, 0.0)
        assert longer >= 0.985 * seconds(case, "prefill", batch, one, 0.0)


@given(name=case_names(), cluster=_clusters, one=_batches, more=st.integers(1, 256))
def test_a_bigger_batch_is_never_faster(name: str, cluster: str, one: float, more: int) -> None:
    """A prefill up to 1.5 %, a decode step up to 6 %.

    Products of few rows are where the fitted surface bends most: on A3 those of 1,280 outputs and
    8,192 inputs take up to twice as long at 1 to 15 rows as at 48 (measurements of the 910B2 do).
    """
    case = load(name, cluster)
    assert seconds(case, "decode", one + more) >= 0.94 * seconds(case, "decode", one)
    assert seconds(case, "prefill", one + more) >= 0.985 * seconds(case, "prefill", one)


@given(name=case_names(), cluster=_clusters, one=_batches, more=st.integers(1, 256))
def test_but_for_products_no_kernel_is_faster_with_a_bigger_batch(
    name: str, cluster: str, one: float, more: int
) -> None:
    case = load(name, cluster)
    for phase, (new, prefix) in LOADS.items():
        usual = (
            Load.of(phase, case.model.engine, tokens=n * new, batch=n, new=new, prefix=prefix)
            for n in np.asarray([one, one + more])
        )
        small, big = usual
        for row in {row for rows in case.model.rows[phase].values() for row in rows}:
            if row.kind != "matmul":
                less = case.model.price(row, small).total_s
                assert case.model.price(row, big).total_s >= less * (1 - 1e-3), row


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", CASES)
def test_fusing_saves_kernels_and_time(name: str, phase: Phase) -> None:
    """Of a prefill it saves the kernels; the time up to 4 %.

    The fused norms of the NPU were measured at the few rows of decoding: carried over to
    thousands of rows they come out slower than the kernels that they replace.
    """
    fused = load(name).model
    plain = replace(load_engine("vllm-ascend"), fused=())
    assert set(fused.engine.fused) < set(FUSIONS)
    apart = _under(load(name), plain)
    (slow, many), (fast, few) = (step(model, phase, 8) for model in (apart, fused))
    assert fast < slow if phase == "decode" else fast < 1.04 * slow
    assert sum(p.kernels for p in few) < sum(p.kernels for p in many)


def _under(case: Priced, engine: Any) -> StepModel:
    """The same layout under another engine."""
    par = case.graphs["decode"].parallel
    return price(case.spec, par, engine=engine).model


@given(name=case_names(), phase=_phases, batch=_batches)
def test_launching_from_the_host_is_never_faster(name: str, phase: Phase, batch: float) -> None:
    graph = replace(load_engine("vllm-ascend"), decode_graph=True, prefill_graph=True)
    host = replace(graph, decode_graph=False, prefill_graph=False)
    case = load(name)
    captured, launched = (
        replace(case.model, engine=engine, kept=Kept(), memo=Memo()) for engine in (graph, host)
    )
    (fast, stages), (slow, _) = (step(m, phase, batch) for m in (captured, launched))
    assert slow >= fast
    floor = sum(p.kernels for p in stages) * case.model.machine.device.host_launch_s
    assert slow >= floor


@pytest.mark.parametrize("name", CASES)
def test_a_grid_costs_what_its_points_cost(name: str) -> None:
    """Beyond a few points prices are remembered and spread; the numbers must not change."""
    case = load(name)
    batch = np.asarray([1.0, 3.0, 16.0, 100.0] * FEW_POINTS).reshape(4, -1)
    context = np.repeat([127.0, 1023.0, 8191.0, 32767.0], FEW_POINTS).reshape(4, -1)
    for phase, new in zip(PHASES, (100.0, 1.0), strict=True):
        grid, _ = step(case.model, phase, batch, new, context)
        assert grid.shape == batch.shape
        for at in ((0, 0), (1, 17), (2, 42), (3, 63)):
            alone = seconds(case, phase, float(batch[at]), new, float(context[at]))
            assert grid[at] == pytest.approx(alone, rel=1e-12)


def test_quantized_weights_speed_up_small_steps_and_a_quantized_cache_long_ones() -> None:
    case = load("llama-3.1-8b", "atlas-800t-a2")
    whole = seconds(case, "decode", 1)
    assert seconds(case, "decode", 1, weight_dtype="w8a8") < 0.75 * whole
    long = seconds(case, "decode", 32, 1.0, 8191.0)
    assert seconds(case, "decode", 32, 1.0, 8191.0, kv_dtype="int8") < 0.9 * long


@pytest.mark.parametrize("name", CASES)
def test_prices_that_dtypes_share_are_those_of_each(name: str) -> None:
    """A memory that has seen other dtypes gives what an empty one does, to the last bit."""
    batch, shared = np.arange(1.0, FEW_POINTS + 1.0), replace(load(name).model, memo=Memo())
    kinds: list[dict[str, Any]] = [
        {"weight_dtype": weight, "kv_dtype": kv, "attention": attention}
        for weight in ("bf16", "w8a8", "w4a16")
        for kv in ("bf16", "int8")
        for attention in ("flash", "naive")
    ]
    for phase in PHASES:
        for kind in kinds:
            shared = replace(shared, kept=Kept())
            own = replace(shared, memo=Memo(), kept=Kept())
            found, alone = (step(model, phase, batch, **kind)[0] for model in (shared, own))
            assert np.array_equal(found, alone)
