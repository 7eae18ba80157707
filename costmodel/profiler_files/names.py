"""Names in profiler files and what they stand for: kernels, dtypes, collectives.

The table is `data/profiler_kernels.toml`. A name that it lacks is no kernel that is priced: it is
counted and listed, never guessed.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

__all__ = [
    "POINTWISE_BYTES",
    "KernelName",
    "collective_kind",
    "dtype_of",
    "kernel_named",
    "streaming_bytes",
]

_HCOM = "hcom_"
POINTWISE_BYTES = ("add_rmsnorm", "rmsnorm", "rope", "swiglu", "topk_router", "kv_append")
"""Streaming kernels whose bytes an element are those of the op table."""


@dataclass(frozen=True, slots=True)
class KernelName:
    """The priced kernel behind a name."""

    op: str
    elements: float
    """Elements computed for one element of the first input."""


@functools.cache
def _tables() -> dict[str, Any]:
    file = resources.files("shardplan.costmodel") / "data" / "profiler_kernels.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def kernel_named(name: str) -> KernelName | None:
    """The kernel of a type name; None where it is not priced."""
    found = _tables()["kernels"].get(name.strip())
    if found is None:
        return None
    return KernelName(found["op"], float(found.get("elements", {"value": 1.0})["value"]))


def dtype_of(name: str) -> str | None:
    """bf16, fp16, fp32, int8 or int4; None for other element types."""
    found = _tables()["dtypes"].get(name.strip().upper())
    return None if found is None else str(found)


def streaming_bytes(kind: str) -> float:
    """Bytes that an element makes a kernel move which steps do not price by itself."""
    return float(_tables()["streaming_bytes"][kind]["value"])


def collective_kind(name: str) -> str | None:
    """The collective of `hcom_allReduce_`, `hcom_allReduce__501_0@group`, ...; None for others."""
    lowered = name.strip().lower()
    if not lowered.startswith(_HCOM):
        return None
    word = lowered.removeprefix(_HCOM).split("_", 1)[0]
    found = _tables()["collectives"].get(word)
    return None if found is None else str(found)
