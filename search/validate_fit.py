"""What the fit behind an operator reports of rows that it did not see.

A fit may judge itself on rows left out and then be made again with all of them. Errors on figures
of its table are then too good; the median error that its calibration section carries is not.
"""

from __future__ import annotations

import functools
import math

from shardplan.costmodel.basis import op_section
from shardplan.costmodel.catalog import load_cluster, load_device
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.placement import group_tiers
from shardplan.models.errors import ShardplanError
from shardplan.search.estimate_ops import COLLECTIVE_OPS

__all__ = ["unseen_median"]


@functools.lru_cache(maxsize=256)
def unseen_median(
    op: str, dtype: str, device: str, cluster: str, engine: str, ranks: str = ""
) -> float | None:
    """The section's median error on rows left out; None where there is no such number."""
    try:
        machine = Machine.of(
            load_device(device) if device else load_cluster(cluster).device, engine
        )
        crosses = op in COLLECTIVE_OPS
        spans = group_tiers(load_cluster(cluster), group=int(ranks), stride=1) if crosses else ()
        section = op_section(machine, op, dtype or "bf16", "flash", spans)
    except (ShardplanError, ValueError):
        return None
    known = section.rows_held_out > 0 and math.isfinite(section.median_error)
    return section.median_error if known else None
