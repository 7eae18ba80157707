"""How fast the simulator is, how much memory it takes, and how far its price tables are off.

    python tests/benchmarks/bench_simulate.py [--out results/benchmarks/simulate.md] [--runs 3]
        [--trace-rows 1000000] [--described-rows 10000000]

Cold processes of `shardplan simulate`, from the start of the interpreter to the last file. The
plans are those of results/plans.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measuring import (  # type: ignore[import-not-found]  # beside this script
    MIB,
    Process,
    against,
    best_process,
    cold,
    machine,
    table,
)

from shardplan.costmodel.simulate.prices import StepPrices
from shardplan.costmodel.simulate.traces import PART_TOKENS
from shardplan.search.plan import Plan
from shardplan.search.simulate import instance_of

ROOT = Path(__file__).resolve().parent.parent.parent
PLANS = ROOT / "results" / "plans"
DENSE, EXPERTS = "llama-65b_atlas-800t-a2", "deepseek-v3_2x-atlas-800i-a3"
POOLS = "deepseek-v3_cloudmatrix-384_disagg"
REQUESTS = 100_000
MINUTE_S = 60.0
TARGET = 100_000
LENGTHS = ("--input-len", "512", "--output-len", "256")
RUNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("one replica, 70 in flight", DENSE, ("--concurrency", "70")),
    ("one replica, 8 in flight", DENSE, ("--concurrency", "8")),
    ("one replica, Poisson, 60 % of capacity", DENSE, ("--rate", "3")),
    ("one replica, Poisson, saturated", DENSE, ("--rate", "20")),
    ("four groups that share experts", EXPERTS, ("--concurrency", "196")),
    ("eight replicas, least load", DENSE, ("--replicas", "8", "--rate", "24")),
    ("pools, 144 engines", POOLS, ("--concurrency", "8000")),
)


def _plan(name: str) -> str:
    return str(PLANS / name / "plan.json")


def speeds(runs: int) -> Iterator[list[str]]:
    """A row of each kind of run."""
    for title, plan, options in RUNS:
        words = ("simulate", _plan(plan), *LENGTHS, *options, "--num-prompts", str(REQUESTS))
        found = best_process(words, runs)
        rate = REQUESTS / found.cpu_s * MINUTE_S
        yield [
            title,
            f"{found.wall_s:.1f}",
            f"{found.cpu_s:.1f}",
            f"{found.peak_bytes / MIB:.0f}",
            f"{rate:,.0f}",
            against(rate, TARGET, f"{TARGET:,}", least=True),
        ]


def write_trace(path: Path, rows: int, *, prefixes: bool) -> None:
    """Rows of random lengths, two a second; with prefixes some parts come again."""
    luck = np.random.default_rng(0)
    at_once = 100_000
    with path.open("w", encoding="utf-8") as file:
        if not prefixes:
            file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
        for start in range(0, rows, at_once):
            count = min(at_once, rows - start)
            prompts = luck.integers(64, 1500, count).tolist()
            outputs = luck.integers(1, 400, count).tolist()
            groups = luck.integers(0, 1000, count).tolist()
            for row, (prompt, output, group) in enumerate(
                zip(prompts, outputs, groups, strict=True), start=start
            ):
                if not prefixes:
                    file.write(f"{row / 2.0:.1f},{prompt},{output}\n")
                    continue
                ids = [group, *range(1000 + 4 * row, 1000 + 4 * row + prompt // PART_TOKENS)]
                file.write(
                    f'{{"timestamp": {row * 500}, "input_length": {prompt}, '
                    f'"output_length": {output}, "hash_ids": {ids}}}\n'
                )


def _traced(title: str, found: Process, rows: int) -> list[str]:
    return [
        title,
        f"{rows:,}",
        f"{found.wall_s:.1f}",
        f"{found.cpu_s:.1f}",
        f"{found.peak_bytes / MIB:.0f}",
        f"{rows / found.cpu_s * MINUTE_S:,.0f}",
    ]


def traces(rows: int, described: int) -> Iterator[list[str]]:
    """Long traces: simulated with all files, and described."""
    with tempfile.TemporaryDirectory() as folder:
        azure, mooncake = Path(folder, "t.csv"), Path(folder, "t.jsonl")
        for some in (rows // 10, rows):
            write_trace(azure, some, prefixes=False)
            out = Path(folder, f"out{some}")
            words = ("simulate", _plan(DENSE), "--workload", str(azure), "--out", str(out))
            yield _traced("simulated, Azure, requests.csv written", cold(words), some)
        write_trace(mooncake, rows // 10, prefixes=True)
        found = cold(("simulate", _plan(DENSE), "--workload", str(mooncake)))
        yield _traced("simulated, Mooncake, prefixes found", found, rows // 10)
        for some in (described // 10, described):
            write_trace(azure, some, prefixes=False)
            telling = ("simulate", "--describe", "--workload", str(azure))
            yield _traced("described, Azure", cold(telling), some)


def errors() -> Iterator[list[str]]:
    """What straight lines between knots are off by, of the seconds of the whole step."""
    luck = np.random.default_rng(0)
    for name in (DENSE, EXPERTS):
        plan = Plan.load(Path(_plan(name)))
        one = instance_of(plan)
        prices = StepPrices(one.model, one.types, slots=64, chunk=4096, longest=16384)
        kinds = len(prices.kinds)
        many = luck.integers(1, 65, 2000)
        context = luck.uniform(1.0, 16000.0, 2000)
        exact = prices.cached_seconds(many.astype(float), context)[0]
        decode = [
            prices.decode_s(n, [prices.cached(0, n, c)] * kinds)[0]
            / prices.decode_s(n, [e] * kinds)[0]
            for n, c, e in zip(many.tolist(), context.tolist(), exact.tolist(), strict=True)
        ]
        pieces = luck.integers(1, 9, 2000)
        new = np.exp(luck.uniform(0.0, np.log(4096 / pieces))).astype(int)
        prefix = luck.integers(0, 8192, 2000) * (luck.random(2000) < 0.5)
        sizes = (pieces.astype(float), new.astype(float), prefix.astype(float))
        exact = prices.prompt_seconds(*sizes)[0]
        mixed = []
        cases = zip(pieces.tolist(), new.tolist(), prefix.tolist(), exact.tolist(), strict=True)
        for m, n, x, e in cases:
            found = prices.prompts(m, m * n, m * n * (x + n / 2.0))[0]
            both = [
                prices.mixed_s(m * n, 0, m, [value] * kinds, beside=False)[0]
                for value in (found, e)
            ]
            mixed.append(both[0] / both[1])
        for kind, shares in (("decode", decode), ("prompts", mixed)):
            off = np.abs(np.asarray(shares) - 1.0)
            figures = (off.mean(), np.percentile(off, 99), off.max(), np.mean(shares) - 1.0)
            yield [name, kind, *(f"{value:.3%}" for value in figures)]


def report(given: argparse.Namespace) -> str:
    """The whole page."""
    where = machine()
    lines = [
        "# Speed of the simulator",
        "",
        f"{where}; best of {given.runs} runs.",
        "",
        f"Cold processes of `shardplan simulate`: {REQUESTS:,} requests of 512 prompt and 256 "
        "output tokens, start of the interpreter and tables of prices with them. One thread: a "
        "minute of its CPU time is a minute of a core that nothing else wants.",
        "",
        *table(
            ["what", "wall s", "CPU s", "peak MiB", "requests a CPU minute", "target"],
            list(speeds(given.runs)),
        ),
        "",
        "Traces, a row at a time: what they take does not grow with their rows.",
        "",
        *table(
            ["what", "rows", "wall s", "CPU s", "peak MiB", "rows a CPU minute"],
            list(traces(given.trace_rows, given.described_rows)),
        ),
        "",
        "Prices: token rows, logits and drafts are looked up exactly; attention is read off "
        "straight lines between knots. Errors of whole steps at random sizes against the step "
        "model itself:",
        "",
        *table(["plan", "step", "mean", "p99", "worst", "bias"], list(errors())),
        "",
        "Regenerate: `python tests/benchmarks/bench_simulate.py`",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/simulate.md"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--trace-rows", type=int, default=1_000_000)
    parser.add_argument("--described-rows", type=int, default=10_000_000)
    given = parser.parse_args()
    text = report(given)
    print(text)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
