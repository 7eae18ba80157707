"""The space of disaggregated serving: strategies of either pool, and how many instances of each.

    pool        instance sizes * canonical layouts of each size * cuts * orders * choices * grid
    grid        prefill: step sizes in tokens; decode: slots of a dp group
    counts      x, y >= 1 with x cards_P + y cards_D <= cards (or each within its own cluster)
    space       sum over sizes of (prefill strategies) * (decode strategies) * counts

Instance sizes are the parts of a node that divide it and whole nodes, so that any counts that
fit in number can be placed. A layout is canonical where it holds no independent replicas,
dp = max(ep / (tp cp), 1): replicas are what x and y count. An order of the ranks is a layout of its
own where it may price otherwise than the engine's; those alike are counted beside it.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.orders import distinct_orders
from shardplan.models.parallel import Axis, Parallelism
from shardplan.models.spec import ModelSpec
from shardplan.search.layouts import (
    Reach,
    base_order,
    context_axes,
    divisors,
    module_splits,
    other_orders,
)
from shardplan.search.legality import first_broken_rule
from shardplan.search.plan import Workload
from shardplan.search.rulebook import Subject
from shardplan.search.space import Choice, Ruled

__all__ = [
    "Judged",
    "PairKey",
    "PairRule",
    "Pool",
    "Role",
    "count_pairs",
    "instance_layouts",
    "instance_sizes",
    "pair_key",
    "pair_table",
    "prefill_grid",
]

Role = Literal["prefill", "decode"]
PairRule = Callable[[Subject, Subject], str | None]
"""Id of the first rule that a prefill and a decode instance break together; None when legal.

It may look at the axes of `pair_key` and at what is common to a pool, at nothing else.
"""
PairKey = tuple[int, int, int, int]

_MIN_CHUNK = 256
_MAX_CHUNK = 16384


@dataclass(frozen=True, slots=True)
class Judged:
    """A layout, the rule that it breaks alone, and what of its orders is not priced."""

    parallel: Parallelism
    rule: str = ""
    """Id of the first rule that the layout breaks alone; "" for none."""
    beside: Mapping[str, int] = field(default_factory=dict)
    """Other orders of its ranks that are not layouts of their own, by what leaves them out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool(Ruled):
    """What one role may run on and how; `cards` at most."""

    role: Role
    grid: tuple[int, ...]
    workload: Workload
    sizes: tuple[int, ...]
    """Cards that one instance may have."""
    layouts: tuple[Judged, ...]
    """Every canonical layout of every size, an order that may price otherwise as one of them."""

    @classmethod
    def of(
        cls,
        role: Role,
        subject: Subject,
        *,
        cards: int,
        sizes: tuple[int, ...],
        choices: tuple[Choice, ...],
        grid: tuple[int, ...],
        workload: Workload,
        reach: Reach | None = None,
    ) -> Pool:
        """A pool over instances of these sizes; `subject`: what runs on it, of any layout."""
        reach = reach or Reach()
        return cls(
            role=role,
            spec=subject.spec,
            cluster=subject.cluster,
            engine=subject.engine,
            cards=cards,
            choices=choices,
            grid=grid,
            workload=workload,
            sizes=sizes,
            reach=reach,
            layouts=tuple(
                one
                for size in sizes
                for one in instance_layouts(replace(subject, role=role), size, reach)
            ),
        )

    @property
    def per_cut(self) -> int:
        """Strategies of one layout and cut."""
        return len(self.choices) * self.points

    @property
    def points(self) -> int:
        """Step sizes or numbers of slots."""
        return len(self.grid)

    def raw(self) -> Iterator[Parallelism]:
        """Every canonical layout of every size, legal or not, ranks ordered as the engine does."""
        subject = self.subject(Parallelism())
        for size in self.sizes:
            for par, _ in _raw_layouts(subject, size, self.reach):
                yield par


def instance_sizes(cluster: Cluster, cards: int) -> tuple[int, ...]:
    """Cards that one instance may have: parts that divide a node, and whole nodes; ascending."""
    node = cluster.ranks_per_node
    parts = {count for count in cluster.rank_counts if node % count == 0}
    nodes = {node * count for count in range(1, cluster.nodes + 1)}
    return tuple(sorted(size for size in parts | nodes if size <= cards))


def instance_layouts(subject: Subject, cards: int, reach: Reach) -> Iterator[Judged]:
    """Every canonical layout of one instance, the engine's own order of the ranks before others.

    Modules are split where the layout is legal.
    `subject`: what runs on it in which role, of any layout.
    """
    for par, rule in _raw_layouts(subject, cards, reach):
        yield from _ordered(subject, par, rule, reach)


def _raw_layouts(subject: Subject, cards: int, reach: Reach) -> Iterator[tuple[Parallelism, str]]:
    """Layouts in the engine's order of the ranks, and the first rule that each breaks."""
    for plain in filter(reach.takes, _instances(subject.spec, cards, reach)):
        order = base_order(subject.engine, plain)
        for mtp in role_depths(subject.role, reach):
            par = replace(plain, order=order, mtp=mtp)
            rule = _broken(subject, par)
            yield par, rule
            if reach.modules and not rule:
                for one in module_splits(subject.spec, par):
                    yield one, _broken(subject, one)


def _ordered(subject: Subject, par: Parallelism, rule: str, reach: Reach) -> Iterator[Judged]:
    """A layout with the engine's order, then with each legal one that may price otherwise."""
    others = other_orders(par, reach)
    if rule or not others:
        yield Judged(par, rule, {f"rule {rule}": len(others)} if others else {})
        return
    beside: Counter[str] = Counter()
    legal = []
    for order in others:
        broken = _broken(subject, replace(par, order=order))
        if broken:
            beside[f"rule {broken}"] += 1
        else:
            legal.append(order)
    distinct = _distinct(subject, par, legal)
    beside["order"] += len(legal) - len(distinct)
    yield Judged(par, "", +beside)
    for order in distinct:
        yield Judged(replace(par, order=order))


def _distinct(
    subject: Subject, par: Parallelism, legal: list[tuple[Axis, ...]]
) -> list[tuple[Axis, ...]]:
    """The legal orders that may price otherwise than the layout's own, one of each kind."""
    if not legal:
        return []
    kinds = distinct_orders(subject.spec, subject.cluster, par, (par.order, *legal))
    return list(kinds[1:])


def _broken(subject: Subject, par: Parallelism) -> str:
    return first_broken_rule(replace(subject, parallel=par)) or ""


def role_depths(role: str, reach: Reach) -> tuple[int, ...]:
    """Tokens that instances of a role predict ahead.

    A prefill instance drafts nothing that is used: it fills the cache of the prediction layer,
    which one draft a prompt does whatever the depth of the decode instances.
    """
    if role == "decode":
        return reach.depths
    return tuple(sorted({min(depth, 1) for depth in reach.depths}))


def _instances(spec: ModelSpec, cards: int, reach: Reach) -> Iterator[Parallelism]:
    for one in context_axes(cards, reach.contexts):
        sizes: dict[str, Any] = {"tp": one.tp, "pp": one.pp, "dp": one.dp, "cp": one.cp}
        if one.dp > 1 and spec.moe is None:
            continue
        copy = one.tp * one.cp
        shared = divisors(copy) if spec.moe is not None else (1,)
        for ep in shared if one.dp == 1 else (copy * one.dp,):
            for sp in (False, True):
                yield Parallelism(**sizes, ep=ep, sp=sp)
                if ep > 1:
                    yield Parallelism(**sizes, ep=ep, sp=sp, exchange="alltoall")


def prefill_grid(engine: EngineProfile, prompt: int) -> tuple[int, ...]:
    """Step sizes to try, tokens: whole prompts a step, or one prompt in equal pieces.

    Other sizes leave part of a step empty: they take as long for no more prompts.
    """
    most = max(_MAX_CHUNK, prompt)
    whole = {prompt * count for count in _spread(max(most // prompt, 1))}
    pieces = {math.ceil(prompt / count) for count in _spread(max(prompt // _MIN_CHUNK, 1))}
    default = engine.max_num_batched_tokens
    return tuple(sorted(whole | pieces | {max(default // prompt * prompt, min(prompt, default))}))


def _spread(most: int) -> list[int]:
    """Every number to 16, then eight an octave."""
    octaves = np.arange(4.0, math.log2(max(most, 1)) + 1e-9, 0.125)
    return sorted({*range(1, min(most, 16) + 1), *(round(2.0**x) for x in octaves), most})


def pair_key(par: Parallelism) -> PairKey:
    """What a pair rule may look at."""
    return par.tp, par.pp, par.cp, par.mtp


def pair_table(
    prefill: Pool,
    decode: Pool,
    keys: tuple[list[Parallelism], list[Parallelism]],
    rule: PairRule,
) -> NDArray[np.object_]:
    """Ids of broken rules, "" where legal; `[prefill layouts, decode layouts]` of given ones."""
    rows = [prefill.subject(par) for par in keys[0]]
    columns = [decode.subject(par) for par in keys[1]]
    table = np.empty((len(rows), len(columns)), dtype=object)
    for place, row in enumerate(rows):
        table[place] = [rule(row, column) or "" for column in columns]
    return table


@functools.cache
def count_pairs(cards: int, prefill: int, decode: int) -> int:
    """Counts (x, y) of instances of these sizes that share `cards`."""
    return sum((cards - x * prefill) // decode for x in range(1, cards // prefill + 1))
