"""What a price rests on: the kind of the calibration section behind each operator.

measured and fitted come from runs on the device (or its family), derived from the machine model
with another kernel's coefficients, assumed from a published constant or a guess that is said.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from shardplan.costmodel.calibration import Calibration
from shardplan.costmodel.optable import Row, pointwise_kernel
from shardplan.costmodel.step import StepModel
from shardplan.models.graph import Phase

__all__ = ["basis_in", "basis_of"]

_ORDER = ("measured", "fitted", "derived", "assumed")


def _candidates(kind: str, weight_dtype: str, phase: str) -> Iterator[str]:
    """Section names that may stand behind a kind of operator, first choice first."""
    if kind in ("matmul", "grouped_matmul"):
        yield f"{'matmul' if kind == 'matmul' else 'moe'}.{weight_dtype}"
        yield f"matmul.{weight_dtype}"
    elif kind == "attention":
        yield f"attention.{phase}"
    elif kind in ("mla_attention", "mla_absorbed"):
        yield f"mla.{phase}"
    else:
        yield f"pointwise.{pointwise_kernel(Row(kind=kind, group='token'))}"


def basis_in(
    model: StepModel, kind: str, weight_dtype: str, phase: Phase, *, attention: str = "flash"
) -> str:
    """What the price of a kind rests on in one layout: for the tiers that it really crosses."""
    if "attention" in kind and attention == "naive":
        return model.machine.calibration.section("attention.naive").kind
    crossed = {
        span.tier.topology
        for rows in model.rows[phase].values()
        for row in rows
        if row.kind == kind
        for span in row.spans
    }
    graph = model.engine.decode_graph if phase == "decode" else model.engine.prefill_graph
    return basis_of(
        model.machine.calibration,
        kind,
        weight_dtype,
        phase,
        topologies=sorted(crossed),
        launch="graph" if graph else "host",
    )


def basis_of(
    calibration: Calibration,
    kind: str,
    weight_dtype: str,
    phase: str,
    *,
    topologies: Collection[str] = (),
    launch: str = "graph",
) -> str:
    """measured, fitted, derived or assumed.

    A collective names the `topologies` that it crosses and how it is launched; the weakest of
    their sections counts.
    """
    sections = calibration.sections
    if topologies:
        names = (
            next(
                (
                    f"collectives.{topology}.{launch}.{one}"
                    for one in (kind, "any")
                    if f"collectives.{topology}.{launch}.{one}" in sections
                ),
                "",
            )
            for topology in topologies
        )
        found = [sections[name].kind if name else "assumed" for name in names]
        return max(found, key=_ORDER.index)
    return next(
        (
            sections[name].kind
            for name in _candidates(kind, weight_dtype, phase)
            if name in sections
        ),
        "derived",
    )
