"""Files of `shardplan validate --out`: a row a figure, the page, the picture.

Also the place of the table in a page that is otherwise written by hand (`between`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shardplan.models.atomic import write_atomically
from shardplan.models.errors import InputError
from shardplan.search.validate_plot import scatter_svg
from shardplan.search.validate_tables import figures_csv, to_markdown

if TYPE_CHECKING:
    from shardplan.search.validate import Report

__all__ = ["PAGE_MARKS", "between", "write_report"]

PAGE_MARKS = ("<!-- validation -->", "<!-- end of validation -->")
"""Lines of a page between which a table of errors stands."""


def write_report(report: Report, folder: Path) -> None:
    """Write validation.csv, validation.md and scatter.svg; the same report, the same bytes."""
    write_atomically(folder / "validation.csv", figures_csv(report))
    write_atomically(folder / "validation.md", to_markdown(report))
    write_atomically(folder / "scatter.svg", scatter_svg(report.figures))


def between(text: str, marks: tuple[str, str], inside: str) -> str:
    """The text with what stands between the two marks replaced; `InputError` without the marks."""
    head, start, rest = text.partition(marks[0])
    _, end, tail = rest.partition(marks[1])
    if not start or not end:
        raise InputError("the page has no place for the table", hint=" ... ".join(marks))
    return f"{head}{start}\n\n{inside.strip()}\n\n{end}{tail}"
