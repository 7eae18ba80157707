"""What the rules leave of a strategy space, rule by rule, without pricing anything.

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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from shardplan.models.parallel import Parallelism
from shardplan.search.api import space_of
from shardplan.search.failure import no_legal_layout
from shardplan.search.legality import (
    Subject,
    binding_rules,
    broken_rules,
    broken_switch_rules,
    rules,
)
from shardplan.search.report.words import count_text
from shardplan.search.request import Asked, resolve
from shardplan.search.rulebook import Scope
from shardplan.search.space import Space
from shardplan.search.tables import add, new_table, show

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["RuleCount", "SpaceRules", "count_rules", "explain_space", "print_space"]


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
    """Pairs of slots and step size."""
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


def _subject(space: Space, par: Parallelism) -> Subject:
    return Subject(spec=space.spec, cluster=space.cluster, engine=space.engine, parallel=par)


def _tally(space: Space) -> tuple[Counter[str], Counter[str], int]:
    """(first, alone) in grids by rule, and the legal layouts."""
    first: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    legal = 0
    switched = [choice for choice in space.choices if choice.switched]
    for par in (replace(one, order=o) for one in space.raw() for o in space.raw_orders_of(one)):
        broken = broken_rules(_subject(space, par))
        legal += not broken and par.order == space.layout_of(par).order
        cuts = space.cuts_of(par)
        alone.update(dict.fromkeys(broken, len(space.choices) * cuts))
        first.update(dict.fromkeys(broken[:1], len(space.choices) * cuts))
        for choice in switched:
            off = broken_switch_rules(space.switch_subject(par, choice))
            alone.update(dict.fromkeys(off, cuts))
            if not broken:
                first.update(dict.fromkeys(off[:1], cuts))
    return first, alone, legal


def count_rules(space: Space) -> SpaceRules:
    """Every rule that binds here with what it removes of a space."""
    first, alone, legal = _tally(space)
    grid = len(space.batches) * len(space.chunks)
    known: Mapping[str, Any] = rules()
    subject = _subject(space, Parallelism())
    bound = binding_rules("layout", subject)
    if any(choice.switched for choice in space.choices):
        bound = (*bound, *binding_rules("switch", subject))
    every = binding_rules("layout", None) + binding_rules("switch", None)
    listed = tuple(
        RuleCount(
            id=name,
            sentence=known[name].sentence,
            devices=known[name].devices,
            engines=known[name].engines,
            source=known[name].source,
            first=first[name] * grid,
            alone=alone[name] * grid,
        )
        for name in bound
    )
    return SpaceRules(
        model=space.spec.name,
        cluster=space.cluster.name,
        device=space.cluster.device.name,
        engine_profile=space.engine.name,
        cards=space.cards,
        layouts=space.raw_layouts,
        legal_layouts=legal,
        choices=len(space.choices),
        grid=grid,
        size=space.size,
        rules=listed,
        not_binding=tuple(name for name in every if name not in bound),
        left=space.size - sum(one.first for one in listed),
    )


def explain_space(asked: Asked) -> SpaceRules:
    """What the rules leave of the space of a question.

    For the objective `cards`: the space of the most cards. Raises `InputError` for a bad
    question and `InfeasibleError`, which names the rules and the nearest change that helps, where
    nothing is left.
    """
    resolved = resolve(asked)
    space = space_of(resolved, resolved.request.cards)
    found = count_rules(space)
    if not found.left:
        raise no_legal_layout(space, {one.id: one.first for one in found.rules if one.first})
    return found


def _words(scope: Scope) -> str:
    return scope if isinstance(scope, str) else ", ".join(scope)


def print_space(found: SpaceRules, console: Console) -> None:
    """The size of the space, what each rule removes, and what is left, as tables."""
    numbers = ("removes first", "alone", "of all")
    counts = new_table(
        f"rules on {found.model}, {found.cards} cards of {found.cluster}, {found.engine_profile}",
        *("rule", *numbers, "devices", "engines"),
        right=numbers,
    )
    words = new_table("what they ask", "rule", "sentence", "source")
    for one in found.rules:
        if one.alone:
            shown = (count_text(one.first), count_text(one.alone), f"{one.alone / found.size:.1%}")
            add(counts, one.id, *shown, _words(one.devices), _words(one.engines))
            add(words, one.id, one.sentence, one.source)
    show(console, counts)
    show(console, words)
    kept = sum(not one.alone for one in found.rules)
    console.print(
        f"{kept} more rules bind here and remove nothing; {len(found.not_binding)} bind other "
        "devices, engines and switches only.\n"
        f"{count_text(found.size)} strategies: {found.layouts:,} layouts with every cut and order, "
        f"x {found.choices} choices x {found.grid:,} pairs of slots and step size.\n"
        f"{count_text(found.size - found.left)} break a rule; {count_text(found.left)} "
        f"({found.left / found.size:.1%}), of {found.legal_layouts:,} layouts, are left to price. "
        "Memory, context and time limits are bounds that the search finds by pricing, not rules.",
        markup=False,
    )
