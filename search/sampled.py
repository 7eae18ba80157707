"""The sampled searches: Optuna proposes strategies, the scorer of the exact search prices them.

    ask  -> tp, pp, ep, sp, exchange, mtp, attention, dtypes, switches, batch, chunk
         -> dp = cards / (tp pp); the legality rules
         -> `LayoutScorer.score` at one point
    tell <- the objective, and by how much each limit is missed

An engine is a sampler: `tpe`, `random`, `cmaes` (its normal distribution runs over the numbers;
the switches and dtypes beside it are drawn at random) and `nsga2`, which searches throughput and
TPOT at once; the plan is the best by the question's objective whatever was searched.

A limit missed by a factor 1 + m counts m / (1 + m), below 1 (`excess`); a layout that breaks a
rule counts more than all limits together and is told as pruned. Samplers that know constraints
rank refused strategies by the sum; CMA-ES, which does not, is told minus the sum in place of the
objective, which is below the objective of any strategy that holds.

A study in a storage goes on where it stopped: `trials` counts all that the study holds. It is
bound to its question by a digest; every trial says in its user attributes what became of it.
No engine here proves a bound.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from shardplan import __version__
from shardplan.costmodel.kernels.base import Machine
from shardplan.models.errors import InputError
from shardplan.models.parallel import Parallelism
from shardplan.search.evaluate import LIMITS, LayoutScorer, Question, context_tokens
from shardplan.search.kept import Kept, Outcome, Tally, keep_best, note_nearest, rank_key
from shardplan.search.legality import Subject, first_broken_rule
from shardplan.search.space import Choice, Space, divisors
from shardplan.search.storage import Direction, open_study, quiet_optuna

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

__all__ = ["ENGINES", "SampledEngine", "search_sampled"]

SampledEngine = Literal["tpe", "nsga2", "random", "cmaes"]
ENGINES: tuple[SampledEngine, ...] = get_args(SampledEngine)

_SCORERS = 128
"""Layouts whose graphs and op tables are kept; a layout drawn again costs only its price."""
_POPULATION = 32
"""Strategies of one NSGA-II generation."""
_ILLEGAL = float(len(LIMITS))
"""What a broken rule counts: no sum of missed limits reaches it."""
_AXES_RULE = "axes"
"""Reason of a draw whose axis sizes do not multiply to the cards."""


@dataclass(frozen=True, slots=True)
class _Point:
    """A drawn strategy, made canonical: a switch that changes nothing is off."""

    parallel: Parallelism
    choice: Choice
    batch: int
    chunk: int

    def describe(self) -> str:
        """As trials name it."""
        choice = self.choice
        return (
            f"{self.parallel.describe()} {choice.attention} {choice.weight_dtype} "
            f"kv {choice.kv_dtype} batch {self.batch} chunk {self.chunk}"
            + " weight_prefetch" * choice.weight_prefetch
            + " fused_collectives" * choice.fused_collectives
            + f" {choice.collectives}" * (choice.collectives != "auto")
        )


@dataclass(slots=True)
class _Run:
    """One search under way: prices each strategy once and remembers all of them."""

    question: Question
    space: Space
    scorer: Callable[[Parallelism], LayoutScorer]
    tally: Tally = field(default_factory=Tally)
    priced: dict[_Point, Kept] = field(default_factory=dict)
    refused: dict[_Point, str] = field(default_factory=dict)

    def rule_broken(self, point: _Point) -> str | None:
        """Why a point is not in the space; None when it is."""
        if point in self.refused:
            return self.refused[point]
        par = point.parallel
        if par.ranks != self.space.cards or (par.tp * par.dp) % par.ep:
            rule: str | None = _AXES_RULE
        else:
            question = self.question
            rule = first_broken_rule(
                Subject(
                    spec=question.spec,
                    cluster=question.cluster,
                    engine=question.engine,
                    parallel=par,
                )
            ) or self.space.broken_switch(par, point.choice)
        if rule is not None:
            self.refused[point] = rule
            self.tally.pruned_by[f"rule {rule}"] += 1
        return rule

    def price(self, point: _Point) -> Kept:
        """The point's score, from memory where it was priced before."""
        known = self.priced.get(point)
        if known is not None:
            return known
        grid = np.array([float(point.batch)]), np.array([float(point.chunk)])
        scores = self.scorer(point.parallel).score(point.choice, *grid)
        one = keep_best(scores, point.parallel, point.choice, *grid)[0]
        self.priced[point] = one
        self.tally.evaluated += 1
        if not one.feasible:
            self.tally.infeasible[LIMITS[one.limit]] += 1
            note_nearest(self.tally, scores, point.parallel, point.choice, grid)
        return one


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Each dimension of the space as Optuna's: numbers by their place in a list, words as is.

    A dimension of one value is left to its value. Where kernels and dtypes do not combine
    freely, their combinations are one dimension, `choice`.
    """
    from optuna.distributions import CategoricalDistribution, IntDistribution

    numbers = {
        **{name: len(_sizes(space, name)) for name in ("tp", "pp", "ep")},
        "mtp": len(_depths(space)),
        "batch": len(space.batches),
        "chunk": len(space.chunks),
    }
    experts = space.spec.moe is not None
    words: dict[str, Sequence[bool | int | str]] = {
        "sp": (False, True),
        "exchange": ("allgather", "alltoall") if experts else ("allgather",),
        **_choice_words(space),
    }
    return {
        **{n: IntDistribution(0, count - 1) for n, count in numbers.items() if count > 1},
        **{n: CategoricalDistribution(v) for n, v in words.items() if len(v) > 1},
    }


def _sizes(space: Space, axis: str) -> tuple[int, ...]:
    """Sizes of an axis that some legal layout has; all divisors of the cards where none is."""
    legal = tuple(sorted({getattr(par, axis) for par in space.layouts}))
    return legal or divisors(space.cards)


def _depths(space: Space) -> tuple[int, ...]:
    """Tokens predicted ahead of some legal layout."""
    return tuple(sorted({par.mtp for par in space.layouts})) or (0,)


def _choice_words(space: Space) -> dict[str, Sequence[int | str]]:
    """Values of each dimension of a choice, or the places of the choices there are."""
    values: dict[str, Sequence[int | str]] = {
        one.name: sorted({getattr(choice, one.name) for choice in space.choices})
        for one in fields(Choice)
    }
    if math.prod(len(one) for one in values.values()) == len(set(space.choices)):
        return values
    return {"choice": range(len(space.choices))}


def point_of(space: Space, params: Mapping[str, Any]) -> _Point:
    """The strategy that drawn parameters stand for; those left out take their only value."""
    tp, pp, ep = (_sizes(space, name)[params.get(name, 0)] for name in ("tp", "pp", "ep"))
    sent = ep > 1 and params.get("exchange") == "alltoall"
    base = space.choices[params.get("choice", 0)]
    return _Point(
        parallel=Parallelism(
            tp=tp,
            pp=pp,
            dp=max(space.cards // (tp * pp), 1),
            ep=ep,
            sp=tp > 1 and bool(params.get("sp", False)),
            exchange="alltoall" if sent else "allgather",
            mtp=_depths(space)[params.get("mtp", 0)],
        ),
        choice=replace(
            base, **{one.name: params[one.name] for one in fields(Choice) if one.name in params}
        ),
        batch=space.batches[params.get("batch", 0)],
        chunk=space.chunks[params.get("chunk", 0)],
    )


def excess(question: Question, one: Kept) -> tuple[float, ...]:
    """How far a strategy misses each of `LIMITS`, 0 where it holds, below 1 always."""
    limits, work, spec = question.limits, question.workload, question.spec
    columns = one.columns
    capacity = columns["memory_bytes"] + columns["memory_free_bytes"]
    over = {
        "memory": columns["memory_bytes"] / capacity,
        "context": context_tokens(work) / (spec.max_context or math.inf),
        "step": one.batch * (1 + one.parallel.mtp) / one.chunk,
        "ttft": columns["ttft_s"] / (limits.ttft_s or math.inf),
        "tpot": columns["tpot_s"] / (limits.tpot_s or math.inf),
        "rate": (work.request_rate or 0.0) / columns["requests_per_s"],
    }
    return tuple(max(1.0 - 1.0 / over[name], 0.0) if over[name] > 1.0 else 0.0 for name in LIMITS)


def study_digest(question: Question, space: Space, objectives: int) -> str:
    """What a study is bound to: the question, the space, the prices' version and coefficients."""
    parts = (
        __version__,
        question,
        Machine.of(question.cluster.device, question.engine.name),
        space.choices,
        space.batches,
        space.chunks,
        objectives,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def make_sampler(engine: SampledEngine, seed: int) -> BaseSampler:
    """The sampler of an engine. `InputError` for an unknown one, or without its package."""
    from optuna import samplers

    def violations(trial: FrozenTrial) -> tuple[float, ...]:
        return tuple(trial.user_attrs["violations"])

    with warnings.catch_warnings():
        # constraints_func is experimental before Optuna 5 and deprecated from it on: it is the
        # one way that all releases this project allows know.
        warnings.simplefilter("ignore")
        if engine == "tpe":
            return samplers.TPESampler(seed=seed, constraints_func=violations)
        if engine == "nsga2":
            return samplers.NSGAIISampler(
                seed=seed, population_size=_POPULATION, constraints_func=violations
            )
        if engine == "random":
            return samplers.RandomSampler(seed=seed)
        if engine == "cmaes":
            _require_cmaes()
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    raise InputError(
        "`engine` of a sampled search must be one of " + ", ".join(ENGINES), got=f"{engine!r}"
    )


def _require_cmaes() -> None:
    try:
        import cmaes  # type: ignore[import-untyped]  # noqa: F401  # Optuna loads it too late
    except ImportError:
        raise InputError(
            "the engine cmaes needs the package cmaes, which Optuna's sampler runs on",
            hint="pip install cmaes, or take tpe",
        ) from None


def _tell(run: _Run, study: Study, trial: Trial, engine: SampledEngine) -> None:
    """Price one drawn strategy and tell the study what became of it."""
    from optuna.trial import TrialState

    point = point_of(run.space, trial.params)
    rule = run.rule_broken(point)
    if rule is not None:
        _note(trial, point, "illegal", rule, (_ILLEGAL, *[0.0] * len(LIMITS)))
        if engine == "cmaes":
            study.tell(trial, -_ILLEGAL)
        else:
            study.tell(trial, state=TrialState.PRUNED)
        return
    one = run.price(point)
    missed = excess(run.question, one)
    reason = "" if one.feasible else LIMITS[one.limit]
    _note(trial, point, "feasible" if one.feasible else "infeasible", reason, (0.0, *missed))
    if engine == "nsga2":
        study.tell(trial, [one.columns["output_tokens_per_s"], one.columns["tpot_s"]])
    elif engine == "cmaes" and not one.feasible:
        study.tell(trial, -sum(missed))
    else:
        study.tell(trial, one.columns["objective"])


def _note(
    trial: Trial, point: _Point, state: str, reason: str, violations: tuple[float, ...]
) -> None:
    trial.set_user_attr("strategy", point.describe())
    trial.set_user_attr("state", state)
    trial.set_user_attr("reason", reason)
    trial.set_user_attr("violations", list(violations))


def _finished(study: Study) -> list[FrozenTrial]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def search_sampled(
    question: Question,
    space: Space,
    *,
    engine: SampledEngine,
    trials: int,
    seed: int,
    storage: str | None = None,
    study_name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Draw until the study holds `trials` trials; the best of all that it holds.

    `storage`: an Optuna database URL (`sqlite:///study.db`, PostgreSQL, MySQL), `journal:FILE`
    or `grpc://HOST:PORT`; None keeps the study in memory. `study_name` defaults to one made
    from the question's digest. The outcome counts distinct strategies: a draw seen before is
    not priced again. `InputError` for an unknown engine, for fewer than one trial, for a
    storage that cannot be opened and for a study of another question.
    """
    if trials < 1:
        raise InputError("a sampled search needs at least one trial", got=f"trials={trials}")
    start = time.perf_counter()
    scorer = functools.lru_cache(maxsize=_SCORERS)(functools.partial(LayoutScorer, question))
    run = _Run(question=question, space=space, scorer=scorer)
    directions: list[Direction] = ["maximize"]
    if engine == "nsga2":
        directions.append("minimize")
    dimensions = distributions(space)
    sampler = make_sampler(engine, seed)
    with quiet_optuna():
        digest = study_digest(question, space, len(directions))
        study = open_study(storage, study_name, digest, sampler, directions)
        held = _finished(study)
        for done in range(len(held), trials):
            _tell(run, study, study.ask(dimensions), engine)
            if progress is not None:
                progress(done + 1, trials)
        for trial in held:
            point = point_of(space, trial.params)
            if run.rule_broken(point) is None:
                run.price(point)
    return _outcome(run, start)


def _outcome(run: _Run, start: float) -> Outcome:
    """What was found, in an order that does not hang on the order of the draws."""
    order = {par: index for index, par in enumerate(run.space.layouts)}
    choices = {choice: index for index, choice in enumerate(run.space.choices)}
    kept = sorted(
        run.priced.values(),
        key=lambda one: (
            *rank_key(one),
            order[one.parallel],
            choices[one.choice],
            one.batch,
            one.chunk,
        ),
    )
    tally = run.tally
    tally.pruned_by = Counter(dict(sorted(tally.pruned_by.items())))
    return Outcome(
        space=run.space,
        best=kept[0] if kept and kept[0].feasible else None,
        kept=tuple(kept),
        tally=tally,
        bound=None,
        wall_s=time.perf_counter() - start,
    )
