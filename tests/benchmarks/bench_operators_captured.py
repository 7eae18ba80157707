"""What the operator-level search finds on graphs captured from transformers, and how fast.

    python tests/benchmarks/bench_operators_captured.py [--runs 3] \\
        [--out results/benchmarks/operators_captured.md]

Classes of transformers with the sizes of presets on the meta device, ids [2, 2048].
Seconds are from the graph to the plan (`search_operators`), and from the plan to its proof
(`prove_operators`). Megatron's split follows from the graph (`oplevel.known`): products by
columns and rows over the last axis, sequences over the first where there are two, experts by width
or apart; the fastest of these is priced by the same code.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measuring import best_seconds, machine, table  # type: ignore[import-not-found]  # beside this

import shardplan
from shardplan.costmodel.catalog import load_cluster
from shardplan.models.opfold import unfolded
from shardplan.models.opgraph import OpGraph
from shardplan.models.parallel import Mesh
from shardplan.search.oplevel.api import price_operators, search_operators
from shardplan.search.oplevel.known import megatron_splits
from shardplan.search.oplevel.proof import prove_operators

CLUSTER, BATCH, TOKENS = "atlas-800t-a2", 2, 2048
CASES: Mapping[str, str] = {
    "llama-3.1-70b": "Llama",
    "qwen3-32b": "Qwen3",
    "mixtral-8x7b": "Mixtral",
}
MESHES: Mapping[str, tuple[int, ...]] = {"8": (8,), "2x8": (2, 8)}


def captured(preset: str, family: str) -> OpGraph:
    """A class with the sizes of a preset."""
    import transformers

    spec = shardplan.load_model(preset)
    sizes: dict[str, Any] = {
        "vocab_size": spec.vocab, "hidden_size": spec.hidden, "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads, "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim, "intermediate_size": spec.moe.ffn if spec.moe else spec.ffn,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")
    return shardplan.load_graph(model, config, batch=BATCH, tokens=TOKENS)


def row(preset: str, graph: OpGraph, name: str, runs: int) -> list[str]:
    """One graph on one mesh."""
    shape = MESHES[name]
    cluster = load_cluster(CLUSTER, nodes=len(shape))
    mesh = Mesh(("x", "y")[: len(shape)], shape, {})

    def search() -> None:
        found.append(search_operators(graph, cluster, shape, dtype="bf16"))

    found: list[Any] = []
    wall_s = best_seconds(search, runs)
    before = time.process_time()
    search()
    cpu_s = time.process_time() - before
    plan = found[-1]
    before = time.process_time()
    proof = prove_operators(plan, graph)
    proof_s = time.process_time() - before
    if not proof.passed:
        raise SystemExit(f"{preset} on {name}: the plan is not proven")
    known_s = min(
        price_operators(graph, cluster, shape, split, dtype="bf16").total_s
        for _, split in megatron_splits(unfolded(graph), mesh)
    )
    operators = sum(one.times for one in plan.operators)
    milli = (f"{1e3 * seconds:.1f}" for seconds in (plan.total_s, known_s))
    return [
        preset, name, f"{operators:,}", f"{wall_s:.2f}", f"{cpu_s:.2f}", f"{proof_s:.2f}",
        f"{plan.certificate.gap:g}", *milli, f"{plan.total_s / known_s:.3f}",
    ]  # fmt: skip


def page(runs: int) -> str:
    """The whole page."""
    started = machine()
    head = [
        "model", "mesh", "operators", "search, s", "processor s", "proof, processor s", "gap",
        "found, ms", "Megatron, ms", "found / Megatron",
    ]  # fmt: skip
    rows = []
    for preset, family in CASES.items():
        graph = captured(preset, family)
        rows += [row(preset, graph, name, runs) for name in MESHES]
    words = (__doc__ or "").split("\n\n")[2].split()
    lines = [
        "# The operator-level search on captured graphs",
        "",
        "`python tests/benchmarks/bench_operators_captured.py`",
        "",
        f"{started}; torch {version('torch')}, transformers {version('transformers')}.",
        "",
        " ".join(words),
        "",
        *table(head, rows),
        "",
        "Milliseconds are predictions: no device has run these splits. Mixtral's rival is a plain",
        "rule: rows of all experts on every rank, summed over the ranks that hold the experts,",
        "where engines exchange rows.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write or print the page."""
    asked = argparse.ArgumentParser(description="Times the operator-level search.")
    asked.add_argument("--runs", type=int, default=3)
    asked.add_argument("--out", type=Path)
    given = asked.parse_args()
    text = page(given.runs)
    if given.out is None:
        print(text)
    else:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
