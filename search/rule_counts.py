"""What each rule removes of a space of layouts, without pricing anything.

    size   = sum over layouts of cuts * orders, * choices * grid    strategies, legal or not
    first  strategies that a rule removes: no rule before it is broken by the same strategy
    alone  strategies that break it, whatever else they break
    left   = size - sum of first                               left to price

A rule on a layout takes all its choices, one on switches a choice of a layout; the grid of slots
and step sizes is taken whole. Left out: memory, context and time limits, which are bounds that the
search finds by pricing, not rules.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from shardplan.models.parallel import Parallelism
from shardplan.search.layouts import base_order
from shardplan.search.legality import binding_rules, broken_rules, broken_switch_rules
from shardplan.search.rulebook import Scope, rules
from shardplan.search.space import Ruled

__all__ = ["RuleCount", "SpaceRules", "count_rules", "rule_count"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleCount:
    """A rule that binds here, and how many strategies it removes."""

    id: str
    sentence: str
    devices: Scope
    engines: Scope
    source: str
    first: int
    """Strategies that break no rule before it."""
    alone: int
    """Strategies that break it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceRules:
    """A space and what each rule takes of it."""

    model: str
    cluster: str
    device: str
    engine_profile: str
    cards: int
    layouts: int
    legal_layouts: int
    choices: int
    grid: int
    """Pairs of slots and step size; of a pool, what its grid has of either."""
    size: int
    rules: tuple[RuleCount, ...]
    """Rules that bind this device and engine, in the order in which they are checked."""
    not_binding: tuple[str, ...]
    """Ids of rules on layouts and switches of other devices and engines."""
    left: int
    """Strategies that keep every rule: to price, or to prune by memory."""

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def count_rules(space: Ruled) -> SpaceRules:
    """Every rule that binds here with what it removes: of a space, or of the strategies that
    instances of a pool may have, of all sizes together."""
    first: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    layouts = legal = size = 0
    switched = [choice for choice in space.choices if choice.switched]
    subject = space.subject(Parallelism())
    for par in space.ways():
        broken, cuts = broken_rules(space.subject(par)), space.cuts_of(par)
        own = par.order == base_order(subject.engine, par)
        layouts, legal = layouts + own, legal + (own and not broken)
        size += len(space.choices) * cuts
        alone.update(dict.fromkeys(broken, len(space.choices) * cuts))
        first.update(dict.fromkeys(broken[:1], len(space.choices) * cuts))
        for choice in switched:
            off = broken_switch_rules(space.switch_subject(par, choice))
            alone.update(dict.fromkeys(off, cuts))
            if not broken:
                first.update(dict.fromkeys(off[:1], cuts))
    bound = binding_rules("layout", subject)
    bound = (*bound, *binding_rules("switch", subject)) if switched else bound
    every = binding_rules("layout", None) + binding_rules("switch", None)
    return SpaceRules(
        model=subject.spec.name,
        cluster=subject.cluster.name,
        device=subject.cluster.device.name,
        engine_profile=subject.engine.name,
        cards=space.cards,
        layouts=layouts,
        legal_layouts=legal,
        choices=len(space.choices),
        grid=space.points,
        size=size * space.points,
        rules=tuple(
            rule_count(one, first[one] * space.points, alone[one] * space.points) for one in bound
        ),
        not_binding=tuple(name for name in every if name not in bound),
        left=(size - first.total()) * space.points,
    )


def rule_count(name: str, first: int, alone: int) -> RuleCount:
    """A rule with its sentence, scope and source, and what it removes."""
    rule = rules()[name]
    return RuleCount(
        id=name,
        sentence=rule.sentence,
        devices=rule.devices,
        engines=rule.engines,
        source=rule.source,
        first=first,
        alone=alone,
    )
