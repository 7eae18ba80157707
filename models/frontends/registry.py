"""Front ends of other packages, found through the entry-point group `shardplan.frontends`.

The name of an entry is the ending of the files that it reads (`toy` for `model.toy`), its value a
function

    (path: Path, sizes: Mapping[str, int]) -> OpGraph | ModelSpec

which raises `InputError` for what it does not read. A package is imported when a file with its
ending is asked for. The endings of our own front ends cannot be taken over. Heavy imports stand in
the functions: names of presets pass by here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardplan.models.errors import InputError, ShardplanError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from shardplan.models.opgraph import OpGraph
    from shardplan.models.spec import ModelSpec

__all__ = [
    "BUILT_IN",
    "GRAPH_FILES",
    "GROUP",
    "Reader",
    "has_reader",
    "holds_graph",
    "read_registered",
    "registered",
]

Reader = Callable[[Path, Mapping[str, int]], "OpGraph | ModelSpec"]

GROUP = "shardplan.frontends"
GRAPH_FILES = (".onnx", ".pt2")
BUILT_IN = ("json", "onnx", "pt2")
_ENDING = re.compile(r"\.[a-z][a-z0-9_]*")
"""What can be an ending: the versions in names of models (`llama-3.1-8b`) are none."""


def holds_graph(subject: Any) -> bool:
    """Whether a subject has operators: a PyTorch object, a file that `load_graph` reads."""
    if isinstance(subject, (str, os.PathLike)):
        path = Path(subject)
        return path.suffix in GRAPH_FILES or has_reader(path)
    return True


def has_reader(path: Path) -> bool:
    """Whether a package that is installed reads files with this ending."""
    return _entry(path) is not None


def read_registered(path: Path, sizes: Mapping[str, int] | None = None) -> OpGraph | ModelSpec:
    """What the front end of another package reads in a file.

    `InputError` for a package that cannot be loaded, that fails, or gives neither a sound graph nor
    a model.
    """
    from shardplan.models.opgraph import OpGraph, check_graph
    from shardplan.models.spec import ModelSpec

    entry = _entry(path)
    if entry is None:
        raise InputError(
            "a model file has an ending that a front end reads",
            got=f"file={path}",
            hint="endings: " + ", ".join(sorted({*BUILT_IN, *registered()})),
        )
    try:
        reader: Reader = entry.load()
        found = reader(path, dict(sizes or {}))
        if isinstance(found, OpGraph):
            check_graph(found)
    except ShardplanError:
        raise
    except Exception as error:  # whatever another package raises
        raise _fault(entry, path, f"{type(error).__name__}: {error}") from error
    if not isinstance(found, OpGraph | ModelSpec):
        raise _fault(entry, path, f"it gives {type(found).__name__}, not OpGraph or ModelSpec")
    return found


def _fault(entry: EntryPoint, path: Path, what: str) -> InputError:
    return InputError(
        "the front end of another package reads the file",
        got=f"file={path}, front end {entry.name} = {entry.value}: {' '.join(what.split())[:300]}",
        hint="this is a fault of the package that registers it",
    )


def registered() -> dict[str, EntryPoint]:
    """Front ends of other packages by ending."""
    from importlib.metadata import entry_points

    found = entry_points(group=GROUP)
    return {point.name: point for point in found if point.name not in BUILT_IN}


def _entry(path: Path) -> EntryPoint | None:
    ending = path.suffix.lower()
    if not _ENDING.fullmatch(ending) or ending[1:] in BUILT_IN:
        return None
    return registered().get(ending[1:])
