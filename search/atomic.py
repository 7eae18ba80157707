"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from shardplan.models.errors import InputError

__all__ = ["write_atomically"]


def write_atomically(path: Path, text: str) -> None:
    """Write a file through a temporary neighbour, so that a crash leaves the old one or the new."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError("the file cannot be written", got=f"{path}: {error.strerror}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise InputError("the file cannot be written", got=f"{path}: {error.strerror}") from None
