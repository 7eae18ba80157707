"""Attention sections without measurements of their own: eager attention, and MLA on NVIDIA."""

from __future__ import annotations

from collections.abc import Sequence

from shardplan.costmodel.fitting.common import FittedSection

__all__ = ["derived_sections"]


def derived_sections(device: str, fitted: Sequence[FittedSection]) -> list[FittedSection]:
    """Sections without measurements of their own: eager attention, and MLA on NVIDIA."""
    npu = device == "910b2"
    naive = {
        "hbm_efficiency": 0.75 if npu else 0.87,
        "cube_efficiency": 0.84 if npu else 0.86,
        "vector_efficiency": 0.5,
        "softmax_flop": 44.0 if npu else 22.0,
        "kv_efficiency": 0.62 if npu else 0.87,
        "matmul_floor_s": 8.6e-6 if npu else 2e-6,
        "vector_floor_s": 5.2e-6 if npu else 2e-6,
    }
    source = (
        "HBM and cube rates reached by measured matrix products on this device, keys and values at "
        "the rate of its measured decode attention; "
    ) + (
        "floors are the smallest MatMulV2 (8.6 us) and SwiGlu (5.2 us) in a profile of Qwen3-32B "
        "decode on an A3 die (github.com/Horacehxw/msModeling @ 39df672b); "
        if npu
        else "floors are the device file's launch floor; "
    )
    source += "vector rate halved and softmax operations counted by hand (both assumed)"
    out = [FittedSection(name="attention.naive", kind="derived", source=source, coefficients=naive)]
    if not npu:
        lent = "the coefficients fitted to attention on this device; no MLA table was read"
        out += [
            FittedSection(
                name=one.name.replace("attention", "mla"),
                kind="derived",
                source=lent,
                coefficients=one.coefficients,
            )
            for one in fitted
        ]
    return out
