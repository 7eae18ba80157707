"""The space of disaggregated serving: strategies of either pool, and how many instances of each.

    pool        instance sizes * canonical layouts of each size * cuts * choices * grid
    grid        prefill: step sizes in tokens; decode: slots of a dp group
    counts      x, y >= 1 with x cards_P + y cards_D <= cards (or each within its own cluster)
    space       sum over sizes of (prefill strategies) * (decode strategies) * counts

Instance sizes are the parts of a node that divide it and whole nodes, so that any counts that
fit in number can be placed. A layout is canonical where it holds no independent replicas,
dp = max(ep / tp, 1): replicas are what x and y count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Cluster
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec
from shardplan.search.cuts import cut_count
from shardplan.search.layouts import Reach, base_order, divisors
from shardplan.search.legality import Subject, first_broken_rule, first_broken_switch_rule
from shardplan.search.plan import Workload
from shardplan.search.space import Choice

__all__ = [
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """What one role may run on and how."""

    role: Role
    spec: ModelSpec
    cluster: Cluster
    engine: EngineProfile
    cards: int
    """Most cards of the pool."""
    choices: tuple[Choice, ...]
    grid: tuple[int, ...]
    workload: Workload
    sizes: tuple[int, ...]
    """Cards that one instance may have."""
    reach: Reach
    """What is searched beyond the plain axes."""
    layouts: tuple[tuple[Parallelism, str], ...]
    """Every canonical layout of every size, and the rule that it breaks alone, "" for none."""

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
                (par, first_broken_rule(replace(subject, parallel=par, role=role)) or "")
                for size in sizes
                for par in instance_layouts(subject.spec, subject.engine, size, role, reach)
            ),
        )

    @property
    def per_cut(self) -> int:
        """Strategies of one layout and cut."""
        return len(self.choices) * len(self.grid)

    def cuts_of(self, par: Parallelism) -> int:
        """Ways to cut the layers into the stages of a layout; 1 where there are too few layers."""
        return max(cut_count(self.spec.layers, par.pp), 1) if self.reach.ways else 1

    def subject(self, par: Parallelism) -> Subject:
        """A layout as the rules look at it."""
        return Subject(
            spec=self.spec,
            cluster=self.cluster,
            engine=self.engine,
            parallel=par,
            role=self.role,
        )

    def broken_switch(self, par: Parallelism, choice: Choice) -> str | None:
        """Id of the first rule that the choice's switches break on a layout."""
        if not choice.switched:
            return None
        return first_broken_switch_rule(
            replace(self.subject(par), overlap=choice.overlap, weight_dtype=choice.weight_dtype)
        )


def instance_sizes(cluster: Cluster, cards: int) -> tuple[int, ...]:
    """Cards that one instance may have: parts that divide a node, and whole nodes; ascending."""
    node = cluster.ranks_per_node
    parts = {count for count in cluster.rank_counts if node % count == 0}
    nodes = {node * count for count in range(1, cluster.nodes + 1)}
    return tuple(sorted(size for size in parts | nodes if size <= cards))


def instance_layouts(
    spec: ModelSpec, engine: EngineProfile, cards: int, role: Role, reach: Reach
) -> Iterator[Parallelism]:
    """Every canonical layout of one instance, legal or not, ranks numbered as the engine does."""
    depths = role_depths(role, reach)
    for one in _instances(spec, cards):
        order = base_order(engine, one)
        yield from (replace(one, order=order, mtp=mtp) for mtp in depths)


def role_depths(role: Role, reach: Reach) -> tuple[int, ...]:
    """Tokens that instances of a role predict ahead.

    A prefill instance drafts nothing that is used: it fills the cache of the prediction layer,
    which one draft a prompt does whatever the depth of the decode instances.
    """
    if role == "decode":
        return reach.depths
    return tuple(sorted({min(depth, 1) for depth in reach.depths}))


def _instances(spec: ModelSpec, cards: int) -> Iterator[Parallelism]:
    for tp in divisors(cards):
        for pp in divisors(cards // tp):
            dp = cards // (tp * pp)
            if dp > 1 and spec.moe is None:
                continue
            shared = divisors(tp) if spec.moe is not None else (1,)
            for ep in shared if dp == 1 else (tp * dp,):
                for sp in (False, True):
                    yield Parallelism(tp=tp, pp=pp, dp=dp, ep=ep, sp=sp)
                    if ep > 1:
                        yield Parallelism(tp=tp, pp=pp, dp=dp, ep=ep, sp=sp, exchange="alltoall")


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
