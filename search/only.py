"""Axes held to some sizes: `--only tp=4,8 --only pp=1`, checked and in one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardplan.models.errors import InputError, did_you_mean
from shardplan.search.workload import shown

__all__ = ["only_of", "only_words"]

_AXES = ("tp", "pp", "dp", "ep", "cp", "sp")
_MOST = 2**20
_MOST_DIGITS = len(str(_MOST))
_SWITCH = {"off": 0, "on": 1, "0": 0, "1": 1}

Sizes = tuple[tuple[str, tuple[int, ...]], ...]


def only_of(
    asked: Mapping[str, int | Sequence[int]] | Sequence[str] | None,
    contexts: tuple[int, ...] | None,
) -> Sizes:
    """(axis, its sizes ascending), by axis; () for None. `contexts`: ranks that may share one.

    `InputError` for what is no axis, a size that no axis has, an axis given twice, and ranks that
    share a context where none may.
    """
    if not asked:
        return ()
    if isinstance(asked, str):
        asked = (asked,)
    pairs = list(asked.items()) if isinstance(asked, Mapping) else [_split(one) for one in asked]
    found: dict[str, tuple[int, ...]] = {}
    for name, values in pairs:
        if name not in _AXES:
            raise InputError(
                f"`only` holds an axis to sizes: {', '.join(_AXES)}",
                got=f"only={shown(name)}",
                hint=did_you_mean(str(name)[:40], _AXES) or "try --only tp=8",
            )
        if name in found:
            raise InputError(
                "`only` names an axis once",
                got=f"{name} twice",
                hint=f"give all sizes together: --only {name}=4,8",
            )
        found[name] = _sizes(name, values)
    if contexts is not None and not set(found.get("cp", contexts)) <= set(contexts):
        raise InputError(
            "ranks share a context where `cp` lets them",
            got=f"only cp={', '.join(map(str, found['cp']))}",
            hint="add --cp auto",
        )
    return tuple(sorted(found.items()))


def only_words(only: Sizes) -> str:
    """As people write it, "" where no axis is held."""
    each = (f"{name}={','.join(map(str, sizes))}" for name, sizes in only)
    return f"held to {' '.join(each)}" if only else ""


def _split(text: object) -> tuple[str, list[str]]:
    """`tp=4,8` as an axis and words."""
    name, equals, values = str(text).partition("=")
    if not isinstance(text, str) or not equals:
        raise InputError(
            "`only` is an axis and its sizes", got=f"only={shown(text)}", hint="try --only tp=8"
        )
    return name.strip(), [one.strip() for one in values.split(",")]


def _sizes(name: str, values: object) -> tuple[int, ...]:
    listed = values if isinstance(values, (list, tuple)) else (values,)
    found = {_size(name, one) for one in listed}
    if not found:
        raise InputError(
            "`only` names sizes", got=f"{name} without any", hint=f"try --only {name}=1"
        )
    return tuple(sorted(found))


def _size(name: str, value: object) -> int:
    """A whole number, or off and on of sp."""
    word = str(value).lower()
    if name == "sp":
        word = str(int(value)) if isinstance(value, bool) else word
        if word in _SWITCH:
            return _SWITCH[word]
        raise InputError("`sp` is off or on", got=f"only sp={shown(value)}", hint="try sp=off")
    whole = (
        not isinstance(value, bool)
        and word.isascii()
        and word.isdigit()
        and len(word) <= _MOST_DIGITS
    )
    if not whole or not 1 <= int(word) <= _MOST:
        raise InputError(
            f"sizes of axes are whole numbers from 1 to {_MOST}",
            got=f"only {name}={shown(value)}",
            hint=f"try --only {name}=8",
        )
    return int(word)
