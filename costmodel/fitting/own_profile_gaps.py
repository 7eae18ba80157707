"""What a kernel of a captured graph waits for beside its own time: `launch_gap_us` of torch-graph.

    python -m shardplan.costmodel.fitting.own_profile_gaps results/profiles/h200_gaps.csv

A profile times a call between calls of its own kind; a model runs it between others. For each
measured chain (the calls of a decode layer in their order, `results/profiles/measure_gaps.py`)

    gap = (seconds of the chain - priced seconds of its calls) / calls

and the median over the chains is what `data/engines/torch-graph.toml` holds, rounded to 0.1 us.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.fitting.common import read_rows
from shardplan.costmodel.fitting.own_profile_tables import POINTWISE
from shardplan.costmodel.kernels.attention import attention_decode
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.kernels.matmul import matmul
from shardplan.costmodel.kernels.pointwise import pointwise

__all__ = ["gap_s", "main"]

_HEAD_DIM = 128


def _streamed_s(machine: Machine, kind: str, elements: int) -> float:
    moved = elements * POINTWISE[kind].bytes_per_element
    return float(pointwise(machine, kind, elements, moved).total_s)


def gap_s(machine: Machine, row: Mapping[str, str]) -> float:
    """Seconds a call of one measured chain takes beyond its price."""
    hidden, heads, kv_heads, ffn = (int(row[k]) for k in ("hidden", "heads", "kv_heads", "ffn"))
    batch, tokens, calls = (int(row[k]) for k in ("batch", "tokens", "calls"))
    products = (
        ((heads + 2 * kv_heads) * _HEAD_DIM, hidden),
        (hidden, heads * _HEAD_DIM),
        (2 * ffn, hidden),
        (hidden, ffn),
    )
    priced = sum(
        float(matmul(machine, batch, n, k, "bf16", weights="cold").total_s) for n, k in products
    )
    priced += float(
        attention_decode(
            machine, batch, tokens, heads, kv_heads, _HEAD_DIM, kernel="flash", kv_dtype="bf16"
        ).total_s
    )
    priced += _streamed_s(machine, "rope", batch * (heads + kv_heads) * _HEAD_DIM)
    priced += 2.0 * _streamed_s(machine, "kv_append", batch * kv_heads * _HEAD_DIM)
    priced += 2.0 * _streamed_s(machine, "add_rmsnorm", batch * hidden)
    priced += _streamed_s(machine, "swiglu", batch * ffn)
    return (float(row["layer_us"]) * 1e-6 - priced) / calls


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: print the gaps of the chains and their median."""
    parser = argparse.ArgumentParser(description="gap between the kernels of a captured graph")
    parser.add_argument("gaps", type=Path, help="h200_gaps.csv")
    options = parser.parse_args(arguments)
    machine = Machine.of(load_device("h200"), "torch-graph")
    gaps = np.asarray([gap_s(machine, row) for row in read_rows(options.gaps)])
    low, middle, high = np.quantile(gaps, (0.1, 0.5, 0.9)) * 1e6
    print(f"{gaps.size} chains: median {middle:.2f} us, tenth {low:.2f} us, ninth {high:.2f} us")


if __name__ == "__main__":
    main()
