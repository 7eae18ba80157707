"""How fast the operator-level search is on graphs of real sizes, and what it finds.

    python tests/benchmarks/bench_operators.py [--out results/benchmarks/operators.md] [--runs 3]

The graphs are built by hand (tests/search/oplevel/graphs.py), every operator of every layer written
out, as a front end captures them. Seconds are from the graph to the plan. Megatron's split is
priced by the same code: products by columns and rows, embedding table and head by vocabulary,
heads of attention apart, tokens apart between the products or not, experts apart or by width; on
two axes the first takes the sequences or, where there is one, all products but attention's too.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from measuring import against, best_seconds, machine, table  # type: ignore[import-not-found]

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.search.oplevel.graphs import (  # noqa: E402  # found by the line above
    DECODE_70B,
    LLAMA_70B,
    MIXTRAL,
    Sizes,
    both,
    data_parallel,
    decoder,
    megatron,
)

from shardplan.costmodel.catalog import load_cluster  # noqa: E402
from shardplan.costmodel.hardware import Cluster  # noqa: E402
from shardplan.search.oplevel.api import price_operators, search_operators  # noqa: E402
from shardplan.search.oplevel.plan import OperatorPlan  # noqa: E402

RUNS = 3
MOST_S = 2.0
CLUSTER = "atlas-800t-a2"
GRAPHS: Mapping[str, tuple[str, Sizes]] = {
    "70b-prompt": ("Llama-70B, a prompt of 2048", LLAMA_70B),
    "70b-decode": ("Llama-70B, 64 sequences decode at 4096", DECODE_70B),
    "mixtral": ("Mixtral-8x7B, a prompt of 2048", MIXTRAL),
}
MESHES: Mapping[str, dict[str, int]] = {"8": {"x": 8}, "2x8": {"x": 2, "y": 8}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One graph on one mesh."""

    graph: str
    mesh: str
    plan: OperatorPlan
    known_s: float
    """The best of Megatron's splits."""
    wall_s: float
    cold_s: float
    cold_cpu_s: float
    """Seconds of the processor in the same process."""


def cluster_of(mesh: Mapping[str, int]) -> Cluster:
    """As many servers as the mesh fills."""
    ranks = 1
    for size in mesh.values():
        ranks *= size
    return load_cluster(CLUSTER, cards=ranks)


def known_seconds(sizes: Sizes, mesh: Mapping[str, int]) -> float:
    """The fastest of the hand-made splits."""
    graph, axes = decoder(sizes, folded=True), list(mesh)
    found = []
    for experts, sequence in itertools.product(
        {False, sizes.experts > 0}, {False, sizes.tokens > 1}
    ):
        strategy = megatron(graph, axes[-1], experts=experts, sequence=sequence)
        if len(axes) > 1 and sizes.batch % mesh[axes[0]] == 0:
            strategy = both(data_parallel(graph, axes[0]), strategy)
        elif len(axes) > 1:
            strategy = both(megatron(graph, axes[0], attention=False), strategy)
        found.append(price_operators(graph, cluster_of(mesh), mesh, strategy).total_s)
    return min(found)


def measured(graph: str, mesh: str, runs: int) -> Row:
    """Search once for the plan and several times for the time; then in a process of its own."""
    sizes, shape = GRAPHS[graph][1], MESHES[mesh]
    written = decoder(sizes, folded=False)
    search = functools.partial(search_operators, written, cluster_of(shape), shape)
    plan = search()
    command = [sys.executable, __file__, "--once", graph, mesh]
    colds = [cold(command) for _ in range(runs)]
    return Row(
        graph=graph,
        mesh=mesh,
        plan=plan,
        known_s=known_seconds(sizes, shape),
        wall_s=best_seconds(search, runs),
        cold_s=min(wall for wall, _ in colds),
        cold_cpu_s=min(cpu for _, cpu in colds),
    )


def cold(command: list[str]) -> tuple[float, float]:
    """(wall, processor) seconds of a process."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def speed_table(rows: list[Row]) -> list[str]:
    """Seconds, gap and size."""
    head = ["graph", "mesh", "operators", "space", "variables", "integers", "gap", "s"]
    lines = []
    for one in rows:
        proof, plan = one.plan.certificate, one.plan
        lines.append(
            [
                GRAPHS[one.graph][0],
                one.mesh,
                f"{sum(row.times for row in plan.operators):,}",
                f"{proof.space_size:.1e}",
                f"{proof.variables:,}",
                f"{proof.integers:,}",
                f"{proof.gap:g}",
                f"{one.wall_s:.2f}",
                against(one.wall_s, MOST_S, f"{MOST_S:.0f} s"),
                f"{one.cold_s:.2f}",
                f"{one.cold_cpu_s:.2f}",
            ]
        )
    found: list[str] = table([*head, "target", "cold process s", "its CPU s"], lines)
    return found


def cost_table(rows: list[Row]) -> list[str]:
    """What is found against Megatron's split."""
    head = ["graph", "mesh", "found ms", "LP bound ms", "Megatron ms", "found / Megatron"]
    lines = []
    for one in rows:
        plan = one.plan
        used = plan.stages[0].total_bytes / plan.stages[0].capacity_bytes
        lines.append(
            [
                GRAPHS[one.graph][0],
                one.mesh,
                f"{plan.total_s * 1e3:.2f}",
                f"{plan.certificate.lp_bound_s * 1e3:.2f}",
                f"{one.known_s * 1e3:.2f}",
                f"{plan.total_s / one.known_s:.3f}",
                f"{used:.0%}",
            ]
        )
    found: list[str] = table([*head, "memory used"], lines)
    return found


def split_table(one: Row) -> list[str]:
    """The split of one layer: operators that are split, and what moves."""
    rows = [
        [row.name, ", ".join(f"{a}: {loop}" for a, loop in row.split.items()) or "whole"]
        for row in one.plan.operators
        if row.times > 1
    ]
    for row in rows:
        own = [move for move in one.plan.moves if move.times > 1 and move.tensor == row[0]]
        row.append(", ".join(f"{m.kind} {m.message_bytes / 1e6:.1f} MB" for m in own))
    lines: list[str] = table(["operator of a layer", "split", "its result then"], rows)
    return lines


def report(runs: int, command: str) -> str:
    """The whole page."""
    rows = [measured(graph, mesh, runs) for graph in GRAPHS for mesh in MESHES]
    where = f"{machine()}. Best of {runs} runs, on a machine that other work may share."
    intro = (
        "Every operator of every layer is given; layers that are alike share their variables. "
        "`space` counts the ways to split them so. Seconds are from the graph to the plan; beside "
        "them a whole cold process (interpreter, imports of numpy and scipy, building the graph), "
        "by the clock and by what the processor spent on it."
    )
    costs = (
        "Predicted by the same code for both, on 910B2 servers of 8 (atlas-800t-a2), bf16, every "
        "operator a kernel of its own. Of Megatron's splits (with and without sequence parallel "
        "norms, experts apart or by width) the fastest. On 2x8 it splits the sequences of the "
        "decode over the servers; of a prompt, which is one sequence, all products but those of "
        "attention, whose 8 kv heads fill one server."
    )
    parts = [
        ["# Speed of the operator-level search", "", f"`{command}`", "", where, "", intro, ""],
        ["## Time to the proven optimum", "", *speed_table(rows), ""],
        ["## What it finds", "", costs, "", *cost_table(rows), ""],
        ["## The split of the prompt on 8 ranks", "", *split_table(rows[0])],
    ]
    return "\n".join(line for part in parts for line in part) + "\n"


def main() -> None:
    """Write the page, or search once."""
    parser = argparse.ArgumentParser(description=__doc__)
    page = ROOT / "results" / "benchmarks" / "operators.md"
    parser.add_argument("--out", type=Path, default=page)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--once", nargs=2, metavar=("GRAPH", "MESH"))
    options = parser.parse_args()
    if options.once:
        graph, mesh = options.once
        shape = MESHES[mesh]
        search_operators(decoder(GRAPHS[graph][1], folded=False), cluster_of(shape), shape)
        return
    start = time.perf_counter()
    text = report(options.runs, "python tests/benchmarks/bench_operators.py")
    options.out.write_text(text, encoding="utf-8")
    sys.stderr.write(f"wrote {options.out} in {time.perf_counter() - start:.0f} s\n")


if __name__ == "__main__":
    main()
