"""The rules as they are told to people (`data/rules.toml`), and what a rule looks at.

A rule has an id, a sentence, a source, and a scope: the device families (`data/
ascend_families.toml`, or the vendor of another device) and the engine profiles that it binds,
each "all" or a list. Numbers that a rule compares with stand in its `values`. The predicate of
the same id stands in `legal_layout`, `legal_engine`, `legal_choice` or `legal_pair`.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Cluster, Device
from shardplan.costmodel.optable import NO_OVERLAP, Overlap
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec
from shardplan.search.families import device_family

__all__ = ["Role", "Rule", "Scope", "Subject", "family_name", "rules", "value"]

Role = Literal["mixed", "prefill", "decode"]
Scope = Literal["all"] | tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a rule looks at: a layout of a model on a cluster under an engine."""

    spec: ModelSpec
    cluster: Cluster
    engine: EngineProfile
    parallel: Parallelism
    overlap: Overlap = NO_OVERLAP
    weight_dtype: str = "bf16"
    kv_dtype: str = "bf16"
    role: Role = "mixed"
    """Which phases it serves: both, or one pool of a disaggregated deployment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule as it is told to people."""

    id: str
    sentence: str
    source: str
    devices: Scope
    engines: Scope
    values: Mapping[str, Any] = field(default_factory=dict)

    def binds(self, family: str, engine: str) -> bool:
        """Whether the rule speaks of a device family and an engine profile."""
        here = self.devices == "all" or family in self.devices
        return here and (self.engines == "all" or engine in self.engines)


def _scope(given: str | list[str]) -> Scope:
    return "all" if given == "all" else tuple(given)


@functools.cache
def rules() -> Mapping[str, Rule]:
    """Every rule by id, in the order of the file."""
    text = (resources.files("shardplan.search") / "data" / "rules.toml").read_text("utf-8")
    made = {}
    for name, table in tomllib.loads(text).items():
        devices, engines = _scope(table.pop("devices")), _scope(table.pop("engines"))
        made[name] = Rule(id=name, devices=devices, engines=engines, **table)
    return MappingProxyType(made)


@functools.cache
def value(rule: str, name: str) -> Any:
    """A number (or list, or table) that a rule compares with."""
    found = rules()[rule].values[name]
    return frozenset(found) if isinstance(found, list) else found


def family_name(device: Device) -> str:
    """Family of a device as the scopes of rules name it; the vendor of one outside Ascend's."""
    return _family_name(device.soc_versions, device.vendor)


@functools.cache
def _family_name(soc_versions: tuple[str, ...], vendor: str) -> str:
    family = device_family(soc_versions)
    return vendor if family is None else str(family["name"])
