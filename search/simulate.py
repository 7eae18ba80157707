"""A plan under a workload, request by request: `shardplan simulate`.

    plan -> layouts priced by their step models -> engines -> events -> figures

The plan's strategies are laid out and priced as its search did (`LayoutScorer`); an aggregated plan
is one deployment, a disaggregated one its pools and the link between them. `replicas` of all of it
stand side by side behind one router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.disagg import Link, link_between
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.simulate.deploy import Instance
from shardplan.costmodel.simulate.events import Simulation
from shardplan.costmodel.simulate.fleet import Fleet, Pools, Service
from shardplan.costmodel.simulate.prices import StepTypes
from shardplan.costmodel.simulate.record import Limits, Recorder
from shardplan.costmodel.simulate.request import Request
from shardplan.costmodel.simulate.router import Router
from shardplan.costmodel.simulate.unit import Lane, Unit
from shardplan.costmodel.simulate.workload import Demand
from shardplan.models.errors import InputError
from shardplan.models.spec import ModelSpec
from shardplan.search.evaluate import LayoutScorer, acceptance_of, context_tokens
from shardplan.search.plan import ClusterInfo, Plan, StrategyInfo
from shardplan.search.proof import model_of, scorer_of
from shardplan.search.space import Choice

__all__ = ["Simulated", "Watch", "deployed", "instance_of", "simulate_plan"]

_TOLD = 1000


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
    return deployed(scorer, Choice.of(way), way.batch, way.chunk)


def deployed(scorer: LayoutScorer, choice: Choice, slots: int, chunk: int) -> Instance:
    """One deployment of a strategy, for the workload and model of the scorer's question."""
    question = scorer.question
    return Instance(
        model=scorer.model_for(choice),
        ledger=scorer.ledger,
        types=StepTypes(choice.weight_dtype, choice.kv_dtype, choice.attention),
        slots=slots,
        chunk=max(chunk, 1 + scorer.parallel.mtp),
        context=context_tokens(question.workload),
        max_context=question.spec.max_context or 0,
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


def fleet_of(plan: Plan, spec: ModelSpec) -> Fleet:
    """All that a plan deploys."""
    if not plan.pools:
        return Fleet(serve=_instance(plan, spec, plan.cluster, plan.strategy))
    first, last = plan.pools
    pools = Pools(
        prefill=_instance(plan, spec, first.cluster, first.strategy),
        prefill_instances=first.instances,
        decode_instances=last.instances,
        link=_link(plan, [first.cluster, last.cluster]),
    )
    return Fleet(serve=_instance(plan, spec, last.cluster, last.strategy), pools=pools)


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
    if limits is None:
        limits = Limits(plan.request.limits.ttft_s, plan.request.limits.tpot_s)

    def told(request: Request) -> None:
        if rows is not None:
            rows(request)
        if watch is not None:
            watch.request(request)
        if progress is not None and simulation.done % _TOLD == 0:
            progress(simulation.done)

    recorder = Recorder(
        limits=limits,
        warmup=warmup,
        rows=told,
        steps=None if watch is None else watch.step,
    )
    service = Service(
        fleet_of(plan, spec),
        demand,
        recorder,
        acceptance=acceptance_of(spec, work) if acceptance is None else acceptance,
        router=router,
        replicas=replicas,
    )
    simulation = service.simulation
    service.run()
    if not recorder.requests:
        raise InputError(
            "`warmup` is below the number of requests",
            got=f"warmup={warmup}, requests={simulation.done}",
        )
    return Simulated(
        recorder=recorder,
        saturated=service.saturated,
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
