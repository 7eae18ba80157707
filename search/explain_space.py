"""What the rules leave of the space of a question, of one pool or of two.

Of two pools the rules on layouts take instances of either, those on pairs take pairs of legal
instances:

    size   = sum over pairs of instance sizes of (strategies of prefill * of decode * counts)
    paired = the same of legal instances        left = paired - sum of first of the pair rules
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.hardware import Cluster
from shardplan.models.errors import InfeasibleError
from shardplan.models.parallel import Parallelism
from shardplan.search.api import space_of
from shardplan.search.disagg import count_weights
from shardplan.search.disagg_question import DisaggQuestion
from shardplan.search.disagg_request import disagg_question, resolve_sides
from shardplan.search.disagg_space import PairKey, Pool, pair_key
from shardplan.search.failure import no_legal_layout
from shardplan.search.legality import binding_rules, broken_pair_rules
from shardplan.search.request import Asked, Resolved, resolve
from shardplan.search.rule_counts import (
    RuleCount,
    SpaceRules,
    count_rules,
    rule_count,
)
from shardplan.search.rulebook import Subject

__all__ = ["PoolRules", "count_pools", "explain_space"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRules:
    """The space of two pools and what each rule takes of it."""

    prefill: SpaceRules
    decode: SpaceRules
    size: int
    """Deployments: a strategy of each pool and counts of instances."""
    paired: int
    """Those of instances that are legal alone."""
    pairs: tuple[RuleCount, ...]
    """Rules on pairs of instances that bind here, in the order in which they are checked."""
    left: int
    """Deployments that keep every rule."""

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def explain_space(asked: Asked) -> tuple[SpaceRules | PoolRules, ...]:
    """What the rules leave of the space of a question: one pool, two, or (`auto`) both in turn.

    For the objective `cards`: the space of the most cards. Raises `InputError` for a bad
    question and `InfeasibleError`, which names the rules and the nearest change that helps, where
    nothing is left.
    """
    resolved = resolve(asked)
    found: list[SpaceRules | PoolRules] = []
    if asked.serving != "disagg":
        found.append(_one_pool(resolved))
    if asked.serving == "disagg" or (asked.serving == "auto" and resolved.request.cards > 1):
        found.append(_two_pools(asked, resolved))
    return tuple(found)


def _one_pool(resolved: Resolved) -> SpaceRules:
    space = space_of(resolved, resolved.request.cards)
    found = count_rules(space)
    if not found.left:
        raise no_legal_layout(space, {one.id: one.first for one in found.rules if one.first})
    return found


def _two_pools(asked: Asked, resolved: Resolved) -> PoolRules:
    found = count_pools(disagg_question(resolve_sides(asked, resolved)))
    if not found.left:
        taken = [*found.prefill.rules, *found.decode.rules, *found.pairs]
        named = dict.fromkeys(f"{one.id} ({one.sentence})" for one in taken if one.first)
        raise InfeasibleError(
            f"no two instances of {resolved.spec.name} may serve together under "
            f"{resolved.engine.name} on {_places(resolved.cluster)}",
            got=f"rules that removed them: {'; '.join(named)}",
            hint="try --serving agg, another --engine-profile or another cluster",
        )
    return found


def _places(cluster: Cluster) -> str:
    return f"{cluster.ranks} ranks of {cluster.device.name}"


def count_pools(question: DisaggQuestion) -> PoolRules:
    """Every rule that binds the two pools, alone or together, with what it removes."""
    pools = question.prefill, question.decode
    one, two = (_Sized.of(pool) for pool in pools)
    weights = np.array([each[2] for each in count_weights(question)], dtype=object)
    weights = weights.reshape(len(question.prefill.sizes), len(question.decode.sizes))
    deployments = one.legal.T.dot(weights).dot(two.legal)
    left = 0
    first: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    for (row, column), count in np.ndenumerate(deployments):
        names = broken_pair_rules(one.subjects[row], two.subjects[column])
        left += 0 if names else count
        first.update(dict.fromkeys(names[:1], count))
        alone.update(dict.fromkeys(names, count))
    bound = dict.fromkeys(
        name for pool in pools for name in binding_rules("pair", pool.subject(Parallelism()))
    )
    return PoolRules(
        prefill=count_rules(question.prefill),
        decode=count_rules(question.decode),
        size=one.total.dot(weights).dot(two.total),
        paired=sum(deployments.ravel().tolist()),
        pairs=tuple(rule_count(name, first[name], alone[name]) for name in bound),
        left=left,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sized:
    """Strategies of a pool by cards of an instance, exact whole numbers."""

    total: NDArray[np.object_]
    """`[sizes]`, legal or not."""
    legal: NDArray[np.object_]
    """`[sizes, subjects]`, legal ones by what pair rules look at."""
    subjects: tuple[Subject, ...]
    """A layout of each kind that pair rules tell apart."""

    @classmethod
    def of(cls, pool: Pool) -> _Sized:
        """Counted from a pool's judged layouts."""
        total: Counter[int] = Counter()
        legal: Counter[tuple[int, PairKey]] = Counter()
        subjects: dict[PairKey, Subject] = {}
        for one in pool.layouts:
            par, each = one.parallel, pool.cuts_of(one.parallel) * pool.points
            total[par.ranks] += each * len(pool.choices) * (1 + sum(one.beside.values()))
            if not one.rule:
                free = sum(pool.broken_switch(par, choice) is None for choice in pool.choices)
                legal[par.ranks, pair_key(par)] += each * free * (1 + one.beside.get("order", 0))
                subjects.setdefault(pair_key(par), pool.subject(par))
        table = [[legal[size, key] for key in subjects] for size in pool.sizes]
        return cls(
            total=np.array([total[size] for size in pool.sizes], dtype=object),
            legal=np.array(table, dtype=object).reshape(len(pool.sizes), len(subjects)),
            subjects=tuple(subjects.values()),
        )
