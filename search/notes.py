"""What a reader must know of a search, beside its answer."""

from __future__ import annotations

from shardplan.search.beside import Beside
from shardplan.search.build_plan import time_note
from shardplan.search.kept import Outcome
from shardplan.search.output import MOST_ROWS
from shardplan.search.request import Resolved

__all__ = ["search_notes"]


def search_notes(resolved: Resolved, outcome: Outcome, beside: Beside) -> tuple[str, ...]:
    """In the order in which they are told."""
    notes = [*resolved.notes, *time_note(resolved.time_limit_s, complete=outcome.complete)]
    if len(outcome.kept) > MOST_ROWS:
        notes.append(f"trials.csv holds the best {MOST_ROWS} of {len(outcome.kept)} kept")
    elif outcome.refused:
        notes.append(
            f"trials.csv holds {len(outcome.kept)} strategies, those that were looked at to the "
            "end: the best of the best layouts and the Pareto points"
        )
    else:
        notes.append(
            f"trials.csv holds {len(outcome.kept)} strategies: of every layout and choice the "
            "best and the Pareto points"
        )
    if beside.layouts is not None and beside.layouts < len(outcome.space.layouts):
        notes.append(f"other dtypes were priced on the best {beside.layouts} layouts only")
    return tuple(notes)
