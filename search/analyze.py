"""What a trial table says: the best, the trade-offs, and what each dimension is worth.

    loss(d = v)   = (best - best where d is v) / |best|                     of the objective
    share(d)      = sum_v n_v (m_v - m)^2 / sum_i (y_i - m)^2               correlation ratio
    y_i           = ln(output_tokens_per_s_per_card) of feasible row i; m their mean; m_v the mean
                    of the n_v rows where dimension d has value v

`loss` says what it costs to be forced to a value when all else is chosen anew; `share` how much
of the spread of the throughput a dimension explains by itself, over the strategies that are in
the table. A share is of the table, not of the space: a search that keeps its best rows only, or
that samples where it is good, shows less spread than there is. Shares need not add up to 1:
dimensions hang together (tp, pp and dp share the cards) and work together.

The Pareto front keeps the strategies that no other beats: throughput per card up, TPOT down,
TTFT down, at least as good in all three and better in one. Of strategies equal in all three the
first stands for all.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shardplan.models.errors import InputError
from shardplan.models.modules import MODULES
from shardplan.search.trials import TRIAL_COLUMNS

if TYPE_CHECKING:
    from pandas import DataFrame, Series

__all__ = [
    "DIMENSIONS",
    "Cell",
    "Dimension",
    "DimensionValue",
    "Row",
    "Summary",
    "best_first",
    "pareto_rows",
    "row_at",
    "row_name",
    "summarise",
    "to_json",
    "value_name",
]

DIMENSIONS: tuple[str, ...] = (
    "tp",
    "pp",
    "dp",
    "ep",
    "cp",
    "sp",
    "exchange",
    "stage_layers",
    "o_tp",
    "ffn_tp",
    "shared_tp",
    "head_tp",
    "embed_tp",
    "order",
    "mtp",
    "attention",
    "weight_dtype",
    "kv_dtype",
    "weight_prefetch",
    "fused_collectives",
    "collectives",
    "batch",
    "chunk",
)
"""Columns of a trial table whose worth is told."""
AXIS_NAMES = ("tp", "pp", "dp", "ep", "cp")
THROUGHPUT = "output_tokens_per_s_per_card"

Cell: TypeAlias = bool | int | float | str | None
Row: TypeAlias = Mapping[str, Cell]
"""One trial: the columns of `TRIAL_COLUMNS`; None where the table has no number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DimensionValue:
    """One value of a dimension and the best strategy that has it."""

    value: Cell
    trials: int
    feasible: int
    best: Row | None
    """None where nothing with this value is feasible."""
    loss: float | None
    """Of the objective against the best of all, 0 for none; None without a feasible row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """A dimension's values, the best first, and what the choice among them is worth."""

    name: str
    values: tuple[DimensionValue, ...]
    second_loss: float | None
    """Loss when forced to the second-best value; None where one value alone is feasible."""
    worst_loss: float | None
    """Loss when forced to the worst feasible value; None where one value alone is feasible."""
    variance_share: float | None
    """Of ln throughput over the feasible rows, 0 to 1; None where throughput does not vary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A trial table, summed up."""

    trials: int
    feasible: int
    best: Row | None
    """Largest objective; the better rank, then the earlier row, settles a tie."""
    dimensions: tuple[Dimension, ...]
    pareto: tuple[Row, ...]
    """Fastest per card first."""
    infeasible: Mapping[str, int]
    """Refused trials by the limit that refused them, most first."""


def summarise(frame: DataFrame) -> Summary:
    """Sum up a trial table as `read_trials` returns it. `InputError` for a table without rows."""
    if frame.empty:
        raise InputError("a trial table has at least one row", got="0 rows")
    good = best_first(frame)
    best = row_at(good, 0) if len(good) else None
    front = good.iloc[pareto_rows(good)] if len(good) else good
    return Summary(
        trials=len(frame),
        feasible=len(good),
        best=best,
        dimensions=tuple(_dimension(frame, good, name) for name in DIMENSIONS),
        pareto=tuple(row_at(front, index) for index in range(len(front))),
        infeasible=_refused(frame),
    )


def to_json(summary: Summary) -> dict[str, Any]:
    """The summary as plain JSON values, rows as objects of the table's columns."""
    return asdict(summary)


def best_first(frame: DataFrame) -> DataFrame:
    """The feasible rows, largest objective first, ties by rank and then by place in the table."""
    good = frame[frame["feasible"].to_numpy(bool)]
    order = np.lexsort((good["rank"].to_numpy(), -good["objective"].to_numpy(float)))
    return good.iloc[order].reset_index(drop=True)


def pareto_rows(frame: DataFrame) -> NDArray[np.int64]:
    """Places of the Pareto front in a table of feasible rows, fastest per card first.

    O(n log n): rows are taken fastest first, so a later one stays only if it beats the staircase
    of lowest TTFT by TPOT that the earlier ones leave.
    """
    speed, tpot_s, ttft_s = (
        frame[name].to_numpy(float) for name in (THROUGHPUT, "tpot_s", "ttft_s")
    )
    order = np.lexsort((ttft_s, tpot_s, -speed))
    stairs_tpot: list[float] = []
    stairs_ttft: list[float] = []
    kept = []
    points = zip(order.tolist(), tpot_s[order].tolist(), ttft_s[order].tolist(), strict=True)
    for place, tpot, ttft in points:
        at = bisect_right(stairs_tpot, tpot)
        if at and stairs_ttft[at - 1] <= ttft:
            continue
        kept.append(place)
        end = at
        while end < len(stairs_ttft) and stairs_ttft[end] >= ttft:
            end += 1
        stairs_tpot[at:end] = [tpot]
        stairs_ttft[at:end] = [ttft]
    return np.array(kept, dtype=np.int64)


def row_name(row: Mapping[str, Any]) -> str:
    """A strategy in a few words: `tp4 pp2 dp4 bf16 batch 128 chunk 8192`, 1 and off left out.

    Of pools: `16P pp16 chunk 1024 + 1D dp128 ep128 ...`, the latter as above.
    """
    if row.get("prefill_instances"):
        first = _axes_name({name: row[f"prefill_{name}"] for name in ("tp", "pp", "dp", "ep")})
        pools = f"{row['prefill_instances']}P {first} chunk {row['prefill_chunk']}"
        return f"{pools} + {row['decode_instances']}D {_one_name(row)}"
    return _one_name(row)


def _axes_name(row: Mapping[str, Any]) -> str:
    axes = [f"{axis}{size}" for axis in AXIS_NAMES if (size := row.get(axis, 1)) != 1]
    return " ".join(axes or ["tp1"])


def _one_name(row: Mapping[str, Any]) -> str:
    """Of one deployment, or one decode instance."""
    words = [_axes_name(row)]
    if row["sp"]:
        words.append("sp")
    if row["ep"] != 1 and row["exchange"] == "alltoall":
        words.append("a2a")
    words += [f"{name}{size}" for name in MODULES if (size := row.get(f"{name}_tp", 0))]
    words += [f"mtp{row['mtp']}"] if row.get("mtp", 0) else []
    dtype = str(row["weight_dtype"])
    words.append(dtype if row["kv_dtype"] == dtype else f"{dtype}/kv {row['kv_dtype']}")
    if row["attention"] != "flash":
        words.append(str(row["attention"]))
    return " ".join([*words, f"batch {row['batch']}", f"chunk {row['chunk']}"])


def value_name(value: Cell) -> str:
    """A dimension's value as a reader says it: on and off for switches."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _dimension(frame: DataFrame, good: DataFrame, name: str) -> Dimension:
    """What a dimension is worth; `good` holds the feasible rows of `frame`, best first."""
    values = _feasible_values(frame, good, name)
    feasible = len(values)
    several = feasible > 1
    seen = {item.value for item in values}
    values += [
        DimensionValue(value=_cell(value), trials=int(count), feasible=0, best=None, loss=None)
        for value, count in sorted(frame[name].value_counts().items(), key=str)
        if count and value not in seen
    ]
    return Dimension(
        name=name,
        values=tuple(values),
        second_loss=values[1].loss if several else None,
        worst_loss=values[feasible - 1].loss if several else None,
        variance_share=_variance_share(good, name),
    )


def _feasible_values(frame: DataFrame, good: DataFrame, name: str) -> list[DimensionValue]:
    """The values that some feasible row has, the best first."""
    trials = frame[name].value_counts()
    feasible = good[name].value_counts()
    first = good.drop_duplicates(name)
    best = float(good["objective"].iloc[0]) if len(good) else math.nan
    return [
        DimensionValue(
            value=_cell(value),
            trials=int(trials[value]),
            feasible=int(feasible[value]),
            best=row_at(first, place),
            loss=_loss(best, float(first["objective"].iloc[place])),
        )
        for place, value in enumerate(first[name].tolist())
    ]


def _loss(best: float, value: float) -> float | None:
    """Relative to the best; None where the best is 0 and there is nothing to compare with."""
    if best == value:
        return 0.0
    return (best - value) / abs(best) if best else None


def _variance_share(good: DataFrame, name: str) -> float | None:
    """Correlation ratio of ln throughput on a dimension; None where it does not vary."""
    logs = np.log(good[THROUGHPUT].to_numpy(float))
    if not len(logs) or logs.max() == logs.min():
        return None
    logs -= logs.mean()
    codes, values = good[name].factorize()
    if len(values) == 1:
        return 0.0
    counts = np.bincount(codes)
    means = np.bincount(codes, weights=logs) / counts
    return float(min(1.0, counts @ means**2 / (logs @ logs)))


def _refused(frame: DataFrame) -> dict[str, int]:
    """Infeasible rows by limit; those that name none count under "unknown"."""
    limits: Series[str] = frame.loc[~frame["feasible"].to_numpy(bool), "limit"].astype(str)
    counts = limits.replace("", "unknown").value_counts()
    pairs = [(str(limit), int(count)) for limit, count in counts.items() if count]
    return dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def row_at(frame: DataFrame, place: int) -> dict[str, Cell]:
    """One row as plain Python values."""
    return {name: _cell(frame[name].iloc[place]) for name in TRIAL_COLUMNS}


def _cell(value: Any) -> Cell:
    """A plain Python value: numpy's scalars unwrapped, NaN as None."""
    plain: Cell = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(plain, float) and math.isnan(plain) else plain
