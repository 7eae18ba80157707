"""Whether the simulator and the steady-state model agree: same steps, loads below saturation.

    python tests/benchmarks/bench_agreement.py [--out results/benchmarks/agreement.md]

Both are asked for the same deployment under the same load; neither is fitted to the other. The
simulator is measured between its start and its end: of a closed loop the first requests have
outputs of any length up to the full one, as if it had run for long, and rounds are counted from the
third on; of random arrivals a tenth is left out at the start, and all that end after the last came.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from agreement_cases import (  # type: ignore[import-not-found]  # beside this script
    CASES,
    ENGINES,
    Case,
    Seen,
    drawn,
    said,
    scorer,
    simulated,
    steady,
)
from agreement_pools import (  # type: ignore[import-not-found]  # beside this script
    CASES as POOLS,
)
from agreement_pools import LOADS as POOL_LOADS
from agreement_pools import PoolsCase, both_of, drawn_pools, pools_simulated, pools_told
from measuring import table  # type: ignore[import-not-found]  # beside this script

GOALS = {"requests/s": 0.05, "TPOT": 0.05, "TTFT p50": 0.15, "TTFT p99": 0.25}
LOADS = ("closed 0.75", "Poisson 0.6", "Poisson 0.85")
DRAWN_COUNT, DRAWN_SEED = 100, 2026
DRAWN_POOLS = 40


@dataclass(frozen=True, slots=True)
class Row:
    """One workload: both answers."""

    deployment: str
    engine: str
    load: str
    lengths: str
    told: Seen
    found: Seen

    @property
    def errors(self) -> dict[str, float]:
        """What the steady state says over what the simulator finds, less 1."""
        told, found = self.told, self.found
        pairs = {
            "requests/s": (told.requests_per_s, found.requests_per_s),
            "TPOT": (told.tpot_s, found.tpot_s),
            "TTFT mean": (told.ttft_mean_s, found.ttft_mean_s),
            "TTFT p50": (told.ttft_p50_s, found.ttft_p50_s),
            "TTFT p99": (told.ttft_p99_s, found.ttft_p99_s),
        }
        return {name: one / other - 1.0 for name, (one, other) in pairs.items()}

    @property
    def agrees(self) -> bool:
        """Whether every goal is met."""
        return all(abs(self.errors[name]) <= goal for name, goal in GOALS.items())


def row_of(case: Case, engine: str, load: str) -> Row:
    """Both answers to one load: `closed` or `Poisson` and a share of what all slots serve."""
    made, (kind, share) = scorer(case, engine), load.split()
    slots = case.slots * made.model.groups
    if kind == "closed":
        flight = max(int(slots * float(share)), 1)
        rate = math.inf
        found = simulated(case, made, flight=flight, rate=None)
    else:
        capacity = said(steady(case, made, flight=float(slots))).requests_per_s
        flight, rate = slots, float(share) * capacity
        found = simulated(case, made, flight=None, rate=rate)
    told = said(steady(case, made, flight=float(flight), rate=rate))
    return Row(case.name, engine, load, case.lengths, told, found)


def rows() -> Iterator[Row]:
    """Every case under every engine and load."""
    for case in CASES:
        for engine, load in itertools.product(case.engines, LOADS):
            yield row_of(case, engine, load)


def drawn_rows() -> Iterator[Row]:
    """Of the workloads that were drawn."""
    for case, load in drawn(DRAWN_COUNT, DRAWN_SEED):
        yield row_of(case, case.engines[0], load)


def pools_row(case: PoolsCase, share: float) -> Row:
    """Both answers to random arrivals at a share of what both pools serve."""
    both = both_of(case)
    rate = share * both.most_per_s
    told, found = pools_told(both, rate), pools_simulated(case, both, rate)
    return Row(case.name, case.engine, f"Poisson {share:.2g}", case.lengths, told, found)


def pool_rows() -> Iterator[Row]:
    """Of prefill and decode pools, chosen."""
    for case, share in itertools.product(POOLS, POOL_LOADS):
        yield pools_row(case, share)


def drawn_pool_rows() -> Iterator[Row]:
    """Of pools that were drawn."""
    for case, share in drawn_pools(DRAWN_POOLS, DRAWN_SEED):
        yield pools_row(case, share)


def _line(row: Row) -> list[str]:
    found = row.found
    return [
        row.deployment,
        row.engine,
        row.load,
        row.lengths,
        f"{found.requests_per_s:.3g}",
        f"{found.tpot_s * 1e3:.1f}",
        f"{found.ttft_p50_s * 1e3:.0f}",
        f"{found.ttft_p99_s * 1e3:.0f}",
        *(f"{error:+.1%}" for error in row.errors.values()),
        "yes" if row.agrees else "no",
    ]


def summary(found: list[Row]) -> list[list[str]]:
    """How many workloads meet each goal, by engine and kind of load."""
    lines = []
    loads = sorted({row.load for row in found}, key=lambda load: load.split())
    for engine, kind in itertools.product(ENGINES, ("closed", "Poisson")):
        for load in (one for one in loads if one.startswith(kind)):
            some = [row for row in found if (row.engine, row.load) == (engine, load)]
            if some:
                lines.append([engine, load, *_met(some)])
    return [*lines, ["all", "", *_met(found)]]


def _agreeing(some: list[Row]) -> str:
    return f"{sum(row.agrees for row in some)} of {len(some)} workloads agree in all four"


def _met(some: list[Row]) -> list[str]:
    cells = []
    for name, goal in GOALS.items():
        errors = np.abs([row.errors[name] for row in some])
        cells.append(
            f"{int((errors <= goal).sum())} of {len(some)}, median {np.median(errors):.1%}"
        )
    return [*cells, f"{sum(row.agrees for row in some)} of {len(some)}"]


WORDS = """
Both price their steps with the same step model; the simulator was checked against a reference that
keeps every request and fills every step (`tests/costmodel/discrete.py`, equal to rounding). Where
the two differ below, the steady state leaves something out; neither was fitted to the other. Loads
are shares of what the steady state says all slots serve. Outputs are of one length, but in closed
loops up to a tenth longer or shorter: requests of one length that begin with one step would do so
for ever, as chance had it at the start.

What still differs:

- **The 99th percentile of TTFT where about one request in a hundred waits for a slot**: it lies at
  the edge between those that wait and those that do not, and moves by its own size with a few of
  them, also from one simulation to the next. How many wait is told to a fifth, to a half where
  steps grow with each request; in mean and median little is seen of it.
- **Steps that grow fast with each request, and prompts that fill most of the time** (5070 tokens,
  64 slots at 0.85): more in flight make longer steps, more come during these and the prompts among
  them are more; the steady state has the first two. TPOT is a twelfth too low.
- **Long prompts in closed loops** (2048 and 6000 tokens in steps of 2048): the mean wait supposes
  that prompts come more unevenly than they do, and percentiles know of no rests. TTFT p50 is up to
  a half too high, p99 up to two fifths too low.
- **Pipelines near saturation**: a microbatch with prompts holds up the others by a step of its own
  kind, two of them at once by less than two. TPOT is a twelfth too high.
- **Groups that step together, with prompts in most steps**: those that begin together end together
  where outputs are of one length, so that the fullest group has more than chance would give it.
  TTFT is up to a fifth too low. Where prompts go first, in closed loops, a step of them is priced
  at their mean number, and whole ones take less: TPOT is a twelfth too high, the safe side.
- **Closed loops whose requests end together**: outputs a tenth apart keep those together that began
  together, and the most that begin with one step are more than chance would have it. TTFT p99 is up
  to a half too low.
- **Pools, many prompts at once**: that some steps are fuller than others, and the fullest group of
  those that step together, is left out (`disagg_queue.py`): TTFT is up to two thirds too low where
  short steps would just do (0.8 of what groups of four serve). Caches of prompts that end together
  come to the decode pool together and wait for slots, which random arrivals do not: TTFT p99 is up
  to a half too low at 0.9.
"""


def _printed(source: Callable[[], Iterator[Row]]) -> list[Row]:
    """Rows, each told as it is found."""
    kept = []
    for row in source():
        kept.append(row)
        print(*_line(row), flush=True)
    return kept


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/agreement.md"))
    given = parser.parse_args()
    every = [_printed(source) for source in (rows, drawn_rows, pool_rows, drawn_pool_rows)]
    found, others, pools, more = every
    goals = [f"{name} within {goal:.0%}" for name, goal in GOALS.items()]
    names = ("requests/s", "TPOT ms", "TTFT p50 ms", "TTFT p99 ms")
    errors = [f"Δ {name}" for name in found[0].errors]
    head = ("deployment", "engine", "load", "in/out", *names, *errors, "agree")
    text = "\n".join(
        [
            "# The simulator and the steady state",
            "",
            f"Chosen; {_agreeing(found)}:",
            "",
            *table(["engine", "load", *goals, "all"], summary(found)),
            "",
            f"Drawn at random (`drawn` of `agreement_cases.py`, seed {DRAWN_SEED}); "
            f"{_agreeing(others)}:",
            "",
            *table(["engine", "load", *goals, "all"], summary(others)),
            "",
            f"Prefill and decode pools, chosen; {_agreeing(pools)}:",
            "",
            *table(["engine", "load", *goals, "all"], [["all", "", *_met(pools)]]),
            "",
            f"Pools drawn at random (`drawn_pools` of `agreement_pools.py`, seed {DRAWN_SEED}); "
            f"{_agreeing(more)}:",
            "",
            *table(["engine", "load", *goals, "all"], [["all", "", *_met(more)]]),
            *WORDS.rstrip().splitlines(),
            "",
            "Numbers below are the simulator's; Δ is what the steady state says over them, less 1.",
            "",
            "Chosen:",
            "",
            *table(head, [_line(row) for row in found]),
            "",
            "Drawn:",
            "",
            *table(head, [_line(row) for row in others]),
            "",
            "Pools, chosen:",
            "",
            *table(head, [_line(row) for row in pools]),
            "",
            "Pools, drawn:",
            "",
            *table(head, [_line(row) for row in more]),
            "",
            "Regenerate: `python tests/benchmarks/bench_agreement.py`",
            "",
        ]
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
