"""What a price rests on: the section that really prices a row, never a default."""

from __future__ import annotations

import pytest
from tests.costmodel.priced import CASES, PHASES, Priced, load, price

from shardplan.costmodel.basis import basis_in, row_section
from shardplan.costmodel.calibration import load_calibration
from shardplan.costmodel.formulas import FORMULAS
from shardplan.costmodel.kernels.pointwise import pointwise_kinds
from shardplan.costmodel.optable import Row, pointwise_bytes, pointwise_kernel
from shardplan.models.catalog import load_model, model_names
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism

NPU = load_calibration("910b2")
CLUSTERS = ("atlas-800i-a3", "hgx-h200", "hgx-h100")


def section_of(row: Row, phase: Phase) -> str:
    """The section that the step model prices a row with, at 16 bits."""
    if row.kind not in FORMULAS or row.kind.endswith("rmsnorm"):
        return f"pointwise.{pointwise_kernel(row)}"
    family = {
        "matmul": "matmul.bf16",
        "grouped_matmul": "moe.bf16",
        "attention": f"attention.{phase}",
        "mla_attention": "mla.prefill",
        "mla_absorbed": "mla.decode",
    }
    return family[row.kind]


def check(case: Priced) -> None:
    """Every local row of both phases has a formula and the basis of its own section."""
    calibration = case.model.machine.calibration
    for phase in PHASES:
        for row in {row for rows in case.model.rows[phase].values() for row in rows}:
            if row.is_collective:
                continue
            section = calibration.section(section_of(row, phase))
            assert row_section(calibration, row, "bf16", phase) == section
            if row.kind not in FORMULAS:
                assert pointwise_kernel(row) in pointwise_kinds(case.model.machine)
                assert pointwise_bytes(row) >= 2


@pytest.mark.parametrize("name", model_names())
def test_every_kernel_of_every_preset_rests_on_its_own_section(name: str) -> None:
    check(price(load_model(name), Parallelism()))


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_of_every_strategy_does(name: str, cluster: str) -> None:
    check(load(name, cluster))


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("name", CASES)
def test_a_collective_rests_on_the_weakest_tier_that_it_crosses(name: str, cluster: str) -> None:
    case = load(name, cluster)
    sections = case.model.machine.calibration.sections
    for row in (row for rows in case.model.rows["decode"].values() for row in rows):
        if not row.is_collective:
            continue
        tiers = [span.tier.topology for span in row.spans]
        own = [f"collectives.{tier}.graph.{row.kind}" for tier in tiers]
        shared = [f"collectives.{tier}.graph.any" for tier in tiers]
        kinds = [sections[a if a in sections else b].kind for a, b in zip(own, shared, strict=True)]
        found = row_section(case.model.machine.calibration, row, "bf16", "decode")
        order = ("measured", "fitted", "derived", "assumed")
        assert found.kind == max(kinds, key=order.index)


def test_kernels_that_stand_for_another_lend_it_their_basis() -> None:
    """A routed copy is priced as a slice, a weighted sum of experts as an add."""
    for kind, kernel in (("dispatch", "slice"), ("combine", "add"), ("scale", "mul")):
        row = Row(kind=kind, group="token")
        assert row_section(NPU, row, "bf16", "decode") == NPU.sections[f"pointwise.{kernel}"]


def test_a_quantized_product_rests_on_its_own_fit() -> None:
    """Linear weights take the strategy's dtype, a router's stay 16-bit."""
    linear = Row(kind="matmul", group="token", weight_class="linear")
    for dtype in ("bf16", "w8a16", "w8a8", "w4a16"):
        assert row_section(NPU, linear, dtype, "decode") == NPU.sections[f"matmul.{dtype}"]
        router = Row(kind="matmul", group="token", weight_class="small")
        assert row_section(NPU, router, dtype, "decode") == NPU.sections["matmul.bf16"]


def test_the_naive_kernel_rests_on_its_own_section() -> None:
    row = Row(kind="attention", group="attention")
    assert row_section(NPU, row, "bf16", "decode", "naive") == NPU.sections["attention.naive"]


def test_a_kind_rests_on_its_weakest_row() -> None:
    """With int8 weights, products are fitted; where one type is assumed, so is the kind."""
    model = load("dense tp8", "atlas-800t-a2").model
    sections = model.machine.calibration.sections
    for dtype in ("w8a8", "w4a16"):
        assert basis_in(model, "matmul", dtype, "decode") == sections[f"matmul.{dtype}"].kind
