"""Writes `predictions.json`: what shardplan says of the steps that `run_nccl.py` measures.

    python results/gpu/predict.py

Apart from the measurement, whose machine may lack what prices need. Steps are those of the engine
profile `torch-graph` (compiled kernels replayed as a CUDA graph), on hgx-h100 and hgx-h200.
"""

from __future__ import annotations

import json
from pathlib import Path

import shardplan
from shardplan.models.atomic import write_atomically

HERE = Path(__file__).resolve().parent
CONFIGS = {
    "llama-1b": HERE / "llama-1b.json",
    "llama-3.1-8b": HERE.parents[1] / "models" / "presets" / "llama-3.1-8b.json",
}
CLUSTERS = ("hgx-h100", "hgx-h200")
POINTS = (("prefill", 1, 2048), ("prefill", 4, 1024), ("decode", 8, 1024), ("decode", 32, 1024))


def main() -> None:
    """Every model, cluster, number of ranks and step."""
    rows = []
    for name, config in CONFIGS.items():
        for cluster in CLUSTERS:
            for tp in (1, 2, 4):
                rows += [_row(name, config, cluster, tp, *point) for point in POINTS]
    text = json.dumps({"engine_profile": "torch-graph", "rows": rows}, indent=1)
    write_atomically(HERE / "predictions.json", text + "\n")


def _row(
    name: str, config: Path, cluster: str, tp: int, phase: str, batch: int, tokens: int
) -> dict[str, object]:
    priced = shardplan.estimate(
        model=str(config),
        cluster=cluster,
        tp=tp,
        phase=phase,
        batch=batch,
        tokens=tokens,
        engine_profile="torch-graph",
    )
    step = {"phase": phase, "batch": batch, "tokens": tokens}
    times = {key: float(f"{priced[key]:.6g}") for key in ("step_s", "collective_s")}
    return {"model": name, "cluster": cluster, "tp": tp, **step, **times}


if __name__ == "__main__":
    main()
