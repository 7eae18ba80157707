"""Published serving points on H100 and H200 as rows of phase `serve`.

A quarter of the configurations, by hash of what they run (not of their names: repeats lie on one
side), is held out; the parameters of the engine profiles may be fitted to the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.fitting.common import read_rows
from shardplan.models.catalog import load_model
from shardplan.models.counts import parameter_count

__all__ = ["serving_rows"]

_SOURCE = "aiconfigurator-core 0.12.0 "
_HELD_OUT = 4
"""One in so many."""
_RUNS = (
    "cluster",
    "engine_profile",
    "model",
    "weight_dtype",
    "tp",
    "dp",
    "ep",
    "input_len",
    "output_len",
    "concurrency",
)
"""What makes a configuration."""
_WEIGHT_BYTES = {"fp8": 1.0, "bf16": 2.0}


def serving_rows(data: Path) -> list[dict[str, str]]:
    """Closed-loop serving points on H100 and H200; `concurrency` there is that of one dp group.

    Left out: rows whose experts are split by tp and by ep at once, which their own names deny, and
    rows whose weights alone are more than the cards that they name can hold.
    """
    rows = read_rows(data / "hopper_serving" / "serving_points.csv")
    found = [_serving_row(row) for row in rows if _sound(row)]
    return [{**row, "held_out": str(_held_out(row)).lower()} for row in found]


def _held_out(row: Mapping[str, str]) -> bool:
    digest = hashlib.blake2b("|".join(row[name] for name in _RUNS).encode(), digest_size=4).digest()
    return digest[0] % _HELD_OUT == 0


def _serving_dtype(row: Mapping[str, str]) -> str:
    return "fp8" if row["gemm_quant"].startswith("fp8") else "bf16"


def _sound(row: Mapping[str, str]) -> bool:
    spec = load_model(row["model"])
    if spec.moe is not None and min(int(row["moe_tp"] or 1), int(row["moe_ep"] or 1)) > 1:
        return False
    cards = int(row["tp"]) * int(row["pp"]) * int(row["attention_dp"] or 1)
    weights = parameter_count(spec) * _WEIGHT_BYTES[_serving_dtype(row)]
    return weights < cards * load_cluster(row["cluster"]).device.hbm_bytes


def _serving_row(row: Mapping[str, str]) -> dict[str, str]:
    dense = load_model(row["model"]).moe is None
    groups = int(row["attention_dp"] or 1)
    return {
        "source": f"{_SOURCE}silicon_sample.csv",
        "group": f"{row['cluster'].removeprefix('hgx-')} {row['engine']}",
        "held_out": "true",
        "note": row["id"],
        "model": row["model"],
        "cluster": row["cluster"],
        "engine_profile": row["engine"],
        "weight_dtype": _serving_dtype(row),
        "tp": row["tp"],
        "pp": row["pp"],
        "dp": str(groups),
        "ep": "1" if dense else row["moe_ep"] or "1",
        "phase": "serve",
        "input_len": row["input_len"],
        "output_len": row["output_len"],
        "concurrency": str(int(row["concurrency"]) * groups),
        "measured_ttft_s": f"{float(row['ttft_ms']) * 1e-3:.6g}",
        "measured_tpot_s": f"{float(row['tpot_ms']) * 1e-3:.6g}",
    }
