"""A judged configuration on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardplan.search.tables import add, memory_table, new_table, rate_text, seconds_text, show
from shardplan.search.tables_plan import strategy_words

if TYPE_CHECKING:
    from rich.console import Console

    from shardplan.search.lint_report import Finding, LintReport

__all__ = ["print_lint"]

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def print_lint(report: LintReport, console: Console) -> None:
    """Findings first, then what it does and what would be better."""
    where = f" on {report.cluster} ({report.device})" if report.cluster else ""
    console.print(
        f"{report.source}: {report.model}, {report.layout}{where}, engine {report.engine_profile}",
        markup=False,
    )
    console.print()
    for finding in report.findings:
        _print_finding(finding, console)
    if not report.findings:
        console.print("nothing speaks against it", style="bold green")
    console.print()
    if report.performance is not None:
        _print_speed(report, console)
    if report.memory:
        show(console, memory_table([row.model_dump() for row in report.memory]))
        console.print(report.lever, markup=False)
    _print_best(report, console)


def _print_finding(one: Finding, console: Console) -> None:
    rule = f" [{one.rule}]" if one.rule else ""
    console.print(f"{one.level}{rule}: {one.sentence}", style=_STYLES[one.level], markup=False)
    for word, text in (("got", one.got), ("try", one.hint), ("source", one.source)):
        if text:
            console.print(f"    {word}: {text.removeprefix('try ')}", markup=False)


def _print_speed(report: LintReport, console: Console) -> None:
    does, work = report.performance, report.workload
    if does is None or work is None:
        return
    title = f"{work.input_len} prompt and {work.output_len} output tokens"
    best = report.best
    columns = ["what", "this"] + (["best plan"] if best else [])
    table = new_table(title, *columns, right=columns[1:])
    rows = (
        ("output tokens/s", "output_tokens_per_s", rate_text),
        ("requests/s", "requests_per_s", rate_text),
        ("TTFT mean", "ttft_s", seconds_text),
        ("TPOT mean", "tpot_s", seconds_text),
        ("one request", "end_to_end_s", seconds_text),
    )
    for words, name, text in rows:
        cells = [text(getattr(does, name))]
        cells += [text(getattr(best.performance, name))] if best else []
        add(table, words, *cells)
    show(console, table)


def _print_best(report: LintReport, console: Console) -> None:
    best = report.best
    if best is None:
        return
    console.print()
    gain = "" if best.gain is None else f", {best.gain:.2f} times the output tokens a second"
    console.print(f"best plan: {strategy_words(best.strategy)}{gain}", markup=False)
