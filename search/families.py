"""Generations of Ascend devices, told apart by the names that the compiler knows them by."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

__all__ = ["Family", "device_family", "family_names"]

Family = Mapping[str, Any]
"""`name`, `title` and `prefixes` of one entry of `data/ascend_families.toml`."""


@functools.cache
def _families() -> tuple[Family, ...]:
    path = files("shardplan.search").joinpath("data", "ascend_families.toml")
    return tuple(tomllib.loads(path.read_text("utf-8"))["families"])


def device_family(soc_versions: Sequence[str]) -> Family | None:
    """The family of a device by its first SoC version; None for one that is no Ascend device."""
    if not soc_versions:
        return None
    first = soc_versions[0]
    return next((one for one in _families() if first.startswith(tuple(one["prefixes"]))), None)


def family_names() -> tuple[str, ...]:
    """Names of all families."""
    return tuple(str(one["name"]) for one in _families())
