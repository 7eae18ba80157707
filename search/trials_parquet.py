"""A trial table from a Parquet file, some rows at a time (extra `parquet`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardplan.models.errors import InputError
from shardplan.search.trial_faults import broken_rule
from shardplan.search.trials import (
    CHUNK_ROWS,
    FALSE,
    INTEGER_COLUMNS,
    MAX_TRIALS_BYTES,
    SWITCH_COLUMNS,
    TRIAL_COLUMNS,
    TRUE,
    WORD_COLUMNS,
    require_columns,
    typed,
    unreadable,
)

if TYPE_CHECKING:
    from shardplan.search.trials import Columns

__all__ = ["parquet_parts"]


def parquet_parts(path: Path) -> Iterator[Columns]:
    """The table's columns of some rows after others, in their final types.

    Words are strings (dictionaries too), switches booleans, counts whole numbers; columns that are
    not the table's are not read. `InputError` where pyarrow is absent or the file is no Parquet
    file or lacks a column, and with the row and the column of the first cell that breaks a rule.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            "Parquet files are read by pyarrow",
            got=str(path),
            hint="pip install 'shardplan[parquet]', or give a CSV",
        ) from None
    try:
        if path.stat().st_size > MAX_TRIALS_BYTES:
            raise InputError("a trial table is at most 1 GiB", got=str(path))
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            require_columns(names, f"{path}:")
            wanted = [name for name in TRIAL_COLUMNS if name in names]
            row = 1
            for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=wanted):
                yield _typed(path, row, batch)
                row += batch.num_rows
    except OSError as error:
        raise unreadable(path, error) from None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise InputError("a .parquet file is in that format", got=f"{path}: {first}") from None


def _typed(path: Path, row: int, batch: Any) -> Columns:
    """One batch, which begins at `row`."""
    import pandas as pd
    import pyarrow

    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    try:
        return typed(pd.DataFrame({name: _cast(name, one) for name, one in columns.items()}))
    except (ValueError, pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        return _refuse(path, row, columns)


def _cast(name: str, column: Any) -> Any:
    """A column as a CSV would give it; pyarrow's errors, or `ValueError`, where it cannot."""
    import pyarrow

    if name in WORD_COLUMNS:
        return column.cast(pyarrow.string()).fill_null("").to_pandas()
    if name in SWITCH_COLUMNS:
        if not pyarrow.types.is_boolean(column.type) or column.null_count:
            raise ValueError(name)
        return column.to_pandas()
    if pyarrow.types.is_boolean(column.type):
        raise ValueError(name)
    if name in INTEGER_COLUMNS and name != "rank":
        if column.null_count:
            raise ValueError(name)
        return column.cast(pyarrow.int32()).to_pandas()
    return column.cast(pyarrow.float64()).to_pandas()


def _refuse(path: Path, row: int, columns: dict[str, Any]) -> Columns:
    """`InputError` with the first cell that breaks a rule, row by row."""
    lists = {name: one.to_pylist() for name, one in columns.items()}
    for place, cells in enumerate(zip(*lists.values(), strict=True), start=row):
        held = dict(zip(lists, cells, strict=True))
        for name, cell in held.items():
            text = _text(cell)
            rule = broken_rule(name, text, feasible=held["feasible"] is True)
            if rule:
                raise InputError(rule, got=f"{path}, row {place}, {name}={text[:100]!r}")
    kinds = ", ".join(f"{name} {one.type}" for name, one in columns.items())
    raise InputError(
        "columns of a trial table are words, booleans, whole numbers and numbers",
        got=f"{path}: {kinds[:300]}",
        hint="write each column with the type that trials.csv shows",
    )


def _text(cell: object) -> str:
    """A cell as a CSV has it."""
    if isinstance(cell, bool):
        return TRUE if cell else FALSE
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell)
