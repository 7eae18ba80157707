"""The data table behind the `config.json` front end: which keys mean what, by architecture.

`data/architectures.json` holds every per-architecture fact; this module only gives it types.
A `bool | str` fact is either settled by the class (`True`, `False`) or by the boolean
configuration key that the string names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

__all__ = ["Architecture", "ConfigTable", "Guard", "MoeKeys", "SlidingRule", "config_table"]

SlidingRule = Literal["none", "all", "all_if_used", "after_max_window_layers", "listed"]

_TABLE_FILE = Path(__file__).parent / "data" / "architectures.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """A key whose value, when given, must be one of those allowed."""

    key: str
    allowed: tuple[Any, ...]
    says: str
    refuse: bool
    """Refuse the configuration; otherwise only note what `says`."""
    each: bool = False
    """The value is a list and every entry must be allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeKeys:
    """Names of the keys that describe the routed experts."""

    experts: tuple[str, ...]
    """The number of experts, by any of these names."""
    ffn: str = "moe_intermediate_size"
    shared_count: str | None = None
    """Key of the number of shared experts, each as wide as a routed one."""
    shared_width: str | None = None
    """Key of the total width of the shared experts."""
    shared_gate: bool = False
    dense: Literal["first_k_dense_replace", "mlp_only_layers"] | None = None
    """Key that says which layers keep a dense feed-forward network."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    scoring_key: str | None = None
    normalise: bool | str = False
    router_bias: bool | str = False
    one_expert_per_group: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What one Hugging Face architecture means by its configuration keys."""

    model_types: tuple[str, ...]
    defaults: Mapping[str, Any]
    """Values that the class gives to absent keys."""
    guards: tuple[Guard, ...]
    source: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: Literal["none", "head", "full"] = "none"
    qk_norm_key: str | None = None
    sandwich_norms: bool = False
    sliding: SlidingRule = "none"
    mla: bool = False
    moe: MoeKeys | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigTable:
    """The whole table: architectures by name, and how to read a checkpoint's element type."""

    architectures: Mapping[str, Architecture]
    text_parts: tuple[str, ...]
    """Keys under which a multi-modal configuration keeps its language model."""
    inherited: tuple[str, ...]
    """Keys that such a part takes from the configuration around it."""
    dtypes: Mapping[str, str]
    quantization: Mapping[str, Any]

    def by_model_type(self, model_type: str) -> str | None:
        """The architecture of a `model_type`, None when no entry names it."""
        for name, entry in self.architectures.items():
            if model_type in entry.model_types:
                return name
        return None


@cache
def config_table() -> ConfigTable:
    """The table, read once a process."""
    raw = json.loads(_TABLE_FILE.read_text(encoding="utf-8"))
    return ConfigTable(
        architectures={
            name: _architecture(entry, raw) for name, entry in raw["architectures"].items()
        },
        text_parts=tuple(raw["text_parts"]),
        inherited=tuple(raw["inherited_by_text_part"]),
        dtypes=raw["dtypes"],
        quantization=raw["quantization"],
    )


def _architecture(entry: Mapping[str, Any], raw: Mapping[str, Any]) -> Architecture:
    facts = dict(entry)
    guards = list(raw["guards"])
    for name in facts.pop("guards", ()):
        guards += raw["guard_sets"][name]
    moe = facts.pop("moe", None)
    return Architecture(
        model_types=tuple(facts.pop("model_types")),
        source=facts.pop("source", raw["source"]),
        notes=tuple(facts.pop("notes", ())),
        guards=tuple(Guard(**{**guard, "allowed": tuple(guard["allowed"])}) for guard in guards),
        moe=None if moe is None else MoeKeys(**{**moe, "experts": tuple(moe["experts"])}),
        **facts,
    )
