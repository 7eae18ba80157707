"""`shardplan validate`: how far predictions are from measured figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardplan.models.errors import InputError
from shardplan.search.cli_common import (
    Device,
    EngineProfile,
    Force,
    Json,
    OptionalCluster,
    note,
    print_json,
    stdout_console,
)

__all__ = ["FILES", "validate"]

FILES = ("validation.csv", "validation.md", "scatter.svg")


def validate(
    table: Annotated[
        Path | None,
        typer.Argument(help="Your own CSV: columns of `estimate --points` and measured_s, ..."),
    ] = None,
    group: Annotated[
        str, typer.Option("--group", help="Only groups and families whose name holds this.")
    ] = "",
    cluster: OptionalCluster = None,
    device: Device = None,
    engine_profile: EngineProfile = None,
    out: Annotated[
        Path | None, typer.Option("--out", help=f"Folder for {', '.join(FILES)}.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Compare prices with measured figures: ours, or your own."""
    from shardplan.search.output import check_out
    from shardplan.search.validate import to_json
    from shardplan.search.validate import validate as compare
    from shardplan.search.validate_tables import print_report

    given = {"cluster": cluster, "device": device, "engine_profile": engine_profile}
    defaults = {name: value for name, value in given.items() if value is not None}
    if table is None and defaults:
        raise InputError(
            "the figures that ship name their own machines",
            got=", ".join(f"--{name.replace('_', '-')}" for name in defaults),
            hint="give a table of your own with it",
        )
    if out is not None:
        check_out(out, force=force)
    report = compare(table, group=group, defaults=defaults)
    if out is not None:
        from shardplan.search.validate_out import write_report

        write_report(report, out)
        note(f"wrote {out}: {', '.join(FILES)}")
    if json:
        print_json(to_json(report))
    else:
        print_report(report, stdout_console())
    if report.unpriced:
        note(f"note: {len(report.unpriced)} of {len(report.figures)} figures could not be priced")
    if report.unfit:
        note(
            f"note: {len(report.unfit)} figures are of runs that should not fit the memory; "
            f"the first is {report.unfit[0].where}"
        )
