"""Errors a user can meet, apart from bugs.

    ShardplanError            base; carries `exit_code`
    ├── InputError            exit 2: an input breaks a rule
    │   ├── UnknownNameError  a name is not in the catalogue; carries close matches
    │   └── LayoutError       a strategy cannot be laid on this model
    ├── InfeasibleError       exit 3: the question is sound, no answer exists
    └── ProofError            exit 1: an applied graph does not compute what the model computes

A message holds the rule, the values, and what to try, in that order:
"tp must divide num_attention_heads (tp=6, heads=64); try 1, 2, 4, 8".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "InfeasibleError",
    "InputError",
    "LayoutError",
    "ProofError",
    "ShardplanError",
    "UnknownNameError",
    "did_you_mean",
    "printable",
]


def printable(text: str) -> str:
    """A text as any terminal shows it: what would steer one, or has no bytes, is escaped."""
    return "".join(
        letter
        if letter.isprintable() or letter == "\n"
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint: the names that are closest to one that is none of them; all where none is close."""
    names = sorted(known)
    close = _close(name, names)
    return f"did you mean {', '.join(close)}" if close else f"known: {', '.join(names)}"


def _close(name: str, names: list[str]) -> list[str]:
    return difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)


class ShardplanError(Exception):
    """Base of every error that is the user's to read, not ours to debug."""

    exit_code = 1
    code = "error"

    def __init__(self, rule: str, *, got: str = "", hint: str = "") -> None:
        self.rule = rule
        self.got = got
        self.hint = hint
        message = rule
        if got:
            message += f" ({got})"
        if hint:
            message += f"; {hint}"
        super().__init__(message)


class InputError(ShardplanError):
    """An input breaks a rule: `rule (got); hint`."""

    exit_code = 2
    code = "bad_input"


class UnknownNameError(InputError):
    """A name that no catalogue holds, with the closest ones that it does."""

    code = "unknown_name"

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        super().__init__(f"unknown {what}", got=repr(name), hint=did_you_mean(name, names))
        self.close = tuple(_close(name, names))


class LayoutError(InputError):
    """A strategy that cannot be laid on the model (a size does not divide, an axis has no home)."""

    code = "illegal_strategy"


class InfeasibleError(ShardplanError):
    """No strategy satisfies the limits: says which binds, by how much, the nearest change."""

    exit_code = 3
    code = "infeasible"


class ProofError(ShardplanError):
    """An applied graph that does not compute what the unsharded model computes."""

    exit_code = 1
    code = "proof_failed"
