"""`shardplan simulate`: a plan under a workload request by request, or what a workload is like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shardplan.models.errors import InputError
from shardplan.search.cli_common import (
    Force,
    Json,
    OptionalModel,
    check_file_out,
    note,
    number,
    print_json,
    progress,
    stdout_console,
    whole,
)

__all__ = ["simulate"]

_WORKLOAD = (
    *("rate", "burstiness", "concurrency", "input_len", "output_len", "num_prompts"),
    *("prefix_hit", "mtp_acceptance", "ttft_ms", "tpot_ms", "seed"),
)
"""Options that say what keys of a workload file say."""


def simulate(
    plan: Annotated[Path | None, typer.Argument(help="plan.json of a search.")] = None,
    workload: Annotated[
        str | None, typer.Option("--workload", help="Workload TOML, or a trace (.csv, .jsonl).")
    ] = None,
    model: OptionalModel = None,
    rate: Annotated[float | None, number("--rate", "Requests a second.")] = None,
    burstiness: Annotated[
        float | None, number("--burstiness", "Shape of the gaps: 1 Poisson, below 1 bursts.")
    ] = None,
    concurrency: Annotated[int | None, whole("--concurrency", "Requests in flight.")] = None,
    input_len: Annotated[int | None, whole("--input-len", "Prompt tokens.")] = None,
    output_len: Annotated[int | None, whole("--output-len", "Output tokens.")] = None,
    num_prompts: Annotated[int | None, whole("--num-prompts", "Requests of the run.")] = None,
    prefix_hit: Annotated[
        float | None, number("--prefix-hit", "Share of a prompt found in the cache.")
    ] = None,
    mtp_acceptance: Annotated[
        float | None, number("--mtp-acceptance", "Share of tokens predicted ahead that is kept.")
    ] = None,
    ttft_ms: Annotated[float | None, number("--ttft-ms", "SLO: TTFT at most.")] = None,
    tpot_ms: Annotated[float | None, number("--tpot-ms", "SLO: TPOT at most.")] = None,
    router: Annotated[
        str, typer.Option("--router", help="round-robin, least-load or prefix-aware.")
    ] = "least-load",
    replicas: Annotated[int, whole("--replicas", "Deployments of the plan side by side.")] = 1,
    warmup: Annotated[int, whole("--warmup", "First requests that are not counted.")] = 0,
    seed: Annotated[int | None, whole("--seed", "Of lengths, arrivals and tokens kept.")] = None,
    describe: Annotated[
        bool, typer.Option("--describe", help="Tell what the workload is like; no plan.")
    ] = False,
    write_trace: Annotated[
        Path | None, typer.Option("--write-trace", help="Write the workload (.csv, .jsonl).")
    ] = None,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="Also timeline.json for Perfetto, into --out.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the files.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Serve a workload with a plan, and tell what its requests see."""
    said = dict(locals())
    given = {name: said[name] for name in _WORKLOAD}
    if describe or write_trace is not None:
        _describe(workload, given, write_trace, json)
        return
    if plan is None:
        raise InputError(
            "a simulation takes a plan", hint="name a plan.json, or use --describe with --workload"
        )
    if timeline and out is None:
        raise InputError("`--timeline` goes with `--out`", hint="name a folder")
    how = ("workload", "model", "router", "replicas", "warmup", "timeline", "out", "force")
    _simulate(plan, {**given, **{name: said[name] for name in how}}, json)


def _describe(path: str | None, given: dict[str, Any], written: Path | None, as_json: bool) -> None:
    from shardplan.costmodel.simulate.describe import describe
    from shardplan.costmodel.simulate.traces import is_trace, trace_lines
    from shardplan.costmodel.simulate.workload import requests
    from shardplan.models.atomic import written_atomically
    from shardplan.search.simulate_demand import read_demand
    from shardplan.search.tables_simulate import print_description

    asked = read_demand(path, given, None)
    for text in asked.notes:
        note(f"note: {text}")
    demand = asked.demand
    if written is not None:
        if not is_trace(written) or written.suffix == ".gz":
            raise InputError("`--write-trace` is a .csv or .jsonl file", got=str(written))
        check_file_out(written)
        with written_atomically(written) as file:
            for line in trace_lines(requests(demand), written.suffix):
                file.write(line)
        note(f"wrote {written}")
    with progress("reading") as show:
        found = describe(requests(demand), demand, lambda done: show(done, demand.count or done))
    if as_json:
        print_json(found)
    else:
        print_description(found, stdout_console())


def _simulate(path: Path, asked: dict[str, Any], as_json: bool) -> None:
    from shardplan.search.simulate_api import simulate as run
    from shardplan.search.tables_simulate import print_simulation

    with progress("simulating") as show:
        found = run(path, **asked, progress=show)
    for text in found.notes:
        note(f"note: {text}")
    if asked["out"] is not None:
        note(f"wrote {asked['out']}")
    if as_json:
        print_json(found.summary)
    else:
        print_simulation(found.summary, stdout_console())
