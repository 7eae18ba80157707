"""`shardplan profile`: operators and collectives measured on a machine at hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardplan.search.cli_common import (
    Json,
    check_file_out,
    note,
    print_json,
    progress,
    stdout_console,
)

if TYPE_CHECKING:
    from shardplan.search.profiling.rates import Peak
    from shardplan.search.profiling.run import Report

__all__ = ["profile"]


def profile(
    device: Annotated[str, typer.Option("--device", help="npu, cuda or cpu.")],
    out: Annotated[Path, typer.Option("--out", help="CSV; what it holds is not measured again.")],
    grid: Annotated[str, typer.Option("--grid", help="tiny, full, or a TOML file.")] = "full",
    ops: Annotated[
        str | None, typer.Option("--ops", help="Operators, such as matmul,attention_decode.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure operators of this machine, or collectives of its ranks.

    Needs PyTorch (and torch_npu for npu). Collectives, over 2 ranks to all:
    torchrun --nproc-per-node 8 --no-python shardplan profile --device npu --out ranks.csv
    """
    from shardplan.search.profiling.rates import peaks
    from shardplan.search.profiling.run import profile as run

    check_file_out(out)
    with progress(f"profile {device}") as show:
        report = run(device, out, grid, ops, show)
    if not report.leader:
        return
    _tell_problems(report)
    best = peaks(report.rows, report.target.cache_bytes)
    if json:
        print_json(_summary(report, best, out))
        return
    _print(report, best, out)


def _tell_problems(report: Report) -> None:
    for what, errors in report.failed.items():
        note(f"not measured: {what}, {len(errors)} points: {errors[0]}")
    for reason in report.refused:
        note(f"refused: {reason}")


def _summary(report: Report, best: list[Peak], out: Path) -> dict[str, Any]:
    target = report.target
    machine = {"name": target.name, "driver": target.driver, "torch_version": target.version}
    return {
        "out": str(out),
        "device": machine,
        "measured": report.measured,
        "kept": report.kept,
        "failed": {what: len(errors) for what, errors in report.failed.items()},
        "refused": report.refused,
        "rows": len(report.rows),
        "peaks": [{"what": p.what, "value": p.value, "unit": p.unit} for p in best],
    }


def _shown(peak: Peak) -> tuple[str, str]:
    scale, unit = {"FLOP/s": (1e-12, "TFLOP/s"), "bytes/s": (1e-9, "GB/s"), "s": (1e6, "us")}[
        peak.unit
    ]
    return f"{peak.value * scale:,.4g}", unit


def _sizes(peak: Peak) -> str:
    from shardplan.search.profiling.points import SIZES

    given = [(name, getattr(peak.point, name)) for name in SIZES]
    return " ".join(f"{name}={value}" for name, value in given if value)


def _print(report: Report, best: list[Peak], out: Path) -> None:
    from rich.table import Table

    target = report.target
    lead = f"{target.name}, driver {target.driver or 'unknown'}, PyTorch {target.version}"
    table = Table("best of", "", "", "at", title=lead, title_justify="left")
    table.columns[1].justify = "right"
    for peak in best:
        value, unit = _shown(peak)
        table.add_row(peak.what, value, unit, f"{peak.point.op} {_sizes(peak)}")
    stdout_console().print(table)
    done = f"{report.measured} points measured, {report.kept} already there"
    lost = sum(len(errors) for errors in report.failed.values())
    note(f"{done}, {lost} not possible here, {len(report.refused)} refused; {out}")
