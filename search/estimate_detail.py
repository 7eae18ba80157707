"""One point in detail: its price, what the time and the memory are made of, what was assumed.

The breakdown is that of one forward pass by kind of operator (phases prefill and decode); its sum
and the engine's host time and launch gaps (`host_s`) make `step_s`. The memory is a row a stage.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import numpy as np

from shardplan.costmodel.basis import basis_in
from shardplan.costmodel.bulk import Dtypes
from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.confidence import operator_confidence
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.search.estimate import Prices, price_columns
from shardplan.search.estimate_fleets import dtypes_of, long_prefill, single_fleet
from shardplan.search.estimate_layout import LAYOUT_COLUMNS, Layout, LayoutMaker
from shardplan.search.estimate_ops import price_ops
from shardplan.search.estimate_points import INPUT_COLUMNS, Points, read_points
from shardplan.search.estimate_serve import SERVE_ARRAYS, price_serving
from shardplan.search.estimate_steps import Step, breakdown, price_steps
from shardplan.search.how_sure import confidence_summary

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
        return found | {"confidence": _op_confidence(points)}
    phase = points.cell("phase", 0) or "decode"
    cells, maker = {name: points.cell(name, 0) for name in LAYOUT_COLUMNS}, LayoutMaker()
    layouts = maker.make(**cells)
    split = maker.split(layouts[0], cells) if long_prefill(points, layouts[0], _ONE).size else None
    layouts = layouts if split is None else (*layouts, split)
    dtypes = dtypes_of(points, layouts[0], 0)
    kinds = dtypes._asdict()
    found["point"] |= {"engine_profile": layouts[0].engine.name, **kinds}
    found["cluster"] = {
        "name": layouts[0].cluster.name,
        "device": layouts[0].device.name,
        "ranks": layouts[0].parallel.ranks,
    }
    words = functools.partial(
        confidence_summary, device=layouts[0].device.name, cluster=layouts[0].cluster.name
    )
    if phase == "serve":
        given = {name: points.floats(name, _ONE) for name in SERVE_ARRAYS}
        runs = [price_serving(*single_fleet(one, dtypes), given) for one in layouts]
        best = max(runs, key=lambda run: float(run.columns["output_tokens_per_s"][0]))
        return found | {"confidence": words(best.step.sure)}
    layout, step = _faster(layouts, points, phase, dtypes)
    found["confidence"] = words(step.sure)
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


def _op_confidence(points: Points) -> dict[str, Any]:
    _, time, section = price_ops(points, _ONE)
    seconds = np.ones(1) if time is None else time.total_s
    cluster = points.cell("cluster", 0) or points.cell("device", 0)
    return confidence_summary(
        operator_confidence(section, seconds),
        device=points.cell("device", 0) or load_cluster(cluster).device.name,
        cluster=cluster,
    )


def _faster(
    layouts: tuple[Layout, ...], points: Points, phase: str, dtypes: Dtypes
) -> tuple[Layout, Step]:
    """The layout whose step is shorter, and the step."""

    def priced(layout: Layout) -> tuple[Layout, Step]:
        step = price_steps(
            *single_fleet(layout, dtypes),
            "prefill" if phase == "prefill" else "decode",
            batch=points.floats("batch", _ONE),
            tokens=points.floats("tokens", _ONE),
        )
        return layout, step

    return min(map(priced, layouts), key=lambda one: float(one[1].step_s[0]))


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
        tokens=float(batch * (tokens if phase == "prefill" else 1 + layout.parallel.mtp)),
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
