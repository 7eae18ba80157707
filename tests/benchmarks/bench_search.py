"""How fast the search is, how it grows, what it needs, and whether it always says the same.

    python tests/benchmarks/bench_search.py [--out results/benchmarks/search.md] [--runs 3]

One strategy is one point of the space, distinct from all others and legal: a layout with its
attention kernel, weight dtype, KV dtype, batch and chunk, priced in full: TTFT, TPOT, throughput,
the parts of a step, and memory against every limit. Those that rules or bounds left out are not
counted. Each number is the best of several runs; searches run in one process that uses one core
(numpy's threads have nothing to share here).
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cold_tables import equal_table, process_table  # type: ignore[import-not-found]  # beside this
from measuring import against, best_seconds, machine, table  # type: ignore[import-not-found]  # too

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.models.catalog import load_model
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec
from shardplan.search.evaluate import Question
from shardplan.search.exact import search_exact
from shardplan.search.kept import Outcome
from shardplan.search.plan import Limits, Workload
from shardplan.search.proof import prove_strategy
from shardplan.search.space import Choice, Space, batch_grid, build_space, chunk_grid

RUNS = 3
INPUT_LEN, OUTPUT_LEN, SLOTS = 1024, 256, 1024
LEAST_A_SECOND = 1_000_000
MOST_RATIO = 1.25
"""Allowed to a ratio that shall not grow: what two runs of the same search may differ by."""
SEARCHES = (
    ("llama-65b", "atlas-800t-a2", 8),
    ("qwen3-235b-a22b", "atlas-800t-a2", 16),
    ("deepseek-v3", "cloudmatrix-384", 32),
    ("llama-3.1-70b", "atlas-800t-a2", 32),
)
DEEP = ("llama-2-13b", "atlas-800t-a2", 8)
LAYERS = (20, 40, 80, 160)
WIDE = ("deepseek-v3", "cloudmatrix-384")
CARDS = (8, 16, 32, 64, 128, 256)
PROOF_S = 1.0
PROOFS = (
    ("llama-65b", Parallelism(tp=8)),
    ("llama-3.1-70b", Parallelism(tp=4, pp=2, sp=True)),
    ("qwen3-32b", Parallelism(tp=2, dp=4)),
    ("qwen3-235b-a22b", Parallelism(tp=4, dp=4, ep=16)),
    ("mixtral-8x7b", Parallelism(tp=2, pp=2, dp=2, ep=4, exchange="alltoall")),
    ("deepseek-v3", Parallelism(tp=4, dp=8, ep=32, exchange="alltoall")),
)
PLAIN = (Choice(attention="flash", weight_dtype="bf16", kv_dtype="bf16"),)
EVERY = tuple(
    Choice(attention=attention, weight_dtype=weight, kv_dtype=kv)
    for attention in ("flash", "naive")
    for weight in ("bf16", "w8a8")
    for kv in ("bf16", "int8")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """The fastest of several equal searches, its space built anew each time."""

    space: Space
    outcome: Outcome
    wall_s: float

    @property
    def applied(self) -> int:
        """Layouts that were applied."""
        return self.outcome.tally.applied

    @property
    def priced(self) -> int:
        """Strategies priced in full."""
        return self.outcome.tally.evaluated


def question_of(
    spec: ModelSpec, cluster: str, cards: int, choices: tuple[Choice, ...]
) -> tuple[Question, Space]:
    """A question over all slots and chunks, and the space that it asks about."""
    devices = load_cluster(cluster, cards=cards)
    engine = load_engine(devices.device.engine_profiles[0])
    space = build_space(
        spec,
        devices,
        engine,
        cards=cards,
        choices=choices,
        batches=batch_grid(SLOTS),
        chunks=chunk_grid(engine, INPUT_LEN, OUTPUT_LEN),
    )
    question = Question(
        spec=spec,
        cluster=devices,
        engine=engine,
        workload=Workload(input_len=INPUT_LEN, output_len=OUTPUT_LEN),
        limits=Limits(),
        objective="throughput",
        cards=cards,
    )
    return question, space


def timed(ask: Callable[[], tuple[Question, Space]], runs: int) -> Timed:
    """Build the space and search it, several times."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        question, space = ask()
        outcome = search_exact(question, space)
        wall_s = time.perf_counter() - start
        found.append(Timed(space=space, outcome=outcome, wall_s=wall_s))
    return min(found, key=lambda one: one.wall_s)


def search_table(runs: int) -> list[str]:
    """Strategies a second of the exact search in one process."""
    head = ["model, cluster, cards", "layouts", "space", "priced", "s", "priced a second", "target"]
    rows = []
    for model, cluster, cards in SEARCHES:
        ask = functools.partial(question_of, load_model(model), cluster, cards, EVERY)
        one = timed(ask, runs)
        rate = one.priced / one.wall_s
        rows.append(
            [
                f"{model}, {cluster}, {cards}",
                f"{len(one.space.layouts)}",
                f"{one.space.size:.1e}",
                f"{one.priced:,}",
                f"{one.wall_s:.2f}",
                f"{rate:,.0f}",
                against(rate, LEAST_A_SECOND, f"{LEAST_A_SECOND:,}", least=True),
            ]
        )
    lines: list[str] = table(head, rows)
    return lines


def layer_table(runs: int) -> list[str]:
    """The same model with ever more layers."""
    model, cluster, cards = DEEP
    base = load_model(model)
    rows, first_s = [], 0.0
    for layers in LAYERS:
        spec = replace(base, layers=layers)
        one = timed(functools.partial(question_of, spec, cluster, cards, EVERY), runs)
        each_s = one.wall_s / one.priced
        first_s = first_s or each_s
        rows.append(
            [
                f"{layers}",
                f"{one.space.size:.1e}",
                f"{one.priced:,}",
                f"{one.wall_s:.3f}",
                f"{each_s * 1e6:.2f}",
                f"{each_s / first_s:.2f}",
                against(each_s / first_s, MOST_RATIO, f"{MOST_RATIO}"),
            ]
        )
    head = ["layers", "space", "priced", "s", "us a strategy", "to the first", "target"]
    lines: list[str] = table(head, rows)
    return lines


def layout_table(runs: int) -> list[str]:
    """Growing spaces; a space in which nothing fits prices no grid and is not compared."""
    model, cluster = WIDE
    rows, first_s = [], 0.0
    for cards in CARDS:
        one = timed(functools.partial(question_of, load_model(model), cluster, cards, PLAIN), runs)
        each_s = one.wall_s / one.applied
        first_s = first_s or (each_s if one.priced else 0.0)
        ratio = each_s / first_s if one.priced else None
        rows.append(
            [
                f"{cards}",
                f"{one.space.raw_layouts:,}",
                f"{one.applied:,}",
                f"{one.priced:,}",
                f"{one.wall_s:.2f}",
                f"{each_s * 1e3:.1f}",
                "-" if ratio is None else f"{ratio:.2f}",
                "-" if ratio is None else against(ratio, MOST_RATIO, f"{MOST_RATIO}"),
            ]
        )
    head = ["dies", "layouts", "legal, priced", "strategies priced", "s", "ms a layout"]
    lines: list[str] = table([*head, "to the first", "target"], rows)
    return lines


def proof_table(runs: int) -> list[str]:
    """Level 1 proofs: the shrunk model run sharded and whole."""
    rows = []
    for model, par in PROOFS:
        spec = load_model(model)
        if not prove_strategy(spec, par).passed:
            raise SystemExit(f"{model} {par.describe()}: the proof failed")
        seconds = best_seconds(functools.partial(prove_strategy, spec, par), runs)
        target = against(seconds, PROOF_S, f"{PROOF_S:.1f} s")
        rows.append([f"{model}, {par.describe()}", f"{par.ranks}", f"{seconds:.3f}", target])
    lines: list[str] = table(["model, strategy", "ranks", "L1 proof s", "target"], rows)
    return lines


def report(runs: int, command: str) -> str:
    """The whole page."""
    where = f"{machine()}. Best of {runs} runs, on a machine that other work may share."
    intro = (
        "One strategy is one point of the space, distinct from all others and legal (it holds "
        "every rule): a layout with its attention kernel, weight dtype, KV dtype, batch and chunk, "
        "priced in full: TTFT, TPOT, throughput, parts of a step, memory, every limit. Strategies "
        "that rules or bounds leave out are in the space and not among the priced. "
        f"Prompts of {INPUT_LEN} and answers of {OUTPUT_LEN} tokens. Seconds of a search in one "
        "process are those to build its space and to search it. Templates that a run applied to a "
        "layout are kept for the next with their kernels, prices are not."
    )
    cold_text = (
        "From the start of the interpreter to the end of the process, with plan.json, trials.csv, "
        "pareto.csv and report.html written; bytecode compiled before, as of an installed package. "
        "The peak is that of the largest process. Space, evaluated and gap are those of the "
        "certificate in plan.json; a gap of 0 says that nothing in the space is better."
    )
    layers_text = (
        f"{DEEP[0]} with other numbers of layers on {DEEP[2]} cards of {DEEP[1]}, pp to {DEEP[2]}, "
        "layers cut in every way. Time in proportion to the layers would make the last ratio "
        f"{LAYERS[-1] / LAYERS[0]:.0f}."
    )
    layouts_text = (
        f"{WIDE[0]} on {WIDE[1]}, one attention kernel and one dtype. At most linear: the "
        "milliseconds a layout do not grow. In a space without priced strategies nothing fits in "
        "the memory; its layouts are applied to prove that, and it is not compared."
    )
    equal_text = (
        "The two processes run under different values of PYTHONHASHSEED; every byte of the files "
        "is compared. Times that differ from run to run are in timing.json alone."
    )
    parts = [
        ["# Speed of the search", "", f"`{command}`", "", where, "", intro, ""],
        ["## Exact search, one process", "", *search_table(runs), ""],
        ["## Cold process to certified plan", "", cold_text, "", *process_table(runs), ""],
        ["## Time against layers", "", layers_text, "", *layer_table(runs), ""],
        ["## Time against layouts", "", layouts_text, "", *layout_table(runs), ""],
        ["## Same bytes", "", equal_text, "", *equal_table(), ""],
        ["## Proofs", "", *proof_table(runs), ""],
    ]
    return "\n".join(line for part in parts for line in part)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/search.md"))
    parser.add_argument("--runs", type=int, default=RUNS)
    given = parser.parse_args()
    runs = max(given.runs, 1)
    command = "python tests/benchmarks/bench_search.py"
    text = report(runs, command if runs == RUNS else f"{command} --runs {runs}")
    print(text)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
