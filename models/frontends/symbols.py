"""Sizes of symbolic dims, as users give them by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shardplan.models.errors import InputError

__all__ = ["check_symbols"]

_MOST = 12


def check_symbols(sizes: Mapping[str, int], symbols: Iterable[str], name: str) -> None:
    """`InputError` for a size of a symbol that the graph `name` does not have."""
    known = sorted(set(symbols))
    strange = sorted(set(sizes) - set(known))
    if strange:
        raise InputError(
            "sizes are of symbolic dims of the graph",
            got=f"graph={name}, size of {strange[0]!r}",
            hint="its symbols: " + (", ".join(known[:_MOST]) or "none"),
        )
