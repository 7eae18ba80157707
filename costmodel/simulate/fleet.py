"""What is deployed, and a run of it under a demand, put together once for whoever simulates.

fleet     one deployment, or instances of prefill and decode and the link between them
service   demand -> requests -> router -> engines of the fleet -> recorder, in parts or at once
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from shardplan.costmodel.disagg import Link
from shardplan.costmodel.simulate.deploy import Instance, units_of
from shardplan.costmodel.simulate.events import Sending, Simulation
from shardplan.costmodel.simulate.record import Mark, Recorder, saturation
from shardplan.costmodel.simulate.request import Asked
from shardplan.costmodel.simulate.router import Router
from shardplan.costmodel.simulate.unit import Unit
from shardplan.costmodel.simulate.workload import Demand, requests

__all__ = ["Fleet", "Pools", "Service"]

_MOST_MARKS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """Prefill instances, and how many stand on either side of the link."""

    prefill: Instance
    prefill_instances: int
    decode_instances: int
    link: Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """All that serves."""

    serve: Instance
    """The deployment; with `pools`, one decode instance."""
    pools: Pools | None = None

    @property
    def instances(self) -> list[Instance]:
        """One of each kind."""
        return [self.serve] if self.pools is None else [self.pools.prefill, self.serve]

    def start(
        self, simulation: Simulation, demand: Demand, *, router: Router, replicas: int
    ) -> None:
        """Give a simulation the engines of so many replicas."""

        def units(one: Instance, count: int, after: list[Unit]) -> list[Unit]:
            return units_of(
                one,
                simulation,
                count=count * replicas,
                first=sum(len(unit.engines) for unit in after),
                first_unit=len(after),
                prefix_hit=demand.prefix_hit,
                shares_prefixes=demand.shares_prefixes,
            )

        pools, taker = self.pools, self.serve
        if pools is None:
            simulation.serve_with(units(taker, 1, []), router)
            return
        sender = replace(pools.prefill, sends=True)
        taker = replace(taker, chunk=max(taker.chunk, taker.slots))
        first = units(sender, pools.prefill_instances, [])
        simulation.serve_with(
            first,
            router,
            decode=units(taker, pools.decode_instances, first),
            sending=Sending(
                link=pools.link,
                token_bytes=taker.token_bytes,
                senders=sender.ranks,
                receivers=taker.ranks,
            ),
        )


class _Marks:
    """How far a run had come at evenly spread arrivals, some hundreds of them."""

    def __init__(self) -> None:
        self.found: list[Mark] = []
        self._every = 1

    def last(self, simulation: Simulation) -> None:
        """The last request has come."""
        self.found.append(
            Mark(simulation.now_s, simulation.arrived, simulation.done, simulation.waiting)
        )

    def add(self, simulation: Simulation) -> None:
        """A request has come."""
        if simulation.arrived % self._every:
            return
        self.last(simulation)
        if len(self.found) >= _MOST_MARKS:
            self.found = self.found[1::2]
            self._every *= 2


class Service:
    """A demand that a fleet serves; `run` goes on where it stopped.

    `InputError` and `InfeasibleError` as of `units_of` and `Simulation.run`.
    """

    def __init__(
        self,
        fleet: Fleet,
        demand: Demand,
        recorder: Recorder,
        *,
        acceptance: float,
        router: Router = "least-load",
        replicas: int = 1,
    ) -> None:
        self.demand, self.recorder, self._marks = demand, recorder, _Marks()
        self.simulation = Simulation(
            self._coming(fleet.serve.max_context),
            recorder,
            closed=demand.concurrency,
            depth=fleet.serve.model.mtp,
            acceptance=acceptance,
            seed=demand.seed,
        )
        fleet.start(self.simulation, demand, router=router, replicas=replicas)
        engines = (engine for unit in self.simulation.units for engine in unit.engines)
        recorder.blocks = sum(engine.blocks.total for engine in engines)

    def _coming(self, longest: int) -> Iterator[Asked]:
        for one in requests(self.demand, longest):
            if self.demand.concurrency is None and self.simulation.arrived:
                self._marks.add(self.simulation)
            yield one
        self._marks.last(self.simulation)

    def run(self, ended: int | None = None) -> None:
        """Until so many requests have ended, None: all."""
        self.simulation.run(ended)

    @property
    def saturated(self) -> dict[str, float] | None:
        """Where the queue grows so far: rates offered and served, and requests that wait."""
        if self.demand.concurrency is not None:
            return None
        return saturation(self._marks.found, uneven=1.0 / self.demand.burstiness)
