"""Which engine takes a request.

round-robin    each in turn
least-load     the fewest requests there, waiting or running (the first of equals)
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


def router(name: Router, engines: Sequence[Engine]) -> Callable[[Request], Engine]:
    """A function that picks an engine for a request."""
    turn = 0

    def in_turn(_: Request) -> Engine:
        nonlocal turn
        turn += 1
        return engines[(turn - 1) % len(engines)]

    def least(_: Request) -> Engine:
        return min(engines, key=lambda one: one.load)

    def by_prefix(request: Request) -> Engine:
        return min(
            engines, key=lambda one: (one.waiting_tokens - one.known_tokens(request), one.load)
        )

    if len(engines) == 1:
        return lambda _: engines[0]
    return {"round-robin": in_turn, "least-load": least, "prefix-aware": by_prefix}[name]
