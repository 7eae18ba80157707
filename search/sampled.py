"""The sampled searches: Optuna proposes strategies, the scorer of the exact search prices them.

    ask  -> a point of the space (`dimensions`)
         -> `LayoutScorer.score` at one point
    tell <- the objective, and by how much each limit is missed (`samplers`)

A limit missed by a factor 1 + m counts m / (1 + m), below 1 (`excess`); a choice whose switches
the layout does not allow counts more than all limits together.

The study is the only memory: every trial says in its user attributes what became of it and at
what price, so that a search goes on where it stopped, and what other workers priced is not priced
again. `trials` counts the finished ones that the study holds, whoever made them. No engine here
proves a bound.

Many may work on one study (`workers`). Trials are numbered by the storage, and of those that have
not failed only the first `trials` are made; one who draws a later number gives it back as failed.
So a study never holds more than it was asked for.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from shardplan.models.errors import InputError
from shardplan.models.parallel import Parallelism
from shardplan.search.dimensions import Dimensions, Point
from shardplan.search.evaluate import (
    LIMITS,
    LayoutScorer,
    Question,
    context_tokens,
)
from shardplan.search.kept import Kept, Outcome, Tally, keep_best, note_one, rank_key
from shardplan.search.samplers import SampledEngine, make_sampler, values_of
from shardplan.search.seeding import plant_seeds
from shardplan.search.seen import AT_RATE
from shardplan.search.space import Space
from shardplan.search.storage import quiet_optuna, talking
from shardplan.search.study import Place, open_study, study_digest
from shardplan.search.trial_result import read_trial
from shardplan.search.workers import Watch, beating, queue_again, worker_name

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

__all__ = [
    "Drawing",
    "excess",
    "finished",
    "outcome_of",
    "search_sampled",
]

_SCORERS = 128
"""Layouts whose graphs and op tables are kept; a layout drawn again costs only its price."""
_ILLEGAL = float(len(LIMITS))
"""What a broken rule counts: no sum of missed limits reaches it."""
_WAIT_S = 0.2
"""Between two looks at the trials that others are still making."""


def excess(question: Question, one: Kept) -> tuple[float, ...]:
    """How far a strategy misses each of `LIMITS`, 0 where it holds, below 1 always."""
    limits, work, spec = question.limits, question.workload, question.spec
    columns = one.columns
    capacity = columns["memory_bytes"] + columns["memory_free_bytes"]
    left, ttft_s = columns["requests_per_s"] * question.share_left(one.parallel), columns["ttft_s"]
    over = {
        "memory": columns["memory_bytes"] / capacity,
        "context": context_tokens(work) / (spec.max_context or float("inf")),
        "step": one.batch * (1 + one.parallel.mtp) / one.chunk,
        "ttft": float(np.fmax(ttft_s, columns.get(AT_RATE, ttft_s))) / (limits.ttft_s or math.inf),
        "tpot": columns["tpot_s"] / (limits.tpot_s or float("inf")),
        "ttft_p99": columns.get("ttft_p99_s", 0.0) / (limits.ttft_p99_s or float("inf")),
        "tpot_p99": columns.get("tpot_p99_s", 0.0) / (limits.tpot_p99_s or float("inf")),
        "rate": (work.request_rate or 0.0) / left if left else float("inf"),
    }
    return tuple(max(1.0 - 1.0 / over[name], 0.0) if over[name] > 1.0 else 0.0 for name in LIMITS)


@dataclass(slots=True)
class Drawing:
    """One process drawing for a study: prices each strategy once."""

    question: Question
    space: Space
    engine: SampledEngine
    dimensions: Dimensions = field(init=False)
    distributions: dict[str, Any] = field(init=False)
    _scorer: Callable[[Parallelism], LayoutScorer] = field(init=False)
    _priced: dict[Point, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dimensions = Dimensions(self.space)
        self.distributions = self.dimensions.distributions()
        self._scorer = functools.lru_cache(maxsize=_SCORERS)(
            functools.partial(LayoutScorer, self.question)
        )

    def price(self, point: Point) -> Kept:
        """The point's score, from memory where it was priced before."""
        known = self._priced.get(point)
        if known is not None:
            return known
        grid = np.array([float(point.batch)]), np.array([float(point.chunk)])
        scores = self._scorer(point.parallel).score(point.choice, *grid)
        one = self._priced[point] = keep_best(scores, point.parallel, point.choice, *grid).one(0)
        return one

    def make(self, study: Study, trial: Trial) -> None:
        """Price one drawn strategy and tell the study what became of it."""
        from optuna.trial import TrialState

        point = self.dimensions.point(trial.params)
        rule = self.space.broken_switch(point.parallel, point.choice)
        one = None if rule is not None else self.price(point)
        if one is None:
            missed = (_ILLEGAL, *[0.0] * len(LIMITS))
            result: dict[str, Any] = {"state": "illegal", "reason": rule}
        else:
            missed = (0.0, *excess(self.question, one))
            held = one.feasible
            result = {
                "state": "feasible" if held else "infeasible",
                "reason": "" if held else LIMITS[one.limit],
                "columns": one.columns,
            }
        result["strategy"] = point.describe()
        values = values_of(self.engine, one, missed)
        trial.set_user_attr("violations", list(missed))
        trial.set_user_attr("result", result)
        told = study.tell(trial, values or None, state=None if values else TrialState.PRUNED)
        if told.state is TrialState.FAIL:  # it would be drawn for ever
            raise InputError(
                "a study takes what its trials give",
                got=f"trial {trial.number}: values {values}, {len(study.directions)} objectives",
                hint="start the study anew under another name",
            )

    def draw(
        self,
        study: Study,
        target: Callable[[], int],
        *,
        shared: bool = True,
        most: int | None = None,
        stop: threading.Event | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Draw until the study holds `target()` finished trials; how many were made here.

        `most`: of them; `stop`: set from outside, ends it after the trial in hand. `shared`:
        others may draw for the study meanwhile.
        """
        watch = Watch(study, len(self.distributions))
        stop, made = stop or threading.Event(), 0
        with beating(shared) as pulse:
            while not stop.is_set() and made != most:
                trials = study.get_trials(deepcopy=False)
                running = [trial for trial in trials if trial.state.name == "RUNNING"]
                done, wanted = len(finished(trials)), target()
                if progress is not None and done:
                    progress(min(done, wanted), wanted)
                if done >= wanted:
                    break
                lost = watch.fail_dead(running)
                if done + len(running) - lost >= wanted:
                    stop.wait(_WAIT_S)
                    continue
                made += self._one(study, wanted, shared, pulse)
        return made

    def _one(self, study: Study, wanted: int, shared: bool, pulse: Any) -> int:
        """Ask, make and tell one trial; 0 where it was one too many."""
        from optuna.trial import TrialState

        trial = study.ask()
        try:
            if shared:
                trial.set_user_attr("worker", worker_name())
                held = study.get_trials(deepcopy=False)
                before = [one for one in held if one.number < trial.number]
                if sum(one.state is not TrialState.FAIL for one in before) >= wanted:
                    study.tell(trial, state=TrialState.FAIL)
                    return 0
            pulse.trial = trial
            self._suggest(trial)
            self.make(study, trial)
        except BaseException as error:
            with suppress(Exception):  # a storage that is down keeps it for whoever looks later
                own = study.get_trials(deepcopy=False)[trial.number]
                if own.state is TrialState.FAIL and isinstance(error, ValueError | RuntimeError):
                    return 0  # somebody took this process for dead: it is made again
                queue_again(study, own, len(self.distributions))
            raise
        finally:
            pulse.trial = None
        return 1

    def _suggest(self, trial: Trial) -> None:
        """As `ask` with distributions would, which leaves no time to name the worker before."""
        for name, one in self.distributions.items():
            if hasattr(one, "choices"):
                trial.suggest_categorical(name, one.choices)
            else:
                trial.suggest_int(name, one.low, one.high)


def finished(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that count: priced, or refused by a rule."""
    return [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]


def search_sampled(
    question: Question,
    space: Space,
    *,
    engine: SampledEngine,
    trials: int,
    seed: int,
    seed_trials: int = 0,
    place: Place | None = None,
    carried: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Draw until the study holds `trials` trials; the best of all that it holds.

    `seed_trials`: how many strategies of a coarse exact pass the study starts with. `carried`: the
    question as `study.encode` writes it, for workers that join. The outcome counts distinct
    strategies: a draw seen before is not priced again. `InputError` for an unknown engine, for
    fewer than one trial, for a storage that cannot be opened or fails, and for a study of another
    question.
    """
    if trials < 1:
        raise InputError("a sampled search needs at least one trial", got=f"trials={trials}")
    start, place = time.perf_counter(), place or Place()
    make_sampler(engine, seed)  # an engine that cannot run leaves no study behind
    if not space.layouts:
        return _outcome(space, (), _nothing_legal(space), start)
    drawing = Drawing(question, space, engine)
    with quiet_optuna(), talking(place.storage):
        digest = study_digest(question, space, engine)
        study = open_study(
            place, digest=digest, engine=engine, seed=seed, trials=trials, question=carried
        )
        plant_seeds(study, question, drawing.dimensions, min(seed_trials, trials))
        drawing.draw(study, lambda: trials, shared=place.storage is not None, progress=progress)
        held = study.get_trials(deepcopy=False)
    return outcome_of(drawing, held, start)


def outcome_of(drawing: Drawing, trials: Sequence[FrozenTrial], start: float) -> Outcome:
    """What a study found, in an order that does not hang on the order of the draws."""
    tally, kept = Tally(), {}
    illegal = set()
    for trial in finished(trials):
        point, result = read_trial(drawing.dimensions, trial)
        if result.state == "illegal":
            if point not in illegal:
                tally.pruned_by[f"rule {result.reason}"] += 1
            illegal.add(point)
        elif point not in kept:
            limit = LIMITS.index(result.reason) if result.reason else -1
            kept[point] = _kept(point, limit, result.columns)
            _count(tally, kept[point])
    order = sorted(
        kept, key=lambda point: (*rank_key(kept[point]), drawing.dimensions.order(point))
    )
    tally.pruned_by = Counter(dict(sorted(tally.pruned_by.items())))
    return _outcome(drawing.space, tuple(kept[point] for point in order), tally, start)


def _kept(point: Point, limit: int, columns: dict[str, float]) -> Kept:
    return Kept(
        parallel=point.parallel,
        choice=point.choice,
        batch=point.batch,
        chunk=point.chunk,
        limit=limit,
        columns=columns,
    )


def _count(tally: Tally, one: Kept) -> None:
    tally.evaluated += 1
    if one.feasible:
        return
    tally.infeasible[LIMITS[one.limit]] += 1
    note_one(tally, one)


def _nothing_legal(space: Space) -> Tally:
    pruned = {f"rule {rule}": count for rule, count in space.broken_strategies.items()}
    return Tally(pruned_by=Counter(pruned))


def _outcome(space: Space, kept: tuple[Kept, ...], tally: Tally, start: float) -> Outcome:
    return Outcome(
        space=space,
        best=kept[0] if kept and kept[0].feasible else None,
        kept=kept,
        tally=tally,
        bound=None,
        wall_s=time.perf_counter() - start,
    )
