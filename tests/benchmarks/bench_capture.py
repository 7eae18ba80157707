"""How fast a model of 70e9 parameters is captured from PyTorch, and in how much memory.

    python tests/benchmarks/bench_capture.py [--out results/benchmarks/capture.md] [--runs 3]

Each capture is the first of a process of its own: `LlamaForCausalLM` with the sizes of llama-2-70b
on the meta device, ids [1, 4096], from its config to the operator graph. Importing torch and
transformers, which takes seconds, is told apart. The best of several runs counts; processor
seconds stand beside, since other load stretches the wall time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measuring import against, machine, table  # type: ignore[import-not-found]  # beside this

MODEL, TOKENS = "llama-2-70b", 4096
TARGETS = {"folded": 3.0, "full": 15.0}
"""Seconds of one capture."""
PEAK_BYTES = 1e9
_KIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One capture in a process of its own."""

    import_s: float
    wall_s: float
    cpu_s: float
    graph_s: float
    """Of the wall time: from the export to the operator graph."""
    peak_bytes: float
    operators: int
    parameters: int
    flop: float
    layers: int
    kv_elements_per_token: int


def one(folded: bool) -> Run:
    """Capture in this process."""
    start = time.perf_counter()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from shardplan.models.catalog import load_model
    from shardplan.models.frontends.torch_graph import graph_of
    from shardplan.models.frontends.torch_model import capture
    from shardplan.models.opdescribe import describe

    spec = load_model(MODEL)
    config = LlamaConfig(
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        intermediate_size=spec.ffn,
        max_position_embeddings=TOKENS,
    )
    torch.set_default_dtype(torch.bfloat16)
    ready, before = time.perf_counter(), time.process_time()
    found = capture(LlamaForCausalLM, config, tokens=TOKENS, folded=folded)
    exported = time.perf_counter()
    graph = graph_of(found).graph
    end, after = time.perf_counter(), time.process_time()
    said = describe(graph)
    return Run(
        import_s=ready - start,
        wall_s=end - ready,
        cpu_s=after - before,
        graph_s=end - exported,
        peak_bytes=float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB),
        operators=len(graph.operators),
        parameters=said.parameters,
        flop=said.flop,
        layers=said.layers,
        kv_elements_per_token=said.kv_elements_per_token,
    )


def measured(kind: str, runs: int) -> Run:
    """The fastest of several processes."""
    found = []
    for _ in range(runs):
        command = [sys.executable, __file__, "--one", kind]
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        found.append(Run(**json.loads(done.stdout.splitlines()[-1])))
    return min(found, key=lambda run: run.wall_s)


def report(runs: int) -> str:
    """The page."""
    head = machine()
    found: dict[str, Run] = {kind: measured(kind, runs) for kind in TARGETS}
    lines = ["# Capturing a model of 70e9 parameters from PyTorch", ""]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines += ["`python tests/benchmarks/bench_capture.py`", "", f"{head}; {versions}.", ""]
    lines += [str(__doc__).split("\n\n")[2].replace("\n", " ").strip(), ""]
    rows = [
        (
            kind,
            f"{run.wall_s:.1f}",
            against(run.wall_s, TARGETS[kind], f"{TARGETS[kind]:.0f} s"),
            f"{run.cpu_s:.1f}",
            f"{run.graph_s:.2f}",
            f"{run.peak_bytes / 1e9:.2f}",
            against(run.peak_bytes, PEAK_BYTES, "1 GB"),
            f"{run.import_s:.1f}",
        )
        for kind, run in found.items()
    ]
    names = ("capture", "s", "target", "processor s", "of it, graph s", "peak, GB", "target")
    lines += [*table((*names, "imports before, s"), rows), ""]
    counts = ("capture", "operators", "parameters", "FLOP", "layers", "KV elements a token")
    lines += table(counts, [(kind, *_counts(run)) for kind, run in found.items()])
    return "\n".join(lines) + "\n"


def _counts(run: Run) -> tuple[str, ...]:
    whole = (run.parameters, run.flop, run.layers, run.kv_elements_per_token)
    return (f"{run.operators:,}", *(f"{number:,.0f}" for number in whole))


def main() -> None:
    """Measure, print, write; or one capture alone."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/capture.md"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", choices=sorted(TARGETS), default=None)
    given: Any = parser.parse_args()
    if given.one is not None:
        run = one(given.one == "folded")
        print(json.dumps({name: getattr(run, name) for name in Run.__dataclass_fields__}))
        return
    text = report(given.runs)
    print(text)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
