"""A `.pt2` file, as `torch.export.save` writes it, opened."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from shardplan.models.errors import InputError
from shardplan.models.fx.torch_lib import torch_lib

__all__ = ["open_program"]


def open_program(path: Path) -> Any:
    """The `ExportedProgram` in a file. `InputError` for what is no such file."""
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
        return torch.export.load(path)
    except Exception as error:  # whatever the loader raises on a file that it does not know
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(
            "the file is read by torch.export.load",
            got=f"file={shown}, {said}",
            hint="save it again with the installed version of torch",
        ) from None
