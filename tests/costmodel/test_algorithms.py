"""Algorithms between servers: HCCL's forms by hand, and that nothing else of a price moves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.costmodel.test_collectives import _ideal, _span

from shardplan.costmodel.basis import collective_sections
from shardplan.costmodel.calibration import load_calibration
from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.kernels.algorithms import ALGORITHMS, form, runs
from shardplan.costmodel.kernels.collectives import KINDS, CollectiveKind, collective
from shardplan.costmodel.load import Load
from shardplan.costmodel.optable import Overlap
from shardplan.costmodel.placement import TierSpan, group_tiers, with_algorithm
from shardplan.costmodel.step import StepModel
from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.catalog import load_model
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism


def seconds(kind: CollectiveKind, *spans: TierSpan, message: float) -> float:
    """In a benchmark over ideal links: 100 GB/s a rank, 25 GB/s a mesh link."""
    return float(collective(kind, spans, message, _ideal(), launch="graph").total_s)


@pytest.mark.parametrize(
    ("algorithm", "kind", "parties", "steps", "share"),
    [
        ("ring", "all_gather", 6, 5, 5 / 6),
        ("ring", "all_reduce", 6, 10, 10 / 6),
        ("NHR", "reduce_scatter", 6, 3, 5 / 6),
        ("NB", "all_reduce", 8, 6, 14 / 8),
        ("H-D_R", "all_reduce", 8, 6, 14 / 8),
        ("H-D_R", "all_reduce", 6, 2 * 2 + 2, 2 * 3 / 4 + 2),
        ("pairwise", "all_to_all", 4, 3, 3 / 16),
    ],
)
def test_steps_and_volume_are_those_of_hccls_guide(
    algorithm: str, kind: CollectiveKind, parties: int, steps: int, share: float
) -> None:
    found = form(algorithm, kind, parties)
    assert found[0] == steps
    assert found[1] == pytest.approx(share)
    span = replace(_span("roce", parties, latency_s=1e-6), algorithm=algorithm)
    wanted = steps * 1e-6 + share * 1e9 / 100e9
    assert seconds(kind, span, message=1e9) == pytest.approx(wanted)


@pytest.mark.parametrize(("kind", "passes"), [("all_gather", 1), ("all_reduce", 2)])
@pytest.mark.parametrize("message", [1e3, 1e6, 1e9])
def test_a_pipeline_runs_the_ring_between_servers_beside_the_mesh_inside(
    kind: CollectiveKind, passes: int, message: float
) -> None:
    """max(s/p b_inter + a_inter, s/p b_intra + a_intra) (p_inter - 1) + s/p b_intra + a_intra."""
    mesh = _span("mesh", 8, latency_s=5e-7)
    roce = replace(_span("roce", 4, latency_s=1.5e-6), algorithm="pipeline")
    own = message / 32
    inter, intra = own / 100e9 + 1.5e-6, own / 25e9 + 5e-7
    wanted = passes * (max(inter, intra) * 3 + intra)
    assert seconds(kind, mesh, roce, message=message) == pytest.approx(wanted)


def test_between_single_ranks_of_servers_a_pipeline_is_a_ring() -> None:
    ring, pipeline = (
        seconds("all_reduce", replace(_span("roce", 6), algorithm=name), message=1e8)
        for name in ("ring", "pipeline")
    )
    assert pipeline == ring


@given(
    algorithm=st.sampled_from(ALGORITHMS),
    kind=st.sampled_from(KINDS),
    nodes=st.sampled_from([2, 3, 4, 8]),
    message=st.floats(1e3, 1e9),
)
def test_what_an_algorithm_does_not_run_is_the_librarys(
    algorithm: str, kind: CollectiveKind, nodes: int, message: float
) -> None:
    cluster = load_cluster("atlas-800t-a2", nodes=nodes)
    spans = group_tiers(cluster, group=8 * nodes, stride=1)
    picked = with_algorithm(cluster, spans, algorithm)
    assert [one.algorithm for one in picked] == ["auto", algorithm]
    calibration = load_calibration("910b2")
    auto, other = (
        collective(kind, one, message, calibration, launch="host") for one in (spans, picked)
    )
    if not runs(algorithm, kind) or algorithm in ("NHR", "NB", "pairwise"):
        assert float(auto.total_s) == float(other.total_s)
    assert np.isfinite(other.total_s)
    parts = other.compute_s + other.memory_s + other.overhead_s
    assert float(parts) == pytest.approx(float(other.total_s))


def test_a_halving_of_servers_that_are_no_power_of_two_moves_more() -> None:
    cluster = load_cluster("atlas-800t-a2", nodes=6)
    spans = group_tiers(cluster, group=6, stride=8)
    times = {
        name: seconds("all_reduce", *with_algorithm(cluster, spans, name), message=1e8)
        for name in ("auto", "NHR", "H-D_R")
    }
    assert times["NHR"] == times["auto"] < times["H-D_R"]


def test_the_supernodes_switch_takes_an_algorithm_and_the_node_does_not() -> None:
    cluster = load_cluster("cloudmatrix-384", nodes=4)
    spans = group_tiers(cluster, group=64, stride=1)
    picked = with_algorithm(cluster, spans, "NHR")
    assert [one.algorithm for one in picked] == ["auto", "auto", "NHR"]
    calibration = load_calibration("a3-die")
    few, many = (
        float(collective("all_reduce", one, 1e5, calibration, launch="graph").total_s)
        for one in (spans, picked)
    )
    assert few < many


def test_a_price_by_another_algorithm_is_derived_at_best() -> None:
    cluster = load_cluster("cloudmatrix-384", nodes=4)
    spans = group_tiers(cluster, group=4, stride=16)
    calibration = load_calibration("a3-die")
    kinds = [
        next(collective_sections(calibration, "all_reduce", one)).kind
        for one in (spans, with_algorithm(cluster, spans, "ring"))
    ]
    assert kinds == ["fitted", "derived"]


def test_a_layout_is_priced_by_its_algorithm_and_shares_memory_of_prices() -> None:
    """tp 8 on four nodes of 8 never leaves them; experts over all ranks do."""
    cluster, engine = load_cluster("atlas-800t-a2", nodes=4), load_engine("vllm-ascend")
    spec, par = load_model("qwen3-30b-a3b"), Parallelism(tp=4, dp=8, ep=32)
    phases: tuple[Phase, ...] = ("prefill", "decode")
    graphs = {phase: apply(build_graph(spec, phase), par) for phase in phases}
    base = StepModel.of(graphs, cluster, engine)
    load = Load.of("prefill", engine, tokens=np.arange(64.0, 64.0 * 101, 64.0))
    totals = {}
    for name in ("auto", "ring", "pipeline"):
        overlap = Overlap(collectives=name)
        shared = StepModel.of(graphs, cluster, engine, base.memo, overlap)
        alone = StepModel.of(graphs, cluster, engine, overlap=overlap)
        totals[name] = shared.parts("token", load)[0].collective_s
        assert np.array_equal(totals[name], alone.parts("token", load)[0].collective_s)
    assert np.array_equal(totals["auto"], base.parts("token", load)[0].collective_s)
    assert (totals["ring"] > totals["auto"]).all()
    assert not np.array_equal(totals["pipeline"], totals["auto"])
