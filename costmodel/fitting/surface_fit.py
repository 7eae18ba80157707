"""Least squares for a kernel formula with a surface: `t = overhead + body * exp(B s)`.

    minimise  sum rho(ln(t / measured))            the measured rows
            + sum rho(hinge * max(0, ln t(x) - ln t(x doubled)))   on a grid of sizes
            + sum rho(smooth * (knot - line through its neighbours))
            + sum rho(ridge * s) + sum rho(pull * ln(p / start))

p physical coefficients (they make overhead and body), s the surface's values, B the weight
of each knot at each row. rho is quadratic below `scale` and linear above, so that an odd row counts
little. The derivative is exact in s and a difference in p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shardplan.costmodel.kernels.base import Array

__all__ = ["Formula", "Knots", "Sizes", "SurfaceProblem", "knot_weights"]

Knots = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Sizes = tuple[Array, Array, Array]
Formula = Callable[[Array, Sizes], tuple[Array, Array]]
"""(physical coefficients, sizes) -> overhead and body in seconds, without the surface."""
_STEP = 1e-4
_MAX_STEPS = 80


def knot_weights(sizes: Sizes, knots: Knots) -> Array:
    """Weight of each knot of the surface at each row: `[rows, knots]`, rows sum to 1."""
    shares = []
    for size, axis in zip(sizes, knots, strict=True):
        logs = np.log2(np.asarray(axis, dtype=np.float64))
        place = np.log2(np.maximum(size, 1.0))
        shares.append(np.stack([np.interp(place, logs, unit) for unit in np.eye(logs.size)], 1))
    product = np.einsum("ri,rj,rl->rijl", *shares)
    return np.asarray(product.reshape(sizes[0].size, -1), dtype=np.float64)


def _smoothness(knots: Knots) -> Array:
    """Rows `[interior knots, values]`: how far a knot lies from the line of its neighbours."""
    index = np.arange(np.prod([len(axis) for axis in knots])).reshape([len(a) for a in knots])
    rows = [np.zeros((0, index.size))]
    for axis, sizes in enumerate(knots):
        place, logs = np.moveaxis(index, axis, 0), np.log2(np.asarray(sizes, dtype=np.float64))
        for i in range(1, len(sizes) - 1):
            share = (logs[i] - logs[i - 1]) / (logs[i + 1] - logs[i - 1])
            block = np.zeros((place[i].size, index.size))
            at = np.arange(place[i].size)
            block[at, place[i - 1].ravel()] = 1.0 - share
            block[at, place[i + 1].ravel()] = share
            block[at, place[i].ravel()] = -1.0
            rows.append(block)
    return np.concatenate(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class SurfaceProblem:
    """What to fit, to which rows, and how strongly the rest pulls."""

    formula: Formula
    knots: Knots
    start: Array
    lower: Array
    upper: Array
    sizes: Sizes
    measured_s: Array
    grid: Sizes
    doubled: tuple[Sizes, ...]
    hinge: float = 10.0
    smooth: float = 0.2
    ridge: float = 0.05
    pull: float = 0.3
    scale: float = 0.03

    def solve(self) -> tuple[Array, Array]:
        """Physical coefficients and surface values (flat, m slowest) of the least sum."""
        from scipy.optimize import least_squares

        groups = [self.sizes, self.grid, *self.doubled]
        weights = [knot_weights(sizes, self.knots) for sizes in groups]
        values = weights[0].shape[1]
        bend = _smoothness(self.knots)
        edge = np.full(values, 1.5)
        low = np.concatenate([np.log(self.lower), -edge])
        high = np.concatenate([np.log(self.upper), edge])
        state = _State(self, groups, weights, bend)
        found = least_squares(
            state.residual,
            np.concatenate([np.log(self.start), np.zeros(values)]),
            jac=state.jacobian,
            bounds=(low, high),
            loss="soft_l1",
            f_scale=self.scale,
            max_nfev=_MAX_STEPS,
        )
        count = self.start.size
        return np.exp(found.x[:count]), np.asarray(found.x[count:], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class _State:
    """Residuals and their derivative at a point (ln p, s)."""

    problem: SurfaceProblem
    groups: list[Sizes]
    weights: list[Array]
    bend: Array

    def _logs(self, point: Array) -> tuple[list[Array], list[Array]]:
        """ln t and the body's share of t, for each group of rows."""
        count = self.problem.start.size
        logs, shares = [], []
        for sizes, weight in zip(self.groups, self.weights, strict=True):
            over, body = self.problem.formula(np.exp(point[:count]), sizes)
            body = body * np.exp(weight @ point[count:])
            logs.append(np.log(over + body))
            shares.append(body / (over + body))
        return logs, shares

    def _rows(self, parts: list[Array], active: list[Array]) -> list[Array]:
        """Measured rows, then the hinge of each doubling, from per-group arrays."""
        hinge = self.problem.hinge
        return [
            parts[0],
            *(
                (hinge * on).reshape(-1, *[1] * (part.ndim - 1)) * (parts[1] - part)
                for part, on in zip(parts[2:], active, strict=True)
            ),
        ]

    def residual(self, point: Array) -> Array:
        """All residuals at a point."""
        count = self.problem.start.size
        logs, _ = self._logs(point)
        active = [(logs[1] > log).astype(np.float64) for log in logs[2:]]
        rows = self._rows(logs, active)
        rows[0] = rows[0] - np.log(self.problem.measured_s)
        rows.append(self.problem.smooth * (self.bend @ point[count:]))
        rows.append(self.problem.ridge * point[count:])
        rows.append(self.problem.pull * (point[:count] - np.log(self.problem.start)))
        return np.concatenate(rows)

    def jacobian(self, point: Array) -> Array:
        """Derivative of `residual`: `[residuals, coefficients]`."""
        count = self.problem.start.size
        logs, shares = self._logs(point)
        columns = []
        for index in range(count):
            moved = point.copy()
            moved[index] += _STEP
            there, _ = self._logs(moved)
            columns.append([(b - a) / _STEP for a, b in zip(logs, there, strict=True)])
        parts = [
            np.column_stack([*(column[g] for column in columns), shares[g][:, None] * weight])
            for g, weight in enumerate(self.weights)
        ]
        active = [(logs[1] > log).astype(np.float64) for log in logs[2:]]
        size = point.size
        rest = np.zeros((self.bend.shape[0] + size, size))
        rest[: self.bend.shape[0], count:] = self.problem.smooth * self.bend
        bottom = rest[self.bend.shape[0] :]
        bottom[: size - count, count:] = self.problem.ridge * np.eye(size - count)
        bottom[size - count :, :count] = self.problem.pull * np.eye(count)
        return np.concatenate([*self._rows(parts, active), rest])
