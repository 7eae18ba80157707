"""Bands and shares: worked by hand, and against errors that are drawn as the formulas say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tests.costmodel.priced import CASES, PHASES, load

from shardplan.costmodel.basis import KINDS
from shardplan.costmodel.bulk import Dtypes, Fleet
from shardplan.costmodel.calibration import Section
from shardplan.costmodel.confidence import (
    Confidence,
    Scale,
    Tally,
    confidence,
    level,
    operator_confidence,
    section_scale,
    serving_confidence,
)
from shardplan.costmodel.forward import forward_loads
from shardplan.costmodel.serving import ServingInput, serve
from shardplan.costmodel.steps import step_seconds
from shardplan.models.graph import Phase

DTYPES = Dtypes("w8a8", "bf16", "flash")
SECTION = Section(
    name="matmul.bf16",
    kind="fitted",
    source="a table",
    rows_fitted=100,
    rows_held_out=20,
    median_error=0.03,
    p90_error=0.1645,
    coefficients={},
)


def sure_of(name: str, engine: str, phase: Phase) -> tuple[Confidence, np.ndarray, Fleet]:
    """The confidence of steps of one layout at two loads."""
    zero = np.zeros(2, dtype=np.int64)
    fleet = Fleet.of([load(name, engine=engine).model], zero, [DTYPES], zero)
    tally = Tally.of(fleet)
    batch, new = np.asarray([4.0, 64.0]), 1.0 if phase == "decode" else 512.0
    total, _ = step_seconds(
        fleet.watched(tally), phase, batch=batch, new=new, prefix=1000.0, **DTYPES._asdict()
    )
    return confidence(tally, fleet, phase, total, np.full(2, fleet.host_s(phase))), total, fleet


@pytest.mark.parametrize("engine", ["vllm-ascend", "vllm-ascend-eager", "mindie"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", CASES)
def test_shares_make_the_whole_and_causes_the_step(name: str, phase: Phase, engine: str) -> None:
    """All of the time rests on something: sections, host and launches sum to the step."""
    sure, total, _ = sure_of(name, engine, phase)
    np.testing.assert_allclose(sum(sure.basis[kind] for kind in KINDS), 1.0, rtol=1e-12)
    seconds = sum(cause.seconds for cause in sure.causes)
    np.testing.assert_allclose(seconds, total, rtol=1e-9)
    assert np.all(sure.low < 1.0)
    assert np.all(sure.high > 1.0)


def test_the_time_of_a_section_is_that_of_its_rows() -> None:
    """Attention of all layers, row by row through the step model."""
    sure, _, fleet = sure_of("dense tp8", "vllm-ascend", "decode")
    model = fleet.models[0]
    loads = forward_loads(
        "decode", fleet.engine, batch=4.0, new=1.0, prefix=1000.0, **DTYPES._asdict()
    )
    layers = model.graphs["decode"].stages[0].counts
    want = sum(
        layers[name] * float(model.price(row, loads[row.group]).total_s)
        for name, rows in model.rows["decode"].items()
        for row in rows
        if row.kind == "attention"
    )
    found = next(cause for cause in sure.causes if cause.name == "attention.decode")
    assert found.seconds[0] == pytest.approx(want, rel=1e-12)


def test_a_median_is_common_and_the_rest_scatters() -> None:
    """p90 of 0.1645 is a sigma of 0.1; a median of 0.03 leaves sqrt(0.1^2 - 0.03^2)."""
    common, scatter = section_scale(SECTION)
    assert common == 0.03
    assert scatter == pytest.approx(math.sqrt(0.01 - 0.0009), rel=1e-3)


def test_what_is_not_fitted_here_is_less_sure() -> None:
    """A borrowed section adds to its own error; one without errors takes those of its kind."""
    own = sum(v * v for v in section_scale(SECTION))
    borrowed = sum(v * v for v in section_scale(replace(SECTION, kind="derived")))
    blank = replace(SECTION, median_error=math.nan, p90_error=math.nan)
    derived, assumed, few = (
        sum(v * v for v in section_scale(replace(blank, kind=kind)))
        for kind in ("derived", "assumed", "fitted")
    )
    assert borrowed == pytest.approx(own + derived)
    assert own < derived < assumed
    assert own < few


def test_errors_that_scatter_average_out_and_common_ones_do_not() -> None:
    """Nine kernels of a section: a third of the scatter, all of the common part."""
    scale = Scale.of(0.0, 0.1645)
    draw = np.random.default_rng(3)
    times = np.full(9, 1.0)
    errors = draw.normal(0.0, scale.scatter, (20_000, 9)) @ times / times.sum()
    assert errors.std() == pytest.approx(scale.scatter / 3.0, rel=0.03)
    variance = scale.common**2 + scale.scatter**2 * (times**2).sum() / times.sum() ** 2
    assert math.sqrt(variance) == pytest.approx(scale.scatter / 3.0)


def test_a_band_holds_the_share_of_errors_that_it_says() -> None:
    """True times drawn around the price with the section's error: nine in ten are inside."""
    sure = operator_confidence(SECTION, np.ones(1))
    draw = np.random.default_rng(5)
    common, scatter = section_scale(SECTION)
    true = np.exp(draw.normal(0.0, math.hypot(common, scatter), 50_000))
    inside = np.mean((true >= sure.low[0]) & (true <= sure.high[0]))
    assert inside == pytest.approx(level(), abs=0.01)


def test_more_of_an_assumed_part_widens_the_band() -> None:
    """Decode on 16 dies is mostly collectives that are derived or assumed."""
    alone, _, _ = sure_of("dense tp1", "vllm-ascend", "decode")
    wide, _, _ = sure_of("dense tp8", "vllm-ascend", "decode")
    assert wide.basis["fitted"][0] < alone.basis["fitted"][0]
    cause, share = wide.weakest()
    assert cause.seconds[0] > 0.0
    assert 0.0 < share <= 1.0


@pytest.mark.parametrize("engine", ["vllm-ascend", "mindie"])
@pytest.mark.parametrize("name", CASES)
def test_a_served_step_is_its_sections_and_the_host(name: str, engine: str) -> None:
    """Nothing is counted twice: sections and host are no more than the mean step."""
    zero = np.zeros(3, dtype=np.int64)
    fleet = Fleet.of([load(name, engine=engine).model], zero, [DTYPES], zero)
    given = ServingInput(
        batch=np.asarray([1.0, 16.0, 128.0]),
        chunk=np.full(3, 2048.0),
        input_len=np.asarray([3000.0, 100.0, 700.0]),
        output_len=np.asarray([1.0, 300.0, 64.0]),
        **DTYPES._asdict(),
    )
    served = serve(fleet, given)
    sure = serving_confidence(fleet, given, served)
    step_s = served.compute_s + served.memory_s + served.collective_s + served.overhead_s
    seconds = sum(cause.seconds for cause in sure.causes)
    np.testing.assert_allclose(seconds, step_s, rtol=1e-9)
