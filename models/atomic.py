"""Files that are written whole or not at all: through a temporary neighbour that is renamed."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from shardplan.models.errors import InputError

__all__ = ["write_atomically", "written_atomically", "written_bytes"]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file through a temporary neighbour, so that a crash leaves the old one or the new.

    A text is written as UTF-8. `InputError` where the file cannot be written.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    with written_bytes(path) as file:
        file.write(data)


@contextmanager
def written_atomically(path: Path) -> Iterator[IO[str]]:
    """The same for a text that is written piece by piece; an exception leaves the old one."""
    with written_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
        yield text
        text.flush()
        text.detach()


@contextmanager
def written_bytes(path: Path) -> Iterator[BinaryIO]:
    """The same for bytes, or for what a library writes into an open file."""
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
