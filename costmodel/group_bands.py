"""How far off the time of each cost group may be: the error of its sections, of one strategy.

    variance_g = sum over sections s of g of (common_s T_gs)^2 + scatter_s^2 sum over kernels t^2
    band_g     = exp(-+ z sigma_g),  sigma_g^2 = ln(1 + variance_g / T_g^2)

T_gs is the time that an average step of the steady state spends in kernels of group g that
section s prices; the errors are those of `confidence`. Host and launches: the errors of the facts
that they rest on. Left out, as it scales every strategy alike: the error of the sum of kernels and
of the serving model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from shardplan.costmodel.bulk import Call, Fleet
from shardplan.costmodel.confidence import Cause, Tally, banded, fact_cause, section_cause
from shardplan.costmodel.cost_groups import COST_GROUPS, HOST, groups_of
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.load import Parts
from shardplan.costmodel.serving import Serving, ServingInput, replay
from shardplan.models.graph import Phase

__all__ = ["group_bands", "step_bands"]


@dataclass(slots=True, kw_only=True)
class _Watch:
    """A fleet's `watch`: one tally a cost group."""

    fleet: Fleet
    cluster: Cluster
    weight: Array | float = 1.0
    tallies: dict[str, Tally] = field(default_factory=dict)

    def __call__(self, phase: Phase, call: Call, seconds: Array) -> None:
        """Take note of the seconds of one call in the group of its row."""
        group = groups_of(call.kernels.row, self.cluster)[0]
        if group not in self.tallies:
            self.tallies[group] = Tally.of(self.fleet)
        self.tallies[group].weight = self.weight
        self.tallies[group](phase, call, seconds)


def group_bands(
    fleet: Fleet, cluster: Cluster, given: ServingInput, served: Serving
) -> dict[str, tuple[float, float]]:
    """(low, high) factor on the time of each cost group that a fleet's one point spends time in."""
    watch = _Watch(fleet=fleet, cluster=cluster)

    def weigh(often: Array) -> None:
        watch.weight = np.broadcast_to(often, (fleet.which.size,))

    replay(fleet.watched(watch), given, served, weigh)
    decode_s = served.pure_share * fleet.host_s("decode")
    prefill_s = served.mixed_share * fleet.host_s("prefill")
    step_s = served.compute_s + served.memory_s + served.collective_s + served.overhead_s
    return _found(watch, step_s, decode_s, prefill_s)


def step_bands(
    fleet: Fleet, cluster: Cluster, phase: Phase, price: Callable[[Fleet], list[Parts]]
) -> dict[str, tuple[float, float]]:
    """The same of one step of a phase; `price` asks a fleet for its parts, stage by stage."""
    watch = _Watch(fleet=fleet, cluster=cluster)
    stages = fleet.step_s(price(fleet.watched(watch)), phase)
    host_s, none = np.full(1, fleet.host_s(phase)), np.zeros(1)
    step_s = sum(stages, np.zeros(1)) + host_s
    first = phase == "prefill"
    return _found(watch, step_s, none if first else host_s, host_s if first else none)


def _found(
    watch: _Watch, step_s: Array, decode_host_s: Array, prefill_host_s: Array
) -> dict[str, tuple[float, float]]:
    """Bands of what was watched; of a step, what is neither kernels nor host time is launches."""
    causes = {
        group: [section_cause(sums, 1.0) for sums in tally.sums.values()]
        for group, tally in watch.tallies.items()
    }
    counted = sum(float(one.seconds[0]) for ones in causes.values() for one in ones)
    left = np.maximum(step_s - decode_host_s - prefill_host_s - counted, 0.0)
    causes[HOST] = _host_causes(watch.fleet, decode_host_s, prefill_host_s, left)
    found = {group: _band(causes[group]) for group in COST_GROUPS if group in causes}
    return {group: band for group, band in found.items() if band is not None}


def _host_causes(fleet: Fleet, decode_s: Array, prefill_s: Array, left: Array) -> list[Cause]:
    """Host time of steps, and what is left: launches and gaps of kernels."""
    engine, device = fleet.engine, fleet.models[0].machine.device
    graph = engine.decode_graph
    owner, key = (engine, "launch_gap_s") if graph else (device, "host_launch_s")
    return [
        fact_cause(HOST, engine, "step_host_s", decode_s),
        fact_cause(HOST, engine, "prefill_step_host_s", prefill_s),
        fact_cause(HOST, owner, key, left),
    ]


def _band(causes: list[Cause]) -> tuple[float, float] | None:
    seconds = sum((one.seconds for one in causes), np.zeros(1))
    if not float(seconds[0]) > 0.0:
        return None
    variance = sum((one.variance for one in causes), np.zeros(1))
    sure = banded(tuple(causes), {}, variance / (seconds * seconds))
    return float(sure.low[0]), float(sure.high[0])
