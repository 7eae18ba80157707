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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from agreement_cases import (  # type: ignore[import-not-found]  # beside this script
    CASES,
    ENGINES,
    Seen,
    said,
    scorer,
    simulated,
    steady,
)
from measuring import table  # type: ignore[import-not-found]  # beside this script

GOALS = {"requests/s": 0.05, "TPOT": 0.05, "TTFT p50": 0.15, "TTFT p99": 0.25}
LOADS = ("closed 3/4", "Poisson 0.6", "Poisson 0.85")


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


def rows() -> Iterator[Row]:
    """Every case under every engine and load."""
    for case in CASES:
        for engine, load in itertools.product(case.engines, LOADS):
            made = scorer(case, engine)
            slots = case.slots * made.model.groups
            if load.startswith("closed"):
                flight = slots * 3 // 4
                rate = math.inf
                found = simulated(case, made, flight=flight, rate=None)
            else:
                capacity = said(steady(case, made, flight=float(slots))).requests_per_s
                flight, rate = slots, float(load.split()[1]) * capacity
                found = simulated(case, made, flight=None, rate=rate)
            told = said(steady(case, made, flight=float(flight), rate=rate))
            yield Row(case.name, engine, load, case.lengths, told, found)


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
    for engine, load in itertools.product(ENGINES, LOADS):
        some = [row for row in found if (row.engine, row.load) == (engine, load)]
        cells = []
        for name, goal in GOALS.items():
            errors = np.abs([row.errors[name] for row in some])
            cells.append(
                f"{int((errors <= goal).sum())} of {len(some)}, median {np.median(errors):.1%}"
            )
        every = sum(row.agrees for row in some)
        lines.append([engine, load, *cells, f"{every} of {len(some)}"])
    return lines


WORDS = """
Both price their steps with the same step model; the simulator was checked against a reference that
keeps every request and fills every step (`tests/costmodel/discrete.py`, equal to rounding). Where
the two differ below, the steady state leaves something out; neither was fitted to the other. Loads
are shares of what the steady state says all slots serve. Outputs are of one length, but in closed
loops up to a tenth longer or shorter: requests of one length that begin with one step would do so
for ever, as chance had it at the start.

What still differs:

- **Prompts about as long as a step** (2048 tokens in steps of 2048, beside decoding sequences): the
  rest of a prompt shares a step with the next, whose rest follows; TTFT is off by a fifth at the
  median and a third at the end. Of longer ones (6000 in steps of 2048) the mean wait of a closed
  loop supposes that prompts come more unevenly than they do.
- **The 99th percentile of TTFT near full slots**: some per cent of requests wait for a slot, and it
  lies among these. Of 40,000 simulated requests themselves it is good to a tenth or two.
- **Few slots whose steps grow with each request** (long contexts, 16 slots at 0.85): the number in
  flight varies up to all slots; the steady state takes them for full from the mean on. TPOT is a
  fifth too high there, which is the safe side.
- **Where 99 % of requests meet no other**, the percentile jumps from one prompt a step to two.
"""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/agreement.md"))
    given = parser.parse_args()
    found = []
    for row in rows():
        found.append(row)
        print(*_line(row), flush=True)
    goals = [f"{name} within {goal:.0%}" for name, goal in GOALS.items()]
    names = ("requests/s", "TPOT ms", "TTFT p50 ms", "TTFT p99 ms")
    errors = [f"Δ {name}" for name in found[0].errors]
    head = ("deployment", "engine", "load", "in/out", *names, *errors, "agree")
    text = "\n".join(
        [
            "# The simulator and the steady state",
            "",
            *table(["engine", "load", *goals, "all"], summary(found)),
            *WORDS.rstrip().splitlines(),
            "",
            f"All {len(found)} workloads, {sum(row.agrees for row in found)} of which agree in all",
            "four. Numbers are the simulator's; Δ is what the steady state says over them, less 1.",
            "",
            *table(head, [_line(row) for row in found]),
            "",
            "Regenerate: `python tests/benchmarks/bench_agreement.py`",
            "",
        ]
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
