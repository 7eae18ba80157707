"""Where the ranks of a communication group lie: how many share each tier of the interconnect.

The members of a group, from rank 0 on, are all sums of one multiple for each of its pairs (size,
stride): 0, s, 2s, ... (g-1)s where one pair says it all (`models.ranks`). Consecutive ranks fill a
tier instance before the next begins, so a member of id `m` lies in instance `m // R` of a tier that
joins `R` ranks. With `c(R)` members in each instance that holds any,

    span(tier) = c(R_tier) / c(R_inner)        product over the tiers = g

where `R_inner` is the tier before it. A tier that adds no member is left out.

Neighbouring stages of a pipeline meet in the innermost tier that holds both. Stages of 4 ranks on
nodes of 8 hand over inside a node and between nodes in turn: a send is priced as the mean over all
neighbours, which is exact for the way of a token through the pipeline.

Left out: a group that fills a tier unevenly (12 ranks on nodes of 8: 8 and 4) has no such product.
That tier is passed over and its members are counted in the next tier out, which is slower: the
time then is an upper bound. Groups that do not start at rank 0 are taken as its translates, which
holds when the sizes nest (every legal mesh of axes).
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from dataclasses import dataclass, replace

from shardplan.costmodel.hardware import Cluster, Tier
from shardplan.models.errors import InputError
from shardplan.models.ranks import Extents

__all__ = [
    "TierSpan",
    "between_nodes",
    "group_tiers",
    "meetings",
    "neighbour_tiers",
    "tiers_crossed",
    "with_algorithm",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSpan:
    """One tier that a group crosses."""

    tier: Tier
    members: int
    """Parties that meet in one instance of the tier: ranks in the innermost, else sub-groups."""
    algorithm: str = "auto"
    """How they exchange, where the user picked it (`kernels.algorithms`)."""
    share: float = 1.0
    """Of the neighbouring stages of a pipeline, how many meet here."""


def group_tiers(cluster: Cluster, *, group: int, stride: int) -> tuple[TierSpan, ...]:
    """Tiers that a group crosses, inner to outer, and how many parties meet in each.

    `group` ranks, `stride` ranks apart, from rank 0. The product of `members` is `group`; a group
    of one rank crosses nothing. `InputError` when a size is below 1 or the group does not fit.
    """
    return tiers_crossed(cluster, ((group, stride),))


def tiers_crossed(cluster: Cluster, lies: Extents) -> tuple[TierSpan, ...]:
    """The same of a group whose members are all sums of its (size, stride) pairs."""
    for size, stride in lies:
        for name, value in (("group", size), ("stride", stride)):
            if value < 1:
                raise InputError(f"`{name}` must be at least 1", got=f"{name}={value}")
    last = sum((size - 1) * stride for size, stride in lies)
    if last >= cluster.ranks:
        raise InputError(
            "a group must fit in the cluster",
            got=", ".join(f"group={size}, stride={stride}" for size, stride in lies)
            + f", ranks={cluster.ranks}",
            hint=f"its last member would be rank {last}; add nodes or make the group smaller",
        )
    counts = _members(tuple(tier.ranks for tier in cluster.tiers), lies)
    return tuple(
        TierSpan(tier=tier, members=members)
        for tier, members in zip(cluster.tiers, counts, strict=True)
        if members > 1
    )


def between_nodes(cluster: Cluster) -> Tier | None:
    """The tier that joins servers, where an algorithm can be picked; None on one server."""
    return next((tier for tier in cluster.tiers if tier.ranks > cluster.ranks_per_node), None)


def with_algorithm(
    cluster: Cluster, spans: tuple[TierSpan, ...], algorithm: str
) -> tuple[TierSpan, ...]:
    """The same tiers, that between servers crossed by a picked algorithm."""
    outer = between_nodes(cluster)
    return tuple(
        replace(span, algorithm=algorithm) if span.tier == outer else span for span in spans
    )


def neighbour_tiers(cluster: Cluster, lies: Extents) -> tuple[TierSpan, ...]:
    """The tiers in which neighbouring stages of a pipeline meet, and which share of them does."""
    for size, stride in lies:
        tiers_crossed(cluster, ((size, stride),))  # a pipeline must fit as any group must
        met = meetings(tuple(tier.ranks for tier in cluster.tiers), size, stride)
        return tuple(
            TierSpan(tier=tier, members=2, share=pairs / (size - 1))
            for tier, pairs in zip(cluster.tiers, met, strict=True)
            if pairs
        )
    return ()


def meetings(tier_ranks: tuple[int, ...], stages: int, stride: int) -> tuple[int, ...]:
    """Pairs of neighbouring stages that meet in each tier: those that cross no border of it.

    Of s - 1 pairs, d ranks apart, min(s - 1, (s - 1) d // R) cross a border of R ranks.
    """
    pairs = stages - 1
    crossing = (pairs, *(min(pairs, pairs * stride // ranks) for ranks in tier_ranks))
    return tuple(before - after for before, after in itertools.pairwise(crossing))


@functools.lru_cache(maxsize=4096)
def _members(tier_ranks: tuple[int, ...], lies: Extents) -> tuple[int, ...]:
    """Parties per tier; 1 where the tier adds none or is passed over."""
    ids = _ids(lies)
    held = 1
    out: list[int] = []
    for ranks in tier_ranks:
        shares = set(Counter(one // ranks for one in ids).values())
        share = max(shares)
        even = len(shares) == 1 and share % held == 0
        out.append(share // held if even else 1)
        if even:
            held = share
    return tuple(out)


def _ids(lies: Extents) -> list[int]:
    """Rank ids of the members."""
    steps = [range(0, size * stride, stride) for size, stride in lies]
    return [sum(one) for one in itertools.product(*steps)]
