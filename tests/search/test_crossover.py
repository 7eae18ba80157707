"""When pools of their own pay: gains and crossings by hand, and pages of a real sweep."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from shardplan.search.crossover import crossover_of, to_markdown
from shardplan.search.main import run
from shardplan.search.sweep import Sweep
from shardplan.search.sweep_values import parse_axes

AXES = parse_axes(["serving=agg,disagg", "output-len=64,128", "tpot-ms=10,20,40,80"])


def swept(rates: dict[tuple[str, int], list[float | None]]) -> Sweep:
    """Rows of objectives by way and output length, over the limits; None: no plan."""
    rows: list[dict[str, Any]] = []
    for serving, length in product(("agg", "disagg"), (64, 128)):
        for limit, rate in zip((10, 20, 40, 80), rates[serving, length], strict=True):
            row = {"serving": serving, "output_len": length, "tpot_ms": limit, "ranks": 4}
            status = "infeasible" if rate is None else "ok"
            rows.append({**row, "status": status, "objective": rate})
    return Sweep(axes=AXES, rows=tuple(rows), interrupted=False)


RATES: dict[tuple[str, int], list[float | None]] = {
    ("agg", 64): [None, 10.0, 20.0, 40.0],
    ("disagg", 64): [5.0, 20.0, 20.0 * math.sqrt(2), 20.0],
    ("agg", 128): [None, None, 10.0, 10.0],
    ("disagg", 128): [None, 5.0, None, 9.0],
}


def test_gains_and_crossings_by_hand() -> None:
    """2, 1.41, 0.5 at 20, 40, 80 ms: alike a third of the way from 40 to 80 on a log scale."""
    found = crossover_of(swept(RATES), "throughput")
    assert found is not None
    first, second = found.lines
    assert first.fixed == (64,)
    assert first.gains == pytest.approx((math.inf, 2.0, math.sqrt(2), 0.5))
    assert first.crossing == pytest.approx(40.0 * 2 ** (1 / 3))
    assert second.gains == (None, math.inf, 0.0, 0.9)
    assert second.crossing is None


def test_the_page_says_what_has_no_plan() -> None:
    """A row a combination, words where there is no number."""
    found = crossover_of(swept(RATES), "throughput")
    assert found is not None
    page = to_markdown(found, "toy on four cards")
    assert "| 64 | disagg alone | 2.00 | 1.41 | 0.50 | 50.4 |" in page
    assert "| 128 | - | disagg alone | agg alone | 0.90 | - |" in page
    assert "toy on four cards." in page


def test_fewer_cards_are_better() -> None:
    """Of the objective cards both ways are held by their cards."""
    found = crossover_of(swept(RATES), "cards")
    assert found is not None
    assert found.lines[0].gains[1:] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("texts", [["tpot-ms=10,20"], ["serving=agg,disagg"]])
def test_other_sweeps_have_none(texts: list[str]) -> None:
    """Both ways and something else are swept, or there is nothing to compare."""
    sweep = Sweep(axes=parse_axes(texts), rows=(), interrupted=False)
    assert crossover_of(sweep, "throughput") is None


def test_a_sweep_over_both_ways_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama-3.1-8B on eight cards: a tight TPOT limit favours pools, a loose one does not."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "sweep"
    command = ["search", "--model", "llama-3.1-8b", "--cluster", "atlas-800t-a2", "--ttft-ms"]
    command += ["2000", "--input-len", "2048", "--sweep", "serving=agg,disagg"]
    command += ["--sweep", "tpot-ms=15,100", "--jobs", "1", "--out", str(out)]
    assert run(command) == 0
    told = capsys.readouterr()
    assert "disaggregated over aggregated" in told.out
    page = (out / "crossover.md").read_text(encoding="utf-8")
    assert "llama-3.1-8b on atlas-800t-a2, input-len 2048, ttft-ms 2000." in page
    assert (out / "crossover.svg").is_file()
    gains = [float(cell) for cell in page.splitlines()[-1].strip("| ").split(" | ")[:2]]
    assert gains[0] > gains[1]
