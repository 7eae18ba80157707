"""Layouts of a space, one after another: how the cards are split, before any rule.

    tp * pp * dp * cp = cards      ep divides tp * cp * dp      sp, exchange of tokens among experts
    modules                        each of a set of modules over tp * m ranks, m > 1 dividing dp,
                                   the same m for all of the set; shared experts whole (shared_tp 1)
    mtp                            tokens predicted ahead

Layers are cut evenly and ranks numbered as the engine does; other cuts and orders of a layout are
ways of it (`space`). Contexts, modules and predictions are tried where asked (`Reach`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, permutations, product
from typing import Any

from shardplan.costmodel.engines import EngineProfile
from shardplan.models.parallel import AXES, Axis, Exchange, Parallelism
from shardplan.models.spec import ModelSpec
from shardplan.search.legal_engine import engine_order, live_axes

__all__ = [
    "Reach",
    "base_order",
    "context_axes",
    "divisors",
    "module_splits",
    "other_orders",
    "raw_layouts",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far a space reaches beyond the plain axes."""

    depths: tuple[int, ...] = (0,)
    """Tokens predicted ahead."""
    contexts: tuple[int, ...] | None = (1,)
    """Ranks that may share a context; None: any number."""
    modules: bool = False
    """Modules may be split over other ranks than tp."""
    ways: bool = True
    """Layers may be cut and ranks be ordered in any way; otherwise evenly, as the engine does."""
    only: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Sizes that axes may have, by name (`sp`: 0 or 1); an axis that is not named may have any."""

    def takes(self, par: Parallelism) -> bool:
        """Whether the axes of a layout have sizes that they may."""
        return all(getattr(par, name) in sizes for name, sizes in self.only)


def divisors(n: int) -> tuple[int, ...]:
    """Divisors of n, ascending."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*low, *(n // d for d in low)}))


def raw_layouts(
    spec: ModelSpec, engine: EngineProfile, cards: int, reach: Reach | None = None
) -> Iterator[Parallelism]:
    """Every layout over `cards` ranks, modules over tp, legal or not, in a fixed order."""
    reach = reach or Reach()
    sent: tuple[Exchange, ...] = ("allgather", "alltoall")
    for one in context_axes(cards, reach.contexts):
        order = base_order(engine, one)
        shared = divisors(one.tp * one.cp * one.dp) if spec.moe is not None else (1,)
        sizes: dict[str, Any] = {"tp": one.tp, "pp": one.pp, "dp": one.dp, "cp": one.cp}
        for ep, sp in product(shared, (False, True)):
            for exchange, mtp in product(sent[: 1 + (ep > 1)], reach.depths):
                par = Parallelism(**sizes, ep=ep, sp=sp, exchange=exchange, order=order, mtp=mtp)
                if reach.takes(par):
                    yield par


def context_axes(cards: int, contexts: tuple[int, ...] | None) -> Iterator[Parallelism]:
    """tp * pp * dp * cp = cards."""
    for tp in divisors(cards):
        for pp in divisors(cards // tp):
            for cp in divisors(cards // (tp * pp)):
                if contexts is None or cp in contexts:
                    yield Parallelism(tp=tp, pp=pp, dp=cards // (tp * pp * cp), cp=cp)


def module_splits(spec: ModelSpec, par: Parallelism) -> Iterator[Parallelism]:
    """A layout with modules split otherwise, legal or not; the layout itself is left out.

    A tied LM head is split as its embedding is.
    """
    groups: list[tuple[str, ...]] = [("o_tp",)]
    groups += [("ffn_tp",)] if spec.dense_layers else []
    groups += [("head_tp", "embed_tp")] if spec.tied_embeddings else [("head_tp",), ("embed_tp",)]
    shared = spec.moe is not None and spec.moe.shared_ffn > 0
    groups += [("shared_tp",)] if shared else []
    sets = [one for count in range(len(groups) + 1) for one in combinations(groups, count)]
    for many in divisors(par.dp):
        for chosen in sets if many > 1 else sets[:1]:
            names = [name for group in chosen for name in group]
            sizes: dict[str, Any] = dict.fromkeys(names, par.tp * many)
            one = replace(par, **sizes)
            if names:
                yield one
            if shared and par.tp > 1 and "shared_tp" not in names:
                yield replace(one, shared_tp=1)


@functools.cache
def _alike(live: frozenset[Axis]) -> Mapping[tuple[Axis, ...], tuple[Axis, ...]]:
    """Order of the axes that have ranks -> the first order of all axes that has them so."""
    found: dict[tuple[Axis, ...], tuple[Axis, ...]] = {}
    for order in permutations(AXES):
        found.setdefault(tuple(axis for axis in order if axis in live), order)
    return found


def other_orders(par: Parallelism, reach: Reach) -> tuple[tuple[Axis, ...], ...]:
    """Orders beside a layout's own; none where ranks are ordered as the engine does."""
    if not reach.ways:
        return ()
    every = _alike(frozenset(live_axes(par, AXES))).values()
    return tuple(one for one in every if one != par.order)


def base_order(engine: EngineProfile, par: Parallelism) -> tuple[Axis, ...]:
    """The engine's own order, spelled as the first that is alike."""
    return _own_order(engine.name, live_axes(par, AXES))


@functools.cache
def _own_order(engine: str, live: tuple[Axis, ...]) -> tuple[Axis, ...]:
    own = tuple(axis for axis in engine_order(engine) if axis in live)
    return _alike(frozenset(own))[own]
