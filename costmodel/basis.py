"""What a price rests on: the calibration section behind each row of the op table.

measured and fitted come from runs on the device (or its family), derived from the machine model
with another kernel's coefficients, assumed from a published constant or a guess that is said.
Where several sections price one row (the tiers that a collective crosses, a product with its
prefetch), the weakest counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from shardplan.costmodel.calibration import Calibration, Section
from shardplan.costmodel.kernels.algorithms import runs
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.load import kernel_dtype
from shardplan.costmodel.optable import Row, pointwise_kernel
from shardplan.costmodel.overlap import FUSED_SECTION, PREFETCH_SECTION
from shardplan.costmodel.placement import TierSpan
from shardplan.costmodel.step import StepModel
from shardplan.models.graph import Phase

__all__ = ["KINDS", "basis_in", "collective_sections", "op_section", "row_section", "weakest"]

KINDS = ("measured", "fitted", "derived", "assumed")
"""From the strongest to the weakest."""
_PRODUCTS = ("matmul", "grouped_matmul", "matmul_all_reduce")
_UNKNOWN = Section(
    name="none",
    kind="assumed",
    source="no section prices this kernel",
    rows_fitted=0,
    rows_held_out=0,
    median_error=float("nan"),
    p90_error=float("nan"),
    coefficients={},
)


def weakest(sections: Iterable[Section]) -> Section:
    """The section of the weakest kind, the first of several."""
    return max(sections, key=lambda section: KINDS.index(section.kind), default=_UNKNOWN)


def collective_sections(
    calibration: Calibration, kind: str, spans: Sequence[TierSpan], launch: str = "graph"
) -> Iterator[Section]:
    """The section of each tier that a collective crosses; in service, that of captured graphs."""
    for span in spans:
        lead = f"collectives.{span.tier.topology}.{launch}"
        own = calibration.sections.get(f"{lead}.{kind}")
        found = own or calibration.sections.get(f"{lead}.any", _UNKNOWN)
        if runs(span.algorithm, kind):  # fitted to another form of the same links
            found = replace(found, kind=max(found.kind, "derived", key=KINDS.index))
        yield found


def _names(row: Row, weight_dtype: str, phase: str, attention: str) -> Iterator[tuple[str, ...]]:
    """Names of sections that price a row, each with those that may stand in for it."""
    if row.kind in _PRODUCTS:
        dtype = kernel_dtype(row, weight_dtype)
        dense = f"matmul.{dtype}"
        yield (f"moe.{dtype}", dense) if row.kind == "grouped_matmul" else (dense,)
        if row.behind:
            yield (PREFETCH_SECTION,)
        if row.fused is not None:
            yield (FUSED_SECTION,)
    elif "attention" in row.kind or row.kind == "mla_absorbed":
        family = "attention" if row.kind == "attention" else "mla"
        yield ("attention.naive",) if attention == "naive" else (f"{family}.{phase}",)
    else:
        yield (f"pointwise.{pointwise_kernel(row)}",)


def row_section(
    calibration: Calibration, row: Row, weight_dtype: str, phase: str, attention: str = "flash"
) -> Section:
    """The section that a row's price rests on."""
    sections = calibration.sections
    if row.is_collective:
        return weakest(collective_sections(calibration, row.kind, row.spans))
    return weakest(
        next((sections[name] for name in names if name in sections), _UNKNOWN)
        for names in _names(row, weight_dtype, phase, attention)
    )


def op_section(
    machine: Machine, op: str, dtype: str, attention: str, spans: Sequence[TierSpan] = ()
) -> Section:
    """The section behind one operator alone, as `shardplan estimate` prices it in phase op."""
    if spans:
        return weakest(collective_sections(machine.calibration, op, spans, "host"))
    name = {"matmul": f"matmul.{dtype}", "moe": f"moe.{dtype}"}.get(op, op.replace("_", "."))
    if attention == "naive" and op not in ("matmul", "moe"):
        name = "attention.naive"
    return machine.calibration.sections.get(name, _UNKNOWN)


def basis_in(
    model: StepModel, kind: str, weight_dtype: str, phase: Phase, *, attention: str = "flash"
) -> str:
    """What the price of a kind of operator rests on in one layout: its weakest row."""
    calibration = model.machine.calibration
    return weakest(
        row_section(calibration, row, weight_dtype, phase, attention)
        for rows in model.rows[phase].values()
        for row in rows
        if row.kind == kind
    ).kind
