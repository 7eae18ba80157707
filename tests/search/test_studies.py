"""Studies in a storage: whose they are, how they go on, and what is said when they cannot."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from tests.search.oracle import dense, small_case
from tests.search.shared_study import QUESTION, search_small

from shardplan.models.errors import InputError
from shardplan.search import study as studies
from shardplan.search import workers
from shardplan.search.api import subject_of
from shardplan.search.joined import draw_for
from shardplan.search.kept import Outcome
from shardplan.search.request import resolve
from shardplan.search.sampled import Drawing, search_sampled
from shardplan.search.samplers import per_trial
from shardplan.search.storage import open_storage
from shardplan.search.study import Place, decode, encode, join_study, study_digest


@pytest.fixture
def journal(tmp_path: Path) -> str:
    return f"journal:{tmp_path / 'study.log'}"


def _loaded(url: str) -> optuna.Study:
    return optuna.load_study(study_name="s", storage=open_storage(url))


@pytest.mark.parametrize("seed_trials", [0, 3])
def test_a_search_that_stopped_goes_on_to_what_it_would_have_found(
    journal: str, seed_trials: int
) -> None:
    """Draws depend on the seed and the number of the trial, not on who makes them or when."""
    whole = search_small(Place(), 12, seed_trials=seed_trials)
    search_small(Place(storage=journal, name="s"), 5, seed_trials=seed_trials)
    resumed = Place(storage=journal, name="s", resume=True)
    assert search_small(resumed, 12, seed_trials=seed_trials).kept == whole.kept


def test_what_others_priced_is_not_priced_again(
    journal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = search_small(Place(storage=journal, name="s"), 6)
    monkeypatch.setattr(Drawing, "price", lambda *_: pytest.fail("priced"))
    assert search_small(Place(storage=journal, name="s", resume=True), 6).kept == first.kept


def test_seeds_are_the_best_of_a_coarse_exact_pass() -> None:
    """The first trial is no worse than all that chance finds in twenty."""
    seeded = search_small(Place(), 1, seed_trials=1).best
    drawn = search_small(Place(), 20).best
    assert seeded is not None
    assert drawn is not None
    assert seeded.columns["objective"] >= drawn.columns["objective"]


def test_a_study_carries_its_question(journal: str) -> None:
    """Read back it is the same to the last number, and its digest too."""
    search_small(Place(storage=journal, name="s"), 1)
    joined = join_study(journal, "s")
    resolved = resolve(QUESTION)
    assert (joined.resolved, joined.cards) == (resolved, 2)
    question, space = subject_of(joined.resolved, joined.cards)
    assert joined.digest == study_digest(question, space, "random")


def test_a_question_from_files_needs_no_files(tmp_path: Path) -> None:
    """A config.json, read where it lies; the question it becomes names sizes, not the path's."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 768, "vocab_size": 1024, "torch_dtype": "bfloat16",
    }  # fmt: skip
    digests = set()
    for name in ("here", "there"):
        file = tmp_path / name / "own" / "config.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(config))
        text = encode(resolve(replace(QUESTION, model=str(file))), 2)
        file.unlink()
        question, space = subject_of(*decode(text))
        digests.add(study_digest(question, space, "random"))
    assert len(digests) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"resolved": {}, "cards": 2}', "nan"])
def test_a_question_that_cannot_be_read_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match="question that a study carries") as error:
        decode(text)
    assert "\n" not in str(error.value)


def test_a_study_of_that_name_is_resumed_only_when_asked(journal: str) -> None:
    with pytest.raises(InputError, match=r"no study 's'.*empty.*leave --resume out"):
        search_small(Place(storage=journal, name="s", resume=True), 2)
    search_small(Place(storage=journal, name="s"), 2)
    with pytest.raises(InputError, match="go on with it by --resume"):
        search_small(Place(storage=journal, name="s"), 3)
    with pytest.raises(InputError, match="no study 't'; there are s"):
        search_small(Place(storage=journal, name="t", resume=True), 3)
    assert len(_loaded(journal).trials) == 2


def test_a_study_of_another_version_is_refused(
    journal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(studies, "__version__", "0.0.1")
        search_small(Place(storage=journal, name="s"), 2)
    with pytest.raises(InputError, match=r"study 's' is of 0\.0\.1, this is"):
        search_small(Place(storage=journal, name="s", resume=True), 3)
    with pytest.raises(InputError, match=r"install shardplan 0\.0\.1"):
        draw_for(journal, "s")


def test_a_worker_prices_as_its_search_did(journal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    search_small(Place(storage=journal, name="s"), 2)
    monkeypatch.setattr("shardplan.search.joined.study_digest", lambda *_: "another")
    with pytest.raises(InputError, match="install the same build"):
        draw_for(journal, "s")


def test_a_worker_joins_only_what_a_search_made(journal: str) -> None:
    with pytest.raises(InputError, match="the storage is empty"):
        draw_for(journal, "s")
    optuna.create_study(study_name="s", storage=open_storage(journal))
    with pytest.raises(InputError, match="carries no question"):
        draw_for(journal, "s")


def _left_behind(url: str, worker: str) -> None:
    """A trial of a worker that asked and never told."""
    study = optuna.load_study(
        study_name="s", storage=open_storage(url), sampler=per_trial("random", 0)
    )
    question, space = subject_of(resolve(QUESTION), 2)
    trial = study.ask(Drawing(question, space, "random").distributions)
    trial.set_user_attr("worker", worker)


def test_a_dead_processs_trial_is_made_again_at_once(journal: str) -> None:
    """It ran on this machine and is no more; nobody waits for its silence to last."""
    search_small(Place(storage=journal, name="s"), 2)
    machine = workers.worker_name().split(" ")[0]
    if not machine:
        pytest.skip("processes of this system cannot be told apart")
    _left_behind(journal, f"{machine} 1 0")
    search_small(Place(storage=journal, name="s", resume=True), 4)
    trials = _loaded(journal).trials
    assert [trial.state.name for trial in trials].count("COMPLETE") == 4
    assert [trial.state.name for trial in trials].count("FAIL") == 1
    (again,) = (trial for trial in trials if "again" in trial.user_attrs)
    assert again.params == trials[2].params


def test_a_search_that_is_interrupted_leaves_no_trial_running(
    journal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had drawn is queued, and made when it goes on."""

    def interrupt(done: int, _wanted: int) -> None:
        if done == 3:
            monkeypatch.setattr(Drawing, "price", stopped)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_small(Place(storage=journal, name="s"), 8, progress=interrupt)
    assert {one.state.name for one in _loaded(journal).trials} == {"COMPLETE", "FAIL", "WAITING"}
    monkeypatch.undo()
    resumed = search_small(Place(storage=journal, name="s", resume=True), 8)
    assert resumed.kept == search_small(Place(), 8).kept


def test_a_silent_workers_trial_is_made_again_after_a_while(
    journal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another machine: by the time that passes here without a sign of life."""
    search_small(Place(storage=journal, name="s"), 2)
    _left_behind(journal, "elsewhere 1 0")
    monkeypatch.setattr(workers, "GRACE_S", 0.5)
    search_small(Place(storage=journal, name="s", resume=True), 3)
    states = [trial.state.name for trial in _loaded(journal).trials]
    assert (states.count("COMPLETE"), states.count("FAIL")) == (3, 1)


def test_a_worker_that_beats_is_left_in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The beat that moves counts, not the clock on the wall."""
    now = [0.0]
    monkeypatch.setattr("shardplan.search.workers.time.monotonic", lambda: now[0])
    study = optuna.create_study()
    trial = study.ask()
    trial.set_user_attr("worker", "elsewhere 1 0")
    watch = workers.Watch(study, 0)
    for beat in range(5):
        trial.set_user_attr("beat", beat)
        now[0] += workers.GRACE_S * 0.9
        assert watch.fail_dead([study.trials[0]]) == 0
    now[0] += workers.GRACE_S * 1.1
    assert watch.fail_dead([study.trials[0]]) == 1


def test_a_worker_that_was_taken_for_dead_drops_its_result(
    journal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It slept while others failed its trial: that is made again, and counted once."""
    price = Drawing.price
    slept: list[int] = []

    def sleep(drawing: Drawing, point: Any) -> Any:
        others = _loaded(journal)
        if not slept:
            slept.append(others.trials[-1].number)
            workers.queue_again(others, others.trials[-1], len(drawing.distributions))
        return price(drawing, point)

    monkeypatch.setattr(Drawing, "price", sleep)
    found = search_small(Place(storage=journal, name="s"), 4)
    monkeypatch.undo()
    assert found.kept == search_small(Place(), 4).kept
    states = [trial.state.name for trial in _loaded(journal).trials]
    assert (states.count("COMPLETE"), states.count("FAIL")) == (4, 1)


def test_what_kills_its_workers_is_not_tried_for_ever() -> None:
    study = optuna.create_study()
    watch = workers.Watch(study, 1)
    machine = workers.worker_name().split(" ")[0]
    if not machine:
        pytest.skip("processes of this system cannot be told apart")
    for _ in range(1 + workers.RETRIES):
        study.ask({"x": optuna.distributions.IntDistribution(0, 9)}).set_user_attr(
            "worker", f"{machine} 1 0"
        )
        assert watch.fail_dead([study.trials[-1]]) == 1
    assert len({trial.params["x"] for trial in study.trials}) == 1
    assert {trial.state.name for trial in study.trials} == {"FAIL"}


def test_two_searches_at_once_share_one_study(journal: str) -> None:
    """Neither loses a trial nor counts one twice; together they make what was asked for."""
    search_small(Place(storage=journal, name="s"), 1)
    found: list[Outcome] = []

    def go_on() -> None:
        found.append(search_small(Place(storage=journal, name="s", resume=True), 12))

    threads = [threading.Thread(target=go_on) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found[0].kept == found[1].kept
    states = [trial.state.name for trial in _loaded(journal).trials]
    assert states.count("COMPLETE") == 12
    assert set(states) <= {"COMPLETE", "FAIL"}


@pytest.mark.parametrize(
    ("places", "rule"),
    [
        ({"study": "s"}, "has a storage"),
        ({"resume": True}, "has a storage"),
        ({"storage": "journal:x.log"}, "only a sampling engine keeps a study"),
    ],
)
def test_places_that_mean_nothing_are_refused(places: dict[str, Any], rule: str) -> None:
    from shardplan.search.api import search

    with pytest.raises(InputError, match=rule):
        search("llama-3.1-8b", "atlas-800t-a2", **places)


def test_each_question_of_one_search_has_a_study_of_its_own(journal: str) -> None:
    """Fewest cards: one study a count; the same command with resume finds them all."""
    from shardplan.search.api import search

    def ask(resume: bool) -> Any:
        return search(
            "qwen2.5-32b", "atlas-800t-a2", cards=4, objective="cards", input_len=512,
            output_len=64, engine="random", trials=3, storage=journal, study="mine", resume=resume,
        )  # fmt: skip

    first = ask(False)
    names = {one.study_name for one in open_storage(journal).get_all_studies()}
    assert names <= {f"mine-{count}-cards" for count in (1, 2, 4)}
    assert "mine-1-cards" in names
    assert ask(True).plan.dumps() == first.plan.dumps()


def test_a_space_without_a_legal_layout_makes_no_study(journal: str) -> None:
    case = small_case(dense())
    space = replace(case.space(), layouts=(), broken={"tp-heads": 2}, broken_ways={"tp-heads": 2})
    outcome = search_sampled(
        case.question, space, engine="tpe", trials=3, seed=0, place=Place(storage=journal, name="s")
    )
    assert outcome.best is None
    assert outcome.tally.pruned_by == {"rule tp-heads": 2 * space.per_layout}
    assert not Path(journal.partition(":")[2]).exists()
