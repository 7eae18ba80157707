"""What a sampled search starts with: the winners of a coarse exact pass.

    layouts            at most `LAYOUTS`, evenly spaced
    batches, chunks    at most `GRID` of each, the ends among them

The best strategy of each layout there, the best layouts first, is put into the study before
anything is drawn. It costs no trial of its own: seeds count as trials. An honest measure of a
sampler leaves them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from shardplan.models.parallel import Parallelism
from shardplan.search.dimensions import Dimensions, Point
from shardplan.search.evaluate import Question
from shardplan.search.exact import search_exact
from shardplan.search.kept import first_of_each

if TYPE_CHECKING:
    from optuna.study import Study

__all__ = ["plant_seeds", "seeds_of"]

LAYOUTS = 256
GRID = 12
_T = TypeVar("_T")


def _thinned(values: Sequence[_T], most: int) -> tuple[_T, ...]:
    """At most `most` of them, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return tuple(values)
    last = len(values) - 1
    return tuple(values[round(i * last / (most - 1))] for i in range(most))


def seeds_of(question: Question, dimensions: Dimensions, count: int) -> list[Point]:
    """The best strategies of a coarse exact pass, one a layout, the best first."""
    space = dimensions.space
    coarse = replace(
        space,
        layouts=_thinned(space.layouts, LAYOUTS),
        batches=_thinned(space.batches, GRID),
        chunks=_thinned(space.chunks, GRID),
        reach=replace(space.reach, ways=False),
    )
    best: dict[Parallelism, Point] = {}
    for one in first_of_each(search_exact(question, coarse).kept):
        if not one.feasible or len(best) == count:
            break
        if one.parallel not in best:
            best[one.parallel] = Point(one.parallel, one.choice, one.batch, one.chunk)
    return list(best.values())


def plant_seeds(study: Study, question: Question, dimensions: Dimensions, count: int) -> None:
    """Queue the seeds of a study that nothing was drawn for yet."""
    trials = study.get_trials(deepcopy=False)
    planted = {trial.user_attrs.get("seed") for trial in trials}
    if not count or None in planted:
        return
    for index, point in enumerate(seeds_of(question, dimensions, count)):
        if index not in planted:
            study.enqueue_trial(dimensions.params(point), user_attrs={"seed": index})
