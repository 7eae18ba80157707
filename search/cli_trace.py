"""`shardplan trace`: one predicted step of each phase, kernel by kernel, for Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardplan.search.cli_common import (
    Device,
    Json,
    OptionalCluster,
    OptionalModel,
    check_file_out,
    note,
    print_json,
)

__all__ = ["trace"]


def trace(
    plan: Annotated[Path, typer.Argument(help="plan.json of a search.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The trace; trace.json beside the plan.")
    ] = None,
    ranks: Annotated[
        str, typer.Option("--ranks", help="all, or 0,4-7; auto: all while they are few.")
    ] = "auto",
    model: OptionalModel = None,
    cluster: OptionalCluster = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Write one predicted step of each rank as a trace for Perfetto."""
    from shardplan.search.plan import Plan
    from shardplan.search.predicted import predicted_steps
    from shardplan.search.trace import write_trace

    path = plan.parent / "trace.json" if out is None else out
    check_file_out(path)
    loaded = Plan.load(plan)
    steps = predicted_steps(loaded, model=model, cluster=cluster, device=device)
    said = write_trace(path, loaded, steps, ranks)
    if json:
        print_json({"file": str(path), **said})
        return
    typer.echo(path)
    for phase in ("prefill", "decode"):
        shown, there = said[f"{phase}_ranks_written"], said[f"{phase}_ranks"]
        note(f"{phase}: {said[f'{phase}_step_s'] * 1e3:.3f} ms, {shown:,} of {there:,} ranks")
