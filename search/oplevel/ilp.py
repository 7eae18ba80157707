"""The integer program over layouts, solved by HiGHS.

Variables, per class (`quotient`), all within [0, 1]:

    x[o, c]     operator o runs as its candidate c                          integer
    y[t, a]     tensor t is moved by step a (once, whoever reads it)        integer where several
                                                                            read it, or its copies
                                                                            count as memory
    f[t, r, a]  the way of reader r to t goes by step a                     t with several readers
    h[t, n]     t is held in layout n                                       parameters with several
                                                                            readers, memory limited

    minimise    sum times(o) seconds(o, c) x[o, c] + sum times(t) seconds(t, a) y[t, a]

    (1) one candidate each             sum over c x[o, c] = 1
    (2) a way for each reader,         made[t, n] + in(f[t, r], n) = out(f[t, r], n) + read[r, n]
        layout by layout               made, read: the sum of x of the candidates that give or
                                       take the layout n; an input is made as it comes, an output
                                       is read as it is given
    (3) a step is paid once            f[t, r, a] <= y[t, a]       (f is y where one reads)
    (4) held as read                   read[r, n] <= h[t, n]
    (5) memory, for each row           sum of held bytes + sum of alive bytes <= limit
                                       a tensor is alive in each layout that it is made in or moved
                                       to: bytes(n) (made[t, n] + in(y[t], n))

Exact: for fixed integer x the ways are flows from one layout to one other, whose vertices are
paths, and with y integer too, f may be taken integer. So the integer optimum is the least over all
candidates of the least over all trees of steps, which the tests check by trying all.
`scipy.optimize.milp` is first asked without integers; an integer answer is then the optimum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shardplan.costmodel.kernels.base import Array
from shardplan.models.errors import InfeasibleError
from shardplan.search.oplevel.problem import Problem, TensorPart
from shardplan.search.oplevel.quotient import Live

__all__ = ["MemoryRow", "Sends", "Solution", "least_memory_bytes", "relaxed_s", "solve"]

_MICRO = 1e6
"""The objective is in microseconds: HiGHS ends within 1e-6 of the optimum."""
_FULL = 1e5
"""A full memory, in the units of its row: HiGHS holds rows to 1e-6."""
_NEAR = 1e-6
_HALF = 0.5
_OPTIMAL, _INFEASIBLE = 0, 2
Sends = Mapping[int, Array]
"""Tensor class -> seconds that it costs between stages in each of its layouts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """What is held and alive at once on a rank of a stage: (tensor class, how many of it)."""

    held: tuple[tuple[int, float], ...]
    live: Live


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Candidate of each operator class, steps of each tensor class, and what is proven of them."""

    picks: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    lp_bound_s: float
    bound_s: float
    variables: int
    integers: int
    rows: int


@dataclass(slots=True)
class _Model:
    """Columns with their costs, rows as triplets."""

    cost: list[float] = field(default_factory=list)
    integer: list[int] = field(default_factory=list)
    entries: tuple[list[int], list[int], list[float]] = field(default_factory=lambda: ([], [], []))
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    unbounded: list[int] = field(default_factory=list)

    def columns(self, costs: Iterable[float], *, integer: bool) -> range:
        """New variables."""
        first = len(self.cost)
        self.cost.extend(map(float, costs))
        self.integer += [int(integer)] * (len(self.cost) - first)
        return range(first, len(self.cost))

    def row(self, terms: Iterable[tuple[int, float]], low: float, high: float) -> None:
        """low <= sum of factor * variable <= high."""
        rows, columns, factors = self.entries
        for column, factor in terms:
            rows.append(len(self.low))
            columns.append(column)
            factors.append(factor)
        self.low.append(low)
        self.high.append(high)

    def solve(self, *, integers: bool, time_limit_s: float | None) -> Any:
        """What `scipy.optimize.milp` gives."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        places = np.array(self.entries[:2], np.int32)  # HiGHS of scipy 1.11 takes no others
        shape = (len(self.low), len(self.cost))
        matrix = csr_array((self.entries[2], tuple(places)), shape=shape)
        upper = np.ones(len(self.cost))
        upper[self.unbounded] = np.inf
        limit = np.inf if time_limit_s is None else time_limit_s
        return milp(
            np.array(self.cost),
            integrality=np.array(self.integer) if integers else None,
            bounds=Bounds(0.0, upper),
            constraints=LinearConstraint(matrix, np.array(self.low), np.array(self.high)),
            options={"mip_rel_gap": 0.0, "time_limit": limit},
        )


@dataclass(slots=True)
class _Built:
    problem: Problem
    model: _Model
    picks: list[range]
    moves: list[range]
    held: dict[int, range]


def _build(
    problem: Problem,
    rows: Sequence[MemoryRow],
    sends: Sends,
    *,
    copies: bool,
    least_memory: bool,
) -> _Built:
    model = _Model()
    picks = []
    for owner, options in zip(problem.quotient.operators, problem.candidates, strict=True):
        scale = 0.0 if least_memory else _MICRO * owner.times
        picks.append(model.columns((one.seconds[0] * scale for one in options), integer=True))
        model.row(((column, 1.0) for column in picks[-1]), 1.0, 1.0)
    built = _Built(problem, model, picks, [], {})
    for place, part in enumerate(problem.tensors):
        scale = 0.0 if least_memory else _MICRO * part.owner.times
        many = len(part.owner.readers) + (part.given is not None) > 1
        built.moves.append(
            model.columns(part.seconds * scale, integer=many or (copies and bool(rows)))
        )
        if part.owner.is_held:
            _hold(built, place, part, limited=bool(rows))
        else:
            _ways(built, place, part, many=many)
        for node, seconds in enumerate(sends.get(place, ())):
            for column, factor in _made(built, part, node)[0]:
                model.cost[column] += 0.0 if least_memory else factor * seconds * _MICRO
    return built


def _made(built: _Built, part: TensorPart, node: int) -> tuple[list[tuple[int, float]], float]:
    """(terms, constant) that are 1 in sum where a tensor is made in a layout."""
    if part.owner.maker is None:
        return [], float(part.source == node)
    place, slot = part.owner.maker
    options = built.problem.candidates[place]
    key = part.nodes[node]
    return [
        (built.picks[place][i], 1.0) for i, c in enumerate(options) if c.writes[slot] == key
    ], 0.0


def _read(built: _Built, part: TensorPart, reader: tuple[int, int], node: int) -> list[int]:
    """Variables of candidates of a reader that take a layout."""
    place, slot = reader
    key, options = part.nodes[node], built.problem.candidates[place]
    return [built.picks[place][i] for i, c in enumerate(options) if c.reads[slot] == key]


def _ways(built: _Built, place: int, part: TensorPart, *, many: bool) -> None:
    """(2) and (3): a way from where a tensor is made to each of its readers."""
    paid = built.moves[place]
    for reader in (*part.owner.readers, *([None] if part.given is not None else [])):
        ways = built.model.columns([0.0] * len(part.steps), integer=False) if many else paid
        if many:
            for way, once in zip(ways, paid, strict=True):
                built.model.row(((once, 1.0), (way, -1.0)), 0.0, np.inf)
        ends: dict[int, int] = {}
        if reader is None and part.given is not None:
            columns = built.model.columns([0.0] * len(part.given), integer=False)
            ends = dict(zip(part.given, columns, strict=True))
            built.model.row(((column, 1.0) for column in columns), 1.0, 1.0)
        flows: list[list[tuple[int, float]]] = [[] for _ in part.nodes]
        for way, step in zip(ways, part.steps, strict=True):
            flows[step.target].append((way, 1.0))
            flows[step.source].append((way, -1.0))
        for node, flow in enumerate(flows):
            made, constant = _made(built, part, node)
            taken = [ends[node]] if node in ends else []
            taken = taken if reader is None else _read(built, part, reader, node)
            terms = _joined([*made, *flow, *((column, -1.0) for column in taken)])
            built.model.row(terms, -constant, -constant)


def _joined(terms: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """Terms of the same variable as one."""
    total: dict[int, float] = {}
    for column, factor in terms:
        total[column] = total.get(column, 0.0) + factor
    return list(total.items())


def _hold(built: _Built, place: int, part: TensorPart, *, limited: bool) -> None:
    """(4): a parameter is held in each layout in which it is read."""
    if not limited or len(part.owner.readers) < 2:  # noqa: PLR2004
        return
    columns = built.model.columns([0.0] * len(part.nodes), integer=False)
    built.held[place] = columns
    for reader in part.owner.readers:
        for node, column in enumerate(columns):
            taken = _read(built, part, reader, node)
            built.model.row([(column, 1.0), *((x, -1.0) for x in taken)], 0.0, np.inf)


def _memory_terms(
    built: _Built, row: MemoryRow, *, copies: bool
) -> tuple[list[tuple[int, float]], float]:
    """(terms, constant) of the bytes of a row; without the copies of tensors that are moved."""
    terms: list[tuple[int, float]] = []
    constant = 0.0
    for place, count in row.held:
        part = built.problem.tensors[place]
        for node, size in enumerate(part.bytes):
            columns = [built.held[place][node]] if place in built.held else []
            columns = columns or _read(built, part, part.owner.readers[0], node)
            terms += [(column, count * size) for column in columns]
    for place, count in row.live:
        part = built.problem.tensors[place]
        for node, size in enumerate(part.bytes):
            made, given = _made(built, part, node)
            constant += given * count * size
            terms += [(column, count * size) for column, _ in made]
        arrive = zip(built.moves[place], part.steps, strict=True) if copies else ()
        terms += [(column, count * part.bytes[step.target]) for column, step in arrive]
    return _joined(terms), constant


def solve(
    problem: Problem,
    rows: Sequence[MemoryRow] = (),
    limit_bytes: float = np.inf,
    sends: Sends | None = None,
    time_limit_s: float | None = None,
    *,
    copies: bool = True,
    below_s: float = np.inf,
) -> Solution | None:
    """The cheapest strategy within the memory rows; None where there is none below `below_s`.

    `copies`: count tensors in the layouts that they are moved to, too; without, the rows ask for
    less than (5) does. `InfeasibleError` where a time limit ends before any was found.
    """
    built = _build(problem, rows, sends or {}, copies=copies, least_memory=False)
    for row in rows:
        terms, constant = _memory_terms(built, row, copies=copies)
        unit = _FULL / limit_bytes
        scaled = [(column, factor * unit) for column, factor in terms]
        built.model.row(scaled, -np.inf, (limit_bytes - constant) * unit)
    result = built.model.solve(integers=False, time_limit_s=time_limit_s)
    if result.status == _INFEASIBLE:
        return None
    lp_bound = bound = float(result.fun) if result.status == _OPTIMAL else 0.0
    if lp_bound >= below_s * _MICRO:
        return None
    if result.status != _OPTIMAL or not _is_integer(built.model, result.x):
        result = built.model.solve(integers=True, time_limit_s=time_limit_s)
        if result.status == _INFEASIBLE:
            return None
        if result.x is None:
            raise InfeasibleError(
                "the time limit ended before any strategy was found",
                got=f"time_limit_s={time_limit_s}",
                hint="give it more time",
            )
        bound = max(bound, float(result.mip_dual_bound))
    return Solution(
        picks=tuple(int(np.argmax(result.x[list(own)])) for own in built.picks),
        steps=tuple(
            tuple(i for i, column in enumerate(own) if result.x[column] > _HALF)
            for own in built.moves
        ),
        lp_bound_s=lp_bound / _MICRO,
        bound_s=bound / _MICRO,
        variables=len(built.model.cost),
        integers=sum(built.model.integer),
        rows=len(built.model.low),
    )


def relaxed_s(problem: Problem) -> float:
    """A lower bound of every strategy: the program without integers, memory and sends."""
    built = _build(problem, (), {}, copies=False, least_memory=False)
    return float(built.model.solve(integers=False, time_limit_s=None).fun) / _MICRO


def _is_integer(model: _Model, values: Array) -> bool:
    own = values[np.array(model.integer, dtype=bool)]
    return bool((np.abs(own - np.round(own)) < _NEAR).all())


def least_memory_bytes(problem: Problem, rows: Sequence[MemoryRow]) -> float:
    """The least bytes of a rank that any strategy needs, at its fullest row."""
    built = _build(problem, rows, {}, copies=True, least_memory=True)
    top = built.model.columns([1.0], integer=False)[0]
    built.model.unbounded.append(top)
    found = [_memory_terms(built, row, copies=True) for row in rows]
    unit = _FULL / max(1.0, *(sum(f for _, f in terms) + constant for terms, constant in found))
    for terms, constant in found:
        scaled = [(column, -factor * unit) for column, factor in terms]
        built.model.row([(top, 1.0), *scaled], constant * unit, np.inf)
    result = built.model.solve(integers=True, time_limit_s=None)
    return float(result.fun) / unit
