"""The sampled engines: one contract for all, and what each does beside it."""

from __future__ import annotations

import importlib.util
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.search.oracle import Case, dense, small_case, sparse

from shardplan.models.errors import InputError
from shardplan.search.dimensions import Dimensions
from shardplan.search.evaluate import LIMITS, LayoutScorer
from shardplan.search.exact import search_exact
from shardplan.search.kept import Kept, Outcome, rank_key
from shardplan.search.rulebook import rules
from shardplan.search.sampled import excess, search_sampled
from shardplan.search.samplers import ENGINES, SampledEngine
from shardplan.search.storage import open_storage
from shardplan.search.study import Place

pytestmark = pytest.mark.filterwarnings(
    "ignore:Selection of the SingletonThreadPool"  # SQLAlchemy on databases in memory
)


needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="no torch, which the engine gp runs on"
)


def _run(
    case: Case,
    engine: SampledEngine = "tpe",
    *,
    trials: int = 16,
    seed: int = 0,
    storage: str | None = None,
    study_name: str | None = None,
    resume: bool = False,
) -> Outcome:
    return search_sampled(
        case.question,
        case.space(),
        engine=engine,
        trials=trials,
        seed=seed,
        place=Place(storage=storage, name=study_name, resume=resume),
    )


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """An SQLite database in memory, which lives as long as one connection to it."""
    name = f"file:{tmp_path.name}?mode=memory&cache=shared"
    with closing(sqlite3.connect(name, uri=True)):
        yield f"sqlite:///{name}&uri=true"


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(one, marks=[pytest.mark.slow, needs_torch] if one == "gp" else [])
        for one in ENGINES
    ],
)
class TestEveryEngine:
    """What holds for all of them."""

    def test_finds_strategies_at_the_exact_searchs_prices(self, engine: SampledEngine) -> None:
        """Its best is a strategy of the space, priced as the scorer does, not above the optimum."""
        case = small_case(sparse(), hbm_bytes=24e6)
        outcome = _run(case, engine)
        best, proven = outcome.best, search_exact(case.question, case.space()).best
        assert best is not None
        assert proven is not None
        assert outcome.space.layout_of(best.parallel) in outcome.space.layouts
        at = np.array([float(best.batch)]), np.array([float(best.chunk)])
        scores = LayoutScorer(case.question, best.parallel).score(best.choice, *at)
        assert scores.feasible[0]
        assert {name: one[0] for name, one in scores.every().items()} == best.columns
        assert best.columns["objective"] <= proven.columns["objective"] * (1 + 1e-12)

    def test_reaches_the_optimum_of_a_small_space(self, engine: SampledEngine) -> None:
        """36 strategies: 90 draws, 40 of the slow engine, 160 of those that search fronts."""
        case = small_case(dense(), cards=2)
        case = replace(case, batches=(1, 8), chunks=(64, 512, 2048), choices=case.choices[:1])
        draws = {"gp": 40, "nsga2": 160, "nsga3": 160}.get(engine, 90)
        outcome, proven = (
            _run(case, engine, trials=draws),
            search_exact(case.question, case.space()),
        )
        assert outcome.best is not None
        assert proven.best is not None
        objective = proven.best.columns["objective"]
        assert outcome.best.columns["objective"] == pytest.approx(objective, rel=1e-9)

    def test_repeats_itself_for_a_seed(self, engine: SampledEngine) -> None:
        case = small_case(sparse(), hbm_bytes=24e6)
        one, two = (_run(case, engine, trials=14, seed=7) for _ in range(2))
        assert one.kept == two.kept
        assert one.tally == two.tally
        assert _run(case, engine, trials=14, seed=8).kept != one.kept

    def test_counts_each_strategy_once_and_proves_nothing(self, engine: SampledEngine) -> None:
        draws = 14 if engine == "gp" else 40
        outcome = _run(small_case(dense(), cards=2), engine, trials=draws)
        points = {(one.parallel, one.choice, one.batch, one.chunk) for one in outcome.kept}
        assert outcome.tally.evaluated == len(outcome.kept) == len(points) <= draws
        assert not outcome.complete
        assert list(outcome.kept) == sorted(outcome.kept, key=rank_key)
        refused = sum(not one.feasible for one in outcome.kept)
        assert sum(outcome.tally.infeasible.values()) == refused

    def test_says_in_every_trial_what_became_of_it(self, engine: SampledEngine, url: str) -> None:
        """Feasible, infeasible with the limit that bound, illegal with the rule it broke."""
        import optuna

        case = small_case(sparse(), hbm_bytes=16e6, tpot_s=0.002)
        base = case.choices[0]
        case = replace(case, choices=(base, replace(base, fused_collectives=True)))
        outcome = _run(case, engine, trials=20, storage=url, study_name="s")
        study = optuna.load_study(study_name="s", storage=url)
        states = [trial.user_attrs["result"]["state"] for trial in study.trials]
        assert len(states) == 20
        assert {"illegal", "infeasible"} <= set(states)
        for trial in study.trials:
            state, reason = (
                trial.user_attrs["result"]["state"],
                trial.user_attrs["result"]["reason"],
            )
            missed = sum(trial.user_attrs["violations"])
            assert trial.user_attrs["result"]["strategy"]
            if state == "illegal":
                assert reason in rules()
                assert missed == len(LIMITS)
            elif state == "infeasible":
                assert reason in LIMITS
                assert 0 < missed < len(LIMITS)
                if engine in ("cmaes", "gp"):  # know no constraints: below all that hold
                    assert trial.value == -missed
            else:
                assert (state, reason, missed) == ("feasible", "", 0.0)
        illegal = {
            t.user_attrs["result"]["strategy"]
            for t in study.trials
            if t.user_attrs["result"]["state"] == "illegal"
        }
        assert sum(outcome.tally.pruned_by.values()) == len(illegal)

    def test_goes_on_where_it_stopped(self, engine: SampledEngine, url: str) -> None:
        """6 trials, then 10 in all: 4 new ones, and the first six are still in the answer."""
        import optuna

        case = small_case(dense())
        first = _run(case, engine, trials=6, storage=url)
        second = _run(case, engine, trials=10, storage=url, seed=1)
        (name,) = optuna.get_all_study_names(url)
        assert len(optuna.load_study(study_name=name, storage=url).trials) == 10
        assert {_point(one) for one in first.kept} <= {_point(one) for one in second.kept}
        third = _run(case, engine, trials=10, storage=url, seed=2)
        assert third.kept == second.kept
        assert len(optuna.load_study(study_name=name, storage=url).trials) == 10


def _point(one: Kept) -> tuple[object, ...]:
    return one.parallel, one.choice, one.batch, one.chunk


def test_all_engines_are_told_limits_by_how_far_they_are_missed() -> None:
    """TPOT of 8 ms against 2 ms: a factor 4 = 1 + 3, so 3 / 4; what holds counts nothing."""
    case = small_case(dense(), tpot_s=0.002)
    free = search_exact(case.question, case.space()).kept[0]
    one = replace(free, columns={**free.columns, "tpot_s": 0.008})
    assert excess(case.question, one) == tuple(0.75 if name == "tpot" else 0.0 for name in LIMITS)


def test_switches_of_the_engine_are_drawn_and_their_rules_told() -> None:
    """Every strategy that is priced with a switch on is one that the exact search prices so."""
    case = small_case(dense(), input_len=2000)
    base = case.choices[0]
    choices = (base, replace(base, fused_collectives=True))
    case = replace(case, choices=choices)
    assert "fused_collectives" in Dimensions(case.space()).distributions()
    outcome = _run(case, "random", trials=60)
    on = [one for one in outcome.kept if one.choice.fused_collectives]
    assert on
    assert all(one.parallel.tp in (2, 4) and not one.parallel.sp for one in on)
    assert outcome.tally.pruned_by["rule fused-group"] > 0
    exact = {_point(one): one for one in search_exact(case.question, case.space()).kept}
    known = [one for one in on if _point(one) in exact]
    assert all(one.columns == exact[_point(one)].columns for one in known)


def test_nsga2_weighs_throughput_against_tpot(url: str) -> None:
    import optuna

    _run(small_case(dense()), "nsga2", trials=5, storage=url, study_name="s")
    study = optuna.load_study(study_name="s", storage=url)
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]


def test_nsga3_weighs_ttft_as_well(url: str) -> None:
    import optuna

    _run(small_case(dense()), "nsga3", trials=5, storage=url, study_name="s")
    study = optuna.load_study(study_name="s", storage=url)
    assert [way.name for way in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]


def test_tpe_needs_fewer_draws_than_chance() -> None:
    """Over three seeds, 60 draws each on an expert model of 4 cards: the sum of the objectives."""
    case = small_case(sparse(), hbm_bytes=24e6)

    def found(engine: SampledEngine, seed: int) -> float:
        best = _run(case, engine, trials=60, seed=seed).best
        return best.columns["objective"] if best is not None else 0.0

    assert sum(found("tpe", s) for s in range(3)) > sum(found("random", s) for s in range(3))


def test_a_file_holds_a_study(tmp_path: Path) -> None:
    case, file = small_case(dense()), f"sqlite:///{tmp_path / 'study.db'}"
    first = _run(case, trials=2, storage=file)
    assert _run(case, trials=2, storage=file).kept == first.kept


def test_a_journal_file_is_a_storage(tmp_path: Path) -> None:
    case, journal = small_case(dense()), f"journal:{tmp_path / 'study.log'}"
    first = _run(case, trials=5, storage=journal)
    assert _run(case, trials=5, storage=journal).kept == first.kept


def test_a_study_of_another_question_is_refused(url: str) -> None:
    """Another model, another space, and another engine's objectives, under the same name."""
    case = small_case(dense())
    _run(case, trials=3, storage=url, study_name="mine")
    for other in (
        small_case(sparse()),
        replace(case, batches=(1, 2)),
        small_case(dense(), cards=2),
    ):
        with pytest.raises(InputError, match="study 'mine' belongs to another"):
            _run(other, trials=3, storage=url, study_name="mine", resume=True)
    with pytest.raises(InputError, match="study 'mine' belongs to another"):
        _run(case, "nsga2", trials=3, storage=url, study_name="mine", resume=True)


def test_questions_share_a_storage_under_their_own_names(url: str) -> None:
    import optuna

    for case in (small_case(dense()), small_case(sparse())):
        _run(case, trials=2, storage=url)
    assert len(optuna.get_all_study_names(url)) == 2


@pytest.mark.parametrize(
    "address",
    [
        "sqlite:////no/such/folder/study.db",
        "journal:/no/such/folder/study.log",
        "study.db",
        "nonsense://somewhere",
        "postgresql://me:secret@127.0.0.1:1/studies",
        "redis://127.0.0.1:1",
        "grpc://127.0.0.1:port",
    ],
)
def test_a_storage_that_cannot_be_opened_is_one_line(address: str) -> None:
    with pytest.raises(InputError, match="storage of the study cannot be opened") as error:
        _run(small_case(dense()), trials=1, storage=address)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_no_address_is_memory() -> None:
    import optuna

    assert isinstance(open_storage(None), optuna.storages.InMemoryStorage)


def test_optuna_says_nothing_and_keeps_its_own_level(capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    _run(small_case(dense()), "cmaes", trials=12)
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == before


def test_progress_counts_the_trials() -> None:
    case, seen = small_case(dense()), []
    search_sampled(
        case.question,
        case.space(),
        engine="random",
        trials=4,
        seed=0,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_nothing_to_draw_from_is_refused() -> None:
    with pytest.raises(InputError, match="at least one trial"):
        _run(small_case(dense()), trials=0)
    with pytest.raises(InputError, match="must be one of tpe, nsga2, nsga3, cmaes, gp, random"):
        _run(small_case(dense()), "annealing")  # type: ignore[arg-type]  # what a user may type


@pytest.mark.parametrize(
    ("engine", "package", "install"),
    [("cmaes", "cmaes", "pip install cmaes"), ("gp", "torch", r"pip install 'shardplan\[torch\]'")],
)
def test_an_engine_says_which_package_it_lacks(
    engine: SampledEngine, package: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=install):
        _run(small_case(dense()), engine)
