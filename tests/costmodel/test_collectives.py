"""Collectives: alpha-beta forms by hand, floors by launch, and what must always hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.calibration import Calibration, Section, load_calibration
from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.errors import CalibrationError
from shardplan.costmodel.fitting.collective_tables import ServiceRow
from shardplan.costmodel.fitting.collectives import in_service
from shardplan.costmodel.hardware import Tier, Topology
from shardplan.costmodel.kernels.collectives import (
    CollectiveKind,
    Launch,
    collective,
    group_size,
)
from shardplan.costmodel.placement import TierSpan, group_tiers
from shardplan.models.errors import InputError

_KINDS: tuple[CollectiveKind, ...] = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "send",
)
_IDEAL = {
    **dict.fromkeys(
        (
            *("floor_s", "floor_rank_s", "base_s", "step_s", "sync_s", "e_r", "e_rr"),
            *("ramp_bytes", "ramp_r", "oneshot_bytes", "protocol_bytes", "protocol_s"),
        ),
        0.0,
    ),
    "efficiency": 1.0,
    "oneshot_efficiency": 1.0,
    "ranks_max": 8.0,
}
_CLUSTERS = ("atlas-800t-a2", "atlas-800i-a3", "atlas-800-9000", "atlas-300i-duo", "hgx-h200")


def _ideal(**changes: float) -> Calibration:
    """Links that reach their rate and cost nothing to start, but for `changes`."""
    section = Section(
        name="ideal",
        kind="assumed",
        source="hand-worked case",
        rows_fitted=0,
        rows_held_out=0,
        median_error=0.0,
        p90_error=0.0,
        coefficients=_IDEAL | changes,
    )
    topologies = ("mesh", "switch", "pair", "ring", "pcie", "roce")
    return Calibration(
        name="ideal", sections={f"collectives.{name}.graph.any": section for name in topologies}
    )


def _span(topology: Topology, members: int, latency_s: float = 0.0) -> TierSpan:
    """A tier of 100 GB/s a rank and 25 GB/s a link."""
    tier = Tier(
        name=topology,
        ranks=64,
        topology=topology,
        bytes_per_s=100e9,
        link_bytes_per_s=25e9,
        latency_s=latency_s,
    )
    return TierSpan(tier=tier, members=members)


def _seconds(kind: CollectiveKind, *spans: TierSpan, message: float = 1e9) -> float:
    return float(collective(kind, spans, message, _ideal(), launch="graph").total_s)


@pytest.mark.parametrize(
    ("kind", "topology", "members", "seconds"),
    [
        ("all_gather", "mesh", 4, 1e9 / 4 / 25e9),
        ("reduce_scatter", "mesh", 4, 1e9 / 4 / 25e9),
        ("all_reduce", "mesh", 4, 2 * 1e9 / 4 / 25e9),
        ("all_to_all", "mesh", 4, 1e9 / 16 / 25e9),
        ("send", "mesh", 4, 1e9 / 25e9),
        ("all_gather", "ring", 4, 0.75 * 1e9 / 100e9),
        ("all_reduce", "ring", 4, 1.5 * 1e9 / 100e9),
        ("all_reduce", "roce", 8, 1.75 * 1e9 / 100e9),
        ("all_to_all", "roce", 8, 7 / 8 * 1e9 / 8 / 100e9),
        ("all_gather", "pair", 2, 0.5 * 1e9 / 100e9),
        ("send", "switch", 8, 1e9 / 100e9),
    ],
)
def test_volume_over_the_rate_that_binds(
    kind: CollectiveKind, topology: Topology, members: int, seconds: float
) -> None:
    assert _seconds(kind, _span(topology, members)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("kind", "topology", "members", "steps"),
    [
        ("all_gather", "mesh", 8, 1),
        ("all_reduce", "mesh", 8, 2),
        ("all_reduce", "ring", 8, 14),
        ("all_gather", "roce", 6, 3),
        ("all_reduce", "roce", 8, 6),
        ("all_to_all", "roce", 8, 7),
        ("send", "ring", 8, 1),
    ],
)
def test_steps_of_each_algorithm(
    kind: CollectiveKind, topology: Topology, members: int, steps: int
) -> None:
    assert _seconds(kind, _span(topology, members, 1e-6), message=0.0) == pytest.approx(
        steps * 1e-6
    )


def test_all_reduce_over_two_tiers_crosses_the_slow_one_with_a_share() -> None:
    """4 ranks in a mesh, 2 nodes: scatter 1/4 in, all_reduce of 1/4 out, gather 1/4 in."""
    inside = 2 * 1e9 / 4 / 25e9
    outside = 2 * 0.5 * 0.25e9 / 100e9
    assert _seconds("all_reduce", _span("mesh", 4), _span("roce", 2)) == pytest.approx(
        inside + outside
    )


def test_all_to_all_over_two_tiers_sends_a_rank_s_share_only() -> None:
    """A share of 1/8: 3/4 of it leaves within the node over 4 links, half of it crosses."""
    inside = 1e9 / 8 / 4 / 25e9
    outside = 0.5 * 1e9 / 8 / 100e9
    assert _seconds("all_to_all", _span("mesh", 4), _span("roce", 2)) == pytest.approx(
        inside + outside
    )


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [
        ("all_gather", 0.75 * 1e9 / 100e9),
        ("reduce_scatter", 0.75 * 1e9 / 100e9),
        ("all_reduce", 2 * 0.5 * 1e9 / 100e9 + 2 * 0.75 * 0.5e9 / 100e9),
    ],
)
def test_a_die_pair_s_link_carries_its_share_beside_the_switch(
    kind: CollectiveKind, seconds: float
) -> None:
    """8 dies in 4 packages: the pair's 1/8 takes less than the 3/4 that cross the switch."""
    assert _seconds(kind, _span("pair", 2), _span("switch", 4)) == pytest.approx(seconds)


def test_a_slow_pair_binds_where_its_share_takes_longer() -> None:
    slow = replace(_span("pair", 2).tier, bytes_per_s=1e9)
    pair = TierSpan(tier=slow, members=2)
    assert _seconds("all_gather", pair, _span("switch", 4)) == pytest.approx(0.5 * 0.25e9 / 1e9)


def _served(ranks: int, message: float, **changes: float) -> float:
    ideal = _ideal(**changes)
    spans = (_span("switch", ranks),)
    return float(
        collective("all_gather", spans, message, ideal, launch="host", in_service=True).total_s
    )


def test_service_adds_a_constant_by_dies_and_a_share_to_large_messages() -> None:
    """10 us on 16 ranks, a fourth of that on 8; 5 % beyond the size that leaves AIV."""
    known = {
        "service_s": 1e-5,
        "service_ranks": 16.0,
        "service_power": 2.0,
        "service_share": 0.05,
        "protocol_bytes": 1e6,
    }
    small = 1e6
    for ranks, more in ((16, 1e-5), (8, 2.5e-6), (32, 1e-5)):
        alone = (ranks - 1) / ranks * small / 100e9
        assert _served(ranks, small, **known) == pytest.approx(alone + more)
    alone = 15 / 16 * 1e9 / 100e9
    assert _served(16, 1e9, **known) == pytest.approx(1.05 * alone)


def test_a_launch_is_not_in_the_price_in_service() -> None:
    spans = group_tiers(load_cluster("atlas-800i-a3"), group=16, stride=1)
    calibration = load_calibration("a3-die")
    graph, host = (
        float(
            collective(
                "all_gather", spans, 1e5, calibration, launch=launch, in_service=True
            ).total_s
        )
        for launch in ("graph", "host")
    )
    assert graph == host
    alone = collective("all_gather", spans, 1e5, calibration, launch="host")
    assert float(alone.total_s) >= 43e-6 > graph


@pytest.mark.parametrize(
    ("kind", "dies", "shard_bytes", "bench_s", "service_s"),
    [
        ("all_gather", 16, 40.0 * 2**20, 3080.2e-6, 3141.1e-6),
        ("reduce_scatter", 16, 21.4 * 2**20, 2044.3e-6, 2115.1e-6),
        ("all_gather", 16, 297.0 * 2**10, 33.0e-6, 48.2e-6),
        ("all_gather", 8, 14.0 * 2**10, 5.6e-6, 7.0e-6),
        ("all_reduce", 16, 10.0 * 2**10, 12.1e-6, 19.8e-6),
    ],
)
def test_measured_a3_collectives_are_reproduced(
    kind: CollectiveKind, dies: int, shard_bytes: float, bench_s: float, service_s: float
) -> None:
    """Alone in a benchmark and inside a serving network (AIV, HCCL 8.5)."""
    spans = group_tiers(load_cluster("atlas-800i-a3"), group=dies, stride=1)
    calibration = load_calibration("a3-die")
    for inside, seconds in ((False, bench_s), (True, service_s)):
        time = collective(
            kind, spans, dies * shard_bytes, calibration, launch="graph", in_service=inside
        )
        assert time.total_s == pytest.approx(seconds, rel=0.06)


def test_service_constants_are_the_differences_of_the_two_columns() -> None:
    def row(kind: CollectiveKind, ranks: int, size: float, bench: float, more: float) -> ServiceRow:
        return ServiceRow(
            kind=kind,
            ranks=ranks,
            message_bytes=size,
            bench_s=bench * 1e-6,
            service_s=(bench + more) * 1e-6,
        )

    rows = [
        row("all_gather", 8, 1e4, 5.0, 1.0),
        row("all_gather", 8, 2e4, 5.5, 3.0),
        row("all_gather", 16, 1e5, 12.0, 16.0),
        row("all_gather", 16, 1e9, 4000.0, 100.0),
        row("all_reduce", 16, 1e5, 12.0, 8.0),
    ]
    gather, reduce = in_service(rows, "all_gather"), in_service(rows, "all_reduce")
    assert (gather["service_s"], gather["service_power"]) == pytest.approx((16e-6, 3.0))
    assert gather["service_share"] == pytest.approx(0.025)
    assert (reduce["service_s"], reduce["service_power"]) == pytest.approx((8e-6, 3.0))


def test_a_small_all_reduce_reads_every_peer_once() -> None:
    ideal = _ideal(oneshot_bytes=1e5, floor_s=1e-5)
    time = collective("all_reduce", (_span("mesh", 8),), 5e4, ideal, launch="graph")
    assert time.total_s == pytest.approx(1e-5 + 5e4 / 25e9)


def test_large_messages_leave_the_fast_kernels() -> None:
    ideal = _ideal(protocol_bytes=1e6, protocol_s=5e-5)
    below, above = collective(
        "all_gather", (_span("switch", 8),), np.asarray([7.9e6, 8e6]), ideal, launch="graph"
    ).total_s
    assert above - below == pytest.approx(5e-5, rel=0.02)


def test_leaving_the_fast_kernels_costs_more_on_more_ranks() -> None:
    ideal = _ideal(protocol_bytes=1e6, protocol_s=1e-5, protocol_sync_s=2e-5)
    for ranks, more in ((2, 3e-5), (8, 7e-5)):
        sizes = ranks * np.asarray([0.999e6, 1e6])
        below, above = collective(
            "all_gather", (_span("switch", ranks),), sizes, ideal, launch="graph"
        ).total_s
        assert above - below == pytest.approx(more, rel=0.02)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
def test_a_910b_graph_saves_the_launch_of_small_messages_alone(
    kind: CollectiveKind, ranks: int
) -> None:
    """What hccl_test pays at every size is the device's own; only its floor is the launch."""
    spans = group_tiers(load_cluster("atlas-800t-a2"), group=ranks, stride=1)
    calibration = load_calibration("910b2")
    sizes = np.asarray([16e3, 256e6])
    graph, host = (
        collective(kind, spans, sizes, calibration, launch=launch).total_s
        for launch in ("graph", "host")
    )
    assert graph[0] < 0.5 * host[0]
    assert graph[1] == pytest.approx(host[1], rel=0.01)


@pytest.mark.parametrize(
    ("ranks", "message_bytes", "seconds"),
    [(2, 26_214_400, 1444.5e-6), (4, 596_046_447, 18000e-6), (8, 32_768_000, 556.7e-6)],
)
def test_measured_910b_all_reduce_is_reproduced(
    ranks: int, message_bytes: int, seconds: float
) -> None:
    """Single figures of hccl_test, launched by the host, on one 910B node."""
    spans = group_tiers(load_cluster("atlas-800t-a2"), group=ranks, stride=1)
    calibration = load_calibration("910b2")
    time = collective("all_reduce", spans, message_bytes, calibration, launch="host")
    assert time.total_s == pytest.approx(seconds, rel=0.06)


def test_a_graph_pays_a_smaller_floor_than_the_host() -> None:
    spans = group_tiers(load_cluster("atlas-800t-a2"), group=8, stride=1)
    calibration = load_calibration("910b2")
    host, graph = (
        float(collective("all_reduce", spans, 8192, calibration, launch=launch).total_s)
        for launch in ("host", "graph")
    )
    assert 40e-6 < host < 65e-6
    assert 10e-6 < graph < 25e-6


def test_an_engine_s_own_all_reduce_is_faster_for_small_messages() -> None:
    spans = group_tiers(load_cluster("hgx-h200"), group=8, stride=1)
    calibration = load_calibration("h200")
    library, own = (
        float(
            collective(
                "all_reduce", spans, 16384, calibration, launch="graph", custom=custom
            ).total_s
        )
        for custom in (False, True)
    )
    assert own < 0.5 * library


def test_a_group_of_one_costs_nothing() -> None:
    calibration = load_calibration("910b2")
    sizes = np.asarray([1.0, 1e9])
    for kind in _KINDS:
        alone = collective(kind, (_span("mesh", 1),), sizes, calibration, launch="host")
        nobody = collective(kind, (), sizes, calibration, launch="host")
        for part in (*alone, *nobody):
            assert part.shape == (2,)
            assert not part.any()


@given(
    small=st.integers(0, 2**33),
    more=st.integers(0, 2**33),
    group=st.sampled_from([2, 4, 8, 16, 32]),
)
@pytest.mark.parametrize("name", _CLUSTERS)
@pytest.mark.parametrize("kind", _KINDS)
def test_more_bytes_are_never_faster_and_the_parts_sum(
    name: str, kind: CollectiveKind, small: int, more: int, group: int
) -> None:
    nodes = 1 if name == "atlas-300i-duo" else 4
    cluster = load_cluster(name, nodes=nodes)
    spans = group_tiers(cluster, group=min(group, cluster.ranks), stride=1)
    calibration = load_calibration(cluster.device.calibration)
    settings: tuple[tuple[Launch, bool], ...] = (("graph", False), ("host", False), ("host", True))
    for launch, inside in settings:
        time = collective(
            kind,
            spans,
            np.asarray([small, small + more]),
            calibration,
            launch=launch,
            in_service=inside,
        )
        assert np.isfinite(time.total_s).all()
        assert time.total_s[0] <= time.total_s[1] * (1 + 1e-12)
        assert (time.overhead_s >= -1e-15).all()
        parts = time.compute_s + time.memory_s + time.overhead_s
        assert parts == pytest.approx(time.total_s)


def test_a_scalar_equals_its_array_element_and_shapes_are_kept() -> None:
    spans = group_tiers(load_cluster("atlas-800i-a3"), group=16, stride=1)
    assert group_size(spans) == 16
    calibration = load_calibration("a3-die")
    sizes = np.asarray([[1e3, 1e5, 1e7], [1e8, 1e9, 2e9]])
    many = collective("all_gather", spans, sizes, calibration, launch="graph")
    one = collective("all_gather", spans, 1e7, calibration, launch="graph")
    assert many.total_s.shape == (2, 3)
    assert one.total_s == many.total_s[0, 2]


def test_unknown_kinds_launches_and_missing_sections_are_named() -> None:
    spans = (_span("mesh", 8),)
    with pytest.raises(InputError, match="broadcast"):
        collective("broadcast", spans, 1, _ideal(), launch="graph")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="graph or host"):
        collective("send", spans, 1, _ideal(), launch="eager")  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"mesh\.host\.any"):
        collective("send", spans, 1, _ideal(), launch="host")
