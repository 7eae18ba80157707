"""YAML that people read: keys in the order given, scripts as blocks, a document per object.

Only the part of YAML is written that cannot be misread: a word of letters, digits and `_./-` that
begins with a letter or a slash and means no truth value stands plain, lines of printable ASCII
stand as a literal block, and every other text is in double quotes with everything but printable
ASCII escaped. So no quoting rule of YAML 1.1 or 1.2 has to be known. Tests read it back with
PyYAML.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

__all__ = ["yaml_text"]

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
_DECIMAL = re.compile(r"-?\d+\.\d+")
_LINES = re.compile(r"(?:[ -~]*\n)+")
_MEANINGS = {"false", "n", "no", "null", "off", "on", "true", "y", "yes"}
_STEP = "  "


def yaml_text(comment: str, *documents: Mapping[str, object]) -> str:
    """The documents as one stream under a comment of one or more lines.

    Values are texts, whole numbers, floats that need no exponent, truth values, lists and mappings.
    TypeError for anything else.
    """
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    bodies = ("".join(f"{line}\n" for line in _mapping(one, "")) for one in documents)
    return head + "---\n".join(bodies)


def _mapping(value: Mapping[str, object], indent: str) -> Iterator[str]:
    for key, item in value.items():
        yield from _item(f"{indent}{_text(key)}:", item, indent)


def _item(head: str, value: object, indent: str) -> Iterator[str]:
    """Lines of a value after `key:` or `-`."""
    if isinstance(value, Mapping) and value:
        if head.endswith("-"):
            first, *rest = _mapping(value, f"{indent}{_STEP}")
            yield f"{head} {first.lstrip()}"
            yield from rest
        else:
            yield head
            yield from _mapping(value, f"{indent}{_STEP}")
    elif isinstance(value, Sequence) and not isinstance(value, str) and value:
        yield head
        for item in value:
            yield from _item(f"{indent}{_STEP}-", item, f"{indent}{_STEP}")
    elif isinstance(value, str) and _is_block(value):
        yield f"{head} |"
        for line in value[:-1].split("\n"):
            yield f"{indent}{_STEP}{line}" if line else ""
    else:
        yield f"{head} {_scalar(value)}"


def _is_block(text: str) -> bool:
    """Whether lines can stand as they are: the first sets the indent, the last is not blank."""
    inside = _LINES.fullmatch(text) and text[0] not in " \n"
    return bool(inside) and bool(text[:-1].rpartition("\n")[2].strip())


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and _DECIMAL.fullmatch(repr(value)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, Sequence):
        return "[]"
    raise TypeError(f"no YAML for {type(value).__name__}")


def _text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _MEANINGS:
        return text
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    code = ord(char)
    if " " <= char <= "~":
        return f"\\{char}" if char in '"\\' else char
    if code <= 0xFF:  # noqa: PLR2004 (two hexadecimal digits)
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"  # noqa: PLR2004
