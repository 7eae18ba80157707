"""Strategies chosen by their percentiles, and by the simulator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardplan.costmodel.run_out import run_out
from shardplan.models.errors import InfeasibleError, InputError
from shardplan.search.api import SearchResult, search, subject_of
from shardplan.search.evaluate import LayoutScorer
from shardplan.search.exact import search_exact
from shardplan.search.plan import Plan
from shardplan.search.request import Asked, resolve

FILES = Path(__file__).parent / "workloads"
ASKED: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "cluster": "atlas-800t-a2",
    "cards": 1,
    "input_len": 256,
    "output_len": 64,
    "concurrency": 8,
    "kv_dtype": "bf16",
    "weight_dtype": "bf16",
}


def asked(**changes: Any) -> SearchResult:
    """A search of few strategies."""
    return search(**ASKED | changes)


def test_a_percentile_that_is_limited_is_that_of_a_run() -> None:
    """Of the best of all strategies that keep it, by brute force."""
    limits = {"ttft_p99_ms": 90.0, "tpot_p99_ms": 25.0}
    question, space = subject_of(resolve(Asked(**ASKED | limits)), 1)
    free, everything = subject_of(resolve(Asked(**ASKED)), 1)
    best = search_exact(question, space).best
    assert best is not None
    scorer, able = LayoutScorer(free, everything.layouts[0]), []
    batch, chunk = (np.array(one, dtype=float) for one in (everything.batches, everything.chunks))
    grid = [one.ravel() for one in np.meshgrid(batch, chunk, indexing="ij")]
    for choice in everything.choices:
        run = run_out(scorer.model_for(choice), scorer.serving_input(choice, *grid))
        scores = scorer.score(choice, *grid)
        held = (run.ttft_p99_s <= 0.09) & (run.tpot_p99_s <= 0.025) & scores.feasible
        able.append(float(scores.columns["objective"][held].max()))
    assert best.columns["objective"] == pytest.approx(max(able))
    assert best.columns["ttft_p99_s"] <= 0.09


def test_a_percentile_that_nothing_keeps_is_named() -> None:
    with pytest.raises(InfeasibleError, match="no strategy meets the TPOT p99 limit") as caught:
        asked(tpot_p99_ms=1.0)
    assert "--tpot-p99-ms" in str(caught.value)


def test_the_best_are_simulated_and_the_plan_says_so(tmp_path: Path) -> None:
    """The same seed and file, the same bytes."""
    file = tmp_path / "workload.toml"
    file.write_text(
        "input_len = { mean = 256, cv = 0.5, max = 1024 }\noutput_len = 64\nconcurrency = 8\n"
        "ttft_p99_ms = 5000\n",
        encoding="utf-8",
    )
    own = {"input_len": None, "output_len": None, "concurrency": None, "workload": str(file)}
    one, two = (asked(refine_simulated=4, **own).plan for _ in range(2))
    assert one.dumps() == two.dumps()
    note = next(note for note in one.notes if note.startswith("refined: "))
    assert note.startswith("refined: the best 4 strategies were simulated")
    told = one.simulated
    assert told is not None
    assert told.tried == 4
    assert told.holds
    assert f"{told.run.output_tokens_per_s:,.4g} output tokens/s" in note
    assert Plan.of(json.loads(one.dumps()), "plan.json").simulated is not None
    assert "simulated" not in json.loads(asked(**own).plan.dumps())
    assert any(note.startswith("input_len is a distribution") for note in one.notes)
    assert one.request.refine_simulated == 4
    assert one.certificate.gap is not None
    assert one.certificate.gap >= 0.0


def of_file(name: str, **changes: Any) -> Plan:
    """The plan for a workload file."""
    file = str(FILES / f"{name}.toml")
    return search(
        "llama-3.1-8b", "atlas-800t-a2", weight_dtype="bf16", workload=file, **changes
    ).plan


def briefly(patch: pytest.MonkeyPatch) -> None:
    """Fewer requests a step."""
    patch.setattr("shardplan.search.runner._REQUESTS", 60)


def test_bursts_take_more_cards_than_the_steady_state_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two cards miss the limit in the simulator; with more of them one keeps it."""
    briefly(monkeypatch)
    plan = of_file("bursts", ttft_p99_ms=1000.0, objective="cards", refine_simulated=2)
    told = plan.simulated
    assert told is not None
    assert told.first is not None
    assert not told.first_holds
    assert told.first.ttft_p99_s > 1.0 >= told.run.ttft_p99_s
    assert told.holds
    assert told.chosen > 2
    assert plan.cards > 2
    assert plan.certificate.gap == plan.cards / 2 - 1
    assert "with fewer or cheaper cards all of them miss a limit there" in plan.notes[-1]


def test_spread_lengths_take_fewer_slots() -> None:
    """Long requests stay longer, so that contexts are longer than a mean request's."""
    plain, refined = (of_file("spread", cards=2, refine_simulated=n) for n in (0, 8))
    told = refined.simulated
    assert told is not None
    assert told.first is not None
    assert told.first.tpot_s > 0.04 >= told.run.tpot_s
    assert refined.strategy.batch < plain.strategy.batch
    assert 0.0 < (refined.certificate.gap or 0.0) < 0.1


def test_a_request_that_no_strategy_holds_is_named(tmp_path: Path) -> None:
    file = tmp_path / "workload.toml"
    file.write_text(
        "input_len = { edges = [1, 2, 120000, 120001], weights = [1, 0, 1] }\noutput_len = 64\n",
        encoding="utf-8",
    )
    own = {"input_len": None, "output_len": None, "workload": str(file)}
    with pytest.raises(InputError, match="a request fits into the cache of an engine"):
        asked(cluster="atlas-800i-a2", refine_simulated=2, **own)


def test_a_file_that_only_a_simulation_could_read_is_checked_by_a_search(tmp_path: Path) -> None:
    file = tmp_path / "workload.toml"
    file.write_text("burstiness = -1\n", encoding="utf-8")
    with pytest.raises(InputError, match="burstiness"):
        asked(workload=str(file))
