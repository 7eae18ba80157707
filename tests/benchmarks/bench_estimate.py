"""How fast a table of points is priced: `shardplan estimate --points`, cold process to file.

    python tests/benchmarks/bench_estimate.py [--out results/benchmarks/estimate.md] [--runs 3]
        [--rows 100000] [--settings 1700 5000] [--points FILE]

A setting is a model on a cluster under one strategy with its dtypes; settings are drawn without
repeats from the product of the lists below, and every row draws a setting, a phase and sizes.
Rows of phase op draw an operator, a device and sizes. `--points` only writes the table, of the
first number of settings.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import platform
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measuring import best_process  # type: ignore[import-not-found]  # beside this script

from shardplan.costmodel.catalog import load_cluster
from shardplan.models.catalog import load_model

ROWS, SETTINGS, SEED = 100_000, (1_700, 5_000), 20260101
DENSE = ("llama-65b", "llama-3.1-8b", "llama-3.1-70b", "qwen3-8b", "qwen3-32b", "qwen2.5-14b")
SPARSE = ("mixtral-8x7b", "qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v2-lite", "deepseek-v3")
CLUSTERS = ("atlas-800t-a2", "atlas-800i-a2", "atlas-800i-a3", "hgx-h200")
TP, PP, DP = (1, 2, 4, 8), (1, 2, 4), (1, 2, 4)
WEIGHTS, CACHES = ("bf16", "w8a8", "w8a16"), ("bf16", "int8")
PHASES = ("decode", "prefill", "serve", "op")
SHARES = (35, 25, 20, 20)
DEVICES = ("910b2", "910b4", "a3-die", "h200")
OPS = ("matmul", "attention_prefill", "attention_decode", "mla_decode", "moe", "all_reduce")
SETTING = ("model", "cluster", "device", "tp", "pp", "dp", "ep", "weight_dtype", "kv_dtype")
SERVE = ("input_len", "output_len", "concurrency", "request_rate", "num_prompts")
OP = ("op", "m", "n", "k", "dtype", "heads", "kv_heads", "head_dim", "hidden", "ffn")
COLUMNS = (
    *SETTING,
    *("phase", "batch", "tokens"),
    *SERVE,
    *OP,
    *("experts", "topk", "ranks", "message_bytes"),
)
_MIB = 2.0**20
Cells = dict[str, Any]


def _experts_over(model: str, tp: int, dp: int) -> tuple[int, ...]:
    """Choices of `ep`: one for dense models, split by tp or over all ranks of a stage."""
    return (1, tp * dp) if model in SPARSE and tp * dp > 1 else (1,)


def settings(count: int, draw: random.Random) -> list[Cells]:
    """`count` different settings, each with ranks for its cluster and heads that tp divides."""
    found = []
    heads = {name: load_model(name).heads for name in (*DENSE, *SPARSE)}
    ranks = {name: load_cluster(name).ranks_per_node for name in CLUSTERS}
    for model, cluster, tp, pp, dp in itertools.product(DENSE + SPARSE, CLUSTERS, TP, PP, DP):
        if heads[model] % tp or tp * pp * dp > 2 * ranks[cluster]:
            continue
        weights = ("bf16", "fp8") if cluster == "hgx-h200" else WEIGHTS
        for ep, weight, kv in itertools.product(_experts_over(model, tp, dp), weights, CACHES):
            found.append(
                {
                    "model": model,
                    "cluster": cluster,
                    "tp": tp,
                    "pp": pp,
                    "dp": dp,
                    "ep": ep,
                    "weight_dtype": weight,
                    "kv_dtype": "bf16" if cluster == "hgx-h200" else kv,
                }
            )
    unique = list({tuple(one.values()): one for one in found}.values())
    return draw.sample(unique, min(count, len(unique)))


def _op(draw: random.Random) -> Cells:
    """One operator alone."""
    op, tokens = draw.choice(OPS), draw.choice((128, 512, 1024, 3000, 4096))
    cells: Cells = {"phase": "op", "op": op, "device": draw.choice(DEVICES)}
    if op == "matmul":
        return cells | {"m": draw.randint(1, 8192), "n": 4096, "k": draw.choice((1024, 4096))}
    if op == "moe":
        experts = {"hidden": 4096, "ffn": 1536, "experts": 128, "topk": 8}
        return cells | {"tokens": tokens, **experts, "ep": draw.choice((1, 4, 8))}
    if op == "all_reduce":
        cluster = {"cluster": draw.choice(CLUSTERS), "device": ""}
        return cells | cluster | {"ranks": 8, "message_bytes": draw.randint(2**10, 2**26)}
    sizes = {"batch": draw.choice((1, 8, 64)), "tokens": tokens, "heads": 32}
    return cells | sizes | ({} if op == "mla_decode" else {"kv_heads": 8, "head_dim": 128})


def _row(setting: Cells, phase: str, draw: random.Random) -> Cells:
    if phase == "op":
        return _op(draw)
    sizes: Cells
    if phase == "decode":
        sizes = {"batch": draw.randint(1, 256), "tokens": draw.randint(64, 16384)}
    elif phase == "prefill":
        sizes = {"batch": draw.randint(1, 8), "tokens": draw.randint(64, 8192)}
    else:
        sizes = {
            "input_len": draw.randint(64, 4096),
            "output_len": draw.randint(16, 1024),
            "concurrency": draw.choice((1, 8, 32, 128, "")),
            "request_rate": draw.choice(("", "", 1, 4)),
            "num_prompts": draw.choice(("", 200, 1000)),
        }
    return {**setting, "phase": phase, **sizes}


def rows(count: int, among: int, seed: int = SEED) -> Iterator[Cells]:
    """The table's rows: the same for the same numbers."""
    draw = random.Random(seed)
    known = settings(among, draw)
    for _ in range(count):
        yield _row(draw.choice(known), draw.choices(PHASES, SHARES)[0], draw)


def write_points(file: Path, count: int, among: int, *, broken: bool = False) -> int:
    """Write the table; different settings and phases in it. `broken`: with cells that no row
    may have, so that each is refused as it is read."""
    seen = set()
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for cells in rows(count, among):
            seen.add(tuple(cells.get(name, "") for name in (*COLUMNS[:10], "op")))
            writer.writerow({**cells, "tp": "none"} if broken else cells)
    return len(seen)


def measured(given: argparse.Namespace, among: int) -> tuple[list[str], int]:
    """Lines of one table of points: the whole command, and reading and writing alone; rows bad."""
    with tempfile.TemporaryDirectory() as folder:
        points, out = Path(folder, "in.csv"), Path(folder, "out.csv")
        arguments = ("estimate", "--points", str(points), "--out", str(out))
        groups = write_points(points, given.rows, among)
        full = best_process(arguments, given.runs)
        with out.open(encoding="utf-8", newline="") as priced:
            bad = sum(row["status"] != "ok" for row in csv.DictReader(priced))
        write_points(points, given.rows, among, broken=True)
        idle = best_process(arguments, given.runs)
    lines = [
        f"| {among:,} | {groups:,} | {full.wall_s:.2f} | {full.cpu_s:.2f} "
        f"| {full.peak_bytes / _MIB:.0f} | {given.rows / full.wall_s:,.0f} "
        f"| {full.cpu_s / idle.cpu_s:.1f} |"
    ]
    return lines, bad


def report(given: argparse.Namespace, command: str) -> str:
    """The whole page."""
    where = (
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, numpy {np.__version__}; best of {given.runs} runs"
    )
    shares = ", ".join(f"{share} % {name}" for name, share in zip(PHASES, SHARES, strict=True))
    table, refused = [], 0
    for among in given.settings:
        lines, bad = measured(given, among)
        table += lines
        refused = max(refused, bad)
    lines = [
        "# Speed of a table of points",
        "",
        where + ".",
        "",
        f"`shardplan estimate --points in.csv --out out.csv`, a cold process: {given.rows:,} rows "
        f"({shares}) over {len(DENSE + SPARSE)} models on {len(CLUSTERS)} clusters. A setting is a "
        "model on a cluster under one strategy with its dtypes; a group is a setting in one phase, "
        f"or an operator on a device. Up to {refused:,} rows are refused, each with its reason.",
        "",
        "| settings | groups | wall s | CPU s | peak MiB | rows a second | over reading alone |",
        "|---|---|---|---|---|---|---|",
        *table,
        "",
        "Over reading alone: CPU time over that of the same command on the same table with a cell "
        "in every row that refuses it as it is read, which does not depend on the machine.",
        "",
        f"Regenerate: `{command}`",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write; or only write the points."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/estimate.md"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--settings", type=int, nargs="+", default=SETTINGS)
    parser.add_argument("--points", type=Path, default=None)
    given = parser.parse_args()
    if given.points is not None:
        print(write_points(given.points, given.rows, given.settings[0]))
        return
    text = report(given, "python tests/benchmarks/bench_estimate.py")
    print(text)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
