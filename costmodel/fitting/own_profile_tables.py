"""Rows of a profile that this project measured (`shardplan profile`), as the fits take them.

Columns: `search/profiling/table.py`. Times are the medians. Collectives were measured on 2 ranks;
for 4 and 8 the increments of the published NCCL table over 2 ranks (same links, another release)
are added to them: NCCL pays them in further steps of its ring, and own and published times of
2 ranks differ by a launch that does not grow with the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardplan.costmodel.fitting.collective_tables import CollectiveTable, nccl_rows
from shardplan.costmodel.fitting.common import read_rows
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.kernels.collectives import CollectiveKind

__all__ = ["COLLECTIVES", "POINTWISE", "Kind", "Profile", "collective_rows", "read_profile"]

COLLECTIVES: tuple[CollectiveKind, ...] = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
)
_RANKS = (2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A streaming kernel: the measured operator, the sizes whose product is its elements."""

    op: str
    backend: str
    sizes: tuple[str, ...]
    bytes_per_element: float
    both_heads: bool = False
    """The elements are of query and key heads together."""


POINTWISE: Mapping[str, Kind] = {
    "add_rmsnorm": Kind(
        op="add_rmsnorm", backend="inductor", sizes=("tokens", "hidden"), bytes_per_element=8.0
    ),
    "rope": Kind(
        op="rope",
        backend="inductor",
        sizes=("tokens", "head_dim"),
        bytes_per_element=4.0,
        both_heads=True,
    ),
    "qk_norm_rope": Kind(
        op="qk_norm_rope",
        backend="inductor",
        sizes=("tokens", "head_dim"),
        bytes_per_element=4.0,
        both_heads=True,
    ),
    "swiglu": Kind(op="swiglu", backend="inductor", sizes=("tokens", "ffn"), bytes_per_element=6.0),
    "kv_append": Kind(
        op="kv_append",
        backend="torch",
        sizes=("batch", "tokens", "kv_heads", "head_dim"),
        bytes_per_element=4.0,
    ),
    "topk_router": Kind(
        op="topk_router", backend="torch", sizes=("tokens", "experts"), bytes_per_element=6.0
    ),
    "slice": Kind(
        op="dispatch", backend="torch", sizes=("tokens", "topk", "hidden"), bytes_per_element=4.0
    ),
    "add": Kind(
        op="combine", backend="torch", sizes=("tokens", "topk", "hidden"), bytes_per_element=4.0
    ),
}
"""Section of `pointwise` -> what was measured; bytes as the op table counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """All rows of one CSV."""

    rows: Sequence[Mapping[str, str]]

    @property
    def machine(self) -> str:
        """Device, driver and PyTorch of the rows."""
        one = self.rows[0]
        return f"{one['device_name']}, driver {one['driver']}, PyTorch {one['torch_version']}"

    def of(self, op: str, backend: str, names: Sequence[str], *, mode: str = "graph") -> Array:
        """`[rows, sizes + 1]`: the named sizes and the seconds of an operator's bf16 rows.

        `mode`: graph for captured ones, eager for those launched by the host.
        """
        wanted = {"op": op, "backend": backend, "dtype": "bf16", "mode": mode}
        found = [
            [*(float(row[name]) for name in names), float(row["time_s_median"])]
            for row in self.rows
            if all(row[key] == value for key, value in wanted.items())
        ]
        return np.asarray(found, dtype=np.float64).reshape(len(found), len(names) + 1)

    def pointwise(self, kind: Kind) -> tuple[Array, Array]:
        """Elements and seconds of a streaming kernel."""
        heads = ("heads", "kv_heads") if kind.both_heads else ()
        found = self.of(kind.op, kind.backend, (*kind.sizes, *heads))
        elements = np.prod(found[:, : len(kind.sizes)], axis=1)
        if kind.both_heads:
            elements = elements * found[:, len(kind.sizes) : -1].sum(axis=1)
        return elements, found[:, -1]


def read_profile(path: Path) -> Profile:
    """A CSV of `shardplan profile`; `InputError` if it is not there."""
    return Profile(rows=list(read_rows(path)))


def _published(table: CollectiveTable, ranks: int, message: Array) -> Array:
    """Seconds of the published table at other sizes, linear in the logs of both."""
    mine = table.ranks == ranks
    order = np.argsort(table.message_bytes[mine])
    sizes, seconds = table.message_bytes[mine][order], table.seconds[mine][order]
    found = np.interp(np.log(message), np.log(sizes), np.log(seconds))
    beyond = np.maximum(message / sizes[-1], 1.0)
    return np.asarray(np.exp(found) * beyond, dtype=np.float64)


def collective_rows(
    profile: Profile, data: Path, device: str, mode: str
) -> dict[CollectiveKind, tuple[Array, Array]]:
    """Message bytes `[sizes]` and seconds `[2, 4 and 8 ranks, sizes]` of one mode's collectives."""
    published = {table.kind: table for table in nccl_rows(data, device)}
    out: dict[CollectiveKind, tuple[Array, Array]] = {}
    for kind in COLLECTIVES:
        found = profile.of(kind, "nccl", ("message_bytes",), mode=mode)
        message, measured = found[np.argsort(found[:, 0])].T
        base = _published(published[kind], _RANKS[0], message)
        more = [_published(published[kind], ranks, message) - base for ranks in _RANKS]
        out[kind] = (message, np.stack([np.maximum(measured + extra, measured) for extra in more]))
    return out
