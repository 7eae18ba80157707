"""A plan under a workload, request by request: `shardplan simulate`.

    plan -> layouts priced by their step models -> engines -> events -> figures

The plan's strategies are laid out and priced as its search did (`LayoutScorer`); an aggregated plan
is one deployment, a disaggregated one its pools and the link between them. `replicas` of all of it
stand side by side behind one router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.disagg import Link, link_between
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.simulate.deploy import Instance, units_of
from shardplan.costmodel.simulate.events import Sending, Simulation
from shardplan.costmodel.simulate.prices import StepTypes
from shardplan.costmodel.simulate.record import Limits, Mark, Recorder, saturation
from shardplan.costmodel.simulate.request import Asked, Request
from shardplan.costmodel.simulate.router import Router
from shardplan.costmodel.simulate.unit import Lane, Unit
from shardplan.costmodel.simulate.workload import Demand, requests
from shardplan.models.errors import InputError
from shardplan.models.spec import ModelSpec
from shardplan.search.evaluate import acceptance_of, context_tokens
from shardplan.search.plan import ClusterInfo, Plan, StrategyInfo
from shardplan.search.proof import model_of, scorer_of
from shardplan.search.space import Choice

__all__ = ["Simulated", "Watch", "instance_of", "simulate_plan"]

_TOLD = 1000
_MOST_MARKS = 1024


class Watch(Protocol):
    """Is told a run as it happens: a `Timeline`, or counts of it."""

    def step(self, unit: Unit, lane: Lane) -> None:
        """A step, or decode steps in a row, that ends."""

    def request(self, request: Request) -> None:
        """A request that has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What a run gave. `recorder` has the spreads and the course of the cache."""

    recorder: Recorder
    saturated: dict[str, float] | None
    engines: dict[str, Any]
    """How the deployment was simulated."""

    @property
    def verdict(self) -> str:
        """Whether what was offered was served, in one sentence."""
        if self.saturated is None:
            return "every request was served, and the queue did not grow"
        found = self.saturated
        return (
            f"saturated at {found['served_requests_per_s']:.4g} requests/s, the queue grows: "
            f"{found['offered_requests_per_s']:.4g} requests/s come, {found['waiting']:,.0f} "
            "waited when the last one came"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        return {
            "verdict": self.verdict,
            "saturated": self.saturated,
            "deployment": self.engines,
            **self.recorder.figures(),
        }


def instance_of(plan: Plan, model: str | None = None) -> Instance:
    """The deployment of an aggregated plan; `InputError` where what it names does not ship."""
    return _instance(plan, model_of(plan, model), plan.cluster, plan.strategy)


def _instance(plan: Plan, spec: ModelSpec, machine: ClusterInfo, way: StrategyInfo) -> Instance:
    """One deployment of a strategy of the plan."""
    scorer = scorer_of(plan, spec, machine, way)
    if scorer is None:
        raise InputError(
            "a plan is simulated on a cluster, device and engine that ship",
            got=f"{machine.name}, {machine.device}, {plan.request.engine_profile}",
            hint="search again with those by name",
        )
    choice = Choice.of(way)
    return Instance(
        model=scorer.model_for(choice),
        ledger=scorer.ledger,
        types=StepTypes(way.weight_dtype, way.kv_dtype, way.attention),
        slots=way.batch,
        chunk=max(way.chunk, 1 + way.mtp),
        context=context_tokens(plan.request.workload),
        max_context=plan.model.max_context,
    )


def _link(plan: Plan, infos: list[ClusterInfo]) -> Link:
    """What joins the pools of a disaggregated plan."""
    shared = plan.request.prefill_cards is None
    clusters: list[Cluster] = [
        load_cluster(one.name, nodes=one.nodes, device=one.device) for one in infos
    ]
    if not shared:
        clusters = [load_cluster(one.name, nodes=one.max_nodes) for one in clusters]
    return link_between(clusters[0], clusters[1], plan.request.cards, same=shared)


@dataclass(slots=True)
class _Run:
    """A simulation that is put together and run."""

    plan: Plan
    spec: ModelSpec
    demand: Demand
    replicas: int
    simulation: Simulation

    def units(self, one: Instance, count: int, after: list[Unit]) -> list[Unit]:
        """Units of `count` instances, numbered after those that there are."""
        return units_of(
            one,
            self.simulation,
            count=count * self.replicas,
            first=sum(len(unit.engines) for unit in after),
            first_unit=len(after),
            prefix_hit=self.demand.prefix_hit,
            shares_prefixes=self.demand.shares_prefixes,
        )

    def deploy(self, name: Router) -> None:
        """Give the simulation its engines."""
        plan = self.plan
        if not plan.pools:
            one = _instance(plan, self.spec, plan.cluster, plan.strategy)
            self.simulation.serve_with(self.units(one, 1, []), name)
            return
        pools = {pool.role: pool for pool in plan.pools}
        first, last = pools["prefill"], pools["decode"]
        sender = _instance(plan, self.spec, first.cluster, first.strategy)
        taker = _instance(plan, self.spec, last.cluster, last.strategy)
        sender = replace(sender, sends=True)
        taker = replace(taker, chunk=max(taker.chunk, taker.slots))
        units = self.units(sender, first.instances, [])
        sending = Sending(
            link=_link(plan, [first.cluster, last.cluster]),
            token_bytes=taker.token_bytes,
            senders=sender.ranks,
            receivers=taker.ranks,
        )
        later = self.units(taker, last.instances, units)
        self.simulation.serve_with(units, name, decode=later, sending=sending)


class _Marks:
    """How far the run had come at evenly spread arrivals, some hundreds of them."""

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


def simulate_plan(
    plan: Plan,
    demand: Demand,
    *,
    model: str | None = None,
    limits: Limits | None = None,
    router: Router = "least-load",
    replicas: int = 1,
    warmup: int = 0,
    acceptance: float | None = None,
    rows: Callable[[Request], None] | None = None,
    watch: Watch | None = None,
    progress: Callable[[int], None] | None = None,
) -> Simulated:
    """Serve the demand with the plan.

    `model` names the model's file where the plan's own name does not find it; `limits` and
    `acceptance` (of tokens predicted ahead) default to the plan's; `rows` is told every request as
    it ends, `progress` how many have ended. `InputError` for a workload or a plan that cannot be
    simulated.
    """
    spec, work = model_of(plan, model), plan.request.workload
    marks = _Marks()
    if limits is None:
        limits = Limits(plan.request.limits.ttft_s, plan.request.limits.tpot_s)

    def told(request: Request) -> None:
        if rows is not None:
            rows(request)
        if watch is not None:
            watch.request(request)
        if progress is not None and simulation.done % _TOLD == 0:
            progress(simulation.done)

    def coming() -> Iterator[Asked]:
        for one in requests(demand, plan.model.max_context):
            if demand.concurrency is None and simulation.arrived:
                marks.add(simulation)
            yield one
        marks.last(simulation)

    recorder = Recorder(
        limits=limits,
        warmup=warmup,
        rows=told,
        steps=None if watch is None else watch.step,
    )
    simulation = Simulation(
        coming(),
        recorder,
        closed=demand.concurrency,
        depth=plan.strategy.mtp,
        acceptance=acceptance_of(spec, work) if acceptance is None else acceptance,
        seed=demand.seed,
    )
    _Run(plan, spec, demand, replicas, simulation).deploy(router)
    recorder.blocks = sum(
        engine.blocks.total for unit in simulation.units for engine in unit.engines
    )
    simulation.run()
    if not recorder.requests:
        raise InputError(
            "`warmup` is below the number of requests",
            got=f"warmup={warmup}, requests={simulation.done}",
        )
    return Simulated(
        recorder=recorder,
        saturated=None if demand.concurrency is not None else saturation(marks.found),
        engines={**_described(simulation), "router": router, "replicas": replicas},
    )


def _described(simulation: Simulation) -> dict[str, Any]:
    """Engines, slots and blocks of either pool."""
    kinds: dict[str, dict[str, Any]] = {}
    for unit in simulation.units:
        for engine in unit.engines:
            role = "serve" if simulation.sending is None else "decode"
            own = kinds.setdefault(
                "prefill" if engine.policy.sends else role,
                {
                    "engines": 0,
                    "step_together": len(unit.engines),
                    "microbatches": engine.policy.batches,
                    "slots": engine.policy.slots,
                    "step_tokens": engine.policy.chunk,
                    "blocks": engine.blocks.total,
                    "block_tokens": engine.blocks.tokens,
                },
            )
            own["engines"] += 1
    return kinds
