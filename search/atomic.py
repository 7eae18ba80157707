"""Files that are written whole or not at all, with floats that are the same on every machine."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from shardplan.models.errors import InputError

__all__ = ["rounded", "write_atomically", "written_atomically"]


def rounded(value: Any) -> Any:
    """The same data with every float rounded to ten significant digits."""
    if isinstance(value, float):
        return float(f"{value:.10g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file through a temporary neighbour, so that a crash leaves the old one or the new.

    A text is written as UTF-8. `InputError` where the file cannot be written.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    with _written(path) as file:
        file.write(data)


@contextmanager
def written_atomically(path: Path) -> Iterator[IO[str]]:
    """The same for a text that is written piece by piece; an exception leaves the old one."""
    with _written(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
        yield text
        text.flush()
        text.detach()


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError("the file cannot be written", got=f"{path}: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise InputError("the file cannot be written", got=f"{path}: {error.strerror}") from None
    finally:
        Path(name).unlink(missing_ok=True)
