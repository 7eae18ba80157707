"""Flips of the ranking are where they are told to be, and the robust plan is brute force's."""

from __future__ import annotations

import functools
import html
import io
import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console
from tests.search.oracle import brute_force, dense, small_case

import shardplan
from shardplan.costmodel.cost_groups import HOST, IN_NODE, ScaledModel
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.memo import Memo
from shardplan.search import exact
from shardplan.search.api import _question, _search_counts
from shardplan.search.contender import Contender, Deployed, Tuned
from shardplan.search.contenders import contenders_of
from shardplan.search.evaluate import LayoutScorer, Question, Scores
from shardplan.search.exact import search_exact
from shardplan.search.judged import Wanted
from shardplan.search.kept import Outcome
from shardplan.search.plan import Limits
from shardplan.search.report.page import page
from shardplan.search.request import Asked, resolve
from shardplan.search.robust import FULL, QUICK, Depth, bands_of, flips, robustness
from shardplan.search.robust_choice import choose, scenarios
from shardplan.search.robust_plan import study
from shardplan.search.robust_words import factor_words, flips_of, verdict
from shardplan.search.tables_robust import print_robustness


@functools.cache
def searched(**asked: Any) -> tuple[Question, Outcome]:
    """A 13b model on a node of eight, and what the exact search finds."""
    question = Asked(model="llama-2-13b", cluster="atlas-800t-a2", **asked)
    resolved = resolve(question)
    outcome = _search_counts(resolved, None, None, Memo(), Wanted())[-1]
    return _question(resolved, outcome.space.cards), outcome


@dataclass
class ByHand:
    """A contender whose step takes `fixed + scaled * f` seconds, whatever else is asked."""

    name: str
    fixed: float
    scaled: float

    def tuned(self, factors: dict[str, Array]) -> Tuned:
        """Its one point at each factor."""
        factor = factors["dense"]
        return Tuned(1.0 / (self.fixed + self.scaled * factor), np.zeros(factor.size, dtype=int))

    def deployed(self, point: int) -> Deployed:
        """A strategy of slots that nothing else has."""
        _, outcome = searched()
        assert outcome.best is not None
        return Deployed(outcome.space.strategy(outcome.best.parallel, outcome.best.choice, 9, 1024))


@pytest.mark.parametrize("depth", [QUICK, FULL])
def test_a_flip_by_hand(depth: Depth) -> None:
    """1 + f against 1.5 + 0.6 f: they meet at f = 1.25; made faster the winner only gains."""
    pair = [ByHand("winner", fixed=1.0, scaled=1.0), ByHand("other", fixed=1.5, scaled=0.6)]
    slower, faster = flips(cast("list[Contender]", pair), "dense", depth, (0.8, 1.3))
    assert faster is None
    assert slower is not None
    assert 1.25 <= slower.factor <= 1.25 * (1.0 + depth.resolution)
    assert slower.within_band is True
    assert (slower.strategy.batch, slower.strategy.chunk) == (9, 1024)
    assert slower.objective == pytest.approx(1.0 / 2.25, rel=0.01)
    assert slower.plan_objective == pytest.approx(1.0 / 2.25, rel=0.01)


def test_at_the_prices_as_they_are_contenders_have_the_searchs_numbers() -> None:
    """To the last bit, through the re-pricing: objective and point of every layout's best."""
    question, outcome = searched(tpot_ms=30)
    found = contenders_of(question, outcome, 20)
    assert found[0].kept is outcome.best
    for one in found:
        groups = {group: np.ones(3) for group in one.groups}
        tuned = one.tuned(groups)
        if one.kept.feasible:
            assert tuned.objective.tolist() == [one.kept.columns["objective"]] * 3
            again = one.at(int(tuned.point[0]))
            assert (again.batch, again.chunk) == (one.kept.batch, one.kept.chunk)
            assert again.columns == one.kept.columns
        else:
            assert not np.isfinite(tuned.objective).any()


def search_scaled(monkeypatch: pytest.MonkeyPatch, group: str, factor: float, **asked: Any) -> Any:
    """The exact search's best with a group's time scaled under it."""
    question, outcome = searched(**asked)

    class Scaled(LayoutScorer):
        def score(
            self, choice: Any, batch: Any, chunk: Any, *, watch: Any = None, **_: Any
        ) -> Scores:
            scaled = ScaledModel.of(self.model_for(choice), self.question.cluster)
            scaled = scaled.at({group: np.array(factor)})
            return super().score(choice, batch, chunk, watch=watch, pricer=scaled)

    with monkeypatch.context() as patch:
        patch.setattr(exact, "LayoutScorer", Scaled)
        return search_exact(question, outcome.space).best


@pytest.mark.parametrize(
    ("asked", "groups"),
    [
        ({"tpot_ms": 30}, (IN_NODE,)),
        pytest.param({"tpot_ms": 30}, ("dense", HOST), marks=pytest.mark.slow),
        pytest.param(
            {"objective": "latency", "concurrency": 64},
            ("dense", IN_NODE, HOST),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_exact_search_flips_where_it_is_told(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], groups: tuple[str, ...]
) -> None:
    """On scaled prices its best is the runner-up just beyond, and the winner's layout before."""
    question, outcome = searched(**asked)
    contenders = contenders_of(question, outcome, 99)
    found = 0
    for group in groups:
        for flip in flips(contenders, group, FULL, None):
            if flip is None:
                continue
            found += 1
            best = search_scaled(monkeypatch, group, flip.factor, **asked)
            assert best.parallel == replace(flip.strategy.parallelism(), stage_layers=())
            assert (best.batch, best.chunk) == (flip.strategy.batch, flip.strategy.chunk)
            assert best.columns["objective"] == pytest.approx(flip.objective, rel=1e-12)
            nearer = math.exp(
                math.log(flip.factor) - math.copysign(math.log1p(FULL.resolution), flip.factor - 1)
            )
            before = search_scaled(monkeypatch, group, nearer, **asked)
            assert before.parallel == contenders[0].kept.parallel
    assert found


def test_the_plan_as_it_stands_breaks_its_limit_where_it_is_told() -> None:
    """Its own slots and step size: within the limit just before the factor, over it there."""
    question, outcome = searched(tpot_ms=30)
    contenders = contenders_of(question, outcome, 3)
    told = robustness(contenders, QUICK, contenders[0], "slots")
    assert sum(row.share for row in told.groups) == pytest.approx(1.0, abs=1e-6)
    alone = contenders[0].alone()
    for row in told.groups:
        assert row.limit == "tpot"
        assert row.limit_factor is not None
        factors = np.array([row.limit_factor / 1.0005, row.limit_factor])
        tpot_s = np.concatenate(
            [one.columns["tpot_s"] for one in alone.blocks({row.group: factors})]
        )
        assert tpot_s[0, 0] <= 0.03 < tpot_s[1, 0]


def test_scenarios_are_the_ends_and_all_corners() -> None:
    """As it is, two ends a group, 2^groups corners."""
    found = scenarios({"a": (0.5, 2.0), "b": (0.9, 1.1), "c": (0.8, 1.25)})
    rows = list(zip(*(found[name].tolist() for name in "abc"), strict=True))
    assert rows[0] == (1.0, 1.0, 1.0)
    assert rows[1:7] == [
        (0.5, 1.0, 1.0),
        (2.0, 1.0, 1.0),
        (1.0, 0.9, 1.0),
        (1.0, 1.1, 1.0),
        (1.0, 1.0, 0.8),
        (1.0, 1.0, 1.25),
    ]
    assert rows[7:] == list(product((0.5, 2.0), (0.9, 1.1), (0.8, 1.25)))


@pytest.mark.parametrize("limited", [False, True])
def test_the_robust_strategy_is_brute_forces(limited: bool) -> None:
    """Every strategy in every scenario, one at a time, by plain loops."""
    case = small_case(dense(), cards=4, concurrency=None)
    question = case.question
    if limited:
        free = search_exact(question, case.space()).best
        assert free is not None
        limits = Limits(tpot_s=free.columns["tpot_s"] * 1.0001)
        question = replace(question, limits=limits)
    case = replace(
        case, question=question, choices=case.choices[:1], batches=(1, 8, 64), chunks=(64, 512)
    )
    space = case.space()
    outcome = search_exact(question, space)
    contenders = contenders_of(question, outcome, 99)
    bands = bands_of(contenders)
    chosen = choose(contenders, bands)

    table = scenarios(bands)
    count = len(next(iter(table.values())))
    objective: dict[Any, list[float]] = {}
    for one in brute_force(case):
        scorer = LayoutScorer(question, one.parallel)
        scaled = ScaledModel.of(scorer.model_for(one.choice), question.cluster)
        point = np.array([float(one.batch)]), np.array([float(one.chunk)])
        factors = {name: factor[:, None] for name, factor in table.items()}
        scores = scorer.score(one.choice, *point, pricer=scaled.at(factors))
        feasible, reached = scores.feasible[:, 0], scores.columns["objective"][:, 0]
        values = [float(v) if ok else 0.0 for v, ok in zip(reached, feasible, strict=True)]
        objective[one.parallel, one.choice, one.batch, one.chunk] = values
    best = [max(values[at] for values in objective.values()) for at in range(count)]
    regret = {
        key: max(1.0 - values[at] / best[at] for at in range(count) if best[at])
        for key, values in objective.items()
    }
    least = min(regret.values())
    place = contenders[chosen.contender]
    kept = place.kept if chosen.point is None else place.at(chosen.point)
    key = (kept.parallel, kept.choice, kept.batch, kept.chunk)
    assert regret[key] == pytest.approx(least, abs=1e-12)
    assert chosen.summary.robust_regret == pytest.approx(least, abs=1e-12)
    assert chosen.summary.scenarios == sum(value > 0 for value in best)
    assert (chosen.summary.nominal_breaks > 0) == limited
    winner = outcome.best
    assert winner is not None
    nominal = (winner.parallel, winner.choice, winner.batch, winner.chunk)
    assert chosen.summary.nominal_regret == pytest.approx(regret[nominal], abs=1e-12)
    assert chosen.summary.given_up == pytest.approx(1.0 - objective[key][0] / best[0], abs=1e-12)


def test_one_layout_alone_never_loses() -> None:
    """No contender, no flip, and nothing to choose but its own points."""
    question, outcome = searched(cards=1)
    (only,) = contenders_of(replace(question), replace(outcome, kept=outcome.kept[:1]), 3)
    assert flips([only], "dense", QUICK, None) == (None, None)


def test_a_search_tells_its_flips_and_a_robust_one_what_it_gives_up() -> None:
    """The plan, its request, certificate and notes; the same bytes each time."""
    asked: dict[str, Any] = {"model": "llama-3.1-8b", "cluster": "atlas-800t-a2", "cards": 2}
    plain = shardplan.search(**asked).plan
    assert plain.robustness is not None
    assert plain.robustness.choice is None
    assert plain.certificate.gap == 0.0
    first, again = (shardplan.search(**asked, robust=True).plan for _ in range(2))
    assert first.dumps() == again.dumps()
    told = first.robustness
    assert first.request.robust
    assert told is not None
    assert told.choice is not None
    assert told.choice.robust_strategy == first.strategy
    assert told.choice.nominal_strategy == plain.strategy
    assert told.choice.robust_regret <= told.choice.nominal_regret
    given_up = 1.0 - first.performance.output_tokens_per_s / plain.performance.output_tokens_per_s
    assert told.choice.given_up == pytest.approx(given_up)
    assert first.certificate.gap == pytest.approx(1.0 / (1.0 - given_up) - 1.0)
    assert any(text.startswith("robust: ") for text in first.notes)


def test_people_read_the_same_in_the_terminal_and_in_the_report() -> None:
    """A row a group with its share, the flips with their runner-ups, the verdict."""
    result = shardplan.search("llama-3.1-8b", "atlas-800t-a2", cards=2)
    told = result.plan.robustness
    assert told is not None
    console = Console(width=120, file=io.StringIO(), record=True)
    print_robustness(result.plan, console)
    report = html.unescape(page(result.plan, result.trials))
    for shown in (console.export_text(), report):
        assert verdict(result.plan) in " ".join(shown.split())
        for row in told.groups:
            assert row.group in shown
            assert all(factor_words(flip.factor) in shown for _, flip in flips_of(row))


def test_a_study_leaves_the_winner_alone() -> None:
    """Without `robust` what the search found is what is deployed."""
    question, outcome = searched()
    assert study(question, outcome, robust=False).best is outcome.best
