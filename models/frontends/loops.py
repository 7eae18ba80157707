"""Loops as a rule of a front end writes them down, whatever format its operators come in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from shardplan.models.opgraph import Loop

__all__ = ["Draft", "Loops", "aligned", "leading_dims", "names"]

Loops = tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Draft:
    """An operator's loops, as a rule writes them down."""

    kind: str
    reads: dict[int, Loops]
    """Input slot -> loop of each dim. Slots that are not named are arithmetic on shapes."""
    writes: list[Loops]
    sizes: dict[str, int]
    whole: frozenset[str] = frozenset()
    linear: tuple[int, ...] = ()
    """Input slots through which a partial sum may pass."""
    flop: float = 0.0
    attrs: dict[str, float | str] = field(default_factory=dict)

    def loops(self) -> dict[str, Loop]:
        """Every loop that a dim runs over."""
        used = {n for one in (*self.reads.values(), *self.writes) for n in one if n}
        return {
            n: Loop(size=size, whole=n in self.whole) for n, size in self.sizes.items() if n in used
        }


def names(rank: int, letter: str = "d") -> Loops:
    """d0, d1, ...: a loop for each dim."""
    return tuple(f"{letter}{index}" for index in range(rank))


def aligned(shape: tuple[int, ...], out: tuple[int, ...], loops: Loops) -> Loops:
    """Loops of a tensor that is broadcast to `out`: dims that are repeated run over none."""
    behind = loops[len(loops) - len(shape) :] if shape else ()
    sizes = out[len(out) - len(shape) :] if shape else ()
    return tuple(n if a == b else "" for n, a, b in zip(behind, shape, sizes, strict=True))


def leading_dims(
    before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[Loops, Loops, dict[str, int]]:
    """Loops of both shapes of a reshape and their sizes.

    Dims fall into groups of equal products. The first dim of a group on either side runs over one
    loop, whose size divides both, and minor dims over none.
    """
    left, right, sizes = [""] * len(before), [""] * len(after), {}
    for first, second in _groups(before, after):
        size = math.gcd(before[first], after[second])
        loop = f"d{second}"
        left[first] = right[second] = loop
        sizes[loop] = size
    return tuple(left), tuple(right), sizes


def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first dim of more than one element before, the same after) of each group."""
    i = j = 0
    while i < len(before) and j < len(after):
        if before[i] == 1 or after[j] == 1:
            if before[i] == 1:
                i += 1
            else:
                j += 1
            continue
        yield i, j
        a, b = before[i], after[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * before[i], i + 1
            else:
                b, j = b * after[j], j + 1
