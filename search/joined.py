"""Drawing for a study that another process made: what `shardplan worker` does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shardplan.models.errors import InputError
from shardplan.search.api import subject_of
from shardplan.search.sampled import Drawing, finished
from shardplan.search.samplers import make_sampler
from shardplan.search.storage import masked, quiet_optuna, talking
from shardplan.search.study import join_study, study_digest
from shardplan.search.trial_result import read_attribute

if TYPE_CHECKING:
    from optuna.study import Study

__all__ = ["draw_for"]


def draw_for(
    address: str,
    name: str,
    *,
    most: int | None = None,
    stop: threading.Event | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Draw until the study holds what was asked for, `most` trials are made or `stop` is set.

    Returns study, storage (passwords masked), engine, made, finished, wanted. `InputError` for a
    storage that cannot be opened or fails, for a name that it does not hold, and for a study of
    another version or of other coefficients.
    """
    with quiet_optuna(), talking(address):
        joined = join_study(address, name)
        make_sampler(joined.engine, 0)  # an engine that cannot run here draws nothing
        question, space = subject_of(joined.resolved, joined.cards)
        if study_digest(question, space, joined.engine) != joined.digest:
            raise InputError(
                "a worker prices as the search that made the study does",
                got=f"study {name!r}: its digest is another here, at the same version",
                hint="install the same build of shardplan on both machines",
            )
        study = joined.study
        made = Drawing(question, space, joined.engine).draw(
            study,
            lambda: _wanted(study),
            most=most,
            stop=stop,
            progress=progress,
        )
        return {
            "study": name,
            "storage": masked(address),
            "engine": joined.engine,
            "made": made,
            "finished": len(finished(study.get_trials(deepcopy=False))),
            "wanted": _wanted(study),
        }


def _wanted(study: Study) -> int:
    """How many finished trials it shall hold, by now."""
    return int(read_attribute(study.user_attrs, "shardplan_trials", int))
