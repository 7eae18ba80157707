"""`search --explain-space` on the terminal: a space, what each rule removes, what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardplan.search.explain_space import PoolRules
from shardplan.search.report.words import count_text
from shardplan.search.tables import add, new_table, show

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from shardplan.search.rule_counts import RuleCount, SpaceRules
    from shardplan.search.rulebook import Scope

__all__ = ["print_space"]

_BOUNDS = "Memory, context and time limits are bounds that the search finds by pricing, not rules."


def print_space(found: SpaceRules | PoolRules, console: Console) -> None:
    """The size of the space, what each rule removes, and what is left, as tables."""
    if isinstance(found, PoolRules):
        _print_pools(found, console)
        return
    _print_rules(_title(found), found.rules, found.size, console)
    _print_words(found.rules, console)
    kept = sum(not one.alone for one in found.rules)
    console.print(
        f"{kept} more rules bind here and remove nothing; {len(found.not_binding)} bind other "
        "devices, engines and switches only.\n"
        f"{count_text(found.size)} strategies: {found.layouts:,} layouts with every cut and order, "
        f"x {found.choices} choices x {found.grid:,} pairs of slots and step size.\n"
        f"{count_text(found.size - found.left)} break a rule; {count_text(found.left)} "
        f"({found.left / found.size:.1%}), of {found.legal_layouts:,} layouts, are left to price. "
        f"{_BOUNDS}",
        markup=False,
    )


def _print_pools(found: PoolRules, console: Console) -> None:
    sides = (found.prefill, "prefill", "step sizes"), (found.decode, "decode", "numbers of slots")
    for side, name, _ in sides:
        _print_rules(f"{name} instances: {_title(side)}", side.rules, side.size, console)
    _print_rules("pairs of legal instances", found.pairs, found.paired, console)
    every = [*found.prefill.rules, *found.decode.rules, *found.pairs]
    _print_words({one.id: one for one in every if one.alone}.values(), console)
    console.print(
        "".join(
            f"{count_text(side.size)} strategies of {name} instances of all sizes: "
            f"{side.layouts:,} layouts with every cut and order, x {side.choices} choices "
            f"x {side.grid:,} {grid}; "
            f"{count_text(side.left)}, of {side.legal_layouts:,} layouts, are legal.\n"
            for side, name, grid in sides
        )
        + f"{count_text(found.size)} deployments: pairs of them and numbers of instances; "
        f"{count_text(found.paired)} ({found.paired / found.size:.1%}) of legal instances, "
        f"{count_text(found.left)} of pairs that may serve together are left to price. {_BOUNDS}",
        markup=False,
    )


def _title(found: SpaceRules) -> str:
    return f"rules on {found.model}, {found.cards} cards of {found.cluster}, {found.engine_profile}"


def _print_rules(title: str, rules: Iterable[RuleCount], size: int, console: Console) -> None:
    """What each rule removes of a space of `size`."""
    numbers = ("removes first", "alone", "of all")
    counts = new_table(title, "rule", *numbers, "devices", "engines", right=numbers)
    for one in rules:
        if one.alone:
            shown = (count_text(one.first), count_text(one.alone), f"{one.alone / size:.1%}")
            add(counts, one.id, *shown, _words(one.devices), _words(one.engines))
    show(console, counts)


def _print_words(rules: Iterable[RuleCount], console: Console) -> None:
    words = new_table("what they ask", "rule", "sentence", "source")
    for one in rules:
        if one.alone:
            add(words, one.id, one.sentence, one.source)
    show(console, words)


def _words(scope: Scope) -> str:
    return scope if isinstance(scope, str) else ", ".join(scope)
