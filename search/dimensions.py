"""The dimensions that a sampled search draws from, and the strategy that a draw stands for.

    draw -> {field: value} of a layout   -> the nearest layout of the space -> its cut
         -> {field: value} of a choice   -> the nearest choice of the space
         -> batch, chunk

A field of `Parallelism` or `Choice` is a dimension when it takes more than one value in the space:
numbers by their place in the sorted list of values (so that neighbours are alike), words as is,
several words joined by `-`. dp follows from the cards, the layers of the stages from `cut`.

Values do not combine freely: axis sizes multiply to the cards, an exchange of tokens needs experts
on several ranks, some kernels come with some dtypes. A draw that the space does not hold stands for
the nearest that it does: distance = sum |difference of places| over numbers + 1/2 for each word
that differs, ties to the first in the order of the space. So every draw is a strategy that holds
the rules of layouts, whatever dimensions the space has; only switches that a layout does not allow
are left to be refused.

`cut` is the place of a layout's stage lengths among those near the even ones (`near_even_cuts`; or
among the layouts that differ in nothing else), scaled to the layout with the most of them. Ranks
are numbered as the engine does.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from shardplan.models.parallel import Parallelism
from shardplan.search.cuts import near_even_cuts
from shardplan.search.space import Choice, Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = ["Dimensions", "Point"]

_FOLLOWS = ("dp", "stage_layers")
"""Fields of a layout that are no dimension of their own."""
_WORD_DISTANCE = 0.5
_T = TypeVar("_T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Point:
    """A strategy of the space."""

    parallel: Parallelism
    choice: Choice
    batch: int
    chunk: int

    def describe(self) -> str:
        """As trials name it."""
        choice = self.choice
        stages = self.parallel.stage_layers
        return (
            f"{self.parallel.describe()} {choice.attention} {choice.weight_dtype} "
            f"kv {choice.kv_dtype} batch {self.batch} chunk {self.chunk}"
            + (f" stages {'-'.join(map(str, stages))}" if stages else "")
            + " weight_prefetch" * choice.weight_prefetch
            + " fused_collectives" * choice.fused_collectives
            + (f" collectives {choice.collectives}" if choice.collectives != "auto" else "")
        )


@dataclass(slots=True)
class _Family(Generic[_T]):
    """Members of the space that are told apart by some fields, and the nearest to any draw."""

    members: tuple[_T, ...]
    values: dict[str, tuple[Any, ...]]
    """Of each field that varies, ascending."""
    places: NDArray[np.int64] = field(init=False)
    """[member, field]: where its value stands."""
    _known: dict[tuple[int, ...], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at = {name: {v: i for i, v in enumerate(held)} for name, held in self.values.items()}
        rows = [[at[name][getattr(one, name)] for name in at] for one in self.members]
        shape = len(self.members), len(at)
        self.places = np.array(rows, dtype=np.int64).reshape(shape)
        for index, row in reversed(list(enumerate(map(tuple, self.places.tolist())))):
            self._known[row] = index

    @classmethod
    def of(cls, members: Sequence[_T], kind: type, leave_out: Sequence[str] = ()) -> _Family[_T]:
        """Members of one dataclass."""
        values = {
            one.name: tuple(sorted({getattr(member, one.name) for member in members}))
            for one in fields(kind)
            if one.name not in leave_out
        }
        return cls(tuple(members), {n: held for n, held in values.items() if len(held) > 1})

    def distributions(self) -> dict[str, BaseDistribution]:
        from optuna.distributions import CategoricalDistribution, IntDistribution

        return {
            name: IntDistribution(0, len(held) - 1)
            if _is_number(held)
            else CategoricalDistribution([_word(value) for value in held])
            for name, held in self.values.items()
        }

    def nearest(self, params: Mapping[str, Any]) -> _T:
        """The member that drawn parameters stand for."""
        drawn = tuple(self._place(name, params.get(name)) for name in self.values)
        found = self._known.get(drawn)
        if found is None:
            far = np.abs(self.places - np.array(drawn))
            words = [not _is_number(held) for held in self.values.values()]
            weighed = np.where(words, _WORD_DISTANCE * (far > 0), far)
            found = self._known[drawn] = int(np.argmin(weighed.sum(axis=1)))
        return self.members[found]

    def _place(self, name: str, drawn: object) -> int:
        held = self.values[name]
        if drawn is None:
            return 0
        if _is_number(held):
            return int(drawn)  # type: ignore[call-overload,no-any-return]  # as distributed
        return [_word(value) for value in held].index(drawn)  # type: ignore[arg-type]  # as above

    def params(self, member: object) -> dict[str, Any]:
        """What would have to be drawn for a member."""
        return {
            name: held.index(value) if _is_number(held) else _word(value)
            for name, held in self.values.items()
            for value in (getattr(member, name),)
        }


def _is_number(held: Sequence[object]) -> bool:
    return isinstance(held[0], int) and not isinstance(held[0], bool)


def _word(value: object) -> bool | str:
    """A value as Optuna's storages keep it."""
    if isinstance(value, bool):
        return value
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


class Dimensions:
    """The space as a sampler sees it. Build it once for a search; it remembers draws."""

    def __init__(self, space: Space) -> None:
        self.space = space
        bases: dict[Parallelism, list[tuple[int, ...]]] = {}
        for par in space.layouts:
            bases.setdefault(replace(par, stage_layers=()), []).append(par.stage_layers)
        self._cuts = bases
        self._layouts = _Family.of(tuple(bases), Parallelism, _FOLLOWS)
        self._choices = _Family.of(space.choices, Choice)
        self._place = {par: index for index, par in enumerate(bases)}
        self._most_cuts = max((len(self.cuts(par)) for par in bases), default=1)

    def cuts(self, par: Parallelism) -> Sequence[tuple[int, ...]]:
        """Stage lengths that a layout may have; () is balanced."""
        written = self._cuts[replace(par, stage_layers=())]
        if written == [()] and self.space.reach.ways:
            return near_even_cuts(self.space.spec, replace(par, stage_layers=()))
        return written

    def values(self) -> dict[str, tuple[Any, ...]]:
        """Values of every dimension of layouts and choices."""
        return {**self._layouts.values, **self._choices.values}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Each dimension as Optuna's; one of a single value is left out."""
        from optuna.distributions import IntDistribution

        counts = {
            "cut": self._most_cuts,
            "batch": len(self.space.batches),
            "chunk": len(self.space.chunks),
        }
        return {
            **self._layouts.distributions(),
            **self._choices.distributions(),
            **{n: IntDistribution(0, count - 1) for n, count in counts.items() if count > 1},
        }

    def point(self, params: Mapping[str, Any]) -> Point:
        """The strategy that drawn parameters stand for; those left out take their first value."""
        par = self._layouts.nearest(params)
        cuts = self.cuts(par)
        return Point(
            parallel=replace(
                par, stage_layers=cuts[params.get("cut", 0) * len(cuts) // self._most_cuts]
            ),
            choice=self._choices.nearest(params),
            batch=self.space.batches[params.get("batch", 0)],
            chunk=self.space.chunks[params.get("chunk", 0)],
        )

    def params(self, point: Point) -> dict[str, Any]:
        """What would have to be drawn for a strategy of the space."""
        cuts = self.cuts(point.parallel)
        cut = -(-list(cuts).index(point.parallel.stage_layers) * self._most_cuts // len(cuts))
        found = {
            **self._layouts.params(point.parallel),
            **self._choices.params(point.choice),
            "cut": cut,
            "batch": self.space.batches.index(point.batch),
            "chunk": self.space.chunks.index(point.chunk),
        }
        return {name: found[name] for name in self.distributions()}

    def order(self, point: Point) -> tuple[int, int, int, int, int]:
        """Where a strategy stands in the order of the space."""
        par = replace(point.parallel, stage_layers=())
        return (
            self._place[par],
            list(self.cuts(par)).index(point.parallel.stage_layers),
            self.space.choices.index(point.choice),
            point.batch,
            point.chunk,
        )
