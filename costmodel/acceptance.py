"""How often a token that was predicted ahead is kept, by model (`data/mtp/acceptance.toml`).

One figure a model, for every position: published figures are of the first position alone. Later
ones are kept less often where one prediction layer is used again and again: 3.20 tokens a step at
depth 7 were measured with DeepSeek-V3's own layer on MT-bench, HumanEval and GSM8K (model card of
nebius/MTP-DeepSeek-V3-0324), where 0.85 at every position would give 4.85. So depths above 1 are
priced as gains that a measurement of one's own traffic should confirm.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple, cast

from shardplan.costmodel.datafile import mapping, number, read_facts, read_shipped
from shardplan.costmodel.hardware import Fact

__all__ = ["Acceptance", "default_acceptance"]

_FIELDS = {"acceptance": number("acceptance", low=0, high=1)}


class Acceptance(NamedTuple):
    """A share and where it comes from."""

    value: float
    fact: Fact


@functools.cache
def _table() -> Mapping[str, Acceptance]:
    found = {}
    for name, own in read_shipped("mtp", "table", "acceptance").items():
        where = f"mtp/acceptance.toml, {name}"
        read = read_facts(mapping(own, where), _FIELDS, where)
        value = cast("float", read.values["acceptance"])
        found[name] = Acceptance(value, read.facts["acceptance"])
    return found


def default_acceptance(architecture: str) -> Acceptance:
    """What is published for an architecture, or what is assumed of any."""
    table = _table()
    return table.get(architecture, table["default"])
