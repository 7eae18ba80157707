"""The separable surface of decode attention over batch, cached tokens and kv heads.

The measured floor moves between 33 and 67 us with the batch and the context in ways that no
formula of bytes explains. The fit (`separable_fit`) follows it only as far as a larger batch or
context does not get cheaper.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shardplan.costmodel.fitting.separable_fit import SeparableProblem, coefficients_of
from shardplan.costmodel.fitting.surface_fit import Sizes
from shardplan.costmodel.kernels.base import Array

__all__ = ["decode_surface"]

_KNOTS = (
    tuple(2**power for power in range(8)),
    tuple(2**power for power in range(7, 15)),
    (1, 4, 8, 16, 32, 40, 64),
)
"""The measured batches, cached tokens and kv heads."""
_RANK, _REACH, _NOISE = 6, (4.0, 4.0, 3.0), 0.05
"""By cross-validation."""
_HINGE = 60.0
"""Keeps the fall with batch or context under 1 % on the fitted device."""
_STEP = 2.0**0.5
_HEAD_DIM = 128.0


def _grid() -> Array:
    """Rows `[batch, tokens, heads, kv_heads, head_dim]` over the measured ranges."""
    axes = np.meshgrid(
        _STEP ** np.arange(15.0), 128.0 * _STEP ** np.arange(15.0), [8, 32, 64.0], [1, 4, 8, 32.0]
    )
    batch, tokens, heads, kv_heads = (axis.ravel() for axis in axes)
    rows = np.stack([batch, tokens, heads, kv_heads, np.full(batch.size, _HEAD_DIM)], 1)
    return np.asarray(rows[kv_heads <= heads], dtype=np.float64)


def decode_surface(base: Callable[[Array], Array], rows: Array, seconds: Array) -> dict[str, float]:
    """Coefficients of the surface on `base`, the seconds of rows without it."""

    def sizes(shapes: Array) -> Sizes:
        return shapes[:, 0], shapes[:, 1], shapes[:, 3]

    grid = _grid()
    longer, more = grid.copy(), grid.copy()
    longer[:, 1] *= _STEP
    more[:, 0] *= _STEP
    known = [(sizes(one), base(one)) for one in (rows, grid, more, longer)]

    def seconds_of(asked: Sizes) -> Array:
        return next(time for given, time in known if given is asked)

    factors = SeparableProblem(
        base=seconds_of,
        knots=_KNOTS,
        sizes=known[0][0],
        measured_s=seconds,
        grid=known[1][0],
        larger=(known[2][0], known[3][0]),
        rank=_RANK,
        reach=_REACH,
        noise=_NOISE,
        hinge=_HINGE,
    ).solve()
    return coefficients_of(factors, _KNOTS)
