"""Valid examples made invalid: edits that know the structure of a file, then edits of its bytes.

A mutator takes the bytes of an example, other examples of the same kind (parts are taken over from
them) and a source of chance; hypothesis and libFuzzer each give their own. What a mutator cannot
read as its kind it edits as bytes.
"""

from __future__ import annotations

import copy
import csv
import functools
import io
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

__all__ = [
    "EDITS",
    "MOST_BYTES",
    "VALUES",
    "WORDS",
    "edit_bytes",
    "edit_csv",
    "edit_json",
    "edit_jsonl",
    "edit_lines",
    "edit_toml",
    "edit_tree",
    "edit_words",
]

WORDS = (
    *("", " ", "0", "-0", "-1", "1", "2", "3", "1e400", "-1e400", "nan", "inf", "1e-400", "0.5"),
    *("1" + "0" * 30, "9" * 5000, "2147483648", "9223372036854775808", "18446744073709551616"),
    *("true", "null", "1_000", " 8 ", "0x10", "١٢", "½", "1,5", "auto", "all", "None", "-"),
    *("../../hit/passwd", "/dev/zero", "/dev/stdin", ".", "~", "a" * 10_000, "\x00", "\x1b[31m"),
    *(
        "$(touch hit)",
        "`touch hit`",
        "; touch hit",
        "' || touch hit #",
        "<script>alert(1)</script>",
    ),
    *("{{7*7}}", "%s%n", "é", "漢字", "\u202e", "\ufeff", "🤖", "\r\n", "\n", "\t", '"', "'", "\\"),
)
"""Texts that break careless readers: of numbers, of paths, of shells, of pages, of encodings."""
VALUES: tuple[Any, ...] = (
    *(0, -0.0, -1, 1, 2, 3, 7, 1.5, True, False, None, [], {}, [[]], [None], {"a": {}}, [0, 0]),
    *(10**30, -(10**30), 2**31, 2**63, 2**64, 1e308, 1e-320, float("inf"), float("nan")),
    *("\ud800", *WORDS),
)
_PART = re.compile(r"\d+(?:\.\d+)?|[^\W\d]+")
_RAW = (b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n\n", b"[" * 200, b"{" * 200, b"\xc3\x28")
MOST_BYTES = 1 << 16
EDITS = (1, 1, 1, 2, 2, 4)


def edit_bytes(data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """Bytes flipped, cut, repeated, put in, or taken over from another example."""
    held = bytearray(data)
    for _ in range(chance.choice(EDITS)):
        at = chance.randint(0, len(held))
        match chance.randint(0, 5):
            case 0 if held:
                held[at % len(held)] ^= 1 << chance.randint(0, 7)
            case 1:
                del held[at : at + chance.randint(1, 64)]
            case 2:
                held[at:at] = held[at : at + chance.randint(1, 64)] * chance.randint(1, 8)
            case 3:
                held[at:at] = chance.choice(_RAW)
            case 4:
                held[at:at] = chance.choice(WORDS).encode("utf-8", "surrogatepass")
            case _:
                other = chance.choice(others) if others else data
                start = chance.randint(0, len(other))
                held[at : at + chance.randint(0, 64)] = other[start : start + 64]
    return bytes(held[:MOST_BYTES])


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        keys: Any = one if isinstance(one, dict) else range(len(one))
        for key in keys:
            found.append((one, key))
            if isinstance(one[key], dict | list):
                waiting.append(one[key])
    return found


def edit_tree(value: Any, others: Sequence[Any], chance: Random) -> Any:
    """A few values of a tree of dicts and lists replaced, removed, doubled, renamed, nested."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.02:
        return copy.deepcopy(chance.choice(VALUES))
    for _ in range(chance.choice(EDITS)):
        places = _places(value, [])
        if not places:
            break
        holder, key = chance.choice(places)
        _edit_place(holder, key, [value, *others], chance)
    return value


def _edit_place(holder: Any, key: Any, trees: Sequence[Any], chance: Random) -> None:
    match chance.randint(0, 8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[chance.choice(WORDS)] = holder.pop(key)
        case 1:
            holder.extend(holder[: chance.randint(1, 64)])
        case 2 if isinstance(holder, dict):
            holder[str(key).upper()] = holder[key]
        case 3:
            tree = chance.choice(trees)
            places = _places(tree, []) if isinstance(tree, dict | list) else []
            if places:
                other, where = chance.choice(places)
                holder[key] = json.loads(json.dumps(other[where], default=str))
        case 4 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * chance.choice((-1, 0, 2, 3, 0.5, 10**6, 10**-6, 10**12))
        case 5 if isinstance(holder[key], str):
            holder[key] = edit_text(holder[key], chance)
        case 6:
            holder[key] = [holder[key]] * chance.randint(1, 3)
        case 7 if isinstance(holder[key], int | float):
            holder[key] = str(holder[key])
        case _:
            holder[key] = copy.deepcopy(chance.choice(VALUES))


def edit_text(text: str, chance: Random) -> str:
    """A text with one of its numbers or words replaced, or with something put in."""
    parts = list(_PART.finditer(text))
    word = chance.choice(WORDS)
    if parts and chance.random() < 0.7:
        part = chance.choice(parts)
        return text[: part.start()] + word + text[part.end() :]
    at = chance.randint(0, len(text))
    return text[:at] + word + text[at:]


@functools.lru_cache(maxsize=128)
def _tree_of(read: Callable[[str], Any], data: bytes) -> Any:
    """The examples are read again and again: what is kept here is not to be edited."""
    return read(data.decode("utf-8"))


def _edited(
    read: Callable[[str], Any], data: bytes, others: Sequence[bytes], chance: Random
) -> Any:
    own = json.loads(json.dumps(_tree_of(read, data), default=str))
    return edit_tree(own, [_tree_of(read, chance.choice(others))] if others else [], chance)


def edit_json(data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """A JSON text of an edited tree; infinities may be written as numbers too large for one."""
    text = json.dumps(_edited(json.loads, data, others, chance), indent=chance.choice((None, 1)))
    if chance.random() < 0.5:
        text = text.replace("Infinity", "1e400")
    return text.encode("utf-8")


def edit_jsonl(data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """Lines of JSON, some of them edited, moved or doubled."""
    lines = data.splitlines()
    for _ in range(chance.choice(EDITS)):
        at = chance.randrange(len(lines))
        match chance.randint(0, 3):
            case 0:
                lines.insert(chance.randrange(len(lines)), lines[at])
            case 1 if len(lines) > 1:
                del lines[at]
            case _:
                lines[at] = edit_json(lines[at], (), chance).replace(b"\n", b" ")
    return b"\n".join(lines) + b"\n"


def toml_text(table: Mapping[str, Any]) -> str:
    """A table as TOML: every key of the top on a line, tables inside inline."""
    lines = (f"{json.dumps(str(key))} = {_inline(value)}\n" for key, value in table.items())
    return "".join(lines)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(str(key))} = {_inline(one)}" for key, one in value.items())
        return "{" + inner + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value)
    return '"none"' if value is None else repr(value)


def edit_toml(data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """A TOML text of an edited table."""
    table = _edited(tomllib.loads, data, others, chance)
    if not isinstance(table, dict):
        return _inline(table).encode("utf-8", "surrogatepass")
    return toml_text(table).encode("utf-8", "surrogatepass")


def edit_csv(data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """Cells replaced, columns doubled or removed, rows repeated, cut or made longer."""
    rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline="")))
    for _ in range(chance.choice(EDITS)):
        row = rows[0] if chance.random() < 0.15 else chance.choice(rows)
        column = chance.randrange(len(row)) if row else 0
        match chance.randint(0, 9):
            case 0 if row:
                del row[column]
            case 1:
                row.insert(column, chance.choice(WORDS))
            case 2:
                for one in rows:
                    one.extend(one[column : column + 1])
            case 3:
                for one in rows:
                    del one[column : column + 1]
            case 4:
                rows.insert(chance.randrange(len(rows)), list(row))
            case 5 if row:
                row[column] = chance.choice(chance.choice(rows) or [""])
            case 6 | 7 if row:
                row[column] = edit_text(row[column], chance)
            case _ if row:
                row[column] = chance.choice(WORDS)
    text = io.StringIO()
    csv.writer(text, lineterminator=chance.choice(("\n", "\r\n"))).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def edit_lines(data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """Words of a text (a script, a log) replaced, removed, doubled; lines moved."""
    lines = [line.split(" ") for line in data.decode("utf-8").split("\n")]
    for _ in range(chance.choice(EDITS)):
        line = chance.choice(lines)
        at = chance.randrange(len(line))
        match chance.randint(0, 4):
            case 0 if len(line) > 1:
                del line[at]
            case 1:
                line.insert(at, chance.choice(chance.choice(lines)))
            case 2:
                lines.insert(chance.randrange(len(lines)), list(line))
            case _:
                line[at] = edit_text(line[at], chance)
    return "\n".join(" ".join(line) for line in lines).encode("utf-8", "surrogatepass")


def edit_words(data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """A command line: words replaced, removed, doubled, or taken from another."""
    words = shlex.split(data.decode("utf-8"))
    pool = shlex.split(chance.choice(others).decode("utf-8")) if others else words
    for _ in range(chance.choice(EDITS)):
        at = chance.randint(0, len(words))
        match chance.randint(0, 4):
            case 0:
                del words[at : at + 1]
            case 1:
                words[at:at] = words[at : at + 2]
            case 2:
                start = chance.randint(0, len(pool))
                words[at:at] = pool[start : start + 2]
            case 3 if at < len(words):
                words[at] = edit_text(words[at], chance)
            case _:
                words[at : at + 1] = [chance.choice(WORDS)]
    return shlex.join(words).encode("utf-8", "surrogatepass")
