"""What the fit behind an operator reports of rows that it did not see.

A fit may judge itself on rows left out and then be made again with all of them. Errors on figures
of its table are then too good; the median error that its calibration section carries is not.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, cast

from shardplan.costmodel.catalog import load_cluster, load_device
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.kernels.collectives import collective_section
from shardplan.costmodel.placement import group_tiers
from shardplan.models.errors import ShardplanError
from shardplan.search.estimate_ops import COLLECTIVE_OPS

if TYPE_CHECKING:
    from shardplan.costmodel.kernels.collectives import CollectiveKind

__all__ = ["unseen_median"]

_SECTIONS = {
    "matmul": "matmul.{dtype}",
    "moe": "moe.{dtype}",
    "attention_prefill": "attention.prefill",
    "attention_decode": "attention.decode",
    "mla_prefill": "mla.prefill",
    "mla_decode": "mla.decode",
}
"""Operator -> section; a collective's is that of its outermost tier, launched by the host."""


@functools.lru_cache(maxsize=256)
def unseen_median(
    op: str, dtype: str, device: str, cluster: str, engine: str, ranks: str = ""
) -> float | None:
    """The section's median error on rows left out; None where there is no such number."""
    if op not in _SECTIONS and op not in COLLECTIVE_OPS:
        return None
    try:
        machine = Machine.of(
            load_device(device) if device else load_cluster(cluster).device, engine
        )
        if op in _SECTIONS:
            name = _SECTIONS[op].format(dtype=dtype or "bf16")
        else:
            spans = group_tiers(load_cluster(cluster), group=int(ranks), stride=1)
            kind = cast("CollectiveKind", op)
            name = collective_section(kind, spans, machine.calibration, "host")
        section = machine.calibration.section(name)
    except (ShardplanError, ValueError):
        return None
    known = section.rows_held_out > 0 and math.isfinite(section.median_error)
    return section.median_error if known else None
