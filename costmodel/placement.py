"""Where the ranks of a communication group lie: how many share each tier of the interconnect.

A group of `g` ranks, `s` ranks apart, starts at rank 0: its members are 0, s, 2s, ... (g-1)s.
Consecutive ranks fill a tier instance before the next begins, so member `i` lies in instance
`i*s // R` of a tier that joins `R` ranks. With `c(R)` members in each instance that holds any,

    span(tier) = c(R_tier) / c(R_inner)        product over the tiers = g

where `R_inner` is the tier before it. A tier that adds no member is left out.

Left out: a group that fills a tier unevenly (12 ranks on nodes of 8: 8 and 4) has no such product.
That tier is passed over and its members are counted in the next tier out, which is slower: the
time then is an upper bound. Groups that do not start at rank 0 are taken as its translates, which
holds when the sizes nest (every legal mesh of axes).
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

from shardplan.costmodel.hardware import Cluster, Tier
from shardplan.models.errors import InputError

__all__ = ["TierSpan", "group_tiers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSpan:
    """One tier that a group crosses."""

    tier: Tier
    members: int
    """Parties that meet in one instance of the tier: ranks in the innermost, else sub-groups."""


def group_tiers(cluster: Cluster, *, group: int, stride: int) -> tuple[TierSpan, ...]:
    """Tiers that a group crosses, inner to outer, and how many parties meet in each.

    `group` ranks, `stride` ranks apart, from rank 0. The product of `members` is `group`; a group
    of one rank crosses nothing. `InputError` when a size is below 1 or the group does not fit.
    """
    for name, value in (("group", group), ("stride", stride)):
        if value < 1:
            raise InputError(f"`{name}` must be at least 1", got=f"{name}={value}")
    last = (group - 1) * stride
    if last >= cluster.ranks:
        raise InputError(
            "a group must fit in the cluster",
            got=f"group={group}, stride={stride}, ranks={cluster.ranks}",
            hint=f"its last member would be rank {last}; add nodes or make the group smaller",
        )
    counts = _members(tuple(tier.ranks for tier in cluster.tiers), group, stride)
    return tuple(
        TierSpan(tier=tier, members=members)
        for tier, members in zip(cluster.tiers, counts, strict=True)
        if members > 1
    )


@functools.lru_cache(maxsize=4096)
def _members(tier_ranks: tuple[int, ...], group: int, stride: int) -> tuple[int, ...]:
    """Parties per tier; 1 where the tier adds none or is passed over."""
    held = 1
    out: list[int] = []
    for ranks in tier_ranks:
        shares = set(Counter(i * stride // ranks for i in range(group)).values())
        share = max(shares)
        even = len(shares) == 1 and share % held == 0
        out.append(share // held if even else 1)
        if even:
            held = share
    return tuple(out)
