"""How far sampled searches stay from the optimum that the exact search proves.

    python tests/benchmarks/bench_regret.py [--out FILE] [--trials 150] [--seeds 5]
        [--engines tpe,random,...]

regret = 1 - objective found / objective proven, of the best strategy after the given number of
trials; 1 where nothing feasible was found. Seeds from an exact pass are off: the samplers start
from nothing. The Gaussian process takes tenths of a second over each trial, so it gets fewer trials
than the others, which its row says; the regret of all after so many trials stands beside. Prices
are shared by all runs of a question, so the seconds are those of the samplers and of the strategies
that no run before had drawn. The samplers draw cuts of the layers near the even one and ranks
numbered as the engine does; the optimum is that of all cuts and orders.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna

from shardplan.search.api import subject_of
from shardplan.search.exact import search_exact
from shardplan.search.request import Asked, resolve
from shardplan.search.sampled import Drawing, outcome_of
from shardplan.search.samplers import ENGINES, SampledEngine, directions, per_trial
from shardplan.search.storage import quiet_optuna

QUESTIONS: tuple[Asked, ...] = (
    Asked(model="llama-65b", cluster="atlas-800t-a2"),
    Asked(model="qwen3-32b", cluster="atlas-800i-a2", concurrency=64, tpot_ms=50.0),
    Asked(model="llama-3.1-70b", cluster="atlas-800t-a2", nodes=2, fused_collectives="auto"),
    Asked(model="qwen3-30b-a3b", cluster="atlas-800t-a2", objective="latency"),
    Asked(model="qwen3-235b-a22b", cluster="atlas-800t-a2", nodes=2),
    Asked(model="deepseek-v3", cluster="cloudmatrix-384", cards=32, tpot_ms=60.0),
)
TRIALS, SEEDS = 150, 5
SLOW_ENGINE, EARLY = "gp", 20
"""The slow engine gets the early trials alone; the regret of every engine after them is told."""
NEAR = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One search."""

    engine: SampledEngine
    question: int
    regret: float
    early: float
    """Regret after the first `EARLY` trials."""
    wall_s: float


def title(asked: Asked) -> str:
    """A question in words."""
    words = [f"{asked.model}, {asked.cluster}"]
    words += [f"{asked.nodes} nodes"] if asked.nodes else []
    words += [f"{asked.cards} cards"] if asked.cards else []
    words += [f"{asked.concurrency} in flight"] if asked.concurrency else []
    words += [f"TPOT {asked.tpot_ms:.0f} ms"] if asked.tpot_ms else []
    words += [asked.objective] if asked.objective != "throughput" else []
    words += ["fused on and off"] if asked.fused_collectives == "auto" else []
    return ", ".join(words)


def draw(drawing: Drawing, engine: SampledEngine, trials: int, seed: int) -> tuple[float, ...]:
    """(best objective early, best objective, seconds) of one search; 0: nothing feasible."""
    start = time.perf_counter()
    drawing.engine = engine
    study = optuna.create_study(directions=directions(engine), sampler=per_trial(engine, seed))
    found = []
    for most in (min(EARLY, trials), trials):
        drawing.draw(study, lambda most=most: most, shared=False)  # type: ignore[misc]  # the loop's
        best = outcome_of(drawing, study.get_trials(deepcopy=False), start).best
        found.append(best.columns["objective"] if best is not None else 0.0)
    return *found, time.perf_counter() - start


def budget(engine: SampledEngine, trials: int) -> int:
    """Trials of an engine."""
    return min(trials, EARLY) if engine == SLOW_ENGINE else trials


def measure(
    engines: tuple[SampledEngine, ...], trials: int, seeds: int
) -> tuple[list[Run], list[str]]:
    """Every engine on every question; the rows that say what the questions are."""
    runs, rows = [], []
    for index, asked in enumerate(QUESTIONS):
        resolved = resolve(asked)
        question, space = subject_of(resolved, resolved.request.cards)
        proven = search_exact(question, space)
        if proven.best is None:
            raise SystemExit(f"{title(asked)}: nothing is feasible")
        optimum = proven.best.columns["objective"]
        tally = proven.tally
        sizes = f"{space.size:.1e} | {tally.evaluated:,} | {proven.wall_s:.1f}"
        rows.append(f"| {index + 1}. {title(asked)} | {sizes} |")
        drawing = Drawing(question, space, "random")
        for engine in engines:
            for seed in range(seeds):
                early, found, wall_s = draw(drawing, engine, budget(engine, trials), seed)
                runs.append(
                    Run(
                        engine=engine,
                        question=index,
                        regret=max(1.0 - found / optimum, 0.0),
                        early=max(1.0 - early / optimum, 0.0),
                        wall_s=wall_s,
                    )
                )
            print(title(asked), engine, f"{np.mean([r.regret for r in runs[-seeds:]]):.2%}")
    return runs, rows


def engine_row(engine: SampledEngine, runs: list[Run], trials: int, seeds: int) -> str:
    """One engine over all questions."""
    own = [run for run in runs if run.engine == engine]
    regret = np.array([run.regret for run in own])
    each = [
        f"{np.mean([run.regret for run in own if run.question == index]):.2%}"
        for index in range(len(QUESTIONS))
    ]
    cells = [
        engine,
        f"{budget(engine, trials)} x {seeds}",
        f"{regret.mean():.2%}",
        f"{np.median(regret):.2%}",
        f"{regret.max():.2%}",
        f"{(regret <= NEAR).mean():.0%}",
        f"{np.mean([run.early for run in own]):.2%}",
        f"{np.mean([run.wall_s for run in own]):.1f}",
        *each,
    ]
    return f"| {' | '.join(cells)} |"


def report(engines: tuple[SampledEngine, ...], trials: int, seeds: int, command: str) -> str:
    """The whole page."""
    runs, rows = measure(engines, trials, seeds)
    numbers = " | ".join(str(index + 1) for index in range(len(QUESTIONS)))
    where = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"Optuna {optuna.__version__}, numpy {np.__version__}, load average "
        f"{os.getloadavg()[0]:.1f} at the end"
    )
    lines = [
        "# Regret of sampled searches against the exact one",
        "",
        f"`{command}`",
        "",
        f"{where}. All rows are of one run of this command.",
        "",
        "Regret: how far the best objective of a search stays below the optimum that the exact "
        f"search proves. Near: the share of searches within {NEAR:.0%}. Early: the mean regret "
        f"after {min(EARLY, trials)} trials. Seeds from an exact pass are off. Seconds are of one "
        "search, with prices that an earlier search of the question had paid for; the last columns "
        "are the mean regret on each question. The samplers draw cuts of the layers near the even "
        "one and ranks numbered as the engine does; the optimum is that of all cuts and orders.",
        "",
        f"| engine | trials x seeds | mean | median | worst | near | early | s | {numbers} |",
        "|---|---:|---:|---:|---:|---:|---:|---:|" + "---:|" * len(QUESTIONS),
        *(engine_row(engine, runs, trials, seeds) for engine in engines),
        "",
        *_slow_note(engines, trials),
        "| question | strategies in the space | priced by exact | exact, s |",
        "|---|---:|---:|---:|",
        *rows,
        "",
        "The exact search prices or bounds every strategy of these spaces in the seconds above: "
        "sampling is for objectives that it cannot price.",
        "",
    ]
    return "\n".join(lines)


def _slow_note(engines: tuple[SampledEngine, ...], trials: int) -> list[str]:
    """What must be known to compare the slow engine's row with the others."""
    if SLOW_ENGINE not in engines or trials <= EARLY:
        return []
    text = (
        f"{SLOW_ENGINE} has {EARLY} trials where the others have {trials}: compare it by `early`."
    )
    return [text, ""]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/regret.md"))
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--engines", default=",".join(ENGINES))
    given = parser.parse_args()
    chosen = tuple(one for one in ENGINES if one in given.engines.split(","))
    command = "python tests/benchmarks/bench_regret.py"
    if (given.trials, given.seeds, chosen) != (TRIALS, SEEDS, ENGINES):
        command += f" --trials {given.trials} --seeds {given.seeds} --engines {','.join(chosen)}"
    with quiet_optuna():
        text = report(chosen, given.trials, given.seeds, command)
    print(text)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
