"""Groups of linear layers that may be stored in types of their own.

    attention   projections of attention, latent ones too, and every other linear product
    ffn         dense feed-forward networks
    shared      shared experts
    experts     routed experts

Embeddings, the LM head, routers, norms, biases and what MLA absorbs keep 16 bits (`WeightClass`)
and belong to no group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from shardplan.models.graph import Op, Role
from shardplan.models.spec import ModelSpec

__all__ = ["WEIGHT_GROUPS", "WeightGroup", "group_of", "groups_of"]

WeightGroup = Literal["attention", "ffn", "shared", "experts"]
WEIGHT_GROUPS: tuple[WeightGroup, ...] = ("attention", "ffn", "shared", "experts")
_BY_ROLE: Mapping[Role, WeightGroup] = {"ffn": "ffn", "shared": "shared", "expert": "experts"}


def group_of(op: Op) -> WeightGroup:
    """The group of a linear operator's weights."""
    return _BY_ROLE.get(op.role, "attention")


def groups_of(spec: ModelSpec) -> tuple[WeightGroup, ...]:
    """Groups that a model has weights of."""
    moe = spec.moe
    has = {
        "attention": True,
        "ffn": spec.dense_layers > 0,
        "shared": moe is not None and moe.shared_ffn > 0,
        "experts": moe is not None,
    }
    return tuple(one for one in WEIGHT_GROUPS if has[one])
