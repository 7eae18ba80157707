"""The Python face: `shardplan.search(...)` and `shardplan.estimate(...)`.

    resolve -> space -> search engine -> winner -> proof -> plan

The objective `cards` searches growing card counts and stops at the first that is feasible; every
smaller count is thereby proven infeasible. So does `cost` at a rate; without one it searches them
all and takes the most tokens a card.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from shardplan import __version__
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.memo import Memo
from shardplan.models.catalog import load_model
from shardplan.models.errors import InputError, ProofError
from shardplan.models.spec import ModelSpec
from shardplan.search.aside import aside
from shardplan.search.asked import DEFAULT_TRIALS
from shardplan.search.beside import Beside, search_beside
from shardplan.search.build_plan import build_plan, pareto_front
from shardplan.search.costs import cost_of
from shardplan.search.evaluate import LayoutScorer, Question
from shardplan.search.exact import search_exact
from shardplan.search.failure import nothing_feasible
from shardplan.search.judged import Wanted, wanted_of
from shardplan.search.kept import Kept, Outcome
from shardplan.search.notes import search_notes
from shardplan.search.output import MOST_ROWS, trial_table
from shardplan.search.plan import Plan, ProofInfo
from shardplan.search.proof import prove_strategy
from shardplan.search.request import Asked, Resolved, resolve, without_limits
from shardplan.search.robust_plan import study, with_study
from shardplan.search.space import Space, batch_grid, build_space, chunk_grid
from shardplan.search.trial_table import TrialTable
from shardplan.search.workload import whole

if TYPE_CHECKING:
    from pandas import DataFrame

    from shardplan.search.study import Place

__all__ = ["SearchResult", "estimate", "search", "space_of", "subject_of"]

Progress = Callable[[int, int], None]
_MOST_SLOTS = 1024
_MOST_ALTERNATIVES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """A search's plan and tables. `timing`: measured seconds, apart from what is reproducible."""

    plan: Plan
    trial_table: TrialTable
    pareto_table: TrialTable
    timing: dict[str, float]

    @property
    def trials(self) -> DataFrame:
        """The strategies that are remembered, best first, as `trials.csv` has them."""
        return self.trial_table.frame

    @property
    def pareto(self) -> DataFrame:
        """The best trade-offs of throughput and TPOT, as `pareto.csv` has them."""
        return self.pareto_table.frame


def search(
    model: Any,
    cluster: str | Cluster,
    *,
    top: int = 5,
    storage: str | None = None,
    study: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **asked: Any,
) -> SearchResult:
    """Find, price and prove the best plan.

    `model`: a `ModelSpec`, or whatever `load_model` takes: the name of a preset, the path of a
    config.json, an export, a Hugging Face module (its configuration is taken).
    `asked` are the fields of `shardplan.search.request.Asked` (cards, input_len, objective, ...).
    `storage`, `study` and `resume` say where a sampling engine keeps its trials
    (`shardplan.search.study.Place`).
    Raises `InputError` for a bad question and `InfeasibleError` when no strategy satisfies it.
    """
    whole("top", top, _MOST_ALTERNATIVES, try_=5, least=0)
    if not isinstance(model, (str, os.PathLike, ModelSpec)):
        model = load_model(model)
    question = Asked(model=model, cluster=cluster, **asked)
    resolved = resolve(question)
    found = _searched(question, resolved, top, storage, study, resume, progress)
    if question.sized:
        from shardplan.search.capacity import with_capacity

        found = with_capacity(
            found,
            question,
            resolved,
            lambda one: _searched(one, resolve(one), 0, None, None, False, None),
        )
    if question.batched:
        from shardplan.search.batching_api import with_batching

        found = with_batching(found, question, resolved)
    return found


def _searched(
    question: Asked,
    resolved: Resolved,
    top: int,
    storage: str | None,
    study: str | None,
    resume: bool,
    progress: Progress | None,
) -> SearchResult:
    """The best plan of the asked way of serving."""
    place = _place(resolved, storage, study, resume)
    aggregated = functools.partial(_search_aggregated, top=top, place=place, progress=progress)
    if question.serving == "agg":
        return aggregated(resolved)
    from shardplan.search.disagg_api import better_serving, search_disaggregated

    apart = functools.partial(search_disaggregated, question, top=top)
    if question.serving == "disagg":
        return apart(resolved)
    return better_serving(resolved, aggregated, apart)


def _search_aggregated(
    resolved: Resolved, *, top: int, place: Place | None, progress: Progress | None
) -> SearchResult:
    """The best plan whose cards all prefill and decode."""
    start = time.perf_counter()
    memo: Memo = Memo()
    wanted = wanted_of(resolved.request, top)
    outcomes = _search_counts(resolved, place, progress, memo, wanted)
    if outcomes[-1].best is None and resolved.soft_limits and not _out_of_time(outcomes[-1]):
        resolved, place = without_limits(resolved), place and place.named("no-limits")
        outcomes = _search_counts(resolved, place, progress, memo, wanted)
    searched = time.perf_counter()
    question = _question(resolved, outcomes[-1].space.cards)
    best = outcomes[-1].best
    if best is None:
        raise nothing_feasible(resolved, question, outcomes[-1])
    left_s = _time_left(resolved, [outcomes[-1]])
    robust, refine = resolved.request.robust, resolved.request.refine_simulated > 0
    show = functools.partial(_shown, resolved, question, outcomes[-1], memo, left_s)
    shown = show if robust or refine else aside(functools.partial(show, best))
    studying = time.perf_counter()
    best, robustness = study(question, outcomes[-1], robust=robust)
    studied, refined = time.perf_counter(), None
    if refine:
        from shardplan.search.refine_simulated import refine_simulated

        further = functools.partial(_search_counts, resolved, place, progress, memo, wanted)
        refined = refine_simulated(resolved, question, outcomes, best, further)
        if refined.dearer:  # the strategies that were studied have fewer cards
            robustness = study(
                refined.best.question, refined.best.outcomes[-1], robust=False
            ).robustness
        question, outcomes, best = refined.best
        show = functools.partial(_shown, resolved, question, outcomes[-1], memo, left_s)
    simulated = time.perf_counter()
    beside, proof, timing = show(best) if robust or refine else shown()
    scorer = LayoutScorer(question, best.parallel)
    plan = build_plan(
        resolved,
        scorer,
        outcomes,
        best,
        proof,
        quantization=beside.quantization,
        switches=beside.switches,
        top=top,
        version=__version__,
        notes=search_notes(resolved, outcomes[-1], beside),
    )
    plan = with_study(plan, robustness)
    if refined is not None:
        plan = refined.with_plan(plan)
    if resolved.prices is not None:
        plan = plan.model_copy(update={"cost": cost_of(plan, resolved.prices)})
    engine = resolved.request.engine
    outcome = outcomes[-1]
    return SearchResult(
        plan=plan,
        trial_table=trial_table(outcome, outcome.kept[:MOST_ROWS], engine),
        pareto_table=trial_table(outcome, pareto_front(outcome), engine),
        timing={
            "search_s": searched - start,
            "robustness_s": studied - studying,
            "refined_s": simulated - studied,
            **timing,
            "total_s": time.perf_counter() - start,
            "strategies_per_s": plan.certificate.evaluated / max(searched - start, 1e-9),
        },
    )


class _Shown(NamedTuple):
    """What stands beside the best strategy, and its proof."""

    beside: Beside
    proof: ProofInfo
    timing: dict[str, float]


def _shown(
    resolved: Resolved,
    question: Question,
    outcome: Outcome,
    memo: Memo,
    left_s: float | None,
    best: Kept,
) -> _Shown:
    """Other dtypes and switches, with as much time as is left of a limit, and the proof."""
    start = time.perf_counter()
    beside = search_beside(resolved, question, outcome, best, memo, left_s)
    found = time.perf_counter()
    scorer = LayoutScorer(question, best.parallel)
    proof = prove_strategy(resolved.spec, best.parallel, scorer=scorer, choice=best.choice)
    if not proof.passed:
        raise ProofError(
            "the best strategy does not compute what the model computes",
            got=f"{best.parallel.describe()}: {'; '.join(proof.failures)}",
        )
    timing = {"quantization_s": found - start, "proof_s": time.perf_counter() - found}
    return _Shown(beside, proof, timing)


def _question(resolved: Resolved, cards: int) -> Question:
    return Question.of(
        resolved.request,
        resolved.spec,
        resolved.cluster,
        resolved.engine,
        cards=cards,
        spare=resolved.spare,
    )


def space_of(resolved: Resolved, cards: int) -> Space:
    """The space that a question asks about, over some of its cards."""
    work = resolved.request.workload
    return build_space(
        resolved.spec,
        resolved.cluster,
        resolved.engine,
        cards=cards,
        choices=resolved.choices,
        batches=batch_grid(work.concurrency or _MOST_SLOTS),
        chunks=chunk_grid(resolved.engine, work.input_len, work.output_len),
        reach=resolved.reach,
    )


def _counts(resolved: Resolved) -> list[int]:
    """Card counts to search, ascending: all of them for the objective `cards`, else the one."""
    most, cluster = resolved.request.cards, resolved.cluster
    if resolved.request.objective not in ("cards", "cost"):
        return [most]
    nodes = range(1, cluster.nodes + 1)
    found = {*cluster.rank_counts, *(cluster.ranks_per_node * n for n in nodes)}
    return sorted(count for count in found if count <= most)


def subject_of(resolved: Resolved, cards: int) -> tuple[Question, Space]:
    """What is searched with a number of cards."""
    return _question(resolved, cards), space_of(resolved, cards)


def _place(
    resolved: Resolved, storage: str | None, study: str | None, resume: bool
) -> Place | None:
    """Where a sampled search keeps its study; None for the exact one."""
    from shardplan.search.study import Place

    if storage is None and (study is not None or resume):
        raise InputError(
            "a study that is named or resumed has a storage",
            got=f"study={study}, resume={resume}",
            hint="give --storage sqlite:///study.db",
        )
    if resolved.request.engine != "exact":
        return Place(storage=storage, name=study, resume=resume)
    if storage is not None:
        raise InputError(
            "only a sampling engine keeps a study in a storage",
            got=f"engine={resolved.request.engine}",
            hint="try --engine tpe, or leave --storage out: the exact search needs none",
        )
    return None


def _search_counts(
    resolved: Resolved,
    place: Place | None,
    progress: Progress | None,
    memo: Memo,
    wanted: Wanted,
    before: Sequence[Outcome] = (),
) -> list[Outcome]:
    """Up to the first number of cards that will do, or all; those of `before` have been."""
    outcomes, counts = [*before], _counts(resolved)
    for cards in counts[len(before) :]:
        question, space = subject_of(resolved, cards)
        where, left_s = place, _time_left(resolved, outcomes)
        if place is not None and len(counts) > 1:
            where = place.named(f"{cards}-cards", first=cards == counts[0])
        outcomes.append(_run(resolved, question, space, where, progress, memo, wanted, left_s))
        if outcomes[-1].best is not None and not _every_count(resolved):
            break
    if _every_count(resolved):  # the plan is that of the last one
        outcomes.sort(key=_a_card)
    return outcomes


def _every_count(resolved: Resolved) -> bool:
    """Whether more cards may cost less: a token, where no rate is asked."""
    rate = resolved.request.workload.request_rate
    return resolved.request.objective == "cost" and rate is None


def _a_card(outcome: Outcome) -> tuple[float, int]:
    """Output tokens a second and card of the best strategy, then fewer cards; none come first."""
    best = outcome.best
    most = -1.0 if best is None else best.columns["output_tokens_per_s_per_card"]
    return float(f"{most:.9g}"), 0 if best is None else -outcome.space.cards


def _out_of_time(outcome: Outcome) -> bool:
    """Whether a search that proves bounds stopped before it was done."""
    return outcome.bound is not None and not outcome.complete


def _time_left(resolved: Resolved, outcomes: list[Outcome]) -> float | None:
    """Seconds of the time limit that earlier searches have left; None without a limit."""
    limit = resolved.time_limit_s
    return None if limit is None else max(limit - sum(one.wall_s for one in outcomes), 0.0)


def _run(
    resolved: Resolved,
    question: Question,
    space: Space,
    place: Place | None,
    progress: Progress | None,
    memo: Memo,
    wanted: Wanted,
    left_s: float | None,
) -> Outcome:
    request = resolved.request
    if request.engine == "exact":
        return search_exact(
            question,
            space,
            time_limit_s=left_s,
            progress=progress,
            memo=memo,
            wanted=wanted,
        )
    from shardplan.search.sampled import search_sampled
    from shardplan.search.study import encode

    return search_sampled(
        question,
        space,
        engine=request.engine,
        trials=request.trials or DEFAULT_TRIALS,
        seed=request.seed,
        seed_trials=request.seed_trials,
        place=place,
        carried=encode(resolved, question.cards),
        progress=progress,
    )


def estimate(**point: Any) -> dict[str, Any]:
    """Price one given strategy; arguments are the columns of `shardplan estimate --points`."""
    from shardplan.search.estimate import estimate_one

    return estimate_one(**point)
