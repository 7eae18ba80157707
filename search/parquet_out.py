"""Tables as Parquet files (extra `parquet`): what their CSV holds, each column with its type.

A cell that is empty in the CSV is null, but in columns of words. The same table and version of
pyarrow give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shardplan.models.atomic import write_atomically, written_bytes
from shardplan.models.errors import InputError
from shardplan.search.cli_common import check_file_out
from shardplan.search.trials import PARQUET, WORD_COLUMNS

__all__ = ["check_table_out", "require_pyarrow", "write_beside", "write_table"]

_WORDS = (*WORD_COLUMNS, "status", "message")
"""Columns of any table that are text, whatever their cells look like."""


def require_pyarrow(what: str, without: str = "") -> None:
    """`InputError` with the extra to install where `what` cannot be written in that format.

    `without`: an option that writes no table.
    """
    if without:
        raise InputError(f"`{what}` goes with tables", got=without, hint="leave one of them out")
    _modules(what)


def check_table_out(path: Path) -> None:
    """`InputError` unless the table can be written."""
    check_file_out(path)
    if path.suffix.lower() == PARQUET:
        require_pyarrow(str(path))


def write_table(path: Path, text: str) -> None:
    """Write a table that is given as CSV, whole or not at all; `.parquet` as Parquet, others as is.

    `InputError` where pyarrow is absent or the file cannot be written.
    """
    if path.suffix.lower() != PARQUET:
        write_atomically(path, text)
        return
    pyarrow, csv, parquet = _modules(str(path))
    types = dict.fromkeys(_WORDS, pyarrow.string())
    data = io.BytesIO(text.encode("utf-8"))
    try:
        table = csv.read_csv(
            data,
            # one block: types are then guessed from all of a column
            read_options=csv.ReadOptions(block_size=max(len(data.getbuffer()), 1)),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=types),
        )
    except pyarrow.ArrowInvalid as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise InputError(
            "this table cannot be a Parquet file", got=first, hint="name a .csv"
        ) from None
    with written_bytes(path) as file:
        parquet.write_table(table, file)


def write_beside(paths: Iterable[Path]) -> list[Path]:
    """Write the Parquet file of each CSV among some files, beside it; returns what was written."""
    made = []
    for path in paths:
        if path.suffix == ".csv":
            made.append(path.with_suffix(PARQUET))
            write_table(made[-1], path.read_text(encoding="utf-8"))
    return made


def _modules(what: str) -> tuple[Any, Any, Any]:
    try:
        import pyarrow
        from pyarrow import csv, parquet
    except ImportError:
        raise InputError(
            "Parquet files are written by pyarrow",
            got=what,
            hint="pip install 'shardplan[parquet]', or take the CSV",
        ) from None
    return pyarrow, csv, parquet
