"""What a row of the op table is priced for, and what a price is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.memo import Memo, Points
from shardplan.costmodel.optable import Row
from shardplan.costmodel.weight_types import type_of
from shardplan.models.graph import Phase

__all__ = ["PARTS", "SIXTEEN_BIT", "ZERO", "Load", "Parts", "kernel_dtype"]

SIXTEEN_BIT = "bf16"
_FEW = 8
"""Loads of fewer points are priced as they are."""


class Parts(NamedTuple):
    """Seconds, array by array, and kernels launched."""

    compute_s: Array
    memory_s: Array
    collective_s: Array
    overhead_s: Array
    kernels: float

    @property
    def seconds(self) -> tuple[Array, Array, Array, Array]:
        """The arrays alone."""
        return self.compute_s, self.memory_s, self.collective_s, self.overhead_s

    @property
    def total_s(self) -> Array:
        """All of it."""
        return self.compute_s + self.memory_s + self.collective_s + self.overhead_s

    def plus(self, other: Parts) -> Parts:
        """Two in a row."""
        return Parts(
            self.compute_s + other.compute_s,
            self.memory_s + other.memory_s,
            self.collective_s + other.collective_s,
            self.overhead_s + other.overhead_s,
            self.kernels + other.kernels,
        )

    def times(self, count: float) -> Parts:
        """The same `count` times."""
        return Parts(
            self.compute_s * count,
            self.memory_s * count,
            self.collective_s * count,
            self.overhead_s * count,
            self.kernels * count,
        )

    def at(self, points: Points | None) -> Parts:
        """Spread from the different points over the grid that they stand for, where told."""
        if points is None:
            return self
        a, b, c, d = map(points.spread, self.seconds)
        return Parts(a, b, c, d, self.kernels)


PARTS = len(Parts._fields) - 1
"""Arrays of seconds among them."""
ZERO = Parts(np.zeros(()), np.zeros(()), np.zeros(()), np.zeros(()), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a row is priced for; arrays broadcast against one another.

    `tokens` are those of one dp group for the row's group; for attention rows, `batch` sequences
    of one dp group with `new` tokens each after `prefix` cached ones.
    """

    phase: Phase
    tokens: Array
    batch: Array
    new: Array
    prefix: Array
    weight_dtype: str
    kv_dtype: str
    attention: AttentionKernel
    launch: Literal["graph", "host"]

    @classmethod
    def of(
        cls,
        phase: Phase,
        engine: EngineProfile,
        *,
        tokens: ArrayLike = 0.0,
        batch: ArrayLike = 0.0,
        new: ArrayLike = 0.0,
        prefix: ArrayLike = 0.0,
        weight_dtype: str = SIXTEEN_BIT,
        kv_dtype: str = SIXTEEN_BIT,
        attention: AttentionKernel = "flash",
    ) -> Load:
        """A load, launched as the engine launches its phase."""
        graph = engine.decode_graph if phase == "decode" else engine.prefill_graph
        return cls(
            phase=phase,
            tokens=as_array(tokens),
            batch=as_array(batch),
            new=as_array(new),
            prefix=as_array(prefix),
            weight_dtype=weight_dtype,
            kv_dtype=kv_dtype,
            attention=attention,
            launch="graph" if graph else "host",
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the grid that the arrays span."""
        shapes = {one.shape for one in self._arrays if one.ndim}
        return shapes.pop() if len(shapes) == 1 else np.broadcast_shapes(*shapes)

    @property
    def remembered(self) -> bool:
        """Whether it has points enough for its prices to be worth remembering."""
        return math.prod(self.shape) >= _FEW

    @property
    def _arrays(self) -> tuple[Array, Array, Array, Array]:
        return self.tokens, self.batch, self.new, self.prefix

    def at_points(self, memo: Memo) -> tuple[Load, Points]:
        """The same load at its different points alone."""
        points = memo.different(self._arrays)
        tokens, batch, new, prefix = points.arrays
        return replace(self, tokens=tokens, batch=batch, new=new, prefix=prefix), points

    @property
    def kinds(self) -> tuple[str, ...]:
        """All that a price depends on beside the arrays."""
        return self.phase, self.weight_dtype, self.kv_dtype, self.attention, self.launch

    def kinds_of(self, dtypes: Sequence[str]) -> tuple[str, ...]:
        """The same of a price that depends on some of the dtypes alone, in their order."""
        return self.phase, self.launch, *(getattr(self, name) for name in dtypes)


def kernel_dtype(row: Row, weight_dtype: str) -> str:
    """Linear and expert weights take the strategy's dtype of their group, all else is 16-bit."""
    if row.weight_class not in ("linear", "expert"):
        return SIXTEEN_BIT
    return type_of(weight_dtype, row.weight_group)
