"""Which engine takes a request.

round-robin    each in turn
least-load     the fewest requests there, waiting or running; of equals the one whose unit (engines
               that step together) has the fewest, then the first
prefix-aware   the fewest prompt tokens to be computed there before its first token: those that
               wait, and its own less those whose prefix is found; then the fewest requests
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from shardplan.costmodel.simulate.request import Request
from shardplan.costmodel.simulate.scheduler import Engine

__all__ = ["ROUTERS", "Router", "router"]

Router = Literal["round-robin", "least-load", "prefix-aware"]
ROUTERS: tuple[Router, ...] = ("round-robin", "least-load", "prefix-aware")


def router(name: Router, units: Sequence[Sequence[Engine]]) -> Callable[[Request], Engine]:
    """A function that picks an engine for a request; `units`: of engines that step together."""
    engines = [engine for unit in units for engine in unit]
    turn = 0

    def in_turn(_: Request) -> Engine:
        nonlocal turn
        turn += 1
        return engines[(turn - 1) % len(engines)]

    def least(_: Request) -> Engine:
        return min(engines, key=lambda one: one.load)

    def least_of_units(_: Request) -> Engine:
        some = [min(unit, key=lambda one: one.load) for unit in units]
        fewest = min(one.load for one in some)
        able = [place for place, one in enumerate(some) if one.load == fewest]
        return some[min(able, key=lambda place: sum(one.load for one in units[place]))]

    def by_prefix(request: Request) -> Engine:
        return min(
            engines, key=lambda one: (one.waiting_tokens - one.known_tokens(request), one.load)
        )

    if len(engines) == 1:
        return lambda _: engines[0]
    shared = 1 < len(units) < len(engines)
    picks = {
        "round-robin": in_turn,
        "least-load": least_of_units if shared else least,
        "prefix-aware": by_prefix,
    }
    return picks[name]
