"""The trial table: `trials.csv` and `pareto.csv`, one row a strategy, the best first.

Columns are stable, in the order of `TRIAL_COLUMNS`; a reader takes files with further columns
and drops them, and takes what `LATER_COLUMNS` says where a file lacks one of those. Seconds,
bytes and their rates, as everywhere. `objective` is better the larger it is. `compute_s`,
`memory_s`, `collective_s` and `overhead_s` are those of one average step.

Floats are written with nine significant digits: the same table gives the same bytes, and a
table that was read is written as it was read. A cell without a finite number is empty, which only
rows with `feasible` false may have; `rank` is 0 there.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from shardplan.models.atomic import write_atomically
from shardplan.models.errors import InputError
from shardplan.models.parallel import AXES
from shardplan.search.trial_table import TrialTable

if TYPE_CHECKING:
    from pandas import DataFrame, Series

    Columns = dict[str, Series[Any]]

__all__ = [
    "CHUNK_ROWS",
    "COUNT_COLUMNS",
    "FALSE",
    "INTEGER_COLUMNS",
    "LATER_COLUMNS",
    "MAX_INTEGER",
    "MAX_TRIALS_BYTES",
    "NUMBER_COLUMNS",
    "PARQUET",
    "POOL_COLUMNS",
    "POSITIVE",
    "SWITCH_COLUMNS",
    "TRIAL_COLUMNS",
    "TRUE",
    "WORD_COLUMNS",
    "columns_of",
    "joined",
    "read_trials",
    "require_columns",
    "trials_csv",
    "typed",
    "unreadable",
    "write_trials",
]

TRIAL_COLUMNS: tuple[str, ...] = (
    "rank",
    "feasible",
    "limit",
    "objective",
    "tp",
    "pp",
    "dp",
    "ep",
    "cp",
    "sp",
    "exchange",
    "stage_layers",
    "attention",
    "weight_dtype",
    "kv_dtype",
    "batch",
    "chunk",
    "ttft_s",
    "tpot_s",
    "end_to_end_s",
    "output_tokens_per_s",
    "output_tokens_per_s_per_card",
    "requests_per_s",
    "memory_bytes",
    "memory_free_bytes",
    "compute_s",
    "memory_s",
    "collective_s",
    "overhead_s",
    "engine",
    "weight_prefetch",
    "fused_collectives",
    "o_tp",
    "ffn_tp",
    "shared_tp",
    "head_tp",
    "embed_tp",
    "order",
    "mtp",
    "collectives",
    "serving",
    "prefill_instances",
    "decode_instances",
    "prefill_cards",
    "decode_cards",
    "prefill_tp",
    "prefill_pp",
    "prefill_dp",
    "prefill_ep",
    "prefill_chunk",
)
POOL_COLUMNS = (
    "prefill_instances",
    "decode_instances",
    "prefill_cards",
    "decode_cards",
    "prefill_tp",
    "prefill_pp",
    "prefill_dp",
    "prefill_ep",
    "prefill_chunk",
)
"""Of rows with serving disagg, whose other columns are of a decode instance; 0 in others."""
LATER_COLUMNS: Mapping[str, bool | int | str] = MappingProxyType(
    {
        "weight_prefetch": False,
        "fused_collectives": False,
        "o_tp": 0,
        "ffn_tp": 0,
        "shared_tp": 0,
        "head_tp": 0,
        "embed_tp": 0,
        "order": "-".join(AXES),
        "mtp": 0,
        "collectives": "auto",
        "serving": "agg",
        **dict.fromkeys(POOL_COLUMNS, 0),
    }
)
"""What files of earlier releases lack, and what holds in its place."""
SWITCH_COLUMNS = ("feasible", "sp", "weight_prefetch", "fused_collectives")
"""true | false."""
WORD_COLUMNS = (
    "limit",
    "exchange",
    "stage_layers",
    "attention",
    "weight_dtype",
    "kv_dtype",
    "engine",
    "order",
    "collectives",
    "serving",
)
COUNT_COLUMNS = ("o_tp", "ffn_tp", "shared_tp", "head_tp", "embed_tp", "mtp", *POOL_COLUMNS)
"""Whole numbers that may be 0."""
INTEGER_COLUMNS = ("rank", "tp", "pp", "dp", "ep", "cp", "batch", "chunk", *COUNT_COLUMNS)
NUMBER_COLUMNS = tuple(
    name for name in TRIAL_COLUMNS if name not in {*SWITCH_COLUMNS, *WORD_COLUMNS, *INTEGER_COLUMNS}
)
POSITIVE = (
    "ttft_s",
    "tpot_s",
    "end_to_end_s",
    "output_tokens_per_s",
    "output_tokens_per_s_per_card",
    "requests_per_s",
)
"""Of a feasible row."""
TRUE = "true"
FALSE = "false"
MAX_INTEGER = 2**31 - 1
MAX_TRIALS_BYTES = 2**30
CHUNK_ROWS = 100_000
PARQUET = ".parquet"
"""How the name of a table in that format ends."""


def write_trials(path: Path, trials: TrialTable | DataFrame) -> None:
    """Write a trial table, whole or not at all; columns that are not the table's are left out.

    `InputError` when a column is missing or the file cannot be written.
    """
    write_atomically(path, trials_csv(trials))


def trials_csv(trials: TrialTable | DataFrame) -> str:
    """A trial table as CSV; `InputError` when a column is missing."""
    table = TrialTable.of(trials)
    require_columns(table.columns, "a trial table")
    rows = len(table)
    missing = {n: [value] * rows for n, value in LATER_COLUMNS.items() if n not in table.columns}
    lines = _lines({**table.columns, **missing}) if rows else ""
    return ",".join(TRIAL_COLUMNS) + "\n" + lines


def _completed(frame: DataFrame) -> DataFrame:
    """The frame with the columns that earlier releases did not have."""
    missing = {name: value for name, value in LATER_COLUMNS.items() if name not in frame}
    return frame.assign(**missing)


def _lines(table: Mapping[str, Sequence[Any]]) -> str:
    """Rows as CSV. One format a row is six times as fast as pandas, which formats each cell."""
    formats, columns = [], []
    for name in TRIAL_COLUMNS:
        values = table[name]
        form = "%s"
        if name in SWITCH_COLUMNS:
            values = [TRUE if value else FALSE for value in values]
        elif name in WORD_COLUMNS:
            words = [word if isinstance(word, str) else "" for word in values]
            quoted = {word: _quoted(word) for word in set(words)}
            values = [quoted[word] for word in words]
        elif name in INTEGER_COLUMNS:
            form = "%d"
        elif not np.isfinite(np.array(values, dtype=np.float64)).all():
            values = [f"{value:.9g}" if math.isfinite(value) else "" for value in values]
        else:
            form = "%.9g"
        formats.append(form)
        columns.append(values)
    line = ",".join(formats) + "\n"
    return "".join(map(line.__mod__, zip(*columns, strict=True)))


def _quoted(word: str) -> str:
    """A cell of CSV: in quotes where the word holds a comma, a quote or a line's end."""
    if not any(mark in word for mark in ',"\r\n'):
        return word
    doubled = word.replace('"', '""')
    return f'"{doubled}"'


def read_trials(path: Path) -> DataFrame:
    """Read a trial table: words as categories, switches as bool, integers int32, the rest float.

    A file that ends in .parquet is read with pyarrow (extra `parquet`), any other as CSV. Returns
    the columns of `TRIAL_COLUMNS`, in that order. `InputError` names the file, the line and the
    column of the first cell that breaks a rule.
    """
    if path.suffix.lower() == PARQUET:
        from shardplan.search.trials_parquet import parquet_parts

        frame = joined(list(parquet_parts(path)))
    else:
        frame = _read_csv(path)
    if frame.empty:
        raise InputError("a trial table has at least one row below its header", got=str(path))
    return frame


def _read_csv(path: Path) -> DataFrame:
    import pandas as pd

    _require_readable(path)
    try:
        chunks = pd.read_csv(
            path,
            usecols=lambda name: name in TRIAL_COLUMNS,
            dtype=_read_dtypes(),
            keep_default_na=False,
            na_values={name: [""] for name in ("rank", *NUMBER_COLUMNS)},
            encoding="utf-8",
            chunksize=CHUNK_ROWS,
        )
        with chunks, np.errstate(invalid="raise"):  # a whole number that is none
            return joined([typed(chunk) for chunk in chunks])
    except (ValueError, ArithmeticError):  # pandas' parser and decoding errors are ValueErrors
        from shardplan.search.trial_faults import first_fault

        raise first_fault(path) from None
    except OSError as error:
        raise unreadable(path, error) from None


def _read_dtypes() -> dict[str, str]:
    """What pandas parses each column as; integers that may be empty come in as floats."""
    return {
        **dict.fromkeys(SWITCH_COLUMNS, "bool"),
        **dict.fromkeys(WORD_COLUMNS, "str"),  # "category" would turn "80" into a number
        **dict.fromkeys(INTEGER_COLUMNS, "int32"),
        **dict.fromkeys(NUMBER_COLUMNS, "float64"),
        "rank": "float64",
    }


def typed(chunk: DataFrame) -> Columns:
    """The final types of one chunk; `ValueError` with the column where a cell breaks a rule."""
    frame = _completed(chunk).loc[:, list(TRIAL_COLUMNS)]
    rank = frame["rank"].fillna(0.0)
    if not ((rank >= 0) & (rank <= MAX_INTEGER) & (rank == np.floor(rank))).all():
        raise ValueError("rank")
    frame = frame.assign(
        rank=rank.astype("int32"),
        **{name: frame[name].astype("category") for name in WORD_COLUMNS},
        **{name: frame[name].astype("int32") for name in INTEGER_COLUMNS[1:]},
    )
    for name in INTEGER_COLUMNS[1:]:
        if (frame[name] < (name not in COUNT_COLUMNS)).any():
            raise ValueError(name)
    for name in NUMBER_COLUMNS:
        if np.isinf(frame[name]).any() or frame.loc[frame["feasible"], name].isna().any():
            raise ValueError(name)
    for name in POSITIVE:
        if (frame.loc[frame["feasible"], name] <= 0).any():
            raise ValueError(name)
    return {name: values.copy() for name, values in columns_of(frame).items()}


def columns_of(frame: DataFrame) -> Columns:
    """The columns of a table, each by itself."""
    return {name: frame[name] for name in TRIAL_COLUMNS}


def joined(parts: list[Columns]) -> DataFrame:
    """One table after another; categories are united, so that words stay categories.

    Columns are taken out of the parts one by one, so that the whole is not held twice.
    """
    import pandas as pd
    from pandas.api.types import union_categoricals

    columns: Columns = {}
    for name in TRIAL_COLUMNS:
        some = [part.pop(name) for part in parts]
        if name in WORD_COLUMNS and len(some) > 1:
            columns[name] = pd.Series(union_categoricals(some, sort_categories=True))
        else:
            columns[name] = pd.concat(some, ignore_index=True) if some else pd.Series()
    return pd.DataFrame(columns, copy=False)


def require_columns(columns: Iterable[object], what: str) -> None:
    held = {str(name) for name in columns}
    missing = [name for name in TRIAL_COLUMNS if name not in {*held, *LATER_COLUMNS}]
    if missing:
        raise InputError(
            f"{what} has the columns of trials.csv",
            got=f"missing {', '.join(missing)}",
            hint="`shardplan search` writes such a file",
        )


def unreadable(path: Path, error: OSError) -> InputError:
    """A file that cannot be read, in words; not every library fills in `strerror`."""
    why = error.strerror or (str(error).splitlines() or ["it is damaged"])[0][:200]
    return InputError("the trial table cannot be read", got=f"{path}: {why}")


def _require_readable(path: Path) -> None:
    """The file exists, is not huge, and starts with the header of a trial table."""
    try:
        size = path.stat().st_size
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(io.StringIO(file.readline(1 << 16))), [])
    except OSError as error:
        raise unreadable(path, error) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError("a trial table is CSV in UTF-8", got=f"{path}: {error}") from None
    if size > MAX_TRIALS_BYTES:
        raise InputError(
            "a trial table is at most 1 GiB",
            got=f"{path}: {size:,} bytes",
            hint="keep its best rows",
        )
    require_columns(header, f"{path}:")
    if len(header) != len(set(header)):
        raise InputError("each column of a trial table stands there once", got=str(path))
