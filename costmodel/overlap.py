"""Kernels beside one another, where a switch of the engine lets them.

**Weight prefetch.** While the kernels between two products run (norms, activations, routing,
collectives: `Row.behind`), the weights of the product that follows stream from HBM into L2:

    budget   = HBM e t - sum over those kernels of max(0, moved bytes - L2 bytes)
    resident = L2 bytes - bytes moved by those kernels - input and output of the product
    warm     = min(weight bytes, the engine's most, budget, resident), at least 0

t = seconds of those kernels, launches included; e = `overlap.weight_prefetch` hbm. A streaming
kernel reads and writes L2 and takes from HBM what L2 cannot hold (`kernels.pointwise`); a
collective takes nothing. The product reads `warm` bytes at the rate of L2 (`kernels.matmul`: the
share found in L2); a grouped product, of which the prefetched part is small, saves
warm * (1 / (HBM e_hbm) - 1 / (L2 e_l2)) of its memory time. Steps of more tokens than the engine's
limit prefetch nothing.
Left out: a prefetch that outlasts the kernels that hide it (engines then wait for it: what it
gains the product has lost before), its slowing of the kernels beside it.

**Fused product and all_reduce** (MC2, LCOC). The product is cut along its rows into c pieces; the
wire carries one piece while the next is computed:

    total = product / c + max(product, wire) (c - 1) / c + wire / c + overheads
          = max(product, wire) + min(product, wire) / c + overheads
    c     = min(pieces, rows / piece_rows), at least 1

product = body of the product, wire = wire time of the all_reduce, overheads = both kernels' own.
Source of the form: CANN operator guide, "MC2 operator performance tuning". Only prefill is fused:
the aclnnMatmulAllReduce reference says that incremental inference does not enable MC2, MindIE
fuses in its prefill graph alone, and few rows make one piece anyway.
Sections: `overlap.weight_prefetch`, `overlap.matmul_all_reduce`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardplan.costmodel.formulas import (
    FORMULAS,
    local_tokens,
    matmul_rows,
    matmul_time,
)
from shardplan.costmodel.kernels.base import Array, KernelTime
from shardplan.costmodel.kernels.moe import MOE_FAMILY
from shardplan.costmodel.kernels.precision import merged_coefficients, precision_of
from shardplan.costmodel.load import Load, Parts, kernel_dtype
from shardplan.costmodel.optable import Row, pointwise_bytes

if TYPE_CHECKING:
    from shardplan.costmodel.step import StepModel

__all__ = ["FUSED_SECTION", "PREFETCH_SECTION", "fused_parts", "prefetched", "prefetched_bytes"]

PREFETCH_SECTION = "overlap.weight_prefetch"
FUSED_SECTION = "overlap.matmul_all_reduce"
_ACTIVATION_BYTES = 2.0


def _moved_bytes(model: StepModel, row: Row, load: Load) -> Array:
    """Bytes that a streaming kernel reads and writes; none of a collective."""
    if row.is_collective:
        return np.zeros(())
    elements = local_tokens(row, load, model.groups) * row.width * row.share
    return np.asarray(elements * pointwise_bytes(row), dtype=np.float64)


def _operand_bytes(model: StepModel, row: Row, load: Load) -> Array:
    """Bytes of a product's input and output, 16-bit."""
    rows = local_tokens(row, load, model.groups) * row.share
    return np.asarray(rows * (row.n + row.k) * _ACTIVATION_BYTES, dtype=np.float64)


def prefetched_bytes(model: StepModel, row: Row, load: Load) -> Array:
    """Weight bytes of a product that are in L2 when it starts; the load's shape or fewer dims."""
    device, engine = model.machine.device, model.engine
    rate = device.hbm_bytes_per_s * model.machine.calibration.section(PREFETCH_SECTION)["hbm"]
    moved = [_moved_bytes(model, one, load) for one in row.behind]
    hidden_s = sum((model.price(one, load).total_s for one in row.behind), np.zeros(()))
    spilled = sum((np.maximum(one - device.l2_bytes, 0.0) for one in moved), np.zeros(()))
    resident = device.l2_bytes - sum(moved, np.zeros(())) - _operand_bytes(model, row, load)
    rule = precision_of(kernel_dtype(row, load.weight_dtype))
    weights = row.n * row.k * np.maximum(row.experts, 1.0) * rule.weight_bytes
    most = np.minimum(weights, engine.weight_prefetch_bytes)
    warm = np.clip(np.minimum(hidden_s * rate - spilled, resident), 0.0, most)
    few = load.tokens * model.groups / row.ways <= engine.weight_prefetch_tokens
    return np.asarray(np.where(few, warm, 0.0), dtype=np.float64)


def prefetched(model: StepModel, row: Row, load: Load) -> KernelTime:
    """Time of a product or grouped product, part of whose weights is in L2."""
    warm = prefetched_bytes(model, row, load)
    if row.kind != "grouped_matmul":
        return matmul_time(model, row, load, warm)
    time = FORMULAS[row.kind](model, row, load)
    device, calibration = model.machine.device, model.machine.calibration
    rule = precision_of(kernel_dtype(row, load.weight_dtype))
    coef = merged_coefficients(calibration, MOE_FAMILY, rule)
    hbm_byte_s = 1.0 / (device.hbm_bytes_per_s * coef["hbm"])
    l2_byte_s = 1.0 / (device.l2_bytes_per_s * coef["l2"])
    saved = np.minimum(warm * max(hbm_byte_s - l2_byte_s, 0.0), time.memory_s)
    return KernelTime(time.total_s - saved, time.compute_s, time.memory_s - saved, time.overhead_s)


def fused_parts(model: StepModel, row: Row, collective: Row, load: Load) -> Parts:
    """Price of a product and the all_reduce of its result as one kernel."""
    coef = model.machine.calibration.section(FUSED_SECTION)
    time = prefetched(model, row, load) if row.behind else FORMULAS["matmul"](model, row, load)
    wire = model.collective_time(collective, load)
    rows = matmul_rows(model, row, load)
    pieces = np.clip(rows / coef["piece_rows"], 1.0, coef["pieces"])
    body = time.compute_s + time.memory_s
    hidden = np.minimum(body, wire.memory_s) * (1.0 - 1.0 / pieces)
    return Parts(time.compute_s, time.memory_s, wire.total_s - hidden, time.overhead_s, 1.0)
