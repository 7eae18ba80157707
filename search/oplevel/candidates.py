"""What an operator may do: which of its loops is split over each axis of the mesh.

On each axis an operator is split over one of its loops, computes the whole, or (`PASS`) lets
partial sums through: all its linear reads are partial there, the others whole, and so are its
results. Candidates are all combinations that `layouts_of` allows, but

  - partial sums pass only where each linear read may have them (some candidate of its producer
    leaves them on that axis),
  - of candidates with the same layouts of all reads and writes only the cheapest is kept: nothing
    else can tell them apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shardplan.costmodel.opcost import OperatorPrices
from shardplan.models.errors import LayoutError
from shardplan.models.opgraph import Operator, Tensor, layouts_of
from shardplan.models.parallel import Mesh
from shardplan.models.redistribute import PARTIAL
from shardplan.search.oplevel.layouts import Key, key_of

__all__ = ["Candidate", "candidates_of", "partial_axes", "priced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run an operator. `PARTIAL` in `states` stands for sums that pass."""

    states: tuple[tuple[str, str], ...]
    reads: tuple[Key, ...]
    writes: tuple[Key, ...]
    seconds: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Total, compute, memory, overhead."""

    @property
    def chosen(self) -> dict[str, str]:
        """{axis: loop}."""
        return {axis: state for axis, state in self.states if state != PARTIAL}


def candidates_of(
    op: Operator,
    mesh: Mesh,
    tensors: Mapping[str, Tensor],
    passing: Sequence[str],
    fixed: Mapping[str, str] | None = None,
) -> Iterator[Candidate]:
    """All candidates, unpriced. `passing`: axes on which partial sums may pass.

    `fixed`: the one {axis: loop} that is allowed; axes it leaves out may let sums pass.
    `LayoutError` where the operator refuses it.
    """
    if fixed is not None:
        layouts_of(op, fixed, mesh, tensors)
    loops = () if op.refused else tuple(n for n, one in op.loops.items() if not one.whole)
    options: list[tuple[str, ...]] = []
    for axis in mesh.axes:
        through = (PARTIAL,) if axis in passing and not op.refused else ()
        if fixed is None:
            more = (*loops, *through) if mesh.size((axis,)) > 1 else ()
            options.append(("", *more))
        else:
            options.append((fixed[axis],) if axis in fixed else ("", *through))
    for choice in itertools.product(*options):
        states = tuple((a, s) for a, s in zip(mesh.axes, choice, strict=True) if s)
        found = _candidate(op, states, mesh, tensors)
        if found is not None:
            yield found


def _candidate(
    op: Operator, states: tuple[tuple[str, str], ...], mesh: Mesh, tensors: Mapping[str, Tensor]
) -> Candidate | None:
    chosen = {axis: state for axis, state in states if state != PARTIAL}
    through = {axis: PARTIAL for axis, state in states if state == PARTIAL}
    try:
        reads, writes = layouts_of(op, chosen, mesh, tensors)
    except LayoutError:
        return None
    return Candidate(
        states=states,
        reads=tuple(
            key_of({**one, **through} if slot in op.linear else one, mesh)
            for slot, one in enumerate(reads)
        ),
        writes=tuple(key_of({**one, **through}, mesh) for one in writes),
    )


def priced(
    op: Operator, candidates: Sequence[Candidate], prices: OperatorPrices
) -> tuple[Candidate, ...]:
    """The candidates with their seconds; of those that nothing can tell apart the cheapest."""
    times = prices.operator(op, [one.chosen for one in candidates])
    best: dict[tuple[tuple[Key, ...], tuple[Key, ...]], Candidate] = {}
    for place, one in enumerate(candidates):
        total, compute, memory, overhead = (float(part[place]) for part in times)
        own = replace(one, seconds=(total, compute, memory, overhead))
        known = best.get((one.reads, one.writes))
        if known is None or own.seconds[0] < known.seconds[0]:
            best[one.reads, one.writes] = own
    return tuple(best.values())


def partial_axes(candidates: Sequence[Candidate], slot: int) -> set[str]:
    """Axes on which some candidate leaves partial sums in a write."""
    return {axis for one in candidates for axis, dim in one.writes[slot] if dim == PARTIAL}
