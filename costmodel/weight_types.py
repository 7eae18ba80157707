"""Weight types by group of layers: `w8a8,experts=w4a8`.

The first word is the type of all linear layers, the others name groups (`models.weight_groups`)
that have their own. A single word is the usual case and means itself. The canonical spelling has
the most common type of the groups that a model has first (of equals, that of the first group:
attention, ffn, shared, experts), then the other groups by name: equal meanings, equal strings.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from shardplan.models.errors import InputError
from shardplan.models.weight_groups import WEIGHT_GROUPS, WeightGroup

__all__ = ["canonical", "is_mixed", "parts", "type_of", "with_types"]

_EXAMPLE = "write the type of all layers, then groups: w8a8,experts=w4a8"


def is_mixed(text: str) -> bool:
    """Whether groups are named."""
    return "," in text or "=" in text


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> Mapping[WeightGroup, str]:
    """Type of every group. `InputError` where the text is not of the form."""
    default, *others = (word.strip() for word in text.split(","))
    if not default or "=" in default:
        raise InputError(
            "a weight type begins with the type of all layers", got=text[:80], hint=_EXAMPLE
        )
    types = dict.fromkeys(WEIGHT_GROUPS, default)
    named: set[str] = set()
    for word in others:
        name, equals, dtype = (one.strip() for one in word.partition("="))
        group = next((one for one in WEIGHT_GROUPS if one == name), None)
        if group is None or not equals or not dtype or "=" in dtype:
            raise InputError(
                "groups with a weight type of their own are " + ", ".join(WEIGHT_GROUPS),
                got=text[:80],
                hint=_EXAMPLE,
            )
        if name in named:
            raise InputError("a weight type names each group once", got=text[:80], hint=_EXAMPLE)
        named.add(name)
        types[group] = dtype
    return MappingProxyType(types)


def type_of(text: str, group: WeightGroup) -> str:
    """The type of one group's weights."""
    return _parsed(text)[group] if is_mixed(text) else text


def parts(text: str, groups: Sequence[WeightGroup] = WEIGHT_GROUPS) -> tuple[str, ...]:
    """The different types of these groups."""
    if not is_mixed(text):
        return (text,)
    return tuple(dict.fromkeys(type_of(text, group) for group in groups))


def canonical(text: str, groups: Sequence[WeightGroup] = WEIGHT_GROUPS) -> str:
    """The one spelling of a type for a model that has these groups."""
    if not is_mixed(text):
        return text
    types = {group: type_of(text, group) for group in groups}
    counted = Counter(types.values())
    default = max(counted, key=counted.__getitem__)  # of equals the first counted
    others = sorted(f"{group}={dtype}" for group, dtype in types.items() if dtype != default)
    return ",".join((default, *others))


def with_types(text: str, change: Callable[[str], str]) -> str:
    """The text with every type changed; groups and their order stay.

    `InputError` where the text is not of the form.
    """
    _parsed(text)
    words = (word.strip() for word in text.split(","))
    pairs = (word.rpartition("=") for word in words)
    return ",".join(f"{name}{equals}{change(dtype.strip())}" for name, equals, dtype in pairs)
