"""The one place that imports torch for `shardplan.models.fx`, and says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from shardplan.models.errors import InputError

__all__ = ["aten", "functional", "said", "torch_lib", "transformers_lib"]


def torch_lib() -> Any:
    """The module torch. `InputError` where it is missing."""
    return _import("torch")


def transformers_lib() -> Any:
    """The module transformers. `InputError` where it is missing."""
    return _import("transformers")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"graphs of PyTorch need the package {name}",
            got=str(error),
            hint='install the extra: pip install "shardplan[torch]"',
        ) from None


def said(error: Exception, most: int = 300) -> str:
    """What PyTorch, or a model, raised, on one line of about `most` characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


def aten() -> Any:
    """`torch.ops.aten`."""
    return torch_lib().ops.aten


def functional() -> Any:
    """`torch.ops._c10d_functional`: collectives as functions, which compilers see in a graph."""
    torch_lib()
    importlib.import_module("torch.distributed._functional_collectives")
    return torch_lib().ops._c10d_functional
