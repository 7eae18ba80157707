"""`--only`: a search held to some sizes of axes, its space counted so, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

import shardplan
from shardplan.models.errors import InfeasibleError, InputError
from shardplan.search.explain_space import explain_space
from shardplan.search.layouts import Reach, raw_layouts
from shardplan.search.main import run
from shardplan.search.only import only_of
from shardplan.search.request import Asked, resolve

_ASKED: dict[str, Any] = {
    "model": "qwen3-30b-a3b",
    "cluster": "atlas-800t-a2",
    "input_len": 512,
    "output_len": 64,
}


def test_a_held_space_is_the_part_of_the_whole_with_these_sizes() -> None:
    """No layout is lost and none is left that has another size."""
    resolved = resolve(Asked(**_ASKED))
    only = only_of(["tp=2,4", "sp=off"], (1,))
    whole = list(raw_layouts(resolved.spec, resolved.engine, 8))
    held = list(raw_layouts(resolved.spec, resolved.engine, 8, Reach(only=only)))
    assert held == [par for par in whole if par.tp in (2, 4) and not par.sp]
    assert 0 < len(held) < len(whole)


def test_the_best_of_a_held_space_is_the_best_with_these_sizes() -> None:
    """As the whole space's own trials say, and the certificate counts the held space."""
    free = shardplan.search(**_ASKED, top=100)
    size = 2 if free.plan.strategy.tp != 2 else 4
    held = shardplan.search(**_ASKED, only={"tp": size}).plan
    assert held.strategy.tp == size
    assert held.request.only == {"tp": (size,)}
    assert held.certificate.gap == 0.0
    assert held.certificate.space["tp"] == [size]
    assert held.certificate.space_size < free.plan.certificate.space_size
    (rules,) = explain_space(Asked(**_ASKED, only={"tp": size}))
    told = rules.to_json()
    assert told["size"] == held.certificate.space_size
    rows = free.trials[(free.trials["tp"] == size) & free.trials["feasible"]]
    assert len(rows)
    best = rows["output_tokens_per_s"].max()
    assert held.performance.output_tokens_per_s == pytest.approx(best, rel=1e-9)


def test_both_pools_are_held() -> None:
    plan = shardplan.search(**_ASKED, serving="disagg", only=["tp=4", "pp=1"]).plan
    assert [(pool.strategy.tp, pool.strategy.pp) for pool in plan.pools] == [(4, 1), (4, 1)]
    assert plan.certificate.gap == 0.0


def test_words_of_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    """Several sizes and several axes; the plan says what it was held to."""
    line = "search --model llama-3.1-8b --cluster atlas-800t-a2 --only tp=2,4 --only pp=1 --json"
    assert run([*line.split(), "--out", str(tmp_path / "held")]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["request"]["only"] == {"pp": [1], "tp": [2, 4]}
    assert plan["strategy"]["tp"] in (2, 4)


@pytest.mark.parametrize(
    ("only", "says"),
    [
        (["tq=4"], "did you mean tp"),
        (["tp"], "an axis and its sizes"),
        (["tp=0"], r"from 1 to \d+ \(only tp='0'\)"),
        (["tp=4,x"], "whole numbers"),
        (["tp=1e9"], "whole numbers"),
        (["tp=" + "9" * 400], "whole numbers"),
        (["tp="], "whole numbers"),
        (["tp=4", "tp=8"], "tp twice"),
        ({"tp": True}, "whole numbers"),
        ({"tp": []}, "names sizes"),
        ({7: 1}, "only=7"),
        (["sp=2"], "off or on"),
        (["cp=2"], "add --cp auto"),
    ],
)
def test_what_no_axis_can_be_held_to(only: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        resolve(Asked(**_ASKED, only=only))


@pytest.mark.parametrize("serving", ["agg", "disagg"])
def test_sizes_that_no_split_has_are_named(serving: str) -> None:
    with pytest.raises(InfeasibleError, match="held to tp=3") as caught:
        shardplan.search(**_ASKED, serving=serving, only={"tp": 3})
    assert "other sizes of --only" in caught.value.hint
