"""How long a strategy takes to be applied to the graph of a 70B model (extra `torch`).

    python tests/benchmarks/bench_apply.py [--model llama-3.1-70b] [--tp 8] [--runs 3] [--sp]

The Hugging Face class is built and exported on meta tensors (no memory); what is timed is what
comes after: loops of the operators, collectives placed, the per-rank graph, its pipeline stages.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch

from shardplan.models.catalog import load_model
from shardplan.models.fx.decoders import Prefill, export, prepare
from shardplan.models.fx.emit import emit
from shardplan.models.fx.loops import opgraph_of
from shardplan.models.fx.roles import decoder_program
from shardplan.models.fx.stages import cut_stages
from shardplan.models.fx.step import exported_of
from shardplan.models.fx.tiny import tiny_model
from shardplan.models.opshard import transfers_of
from shardplan.models.parallel import Parallelism, balanced_stages, make_mesh

Result = TypeVar("Result")


def best(runs: int, work: Callable[[], Result]) -> tuple[float, Result]:
    """(least seconds of some runs, the last result)."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return min(times), result


def main() -> None:
    """Print seconds of each part."""
    parser = argparse.ArgumentParser(description="Time the application of a strategy.")
    parser.add_argument("--model", default="llama-3.1-70b")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--sp", action="store_true")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    spec = load_model(asked.model)
    par = Parallelism(tp=asked.tp, pp=asked.pp, sp=asked.sp)
    start = time.perf_counter()
    with torch.device("meta"):
        ready = prepare(tiny_model(spec, dtype="bfloat16"), par.tp)
        ids = torch.zeros(1, asked.tokens, dtype=torch.int64)
    built = time.perf_counter()
    exported = exported_of(export(Prefill(ready), [ids]))
    captured = time.perf_counter()
    mesh = make_mesh(spec, par)
    loops_s, graph = best(asked.runs, lambda: opgraph_of(exported))
    place_s, program = best(asked.runs, lambda: decoder_program(graph, mesh, par, "prefill"))
    emit_s, whole = best(asked.runs, lambda: emit(exported, program))
    stages_s, _ = best(asked.runs, lambda: cut_stages(whole, balanced_stages(spec, par)))
    kinds = Counter(kind for kind, _, _ in transfers_of(program))
    print(f"{spec.name}, {par.describe()}: {len(graph.operators)} operators, {dict(kinds)}")
    print(f"build {built - start:.2f} s, export {captured - built:.2f} s")
    print(f"loops {loops_s:.2f} s, place {place_s:.2f} s, emit {emit_s:.2f} s", end=", ")
    print(f"stages {stages_s:.2f} s; applied in {place_s + emit_s + stages_s:.2f} s")


if __name__ == "__main__":
    main()
