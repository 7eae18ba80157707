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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from shardplan.models.errors import InputError
from shardplan.models.parallel import AXES
from shardplan.search.plan import write_atomically
from shardplan.search.trial_table import TrialTable

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "INTEGER_COLUMNS",
    "LATER_COLUMNS",
    "NUMBER_COLUMNS",
    "SWITCH_COLUMNS",
    "TRIAL_COLUMNS",
    "WORD_COLUMNS",
    "read_all_trials",
    "read_trials",
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
_POSITIVE = (
    "ttft_s",
    "tpot_s",
    "end_to_end_s",
    "output_tokens_per_s",
    "output_tokens_per_s_per_card",
    "requests_per_s",
)
"""Of a feasible row."""
_TRUE = "true"
_FALSE = "false"
_MAX_INTEGER = 2**31 - 1
MAX_TRIALS_BYTES = 2**30
_CHUNK_ROWS = 100_000


def write_trials(path: Path, trials: TrialTable | DataFrame) -> None:
    """Write a trial table, whole or not at all; columns that are not the table's are left out.

    `InputError` when a column is missing or the file cannot be written.
    """
    table = TrialTable.of(trials)
    _require_columns(table.columns, "a trial table")
    rows = len(table)
    missing = {n: [value] * rows for n, value in LATER_COLUMNS.items() if n not in table.columns}
    lines = _lines({**table.columns, **missing}) if rows else ""
    write_atomically(path, ",".join(TRIAL_COLUMNS) + "\n" + lines)


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
            values = [_TRUE if value else _FALSE for value in values]
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

    Returns the columns of `TRIAL_COLUMNS`, in that order. `InputError` names the file, the line
    and the column of the first cell that breaks a rule.
    """
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
            chunksize=_CHUNK_ROWS,
        )
        with chunks, np.errstate(invalid="raise"):  # a whole number that is none
            frame = _join([_typed(chunk) for chunk in chunks])
    except (ValueError, ArithmeticError):  # pandas' parser and decoding errors are ValueErrors
        raise _first_fault(path) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if frame.empty:
        raise InputError("a trial table has at least one row below its header", got=str(path))
    return frame


def read_all_trials(paths: Iterable[Path]) -> DataFrame:
    """Several trial tables as one, in the order given; `InputError` as for one, or for none."""
    frames = [read_trials(path) for path in paths]
    if not frames:
        raise InputError("at least one trial table is needed", hint="name a trials.csv")
    return _join(frames)


def _read_dtypes() -> dict[str, str]:
    """What pandas parses each column as; integers that may be empty come in as floats."""
    return {
        **dict.fromkeys(SWITCH_COLUMNS, "bool"),
        **dict.fromkeys(WORD_COLUMNS, "str"),  # "category" would turn "80" into a number
        **dict.fromkeys(INTEGER_COLUMNS, "int32"),
        **dict.fromkeys(NUMBER_COLUMNS, "float64"),
        "rank": "float64",
    }


def _typed(chunk: DataFrame) -> DataFrame:
    """The final types of one chunk; `ValueError` where a cell breaks a rule."""
    frame = _completed(chunk).loc[:, list(TRIAL_COLUMNS)]
    rank = frame["rank"].fillna(0.0)
    if not ((rank >= 0) & (rank <= _MAX_INTEGER) & (rank == np.floor(rank))).all():
        raise ValueError("rank")
    frame = frame.assign(
        rank=rank.astype("int32"),
        **{name: frame[name].astype("category") for name in WORD_COLUMNS},
    )
    for name in INTEGER_COLUMNS[1:]:
        if (frame[name] < (name not in COUNT_COLUMNS)).any():
            raise ValueError(name)
    for name in NUMBER_COLUMNS:
        if np.isinf(frame[name]).any() or frame.loc[frame["feasible"], name].isna().any():
            raise ValueError(name)
    for name in _POSITIVE:
        if (frame.loc[frame["feasible"], name] <= 0).any():
            raise ValueError(name)
    return frame


def _join(frames: list[DataFrame]) -> DataFrame:
    """One frame after another; categories are united, so that words stay categories."""
    import pandas as pd
    from pandas.api.types import union_categoricals

    if len(frames) == 1:
        return frames[0].reset_index(drop=True)
    columns = {}
    for name in TRIAL_COLUMNS:
        parts = [frame[name] for frame in frames]
        if name in WORD_COLUMNS:
            columns[name] = pd.Series(union_categoricals(parts, sort_categories=True))
        else:
            columns[name] = pd.concat(parts, ignore_index=True)
    return pd.DataFrame(columns)


def _require_columns(columns: Iterable[object], what: str) -> None:
    held = {str(name) for name in columns}
    missing = [name for name in TRIAL_COLUMNS if name not in {*held, *LATER_COLUMNS}]
    if missing:
        raise InputError(
            f"{what} has the columns of trials.csv",
            got=f"missing {', '.join(missing)}",
            hint="`shardplan search` writes such a file",
        )


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError("the trial table cannot be read", got=f"{path}: {error.strerror}")


def _require_readable(path: Path) -> None:
    """The file exists, is not huge, and starts with the header of a trial table."""
    try:
        size = path.stat().st_size
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(io.StringIO(file.readline(1 << 16))), [])
    except OSError as error:
        raise _unreadable(path, error) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError("a trial table is CSV in UTF-8", got=f"{path}: {error}") from None
    if size > MAX_TRIALS_BYTES:
        raise InputError(
            "a trial table is at most 1 GiB",
            got=f"{path}: {size:,} bytes",
            hint="keep its best rows",
        )
    _require_columns(header, f"{path}:")
    if len(header) != len(set(header)):
        raise InputError("each column of a trial table stands there once", got=str(path))


def _first_fault(path: Path) -> InputError:
    """Where a table that pandas refused first breaks a rule, in words."""
    try:
        for fault in _faults(path):
            return fault
    except (UnicodeDecodeError, csv.Error) as error:
        return InputError("a trial table is CSV in UTF-8", got=f"{path}: {error}")
    except OSError as error:
        return _unreadable(path, error)
    return InputError("a trial table is CSV in UTF-8", got=str(path))


def _faults(path: Path) -> Iterator[InputError]:
    """Every cell that breaks a rule, in the order of the file."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(rows)
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if not row:
                continue
            if len(row) != len(header):
                yield InputError(
                    "a row of a trial table has a cell for each column",
                    got=f"{where}: {len(row)} cells, {len(header)} columns",
                )
                continue
            cells = dict(zip(header, row, strict=True))
            for name in (one for one in TRIAL_COLUMNS if one in cells):
                rule = _broken_rule(name, cells[name], feasible=cells["feasible"] == _TRUE)
                if rule:
                    yield InputError(rule, got=f"{where}, {name}={cells[name]!r}")


def _broken_rule(name: str, cell: str, *, feasible: bool) -> str:
    """The rule that a cell breaks, "" when it keeps them all."""
    if name in WORD_COLUMNS:
        return ""
    if name in SWITCH_COLUMNS:
        return "" if cell in (_TRUE, _FALSE) else "the cell is true or false"
    if name in INTEGER_COLUMNS:
        low = 0 if name in ("rank", *COUNT_COLUMNS) else 1
        kept = (not cell and name == "rank") or _holds(
            int, cell, lambda value: low <= value <= _MAX_INTEGER
        )
        return "" if kept else f"the cell is a whole number of at least {low}"
    if not cell:
        return "a feasible row has every number" if feasible else ""
    if not _holds(float, cell, math.isfinite):
        return "the cell is a number"
    if feasible and name in _POSITIVE and float(cell) <= 0:
        return "times and rates of a feasible row are above 0"
    return ""


def _holds(parse: Callable[[str], float], cell: str, rule: Callable[[float], bool]) -> bool:
    """Whether a cell parses and keeps a rule."""
    try:
        return rule(parse(cell))
    except (ValueError, OverflowError):
        return False
