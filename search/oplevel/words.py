"""What the options of an operator-level search say in words: a mesh, sizes of symbolic dims."""

from __future__ import annotations

from collections.abc import Iterable

from shardplan.models.errors import InputError
from shardplan.search.oplevel.api import MeshShape

__all__ = ["mesh_shape_of", "sizes_of"]

_MOST = 2**40


def sizes_of(words: Iterable[str]) -> dict[str, int]:
    """Sizes of symbolic dims from `NAME=N,NAME=N`. `InputError` for words that are none."""
    found: dict[str, int] = {}
    for word in (part.strip() for one in words for part in one.split(",")):
        name, _, count = word.rpartition("=")
        if not name or not (count.isascii() and count.isdigit()) or not 0 < int(count) < _MOST:
            raise InputError(
                "sizes of symbolic dims are NAME=N, whole numbers from 1 on",
                got=repr(word[:100]),
                hint="try batch=8,tokens=128",
            )
        found[name] = int(count)
    return found


def mesh_shape_of(text: str) -> MeshShape:
    """A mesh from `auto`, `8`, `2x4` or `x=2,y=4`. `InputError` for anything else."""
    word = text.strip().lower()
    if word == "auto":
        return "auto"
    names = [part.partition("=") for part in word.split(",")]
    once = len({name for name, _, _ in names}) == len(names)
    if once and all(eq and name.isidentifier() and _is_count(size) for name, eq, size in names):
        return {name: int(size) for name, _, size in names}
    sizes = word.split("x")
    if not all(map(_is_count, sizes)):
        raise InputError(
            "a mesh is auto, ranks of its axes, or the same with names",
            got=f"mesh={text[:60]!r}",
            hint="try 8, 2x4 or x=2,y=4",
        )
    return [int(size) for size in sizes]


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < len(str(_MOST))
