"""Cost groups: what of a step goes wrong together, and a step model with groups made slower.

    dense                       products of weights that every token meets, fused ones too
    experts                     grouped products
    attention                   attention kernels, multi-head latent ones too
    collectives in a node       collectives that cross tiers of one node alone
    collectives between nodes   the others
    other kernels               norms, rotations, routing, sampling: all that streams
    host and launches           the engine's time between steps, launches and gaps of kernels

With factor f of each group the time of a row r in group g becomes f_g t(r):

    parts(f) = parts(1) + sum over groups of (f_g - 1) parts of the rows of g

so factors of one give the model's own numbers to the last bit. A fused product and all_reduce is
in two groups: its wire time in that of the all_reduce, the rest in `dense`. Factors are arrays
that broadcast against the grid from the left, `[factors, 1]` against points `[points]`: one pass
prices a grid at many factors.
Left out: what a slower kernel would change elsewhere (weights prefetched beside it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.load import Load, Parts
from shardplan.costmodel.memo import Memo
from shardplan.costmodel.optable import Group, Row
from shardplan.costmodel.step import StepModel
from shardplan.models.graph import Phase

__all__ = [
    "BETWEEN_NODES",
    "COST_GROUPS",
    "HOST",
    "IN_NODE",
    "TRANSFER",
    "ScaledModel",
    "groups_of",
]

IN_NODE, BETWEEN_NODES = "collectives in a node", "collectives between nodes"
HOST = "host and launches"
TRANSFER = "transfer between pools"
"""Of caches, from prefill to decode instances: no part of a step (`costmodel.disagg`)."""
COST_GROUPS = ("dense", "experts", "attention", IN_NODE, BETWEEN_NODES, "other kernels", HOST)
_WIRES = (IN_NODE, BETWEEN_NODES)
_DENSE = ("matmul", "matmul_all_reduce")


def groups_of(row: Row, cluster: Cluster) -> tuple[str, ...]:
    """Cost groups of a row, the one with most of its time first; two where it is fused."""
    if row.is_collective:
        far = any(span.tier.ranks > cluster.ranks_per_node for span in row.spans)
        return (BETWEEN_NODES if far else IN_NODE,)
    if row.kind == "grouped_matmul":
        return ("experts",)
    if row.kind in _DENSE:
        return ("dense", *(groups_of(row.fused, cluster) if row.fused is not None else ()))
    if "attention" in row.kind or row.kind == "mla_absorbed":
        return ("attention",)
    return ("other kernels",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledModel:
    """A step model whose cost groups take `factors` times their time; a `forward.Pricer`."""

    model: StepModel
    within: Mapping[str, StepModel]
    """The same model with the rows of one cost group alone."""
    factors: Mapping[str, Array]

    @classmethod
    def of(cls, model: StepModel, cluster: Cluster) -> ScaledModel:
        """Nothing scaled yet; prices are shared with `model` where it remembers them."""
        found: dict[str, dict[Phase, dict[str, tuple[Row, ...]]]] = {}
        for phase, templates in model.rows.items():
            for name, rows in templates.items():
                for row in rows:
                    for group in groups_of(row, cluster):
                        own = found.setdefault(group, {one: {} for one in model.rows})[phase]
                        own[name] = (*own.get(name, ()), row)
        within = {name: model.with_rows(rows) for name, rows in found.items()}
        return cls(model=model, within=within, factors={})

    def at(self, factors: Mapping[str, Array]) -> ScaledModel:
        """The same model at other factors; groups that are not named keep their time."""
        return replace(self, factors=factors)

    @property
    def memo(self) -> Memo | None:
        """The model's memory; none where factors are those of a grid of two dims."""
        wide = any(one.ndim > len(("factors", "points")) for one in self.factors.values())
        return None if wide else self.model.memo

    @property
    def engine(self) -> EngineProfile:
        """The model's engine."""
        return self.model.engine

    @property
    def groups(self) -> int:
        """Data-parallel groups."""
        return self.model.groups

    @property
    def locked(self) -> int:
        """Data-parallel groups whose steps run together."""
        return self.model.locked

    @property
    def context_ranks(self) -> int:
        """Ranks that share a context."""
        return self.model.context_ranks

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return self.model.stages

    def parts(self, group: Group, load: Load) -> list[Parts]:
        """Per stage, the rows of one group under a load, slower by the factors."""
        stages = self.model.parts(group, load)
        for name, factor in self.factors.items():
            if name == HOST:
                stages = _each(stages, stages, factor, _launched)
            elif name in self.within:
                rows = self.within[name].parts(group, load)
                if any(one.kernels for one in rows):
                    grown = _wire_grown if name in _WIRES else _kernels_grown
                    stages = _each(stages, rows, factor, grown)
        return stages

    def step_s(self, stages: list[Parts], phase: Phase) -> list[Array]:
        """Seconds of each stage, launches included; the engine's host time is not."""
        return self.model.step_s(stages, phase)

    def host_s(self, phase: Phase) -> float | Array:
        """Host time of a step that the device waits for."""
        return self.model.host_s(phase) * self.factors.get(HOST, np.ones(()))


def _each(
    stages: list[Parts],
    rows: list[Parts],
    factor: Array,
    change: Callable[[Parts, Parts, Array], Parts],
) -> list[Parts]:
    """Every stage changed; stages that share their parts share the result."""
    known: dict[tuple[int, int], Parts] = {}
    out = []
    for own, part in zip(stages, rows, strict=True):
        key = (id(own), id(part))
        if key not in known:
            known[key] = change(own, part, factor)
        out.append(known[key])
    return out


def _kernels_grown(own: Parts, part: Parts, factor: Array) -> Parts:
    more = factor - 1.0
    return Parts(
        own.compute_s + more * part.compute_s,
        own.memory_s + more * part.memory_s,
        own.collective_s,
        own.overhead_s + more * part.overhead_s,
        own.kernels,
    )


def _wire_grown(own: Parts, part: Parts, factor: Array) -> Parts:
    return own._replace(collective_s=own.collective_s + (factor - 1.0) * part.collective_s)


def _launched(own: Parts, _: Parts, factor: Array) -> Parts:
    """Launches and gaps are counted by kernels: more of them take more time."""
    return own._replace(kernels=cast("float", own.kernels * factor))
