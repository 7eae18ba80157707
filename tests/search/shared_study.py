"""A small question whose study several tests share between searches and workers."""

from __future__ import annotations

from typing import Any

from shardplan.search.api import subject_of
from shardplan.search.kept import Outcome
from shardplan.search.request import Asked, resolve
from shardplan.search.sampled import search_sampled
from shardplan.search.study import Place, encode

__all__ = ["QUESTION", "search_small"]

QUESTION = Asked(model="llama-3.1-8b", cluster="atlas-800t-a2", cards=2, engine="random")


def search_small(place: Place, trials: int, *, seed: int = 0, **more: Any) -> Outcome:
    """Random draws for `QUESTION` in a study at a place."""
    resolved = resolve(QUESTION)
    question, space = subject_of(resolved, 2)
    return search_sampled(
        question,
        space,
        engine="random",
        trials=trials,
        seed=seed,
        place=place,
        carried=encode(resolved, 2),
        **more,
    )
