"""How a tensor that lies in one layout comes to lie in another: which collectives, in which order.

A layout is {axis: dim}; `PARTIAL` stands for a sum that is not yet taken over the axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from shardplan.models.errors import LayoutError

if TYPE_CHECKING:
    from shardplan.models.parallel import Mesh

__all__ = ["PARTIAL", "redistributions"]

PARTIAL = "+"
Dim = TypeVar("Dim", bound="int | str")
"""A named dim, or the number of a tensor's dim."""


def _transition(have: int | str | None, want: int | str | None) -> str:
    if have == PARTIAL:
        return "all_reduce" if want is None else "reduce_scatter"
    if have is None:
        return "slice" if want != PARTIAL else "refused"
    if want is None:
        return "all_gather"
    return "all_to_all" if want != PARTIAL else "refused"


def redistributions(
    have: dict[str, Dim], want: dict[str, Dim], mesh: Mesh
) -> Iterator[tuple[str, tuple[str, ...], dict[str, Dim]]]:
    """(kind, axes, layout after) of each redistribution, cheapest first.

    Slices come first (less to move), then what reduces, exchanges and gathers. Axes that move
    between the same pair of states, and reduce-scatters onto one dim, share a step.
    """
    through = _detour(have, want, mesh)
    if through is not None:
        yield from redistributions(have, through, mesh)
        yield from redistributions(through, want, mesh)
        return
    moves: dict[tuple[str, Dim | None, Dim | None], list[str]] = {}
    for axis in mesh.axes:
        before, after = have.get(axis), want.get(axis)
        if before != after:
            kind = _transition(before, after)
            if kind == "refused":
                raise LayoutError(
                    "a whole tensor cannot become a partial sum", got=f"axis={axis}, layout={have}"
                )
            pair = (None, None) if kind == "all_to_all" else (before, after)
            moves.setdefault((kind, *pair), []).append(axis)
    rank = ("slice", "reduce_scatter", "all_to_all", "all_reduce", "all_gather")
    now = dict(have)
    for (kind, _, _), axes in sorted(moves.items(), key=lambda item: rank.index(item[0][0])):
        _check_nesting(now, want, axes, mesh)
        for axis in axes:
            if axis in want:
                now[axis] = want[axis]
            else:
                now.pop(axis, None)
        yield kind, tuple(axes), dict(now)


def _detour(have: dict[str, Dim], want: dict[str, Dim], mesh: Mesh) -> dict[str, Dim] | None:
    """A layout to pass through where an exchange cannot nest, None where all can.

    A slice that joins the dim of an exchange would have to nest inside it, and an exchange cannot
    take the major axis of a dim from under a minor one. Either way the axes concerned are
    gathered first and sliced again.
    """
    moved = [a for a in mesh.axes if have.get(a) != want.get(a)]
    kinds = {a: _transition(have.get(a), want.get(a)) for a in moved}
    sliced = {want[a] for a in moved if kinds[a] == "slice"}
    through = {a for a in moved if kinds[a] == "all_to_all" and want[a] in sliced}
    for axis in (a for a in moved if kinds[a] == "all_to_all"):
        under = mesh.axes[mesh.axes.index(axis) + 1 :]
        minor = {a for a in under if have.get(a) == have[axis] and kinds.get(a) != "all_to_all"}
        through |= {axis, *minor} if minor else set()
    return {a: d for a, d in have.items() if a not in through} if through else None


def _check_nesting(
    now: Mapping[str, Dim], want: Mapping[str, Dim], axes: list[str], mesh: Mesh
) -> None:
    """Axes leave and join a dim at its minor end; `LayoutError` otherwise."""
    place = mesh.axes.index
    for state in (now, want):
        for dim in {state[a] for a in axes if state.get(a, PARTIAL) != PARTIAL}:
            moved = [place(a) for a in axes if state.get(a) == dim]
            stays = [place(a) for a, d in now.items() if d == dim and a not in axes]
            if stays and max(stays) > min(moved):
                raise LayoutError(
                    "axes that share a dim nest major to minor",
                    got=f"dim={dim}, moving={', '.join(axes)}, layout={dict(now)}",
                    hint="try another ep, or tokens not split over tp (sp)",
                )
