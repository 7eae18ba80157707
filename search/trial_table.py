"""A trial table in plain columns: what a search writes without loading pandas.

Columns are those of `shardplan.search.trials.TRIAL_COLUMNS`; `frame` gives the same as pandas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["TrialTable"]


@dataclass(frozen=True, slots=True)
class TrialTable:
    """Columns of equal length, by name."""

    columns: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, table: TrialTable | DataFrame) -> TrialTable:
        """A table as it is, or the columns of a frame."""
        if isinstance(table, TrialTable):
            return table
        return cls({str(name): table[name].tolist() for name in table.columns})

    @classmethod
    def of_rows(cls, names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> TrialTable:
        """From rows that all hold the named cells; others are left out."""
        cells = [[row[name] for name in names] for row in rows]
        columns = zip(*cells, strict=True) if cells else ([] for _ in names)
        return cls({name: list(column) for name, column in zip(names, columns, strict=True)})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def only(self, kept: Sequence[bool]) -> TrialTable:
        """The rows that are marked."""
        return TrialTable({n: list(compress(c, kept)) for n, c in self.columns.items()})

    def every(self, step: int) -> TrialTable:
        """Every `step`-th row."""
        return TrialTable({name: column[::step] for name, column in self.columns.items()})

    @property
    def frame(self) -> DataFrame:
        """The same as a pandas frame."""
        import pandas as pd

        return pd.DataFrame({name: list(column) for name, column in self.columns.items()})
