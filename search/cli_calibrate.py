"""`shardplan calibrate`: files of a profiler, or one measured step, to a device profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardplan.models.errors import InputError
from shardplan.search.cli_common import (
    Force,
    Json,
    check_file_out,
    note,
    print_json,
    stdout_console,
    whole,
)
from shardplan.search.completion import cluster_names_like, device_names_like, engine_names_like

if TYPE_CHECKING:
    from rich.console import Console

    from shardplan.costmodel.correct import FamilyFit
    from shardplan.search.calibrate import Calibrated

__all__ = ["calibrate"]

_MOST_SKIPPED = 15


def calibrate(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="kernel_details.csv, op_summary_*.csv, communication.json, hccl_test output, "
            "or the CSV of `shardplan profile`."
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="Device that was measured: a name or a TOML file.",
            autocompletion=device_names_like,
        ),
    ] = "",
    out: Annotated[Path | None, typer.Option("--out", help="Profile to write (TOML).")] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", help="Cluster of the collectives.", autocompletion=cluster_names_like
        ),
    ] = None,
    engine_profile: Annotated[
        str | None,
        typer.Option(
            "--engine-profile",
            help="Engine whose kernels were measured.",
            autocompletion=engine_names_like,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the profile.")] = None,
    ranks: Annotated[
        int | None, whole("--ranks", "Ranks of the collectives, where no file says.")
    ] = None,
    context: Annotated[
        int | None, whole("--context", "Tokens of each sequence, where no shape says.")
    ] = None,
    anchor: Annotated[
        str | None,
        typer.Option(
            "--anchor", help="One measured step: model=,cluster=,tp=,phase=,batch=,tokens=,step_ms="
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Correct the cost model by measurements of your own machine."""
    from shardplan.costmodel.profiler_files.measurement import ReadOptions
    from shardplan.models.atomic import write_atomically
    from shardplan.search.calibrate import calibrate_device, parse_anchor

    if not device:
        raise InputError("`--device` is needed", hint="see `shardplan devices`")
    for option, value, least in (("ranks", ranks, 2), ("context", context, 1)):
        if value is not None and not least <= value <= 2**30:
            raise InputError(f"`--{option}` is {least} or more", got=f"{option}={value}")
    if out is not None:
        _check_out(out, files or [], force)
    found = calibrate_device(
        files or [],
        device,
        cluster=cluster,
        engine_profile=engine_profile,
        name=name,
        options=ReadOptions(ranks=ranks, context=context),
        anchor=None if anchor is None else parse_anchor(anchor),
        folder=None if out is None else out.parent,
    )
    if out is not None:
        write_atomically(out, found.text)
    if json:
        print_json(_as_json(found, out))
    else:
        _print(found, stdout_console())
    _tell(found, out)


def _tell(found: Calibrated, out: Path | None) -> None:
    if found.anchor is None and all(fit.correction is None for fit in found.fits):
        note("note: no correction was kept; the profile prices as its device does")
    if out is None:
        note("nothing was written; give --out profile.toml")
    else:
        either = "" if found.cluster is None else f" or --cluster {out}"
        note(f"wrote {out}: give it as --device {out}{either}")


def _check_out(out: Path, files: Sequence[Path], force: bool) -> None:
    if out.suffix != ".toml":
        raise InputError("`--out` is a TOML file", got=str(out), hint="name it profile.toml")
    check_file_out(out)
    if any(out.resolve() == path.resolve() for path in files):
        raise InputError("`--out` must not be one of the files", got=str(out))
    if out.exists() and not force:
        raise InputError("`--out` exists", got=str(out), hint="give --force to overwrite it")


def _as_json(found: Calibrated, out: Path | None) -> dict[str, Any]:
    return {
        "name": found.name,
        "device": found.device.name,
        "cluster": found.cluster,
        "out": None if out is None else str(out),
        "files": [
            {
                "file": file.file,
                "format": file.format,
                "rows": file.rows,
                "used": sum(one.count for one in file.measurements),
                "shapes": len(file.measurements),
            }
            for file in found.files
        ],
        "skipped": [asdict(one) for one in found.skipped],
        "sections": [asdict(fit) for fit in found.fits],
        "anchor": None
        if found.anchor is None
        else {
            **asdict(found.anchor),
            "factor": found.anchor.factor,
            "step_before_s": found.anchor_before_s,
        },
    }


def _print(found: Calibrated, console: Console) -> None:
    from shardplan.search.tables import new_table, show

    table = new_table(
        "files", "file", "format", "rows", "used", "shapes", right=("rows", "used", "shapes")
    )
    for file in found.files:
        used = sum(one.count for one in file.measurements)
        table.add_row(
            file.file, file.format, f"{file.rows:,}", f"{used:,}", str(len(file.measurements))
        )
    if found.files:
        show(console, table)
        _print_fits(found.fits, console)
        _print_skipped(found, console)
    if found.anchor is not None:
        console.print(
            f"anchor: priced {found.anchor_before_s * 1e3:.3f} ms before; every kernel without a "
            f"correction of its own now costs {found.anchor.factor:.3f} times as much",
            markup=False,
        )


def _print_fits(fits: Sequence[FamilyFit], console: Console) -> None:
    from shardplan.search.tables import new_table, show

    columns = ("shapes", "median", "p90", "factor")
    table = new_table("error on rows left out of the fit", "kernel", *columns, "", right=columns)
    for fit in fits:
        change, before, after = fit.correction, fit.before, fit.after
        pairs = ((before.median, after.median), (before.p90, after.p90))
        errors = [f"{one:.1%}" + (f" -> {two:.1%}" if fit.form else "") for one, two in pairs]
        factor = "-" if change is None else f"{change.factor:.3f}"
        said = fit.reason if change is None else f"{fit.form}"
        table.add_row(fit.section, str(fit.shapes), *errors, factor, said)
    show(console, table)


def _print_skipped(found: Calibrated, console: Console) -> None:
    from shardplan.search.tables import new_table, show

    if not found.skipped:
        return
    table = new_table("not used", "kernel", "calls", "why", right=("calls",))
    ordered = sorted(found.skipped, key=lambda one: (-one.count, one.kernel))
    for one in ordered[:_MOST_SKIPPED]:
        table.add_row(one.kernel, f"{one.count:,}", one.reason)
    show(console, table)
    left = ordered[_MOST_SKIPPED:]
    if left:
        calls = sum(one.count for one in left)
        note(f"note: {len(left)} more kinds of kernel were not used, {calls} calls; see --json")
