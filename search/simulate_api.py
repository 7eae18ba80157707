"""`shardplan.simulate(...)`: a plan under a workload, request by request, from Python."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardplan.costmodel.simulate.router import ROUTERS, Router
from shardplan.costmodel.simulate.timeline import Timeline
from shardplan.models.errors import InputError
from shardplan.search.output import check_out
from shardplan.search.plan import Plan
from shardplan.search.simulate import Simulated, simulate_plan
from shardplan.search.simulate_demand import read_demand
from shardplan.search.simulate_out import requests_file, write_simulation
from shardplan.search.workload import one_of, whole

__all__ = ["SimulationResult", "simulate"]

_MOST_REPLICAS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """What the requests of a workload saw."""

    summary: dict[str, Any]
    """As `simulate --json` prints it: verdict, spreads of TTFT, TPOT and end to end, rates, cache.
    """
    simulated: Simulated
    """The run, with its recorder."""
    notes: tuple[str, ...]
    """What was assumed of the workload."""


def simulate(
    plan: Plan | str | os.PathLike[str],
    *,
    workload: str | os.PathLike[str] | None = None,
    model: str | None = None,
    rate: float | None = None,
    burstiness: float | None = None,
    concurrency: int | None = None,
    input_len: int | None = None,
    output_len: int | None = None,
    num_prompts: int | None = None,
    prefix_hit: float | None = None,
    mtp_acceptance: float | None = None,
    ttft_ms: float | None = None,
    tpot_ms: float | None = None,
    router: Router = "least-load",
    replicas: int = 1,
    warmup: int = 0,
    seed: int | None = None,
    timeline: bool = False,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SimulationResult:
    """Serve a workload with a plan, and tell what its requests see.

    `plan`: a `Plan`, or the path of a plan.json. `workload`: a TOML file or a trace; what is said
    beside it stands before what it says, and that before the plan's own. `model` names the model's
    file where the plan's own name does not find it. `replicas` of the plan stand behind one
    `router` (round-robin, least-load or prefix-aware); the first `warmup` requests are not counted.
    `out`: a folder for the files of the command, with `timeline` also timeline.json. `progress` is
    told requests done and in all.
    Raises `InputError` for a workload or a plan that cannot be simulated.
    """
    given = {
        "rate": rate, "burstiness": burstiness, "concurrency": concurrency,
        "input_len": input_len, "output_len": output_len, "num_prompts": num_prompts,
        "prefix_hit": prefix_hit, "mtp_acceptance": mtp_acceptance, "ttft_ms": ttft_ms,
        "tpot_ms": tpot_ms, "seed": seed,
    }  # fmt: skip
    one_of("router", router, ROUTERS)
    whole("replicas", replicas, _MOST_REPLICAS, try_=1)
    whole("warmup", warmup, 10**9, try_=0, least=0)
    if timeline and out is None:
        raise InputError("`timeline` goes with `out`", hint="name a folder")
    chosen = plan if isinstance(plan, Plan) else Plan.load(plan)
    asked = read_demand(None if workload is None else os.fspath(workload), given, chosen)
    demand, folder = asked.demand, None if out is None else Path(out)
    if folder is not None:
        check_out(folder, force=force)
    watch = Timeline() if timeline else None

    def told(done: int) -> None:
        if progress is not None:
            progress(done, demand.count or done)

    with requests_file(folder) as rows:
        found = simulate_plan(
            chosen,
            demand,
            model=model,
            replicas=replicas,
            router=router,
            warmup=warmup,
            limits=asked.limits,
            acceptance=asked.acceptance,
            rows=rows,
            watch=watch,
            progress=told,
        )
    summary = {"model": chosen.model.name, "cluster": chosen.cluster.name, **found.to_json()}
    if folder is not None:
        write_simulation(folder, found, summary, watch)
    return SimulationResult(summary=summary, simulated=found, notes=asked.notes)
