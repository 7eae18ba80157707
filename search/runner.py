"""One strategy in the simulator, as far as it was run, and what it is worth there in one number.

    holds      output tokens a second, or 1 / the mean time of a request; at a rate, where all serve
               what is offered, 1 / the place in the order of the steady state
    does not   minus the sum over limits of (value - limit) / value, and the share of requests that
               wait where the queue grows

so that strategies that keep every limit and serve what comes stand before others; one that cannot
hold a request of the workload stands behind all.

Requests of a step s: 250 s, and 1 + sqrt(s) times those in flight at least. As many as are in
flight end before it counts: their times are those of the start. Then

    tokens a second = tokens of the requests that end / the time in which they do
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from shardplan.costmodel.simulate.fleet import Fleet, Service
from shardplan.costmodel.simulate.record import Recorder
from shardplan.costmodel.simulate.request import Request
from shardplan.costmodel.simulate.workload import Demand
from shardplan.models.errors import InfeasibleError, InputError
from shardplan.search.plan import Limits, Workload
from shardplan.search.plan_refinement import SimulatedRun
from shardplan.search.staged import FACTOR, STEPS

__all__ = ["Aim", "Runner"]

_REQUESTS = 250
"""Of step 1."""
_NEAR = 0.1
"""A percentile this near to its limit, relatively, is looked at for longer."""
_UNABLE = -10.0
"""Below all sums of misses, each of which is below 1."""


class Aim(NamedTuple):
    """What a run is judged by."""

    limits: Limits
    objective: str
    work: Workload

    def missed(self, run: SimulatedRun) -> float:
        """By how much limits are missed, and what waits; 0 where all hold."""
        missed = run.waiting
        for name, most in self.limits.model_dump().items():
            value = float(getattr(run, name))
            if most is not None and value > most:
                missed += 1.0 - float(most) / value
        return missed

    def near(self, run: SimulatedRun) -> bool:
        """Whether a percentile is near its limit."""
        pairs = (
            (run.ttft_p99_s, self.limits.ttft_p99_s),
            (run.tpot_p99_s, self.limits.tpot_p99_s),
        )
        return any(most and abs(value / most - 1.0) < _NEAR for value, most in pairs)


class _Served:
    """A service that has run full, and what it did since then."""

    def __init__(self, fleet: Fleet, demand: Demand, warmup: int, acceptance: float) -> None:
        self._tokens = 0
        recorder = Recorder(warmup=warmup, rows=self._told)
        self.service = Service(fleet, demand, recorder, acceptance=acceptance)
        self.service.run(warmup)
        self._before, self._since_s = self._tokens, self.service.simulation.now_s

    def _told(self, request: Request) -> None:
        self._tokens += request.output_len

    @property
    def run(self) -> SimulatedRun:
        """What was seen so far."""
        found, grows = self.service.recorder, self.service.saturated
        figures, simulation = found.figures(), self.service.simulation
        later = figures["tpot_s"] if found.tpot.count else {"mean": 0.0, "p99": 0.0}
        return SimulatedRun(
            requests=found.requests,
            ttft_s=figures["ttft_s"]["mean"],
            ttft_p99_s=figures["ttft_s"]["p99"],
            tpot_s=later["mean"],
            tpot_p99_s=later["p99"],
            end_to_end_s=figures["end_to_end_s"]["mean"],
            output_tokens_per_s=(self._tokens - self._before) / (simulation.now_s - self._since_s),
            waiting=0.0 if grows is None else grows["waiting"] / simulation.arrived,
        )


@dataclass(slots=True, kw_only=True)
class Runner:
    """One strategy, as far as it was simulated."""

    aim: Aim
    fleet: Callable[[], Fleet]
    """Made when it is first simulated."""
    demand: Demand
    """But for its count."""
    in_flight: int
    """Requests at a time, about."""
    place: int
    """In the order of the steady state, from 1."""
    objective: float
    """Of the steady state."""
    acceptance: float
    refusal: InputError | InfeasibleError | None = field(default=None, init=False)
    """Why it cannot serve the workload."""
    run: SimulatedRun | None = field(default=None, init=False)
    """What was seen so far."""
    done: int = field(default=0, init=False)
    """Requests that were simulated."""
    _served: _Served | None = field(default=None, init=False)

    @classmethod
    def of(
        cls,
        aim: Aim,
        fleet: Callable[[], Fleet],
        demand: Demand,
        *,
        place: int,
        in_flight: int,
        columns: Mapping[str, float],
        acceptance: float,
    ) -> Runner:
        """At the rate, or with `in_flight` requests; `columns`: what the steady state says."""
        rate = aim.work.request_rate
        if rate is not None:
            in_flight = round(rate * columns["end_to_end_s"])
        return cls(
            aim=aim,
            fleet=fleet,
            demand=replace(demand, rate=rate, concurrency=in_flight if rate is None else None),
            in_flight=in_flight,
            place=place,
            objective=columns["objective"],
            acceptance=acceptance,
        )

    @property
    def _warmup(self) -> int:
        return max(_REQUESTS // 10, self.in_flight)

    def _requests(self, step: int) -> int:
        return max(_REQUESTS * step, (1 + math.isqrt(step)) * self.in_flight)

    def advance(self, step: int) -> float:
        """As `Racer` says."""
        try:
            served = self._served = self._served or self._started()
            served.service.run(self._requests(step))
        except (InputError, InfeasibleError) as error:
            self.refusal, self.run = error, None
            self.drop()
            return _UNABLE
        self.run, self.done = served.run, served.service.simulation.done
        return self._value(self.run)

    def _started(self) -> _Served:
        fleet = self.fleet()
        for one in fleet.instances:  # what the one before asked of the same layout
            one.model.forget()
        demand = replace(self.demand, count=self._requests(STEPS[-1] * FACTOR))
        return _Served(fleet, demand, self._warmup, self.acceptance)

    def drop(self) -> None:
        """As `Racer` says."""
        self._served = None

    def _value(self, run: SimulatedRun) -> float:
        missed = self.aim.missed(run)
        if missed > 0.0:
            return -missed
        if self.aim.objective == "latency":
            return 1.0 / run.end_to_end_s
        rate = self.aim.work.request_rate
        return run.output_tokens_per_s if rate is None else 1.0 / self.place

    @property
    def holds(self) -> bool:
        """Whether every limit is kept and what comes is served, as far as it was run."""
        return self.run is not None and not self.aim.missed(self.run)

    @property
    def undecided(self) -> bool:
        """As `Racer` says."""
        return self.run is not None and self.aim.near(self.run)
