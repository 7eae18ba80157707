"""The engines of a sampled search: which of Optuna's samplers, and what it is told.

| engine | sampler                  | objectives                | a strategy that is refused       |
|--------|--------------------------|---------------------------|----------------------------------|
| random | uniform                  | the question's            | drawn like any other             |
| tpe    | tree of Parzen estimators| the question's            | ranked by the misses, below all  |
| cmaes  | CMA-ES over the numbers, | the question's            | worth minus its misses, which is |
|        | words drawn at random    |                           | below any that holds             |
| gp     | Gaussian process (torch) | the question's            | as cmaes                         |
| nsga2  | NSGA-II                  | tokens/s, TPOT            | ranked by the misses, below all  |
| nsga3  | NSGA-III                 | tokens/s, TPOT, TTFT      | ranked by the misses, below all  |

Whatever is searched, the plan is the best by the question's objective.

Every trial draws from a generator seeded by (seed, how many trials before it have not failed), so
that a search that was stopped at any moment and goes on draws what it would have drawn, and
workers that share a study draw apart.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from shardplan.models.errors import InputError
from shardplan.search.kept import Kept
from shardplan.search.optimizer_state import read_states_plainly
from shardplan.search.trial_result import read_violations

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

__all__ = ["ENGINES", "SampledEngine", "directions", "make_sampler", "per_trial", "values_of"]

SampledEngine = Literal["tpe", "nsga2", "nsga3", "cmaes", "gp", "random"]
ENGINES: tuple[SampledEngine, ...] = get_args(SampledEngine)
Direction = Literal["maximize", "minimize"]

_POPULATION = 16
"""Strategies of one generation of NSGA-II and NSGA-III: a dozen of them in the default trials."""
_SEVERAL: dict[str, tuple[tuple[str, Direction], ...]] = {
    "nsga2": (("output_tokens_per_s", "maximize"), ("tpot_s", "minimize")),
    "nsga3": (
        ("output_tokens_per_s", "maximize"),
        ("tpot_s", "minimize"),
        ("ttft_s", "minimize"),
    ),
}
"""Columns that engines of several objectives weigh against one another."""
_NO_CONSTRAINTS = ("cmaes", "gp")
"""Engines that are told a worse objective in place of a constraint."""


def directions(engine: SampledEngine) -> list[Direction]:
    """Of each objective of an engine."""
    return [way for _, way in _SEVERAL.get(engine, (("objective", "maximize"),))]


def values_of(engine: SampledEngine, one: Kept | None, missed: Sequence[float]) -> list[float]:
    """What an engine is told of a strategy; none: the trial is pruned. `one`: None is illegal."""
    if engine in _NO_CONSTRAINTS and sum(missed) > 0:
        return [-sum(missed)]
    if one is None:
        return []
    return [one.columns[name] for name, _ in _SEVERAL.get(engine, (("objective", "maximize"),))]


def make_sampler(engine: SampledEngine, seed: int) -> BaseSampler:
    """The sampler of an engine. `InputError` for an unknown one, or without its package."""
    from optuna import samplers

    with warnings.catch_warnings():
        # constraints_func is experimental before Optuna 5 and deprecated from it on: it is the
        # one way that all releases this project allows know.
        warnings.simplefilter("ignore")
        if engine == "tpe":
            return samplers.TPESampler(
                seed=seed, constraints_func=read_violations, constant_liar=True
            )
        if engine in ("nsga2", "nsga3"):
            kind = samplers.NSGAIISampler if engine == "nsga2" else samplers.NSGAIIISampler
            return kind(seed=seed, population_size=_POPULATION, constraints_func=read_violations)
        if engine == "random":
            return samplers.RandomSampler(seed=seed)
        if engine == "cmaes":
            try:
                import cmaes  # type: ignore[import-untyped]  # noqa: F401  # Optuna loads it late
            except ImportError:
                raise _lacks("cmaes", "cmaes", "cmaes") from None
            read_states_plainly()
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        if engine == "gp":
            if find_spec("torch") is None:  # not imported: torch takes seconds to load
                raise _lacks("gp", "torch", "'shardplan[torch]'")
            # Read when torch loads: its threads and those of numpy eat up each other's cores,
            # and the matrices are small. Seven times faster on two cores.
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            return samplers.GPSampler(seed=seed, deterministic_objective=True)
    raise InputError(
        "`engine` of a sampled search must be one of " + ", ".join(ENGINES), got=f"{engine!r}"
    )


def _lacks(engine: str, package: str, install: str) -> InputError:
    return InputError(
        f"the engine {engine} needs the package {package}, which Optuna's sampler runs on",
        hint=f"pip install {install}, or take tpe",
    )


def per_trial(engine: SampledEngine, seed: int) -> BaseSampler:
    """A sampler that draws each trial from a generator of its own, seeded by the trial's place."""
    from optuna.samplers import BaseSampler

    class PerTrial(BaseSampler):
        """Made anew before each trial; what it learns from is the study."""

        def __init__(self) -> None:
            self.inner = make_sampler(engine, seed)

        def before_trial(self, study: Any, trial: Any) -> None:
            before = study.get_trials(deepcopy=False)[: trial.number]
            place = sum(one.state.name != "FAIL" for one in before)
            mixed = np.random.SeedSequence([seed, place]).generate_state(1)
            self.inner = make_sampler(engine, int(mixed[0]))
            self.inner.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self.inner.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self.inner.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, name: str, one: Any) -> Any:
            return self.inner.sample_independent(study, trial, name, one)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            self.inner.after_trial(study, trial, state, values)

    return PerTrial()
