"""The one place that imports torch (extra `torch`) for the front end: the rest asks here."""

from __future__ import annotations

from typing import Any

from shardplan.models.errors import InputError

__all__ = ["need_torch"]


def need_torch() -> Any:
    """The package torch with the parts that are used here; `InputError` where it is missing."""
    try:
        import torch
        import torch.export
        import torch.fx
    except ImportError:
        raise InputError(
            "PyTorch modules and exports are read with the package torch, 2.9 or later",
            hint="install the extra: pip install 'shardplan[torch]'",
        ) from None
    return torch
