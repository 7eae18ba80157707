"""Legality: which rules a layout, a choice or a pair of pools breaks.

Rules are checked in the order of their tables, those alone that bind the device family and the
engine (`Rule.binds`); the first that is broken names the reason. The sentences, sources and scopes
stand in `data/rules.toml` (`rulebook`), the predicates in `legal_layout`, `legal_engine`,
`legal_choice` and `legal_pair`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.optable import NO_OVERLAP, Overlap
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec
from shardplan.search.legal_choice import ANY_LAYOUT, FORMAT_RULES, SWITCH_RULES
from shardplan.search.legal_engine import ENGINE_RULES
from shardplan.search.legal_layout import LAYOUT_RULES
from shardplan.search.legal_pair import PAIR_RULES
from shardplan.search.rulebook import Role, Subject, family_name, rules

__all__ = [
    "RULES",
    "binding_rules",
    "broken_pair_rules",
    "broken_rules",
    "broken_switch_rules",
    "first_broken_format_rule",
    "first_broken_pair_rule",
    "first_broken_rule",
    "first_broken_switch_rule",
    "unsupported_format",
    "unsupported_switch",
]

Holds = Callable[[Subject], bool]
RULES: Mapping[str, Holds] = MappingProxyType({**LAYOUT_RULES, **ENGINE_RULES})
"""Rules on layouts."""
_TABLES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"layout": RULES, "format": FORMAT_RULES, "switch": SWITCH_RULES, "pair": PAIR_RULES}
)


@functools.cache
def _binding(table: str, family: str, engine: str) -> tuple[tuple[str, Any], ...]:
    """The rules of a table that bind a device family and an engine."""
    known = rules()
    return tuple(
        (name, holds) for name, holds in _TABLES[table].items() if known[name].binds(family, engine)
    )


def _bound(table: str, s: Subject) -> tuple[tuple[str, Any], ...]:
    return _binding(table, family_name(s.cluster.device), s.engine.name)


def binding_rules(table: str, subject: Subject | None) -> tuple[str, ...]:
    """Ids of a table (layout, format, switch, pair) that bind a subject; all of them for None."""
    if subject is None:
        return tuple(_TABLES[table])
    return tuple(name for name, _ in _bound(table, subject))


def first_broken_rule(subject: Subject) -> str | None:
    """Id of the first rule that a layout breaks; None when it is legal."""
    return next((name for name, holds in _bound("layout", subject) if not holds(subject)), None)


def broken_rules(subject: Subject) -> tuple[str, ...]:
    """Ids of all rules that a layout breaks."""
    return tuple(name for name, holds in _bound("layout", subject) if not holds(subject))


def first_broken_format_rule(subject: Subject) -> str | None:
    """Id of the first rule that the types of weights and cache break; None when there are none."""
    return next((name for name, holds in _bound("format", subject) if not holds(subject)), None)


def first_broken_switch_rule(subject: Subject) -> str | None:
    """Id of the first rule that the switches of a layout break; None when they are legal."""
    if subject.overlap == NO_OVERLAP:
        return None
    return next((name for name, holds in _bound("switch", subject) if not holds(subject)), None)


def broken_switch_rules(subject: Subject) -> tuple[str, ...]:
    """Ids of all rules that the switches of a layout break."""
    if subject.overlap == NO_OVERLAP:
        return ()
    return tuple(name for name, holds in _bound("switch", subject) if not holds(subject))


def first_broken_pair_rule(prefill: Subject, decode: Subject) -> str | None:
    """Id of the first rule that two pools break together; None when they may form a deployment.

    Each pool is a `Subject` with its own role; the rules that bind either pool count.
    """
    return next(iter(broken_pair_rules(prefill, decode)), None)


def broken_pair_rules(prefill: Subject, decode: Subject) -> tuple[str, ...]:
    """Ids of all rules that two pools break together."""
    bound = dict.fromkeys((*_bound("pair", prefill), *_bound("pair", decode)))
    return tuple(name for name, holds in bound if not holds(prefill, decode))


def unsupported_switch(
    spec: ModelSpec, cluster: Cluster, engine: EngineProfile, overlap: Overlap, weight_dtype: str
) -> str | None:
    """Id of the first rule that rules a switch out whatever the layout; None where none does."""
    subject = Subject(
        spec=spec,
        cluster=cluster,
        engine=engine,
        parallel=Parallelism(),
        overlap=overlap,
        weight_dtype=weight_dtype,
    )
    bound = _bound("switch", subject)
    return next((name for name, holds in bound if name in ANY_LAYOUT and not holds(subject)), None)


def unsupported_format(
    spec: ModelSpec,
    cluster: Cluster,
    engine: EngineProfile,
    weight_dtype: str,
    kv_dtype: str,
    role: Role = "mixed",
) -> str | None:
    """Id of the first rule that rules types of weights and cache out; None where none does."""
    return first_broken_format_rule(
        Subject(
            spec=spec,
            cluster=cluster,
            engine=engine,
            parallel=Parallelism(),
            weight_dtype=weight_dtype,
            kv_dtype=kv_dtype,
            role=role,
        )
    )
