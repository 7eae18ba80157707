"""One point in detail: its price, what the time and the memory are made of, what was assumed.

The breakdown is that of one forward pass by kind of operator (phases prefill and decode); its sum
and the engine's host time and launch gaps (`host_s`) make `step_s`. The memory is a row a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import numpy as np

from shardplan.costmodel.basis import basis_in
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.search.estimate import Prices, dtypes_of, price_columns
from shardplan.search.estimate_layout import LAYOUT_COLUMNS, Layout, make_layouts
from shardplan.search.estimate_points import INPUT_COLUMNS, Points, read_points
from shardplan.search.estimate_steps import breakdown, price_steps

__all__ = ["explain_one"]

_ONE = np.zeros(1, dtype=np.int64)


def explain_one(point: Mapping[str, Any]) -> dict[str, Any]:
    """Price one point given by column name, with its breakdown, memory and assumptions.

    Raises the point's own error.
    """
    columns = {name: [value] for name, value in point.items()}
    prices = price_columns(columns, 1)
    if 0 in prices.errors:
        raise prices.errors[0]
    points = read_points(columns, 1, {})
    found: dict[str, Any] = {"point": _point(points), **_answer(prices)}
    if point.get("op") and point.get("phase") in (None, "op"):
        return found
    phase = points.cell("phase", 0) or "decode"
    layouts = make_layouts(**{name: points.cell(name, 0) for name in LAYOUT_COLUMNS})
    kinds = dtypes_of(points, layouts[0], 0)
    found["point"] |= {"engine_profile": layouts[0].engine.name, **kinds}
    found["cluster"] = {
        "name": layouts[0].cluster.name,
        "device": layouts[0].device.name,
        "ranks": layouts[0].parallel.ranks,
    }
    if phase == "serve":
        return found
    layout = _faster(layouts, points, phase, kinds)
    found["strategy"] = layout.parallel.describe()
    found["breakdown"] = _breakdown(layout, points, phase, kinds)
    found["host_s"] = found["step_s"] - sum(row["total_s"] for row in found["breakdown"])
    found["memory"] = _memory(layout, points, phase, kinds)
    return found


def _point(points: Points) -> dict[str, Any]:
    """Cells that were given."""
    return {name: points.cell(name, 0) for name in INPUT_COLUMNS if points.given[name][0]}


def _answer(prices: Prices) -> dict[str, Any]:
    found: dict[str, Any] = {"status": "ok", "message": prices.message(0)}
    for name, values in prices.numbers.items():
        if np.isfinite(values[0]):
            found[name] = float(values[0])
    if prices.fits[0] >= 0:
        found["fits"] = bool(prices.fits[0])
    return found


def _faster(
    layouts: tuple[Layout, ...], points: Points, phase: str, kinds: Mapping[str, str]
) -> Layout:
    def seconds(layout: Layout) -> float:
        step = price_steps(
            layout,
            "prefill" if phase == "prefill" else "decode",
            batch=points.floats("batch", _ONE),
            tokens=points.floats("tokens", _ONE),
            **kinds,
        )
        return float(step.step_s[0])

    return min(layouts, key=seconds)


def _breakdown(
    layout: Layout, points: Points, phase: str, kinds: Mapping[str, str]
) -> list[dict[str, Any]]:
    rows = breakdown(
        layout,
        "prefill" if phase == "prefill" else "decode",
        batch=points.cell("batch", 0),
        tokens=points.cell("tokens", 0),
        **kinds,
    )
    return [
        {
            **asdict(row),
            "total_s": row.total_s,
            "basis": basis_in(
                layout.model,
                row.kind,
                kinds["weight_dtype"],
                "prefill" if phase == "prefill" else "decode",
                attention=kinds["attention"],
            ),
        }
        for row in rows
    ]


def _memory(
    layout: Layout, points: Points, phase: str, kinds: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Bytes on one rank of each stage."""
    batch, tokens = points.cell("batch", 0), points.cell("tokens", 0)
    stages = layout.ledger.stages(
        layout.model.machine,
        weight_dtype=kinds["weight_dtype"],
        kv_dtype=kinds["kv_dtype"],
        attention=cast("AttentionKernel", kinds["attention"]),
        batch=float(batch),
        tokens=float(batch * tokens if phase == "prefill" else batch),
        context=float(tokens),
    )
    return [
        {
            "stage": stage.stage,
            "layers": stage.layers,
            "weights_bytes": float(stage.weights_bytes),
            "kv_cache_bytes": float(stage.kv_cache_bytes),
            "activations_bytes": float(stage.activations_bytes),
            "communicators_bytes": float(stage.communicators_bytes),
            "reserve_bytes": float(stage.reserve_bytes),
            "total_bytes": float(stage.total_bytes),
            "capacity_bytes": layout.ledger.capacity_bytes,
        }
        for stage in stages
    ]
