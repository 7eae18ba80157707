"""Fit of a separable surface: `t = base * exp(s)`, s(x) = sum_r u_r(m) u_r(n) u_r(k).

    minimise  sum rho(ln base + s - ln measured)                       the measured rows
            + sum hinge^2 max(0, ln t(x) - ln t(larger x))^2           a grid of sizes
            + noise sum over axes of u^T K^-1 u,   K = exp(-|ln x - ln x'| / reach)

each u_r piecewise linear between its knots. rho is quadratic below `scale` and linear above, so
that an odd row counts little. K ties neighbouring knots and lets s fade to nothing where no row
lies within `reach` doublings: outside the measured sizes the base alone is left. One axis at a time
is solved (the problem is quadratic in the factors of one axis), each step halved until it helps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from shardplan.costmodel.fitting.surface_fit import Knots, Sizes
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.kernels.surface import factor_name

__all__ = ["Factors", "SeparableProblem", "coefficients_of"]

Factors = tuple[Array, Array, Array]
"""Values `[knots, rank]` of the axes m, n, k."""
_SWEEPS = 30
_HALVINGS = 5
_JITTER = 1e-6
_FIRST = 0.3
"""Spread of the random start of the factors."""


def _shares(sizes: Array, knots: Sequence[int]) -> Array:
    """Weight of each knot at each size: `[rows, knots]`, rows sum to 1."""
    logs = np.log2(np.asarray(knots, dtype=np.float64))
    place = np.log2(np.maximum(sizes, 1.0))
    return np.stack([np.interp(place, logs, unit) for unit in np.eye(logs.size)], 1)


def _precision(knots: Sequence[int], reach: float) -> Array:
    logs = np.log2(np.asarray(knots, dtype=np.float64))
    return np.asarray(np.linalg.inv(np.exp(-np.abs(logs[:, None] - logs[None]) / reach)))


def coefficients_of(factors: Factors, knots: Knots) -> dict[str, float]:
    """The factors under the names that `kernels.surface` reads."""
    return {
        factor_name(rank + 1, axis, size): float(values[place, rank])
        for rank in range(factors[0].shape[1])
        for axis, sizes, values in zip("mnk", knots, factors, strict=True)
        for place, size in enumerate(sizes)
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class SeparableProblem:
    """What to fit, to which rows, and how strongly the rest pulls."""

    base: Callable[[Sizes], Array]
    """Seconds without the surface."""
    knots: Knots
    sizes: Sizes
    measured_s: Array
    grid: Sizes
    larger: tuple[Sizes, ...]
    rank: int
    reach: tuple[float, float, float]
    """Doublings of m, n and k over which neighbouring knots stay alike."""
    noise: float = 0.02
    hinge: float = 6.0
    scale: float = 0.05
    seed: int = 0

    def solve(self) -> Factors:
        """The factors of the least sum."""
        state = _State(self)
        for _ in range(_SWEEPS):
            for axis in range(3):
                state.improve(axis)
        return state.factors[0], state.factors[1], state.factors[2]


class _State:
    """Current factors, the logs of the model at all rows, and the sum to minimise."""

    def __init__(self, problem: SeparableProblem) -> None:
        self.problem = problem
        self.groups = [problem.sizes, problem.grid, *problem.larger]
        self.base = [np.log(problem.base(sizes)) for sizes in self.groups]
        self.shares = [
            [_shares(size, knots) for size, knots in zip(sizes, problem.knots, strict=True)]
            for sizes in self.groups
        ]
        self.target = np.log(problem.measured_s)
        reach = zip(problem.knots, problem.reach, strict=True)
        self.pull = [_precision(knots, far) * problem.noise for knots, far in reach]
        rng = np.random.default_rng(problem.seed)
        self.factors = [
            rng.normal(0.0, _FIRST, (len(knots), problem.rank)) for knots in problem.knots
        ]
        self.factors[0][:, 0] = np.median(self.target - self.base[0])
        self.factors[1][:, 0] = self.factors[2][:, 0] = 1.0
        self.logs, self.cost = self._at(self.factors)

    def _at(self, factors: list[Array]) -> tuple[list[Array], float]:
        """Logs of the model in each group of rows, and the sum to minimise."""
        logs = []
        for base, shares in zip(self.base, self.shares, strict=True):
            lines = [share @ values for share, values in zip(shares, factors, strict=True)]
            logs.append(base + (lines[0] * lines[1] * lines[2]).sum(1))
        scale = self.problem.scale
        size = np.abs(logs[0] - self.target)
        cost = np.where(size < scale, size * size, scale * (2.0 * size - scale)).sum()
        for larger in logs[2:]:
            cost += np.square(self.problem.hinge * np.maximum(0.0, logs[1] - larger)).sum()
        for values, pull in zip(factors, self.pull, strict=True):
            cost += np.einsum("ar,ab,br->", values, pull, values)
        return logs, float(cost)

    def _slopes(self, group: int, axis: int) -> Array:
        """Derivative of the logs of a group by the factors of an axis: `[rows, knots * rank]`."""
        others = [other for other in range(3) if other != axis]
        shares = self.shares[group]
        first, second = (shares[other] @ self.factors[other] for other in others)
        slopes = shares[axis][:, :, None] * (first * second)[:, None, :]
        return np.asarray(slopes.reshape(len(slopes), -1), dtype=np.float64)

    def improve(self, axis: int) -> None:
        """One step of the factors of one axis, if any part of it lowers the sum."""
        values = self.factors[axis]
        flat = values.ravel()
        pull = np.kron(self.pull[axis], np.eye(self.problem.rank))
        slopes = self._slopes(0, axis)
        off = self.logs[0] - self.target
        weight = 1.0 / np.maximum(1.0, np.abs(off) / self.problem.scale)
        matrix = (slopes * weight[:, None]).T @ slopes + pull + _JITTER * np.eye(flat.size)
        vector = slopes.T @ (weight * off) + pull @ flat
        here = self._slopes(1, axis)
        for group in range(2, len(self.groups)):
            fall = self.logs[1] - self.logs[group]
            on = fall > 0.0
            change = self.problem.hinge * (here[on] - self._slopes(group, axis)[on])
            matrix += change.T @ change
            vector += self.problem.hinge * (change.T @ fall[on])
        step = np.linalg.solve(matrix, vector)
        for halving in range(_HALVINGS):
            trial = list(self.factors)
            trial[axis] = (flat - step * 0.5**halving).reshape(values.shape)
            logs, cost = self._at(trial)
            if cost <= self.cost:
                self.factors, self.logs, self.cost = trial, logs, cost
                return
