"""Weight prefetch and fused collectives: off they change nothing, on they follow their formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.costmodel.priced import CASES, PHASES, load

from shardplan.costmodel.audit import audit_collectives
from shardplan.costmodel.basis import basis_in
from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.kernels.matmul import matmul
from shardplan.costmodel.load import Load
from shardplan.costmodel.optable import NO_OVERLAP, Overlap, Row
from shardplan.costmodel.overlap import prefetched_bytes
from shardplan.costmodel.step import StepModel
from shardplan.models.graph import Phase

A2, A3 = "atlas-800t-a2", "atlas-800i-a3"
PREFETCH = Overlap(weight_prefetch=True)
FUSED = Overlap(fused_collectives=True)
BOTH = Overlap(weight_prefetch=True, fused_collectives=True)


def switched(
    name: str, overlap: Overlap, cluster: str = A2, engine: str = "vllm-ascend"
) -> StepModel:
    """One of the cases with switches on."""
    graphs = load(name, cluster, engine).graphs
    machines = load_cluster(cluster, cards=graphs["decode"].parallel.ranks)
    return StepModel.of(graphs, machines, load_engine(engine), overlap=overlap)


def decode(model: StepModel, batch: float, dtype: str = "bf16") -> Load:
    """A decode step at 1000 tokens of context."""
    return Load.of(
        "decode",
        model.engine,
        tokens=batch,
        batch=batch,
        new=1.0,
        prefix=999.0,
        weight_dtype=dtype,
    )


def prefill(model: StepModel, tokens: float) -> Load:
    """One prompt."""
    return Load.of("prefill", model.engine, tokens=tokens, batch=1.0, new=tokens)


def total_s(model: StepModel, given: Load) -> float:
    """Token rows of all stages."""
    return sum(float(parts.total_s) for parts in model.parts("token", given))


def marked(model: StepModel, phase: Phase, block: str) -> dict[str, Row]:
    """Rows that are prefetched for, by the kernels behind which they are."""
    return {
        "+".join(r.kind for r in row.behind): row for row in model.rows[phase][block] if row.behind
    }


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", CASES)
def test_switched_off_the_rows_are_the_same(name: str, phase: Phase) -> None:
    assert switched(name, NO_OVERLAP, A3).rows[phase] == load(name, A3).model.rows[phase]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", CASES)
def test_what_is_charged_is_still_what_the_graph_moves(name: str, phase: Phase) -> None:
    """The all_reduce inside a fused kernel counts as one."""
    elements = audit_collectives(load(name, A3).model, phase)
    assert audit_collectives(switched(name, BOTH, A3), phase) == elements


def test_an_ascend_layer_prefetches_behind_the_kernels_that_the_plugin_names() -> None:
    """vllm-ascend: gate and up behind the norm, down behind the activation; nothing else."""
    model = switched("dense tp8 sp", PREFETCH)
    found = marked(model, "decode", "dense")
    assert set(found) == {"add_rmsnorm", "swiglu"}
    assert (found["add_rmsnorm"].n, found["add_rmsnorm"].k) == (2 * 28672 / 8, 8192)
    assert (found["swiglu"].n, found["swiglu"].k) == (8192, 28672 / 8)


def test_the_first_product_of_a_layer_follows_the_last_kernels_of_the_layer_before() -> None:
    """MindIE: MLA's down projections behind the end of the feed-forward network and the norm."""
    found = marked(switched("mla tp8", PREFETCH, A3, "mindie"), "decode", "dense")
    assert set(found) == {"add_rmsnorm+all_reduce"}


def test_experts_are_prefetched_behind_the_routing() -> None:
    (kinds,) = marked(switched("moe dp4 tp2 ep8", PREFETCH, A3), "decode", "moe")
    assert set(kinds.split("+")) == {"topk_router", "slice", "dispatch"}


@pytest.mark.parametrize("batch", [1.0, 16.0, 128.0])
def test_prefetched_bytes_are_what_fits_the_time_by_hand(batch: float) -> None:
    """Of 58.7 MB of down weights: 0.79 of the HBM rate for the time of the activation."""
    model = switched("dense tp8 sp", PREFETCH)
    row = marked(model, "decode", "dense")["swiglu"]
    given = decode(model, batch)
    (act,) = row.behind
    hidden_s = float(model.price(act, given).total_s)
    expected = min(18 * 2**20, hidden_s * 0.79 * model.machine.device.hbm_bytes_per_s)
    warm = float(prefetched_bytes(model, row, given))
    assert warm == pytest.approx(expected)
    cold = matmul(model.machine, batch, row.n, row.k, "bf16", weights="cold")
    own = model.price(row, given)
    share = np.asarray(warm / (row.n * row.k * 2))
    known = matmul(model.machine, batch, row.n, row.k, "bf16", weights="cold", warm=share)
    assert own.total_s == known.total_s
    assert own.total_s < cold.total_s


def test_a_step_beyond_the_engines_limit_prefetches_nothing() -> None:
    model = switched("dense tp8 sp", PREFETCH)
    row = marked(model, "decode", "dense")["swiglu"]
    warm = prefetched_bytes(model, row, decode(model, np.asarray([499.0, 500.0])))  # type: ignore[arg-type]  # many at once
    assert warm[0] > 0
    assert warm[1] == 0


def test_what_the_activations_need_of_l2_is_not_prefetched_into() -> None:
    """With an L2 that the layer's own tensors fill there is nowhere to prefetch to."""
    model = switched("dense tp8 sp", PREFETCH)
    row = marked(model, "decode", "dense")["swiglu"]
    machine = model.machine
    tight = replace(machine, device=replace(machine.device, l2_bytes=256 * (8192 + 3584) * 2.0))
    assert float(prefetched_bytes(replace(model, machine=tight), row, decode(model, 256.0))) == 0


@pytest.mark.parametrize("dtype", ["bf16", "w8a8"])
@pytest.mark.parametrize("name", ["dense tp8 sp", "moe dp4 tp2 ep8", "mla tp8"])
def test_prefetching_is_never_slower_and_never_beats_the_whole_matrix(
    name: str, dtype: str
) -> None:
    """What it saves of a step is at most the weights' time in HBM of what it brought."""
    off, on = switched(name, NO_OVERLAP, A3), switched(name, PREFETCH, A3)
    for batch in (1.0, 24.0, 200.0):
        given = decode(on, batch, dtype)
        slow, fast = total_s(off, given), total_s(on, given)
        brought = sum(
            float(prefetched_bytes(on, row, given)) * stage.counts[block]
            for stage in on.graphs["decode"].stages
            for block in stage.counts
            for row in on.rows["decode"][block]
            if row.behind
        )
        assert slow - brought / (0.5 * on.machine.device.hbm_bytes_per_s) <= fast <= slow


def test_fusing_happens_in_prefill_where_an_all_reduce_follows_a_product() -> None:
    model = switched("dense tp8", FUSED)
    kinds = [row.kind for row in model.rows["prefill"]["dense"]]
    assert kinds.count("matmul_all_reduce") == 2
    assert "all_reduce" not in kinds
    assert model.rows["decode"] == load("dense tp8", A2).model.rows["decode"]
    embed = [row.kind for row in model.rows["prefill"]["embed"]]
    assert embed.count("all_reduce") == 1


def test_sequence_parallelism_and_sums_of_experts_have_nothing_to_fuse() -> None:
    for name in ("dense tp8 sp", "mla lite tp4 sp"):
        rows = switched(name, FUSED, A3).rows["prefill"]
        assert not any(row.fused for block in rows.values() for row in block)
    moe = switched("shared experts tp8", FUSED, A3).rows["prefill"]["moe"]
    assert [row.kind for row in moe].count("matmul_all_reduce") == 1  # attention's


def test_the_published_case_of_the_operator_guide_comes_back() -> None:
    """888 us of product and 1025 us of wire take 34 % less than their sum."""
    coef = load("dense tp8", A2).model.machine.calibration.section("overlap.matmul_all_reduce")
    product_us, wire_us = 888.0, 1025.0
    hidden_us = min(product_us, wire_us) * (1 - 1 / coef["pieces"])
    assert hidden_us / (product_us + wire_us) == pytest.approx(0.34, abs=0.002)
    assert coef["pieces"] * coef["piece_rows"] == pytest.approx(4096, rel=1e-3)


@pytest.mark.parametrize(("tokens", "gains"), [(512.0, False), (1098.0, False), (4096.0, True)])
def test_a_fused_kernel_hides_part_of_the_shorter_side(tokens: float, gains: bool) -> None:
    apart, fused = switched("dense tp8", NO_OVERLAP), switched("dense tp8", FUSED)
    given = prefill(fused, tokens)
    slow, fast = total_s(apart, given), total_s(fused, given)
    assert fast < 0.97 * slow if gains else fast == pytest.approx(slow, rel=1e-12)
    for row in fused.rows["prefill"]["dense"]:
        if row.fused is None:
            continue
        parts = fused.price(row, given)
        product = float(parts.compute_s + parts.memory_s)
        wire = float(fused.collective_time(row.fused, given).memory_s)
        assert float(parts.total_s) >= max(product, wire)
        assert float(parts.collective_s) >= 0
        assert parts.kernels == 1


def test_prices_say_that_they_rest_on_an_assumption() -> None:
    model = switched("dense tp8 sp", PREFETCH)
    assert basis_in(model, "matmul", "bf16", "decode") == "assumed"
    assert basis_in(load("dense tp8 sp", A2).model, "matmul", "bf16", "decode") == "fitted"
    assert (
        basis_in(switched("dense tp8", FUSED), "matmul_all_reduce", "bf16", "prefill") == "derived"
    )
