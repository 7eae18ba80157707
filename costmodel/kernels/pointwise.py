"""Time of kernels that stream: norms, activations, rotary embedding, quantization, copies.

    total  = floor + max(memory, vector)
    memory = bytes / (L2 * e_l2)
             + max(0, bytes - L2 bytes) * max(0, 1 / (HBM * e_hbm) - 1 / (L2 * e_l2))
    vector = elements * flop_per_element * width / vector rate

bytes read and written together; what exceeds L2 goes at the HBM's rate. HBM and L2 in bytes/s and
the vector rate in FLOP/s (of 2-byte elements; `width` = element bytes / 2, at least 1) are the
device's; e_hbm, e_l2 the fractions that the kind reaches and flop_per_element its arithmetic, from
the section `pointwise.<kind>`. A fused kernel is a kind of its own, whose floor is paid once.
Left out: rows too short or too few to fill the vector cores, other than through the floor.
"""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.kernels.base import (
    ArrayLike,
    KernelTime,
    Machine,
    as_array,
    as_measured,
)
from shardplan.models.errors import UnknownNameError

__all__ = ["POINTWISE_FAMILY", "pointwise", "pointwise_kinds"]

POINTWISE_FAMILY = "pointwise"
_WIDTH = {"bf16": 1.0, "fp16": 1.0, "int8": 1.0, "fp8": 1.0, "w8a8": 1.0, "fp32": 2.0}
"""How many 2-byte lanes an element takes; narrower elements are computed in 2 bytes."""


def pointwise_kinds(machine: Machine) -> tuple[str, ...]:
    """Kinds that the machine's calibration prices, sorted."""
    lead = POINTWISE_FAMILY + "."
    names = machine.calibration.sections
    return tuple(sorted(name.removeprefix(lead) for name in names if name.startswith(lead)))


def pointwise(
    machine: Machine, kind: str, elements: ArrayLike, bytes_moved: ArrayLike, dtype: str = "bf16"
) -> KernelTime:
    """Seconds of one streaming kernel.

    kind: a section of the calibration (`pointwise_kinds`). elements: elements computed;
    bytes_moved: bytes read and written; both broadcast and give the result's shape. dtype of the
    arithmetic: bf16, fp16, int8, fp8, w8a8, fp32. Raises `UnknownNameError` for other names.
    """
    if f"{POINTWISE_FAMILY}.{kind}" not in machine.calibration.sections:
        raise UnknownNameError("pointwise kernel", kind, pointwise_kinds(machine))
    if dtype not in _WIDTH:
        raise UnknownNameError("pointwise dtype", dtype, _WIDTH)
    coef = machine.calibration.section(f"{POINTWISE_FAMILY}.{kind}")
    device = machine.device
    count, moved = np.broadcast_arrays(as_array(elements), as_array(bytes_moved))
    l2_byte_s = 1.0 / (device.l2_bytes_per_s * coef["l2"])
    hbm_byte_s = 1.0 / (device.hbm_bytes_per_s * coef["hbm"])
    beyond = np.maximum(moved - device.l2_bytes, 0.0)
    memory_s = moved * l2_byte_s + beyond * max(0.0, hbm_byte_s - l2_byte_s)
    per_element_s = coef["flop_per_element"] * _WIDTH[dtype] / device.vector_flop_per_s
    vector_s = count * per_element_s
    body = np.maximum(memory_s, vector_s)
    compute = np.where(vector_s > memory_s, body, 0.0)
    over = np.full(body.shape, coef["floor_s"])
    time = KernelTime(np.asarray(body + over), compute, np.asarray(body - compute), over)
    return as_measured(time, machine.calibration, f"{POINTWISE_FAMILY}.{kind}")
