"""A `.pt2` file, as `torch.export.save` writes it, opened: nothing in it is run or unpickled."""

from __future__ import annotations

import contextlib
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardplan.models.errors import InputError
from shardplan.models.frontends.torch_archive import check_archive
from shardplan.models.fx.torch_lib import said, torch_lib

__all__ = ["open_program"]

_PLAIN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Of `torch.load` in this process: tensors and plain containers alone (torch/serialization.py)."""


def open_program(path: Path) -> Any:
    """The `ExportedProgram` in a file. `InputError` for what is no such file, or more than data."""
    torch = torch_lib()
    shown = str(path).encode("utf-8", "backslashreplace").decode("utf-8")
    if not path.is_file():
        raise InputError("no such file", got=f"file={shown}", hint="check the path")
    if not zipfile.is_zipfile(path):
        raise InputError(
            "a .pt2 file is an archive that torch.export.save wrote",
            got=f"file={shown}",
            hint="save the model with torch.export.save(program, path)",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(archive)
    except Exception as error:  # a broken archive raises what its parts raise
        raise InputError(
            "a .pt2 file holds a graph and plain tensors alone",
            got=f"file={shown}, {said(error, 200)}",
            hint="save the model with torch.export.save(program, path)",
        ) from None
    try:
        with _plain_tensors():
            return torch.export.load(path)
    except Exception as error:  # whatever the loader raises on a file that it does not know
        raise InputError(
            "the file is read by torch.export.load",
            got=f"file={shown}, {said(error, 200)}",
            hint="save it again with the installed version of torch",
        ) from None


@contextlib.contextmanager
def _plain_tensors() -> Iterator[None]:
    """`torch.load` takes tensors alone inside, and the loader's own tracebacks are not shown."""
    before, log = os.environ.get(_PLAIN), logging.getLogger("torch.export")
    disabled, log.disabled = log.disabled, True
    os.environ[_PLAIN] = "1"
    try:
        yield
    finally:
        log.disabled = disabled
        if before is None:
            del os.environ[_PLAIN]
        else:
            os.environ[_PLAIN] = before
