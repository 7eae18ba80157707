"""Every layout of an instance of a pool, by plain loops, for the oracle of disaggregated search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise, permutations, product
from typing import Any

from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.errors import LayoutError
from shardplan.models.parallel import AXES, Axis, Exchange, Parallelism
from shardplan.models.spec import ModelSpec
from shardplan.search.disagg_space import Pool

__all__ = ["VLLM", "layouts"]

VLLM: tuple[Axis, ...] = ("dp", "pp", "cp", "tp")


def layouts(pool: Pool) -> Iterator[Parallelism]:
    """Every layout without replicas of every instance size, legal or not, in every way."""
    for par in _plain(pool):
        for depth in _depths(pool):
            one = replace(par, mtp=depth)
            yield from _ways(pool, one)
            if pool.reach.modules and _applies(pool, one):
                for many in _modules(pool.spec, one):
                    yield from _ways(pool, many)


def _ways(pool: Pool, par: Parallelism) -> Iterator[Parallelism]:
    """A layout with every order of the axes that have ranks, each with every cut."""
    orders: dict[tuple[Axis, ...], tuple[Axis, ...]] = {}
    own = VLLM if "vllm" in pool.engine.name else AXES
    for order in permutations(AXES) if pool.reach.ways else [own]:
        orders.setdefault(tuple(axis for axis in order if getattr(par, axis) > 1), order)
    for order in orders.values():
        yield from _cuts(pool, replace(par, order=order))


def _plain(pool: Pool) -> Iterator[Parallelism]:
    exchanges: tuple[Exchange, ...] = ("allgather", "alltoall")
    for cards in pool.sizes:
        for tp, pp, cp, dp in product(range(1, cards + 1), repeat=4):
            if tp * pp * cp * dp != cards or cp not in (pool.reach.contexts or (cp,)):
                continue
            for ep in range(1, tp * cp * dp + 1 if pool.spec.moe is not None else 2):
                copy = tp * cp
                if (copy * dp) % ep or dp != max(ep // copy, 1) or (ep > copy and ep % copy):
                    continue
                for sp in (False, True):
                    for exchange in exchanges if ep > 1 else exchanges[:1]:
                        yield Parallelism(
                            tp=tp, pp=pp, dp=dp, ep=ep, cp=cp, sp=sp, exchange=exchange
                        )


def _modules(spec: ModelSpec, par: Parallelism) -> Iterator[Parallelism]:
    """A layout with some of its modules over m tp ranks, m > 1, and shared experts also whole."""
    shared = spec.moe is not None and spec.moe.shared_ffn > 0
    own = ["o_tp", "head_tp", "embed_tp"]
    own += ["ffn_tp"] * bool(spec.dense_layers) + ["shared_tp"] * shared
    for many in (m for m in range(1, par.dp + 1) if par.dp % m == 0):
        for flags in product((False, True), repeat=len(own)):
            names = [name for name, flag in zip(own, flags, strict=True) if flag]
            if bool(names) != (many > 1):
                continue
            sizes: dict[str, Any] = dict.fromkeys(names, par.tp * many)
            if names:
                yield replace(par, **sizes)
            if shared and par.tp > 1 and "shared_tp" not in names:
                yield replace(par, **sizes, shared_tp=1)


def _applies(pool: Pool, par: Parallelism) -> bool:
    """Whether a layout can be applied to the graph."""
    if par.sp and par.tp == 1:
        return False
    try:
        apply(build_graph(pool.spec, "decode", mtp=par.mtp > 0), par)
    except LayoutError:
        return False
    return True


def _cuts(pool: Pool, par: Parallelism) -> Iterator[Parallelism]:
    """A layout with every cut of its layers; as it is where there is none."""
    layers = pool.spec.layers
    if not pool.reach.ways or not 1 < par.pp <= layers:
        yield par
        return
    for ends in combinations(range(1, layers), par.pp - 1):
        places = (0, *ends, layers)
        yield replace(par, stage_layers=tuple(b - a for a, b in pairwise(places)))


def _depths(pool: Pool) -> list[int]:
    """Tokens predicted ahead; a prefill instance has the layer or not."""
    asked = pool.reach.depths
    if pool.role == "decode":
        return list(asked)
    return [0] * (0 in asked) + [1] * (max(asked) > 0)
