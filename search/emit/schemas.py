"""Checks what a target writes against the schema of the release that it writes for.

The schemas are JSON Schema (2020-12) in `search/data/schemas`, each with its source. Read here is
the part of that language which they use: type, properties, required, additionalProperties, items,
enum, pattern, minimum, maximum, multipleOf, anyOf, $ref. So a key that the release has not, or a
value out of its range, is refused before anything is written; tests hold the same files against
the reference implementation.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from shardplan.search.emit.common import printable, refuse

__all__ = ["check", "schema"]

_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "array": list,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "object": dict,
    "string": str,
}


@functools.cache
def schema(name: str) -> Mapping[str, Any]:
    """A shipped schema, `search/data/schemas/<name>.json`."""
    place = files("shardplan.search").joinpath("data", "schemas", f"{name}.json")
    loaded: Mapping[str, Any] = json.loads(place.read_text("utf-8"))
    return loaded


def check(target: str, name: str, definition: str, value: object) -> None:
    """`InputError` with the first place where the value breaks a definition of a schema."""
    defs = schema(name)["$defs"]
    for place, rule in _broken(defs[definition], value, definition, defs):
        raise refuse(
            target,
            f"{place} {rule}",
            got=printable(repr(_at(value, place))),
            hint=f"the keys and ranges are those of search/data/schemas/{name}.json",
        )


def _at(value: Any, place: str) -> object:
    """The value at a place such as `Config.list.0.key`; the place itself where it is not there."""
    for word in place.split(".")[1:]:
        try:
            value = value[int(word)] if isinstance(value, list) else value[word]
        except (KeyError, IndexError, ValueError, TypeError):
            return word
    return value


def _broken(
    rule: Mapping[str, Any], value: Any, place: str, defs: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """(place, rule) of what does not hold."""
    if "$ref" in rule:
        yield from _broken(defs[rule["$ref"].rpartition("/")[2]], value, place, defs)
    elif "anyOf" in rule:
        if all(any(_broken(one, value, place, defs)) for one in rule["anyOf"]):
            yield place, "is none of the forms it may have"
    elif "enum" in rule:
        if value not in rule["enum"]:
            yield place, f"is one of {', '.join(map(str, rule['enum']))}"
    elif "type" in rule:
        kind = rule["type"]
        fits = isinstance(value, _TYPES[kind]) and isinstance(value, bool) is (kind == "boolean")
        if not fits:
            yield place, f"is of type {kind}"
        elif kind == "object":
            yield from _broken_object(rule, value, place, defs)
        elif kind == "array":
            for index, item in enumerate(value):
                yield from _broken(rule.get("items", {}), item, f"{place}.{index}", defs)
        else:
            yield from _broken_scalar(rule, value, place)


def _broken_object(
    rule: Mapping[str, Any], value: Mapping[str, Any], place: str, defs: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    known, others = rule.get("properties", {}), rule.get("additionalProperties", True)
    for name in rule.get("required", ()):
        if name not in value:
            yield f"{place}.{name}", "is required"
    for name, item in value.items():
        if name in known:
            yield from _broken(known[name], item, f"{place}.{name}", defs)
        elif others is False:
            yield f"{place}.{name}", "is no key of this release"
        elif others is not True:
            yield from _broken(others, item, f"{place}.{name}", defs)


def _broken_scalar(rule: Mapping[str, Any], value: Any, place: str) -> Iterator[tuple[str, str]]:
    if "minimum" in rule and value < rule["minimum"]:
        yield place, f"is at least {rule['minimum']}"
    if "maximum" in rule and value > rule["maximum"]:
        yield place, f"is at most {rule['maximum']}"
    if "multipleOf" in rule and value % rule["multipleOf"]:
        yield place, f"is a multiple of {rule['multipleOf']}"
    if "pattern" in rule and not re.search(rule["pattern"].replace("$", r"\Z"), value):
        yield place, f"matches {rule['pattern']}"
