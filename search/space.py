"""The strategy space: every combination of the searched dimensions, and which of them are legal.

    layout    tp * pp * dp * cp = cards; ep; sp; exchange of tokens among experts; where asked also
              contexts over ranks, modules over their own ranks, tokens predicted ahead (`layouts`)
    cut       layers of each of pp stages, any positive numbers that sum to the layers
    order     which axis neighbouring ranks lie on, of the axes that have ranks
    choices   attention kernel, weight dtype, KV dtype, switches of the engine, algorithm of the
              collectives between nodes
    grid      batch (slots of a dp group), chunk (tokens of a step of a dp group)

The size of the space is the full product, legal or not: |choices| * |grid| * the sum over layouts
of the ways to cut the layers into their stages, times those to order their axes. A layout
that breaks a rule is left out with all its choices, under the first rule that it breaks; a choice
whose switches a layout does not allow is left out of that layout (`broken_switch`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.optable import Overlap
from shardplan.models.parallel import Axis, Parallelism, balanced_stages
from shardplan.models.spec import ModelSpec
from shardplan.search.cuts import cut_count
from shardplan.search.layouts import (
    Reach,
    base_order,
    module_splits,
    other_orders,
    raw_layouts,
)
from shardplan.search.legality import first_broken_rule, first_broken_switch_rule
from shardplan.search.plan import StrategyInfo
from shardplan.search.rulebook import Role, Subject

__all__ = [
    "Choice",
    "Ruled",
    "Space",
    "batch_grid",
    "build_space",
    "chunk_grid",
    "strategy_info",
]

_DIMENSIONS = (
    *("tp", "pp", "dp", "ep", "cp", "sp", "exchange", "mtp"),
    *("o_tp", "ffn_tp", "shared_tp", "head_tp", "embed_tp"),
)
_FINE = 16
_PER_OCTAVE = 16
_MAX_BATCH = 1024
_MIN_CHUNK = 256
_MAX_CHUNK = 16384
_CHUNKS_PER_OCTAVE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What changes prices but not the graph."""

    attention: AttentionKernel
    weight_dtype: str
    kv_dtype: str
    weight_prefetch: bool = False
    fused_collectives: bool = False
    collectives: str = "auto"
    """Algorithm of the collectives between nodes; auto: the library's own pick."""

    @classmethod
    def of(cls, way: StrategyInfo) -> Choice:
        """The choice of a strategy that a plan holds."""
        return cls(**{one.name: getattr(way, one.name) for one in fields(cls)})

    @property
    def overlap(self) -> Overlap:
        """The switches of the engine, and the algorithm between nodes."""
        return Overlap(
            weight_prefetch=self.weight_prefetch,
            fused_collectives=self.fused_collectives,
            collectives=self.collectives,
        )

    @property
    def switched(self) -> bool:
        """Whether any switch is on."""
        return self.weight_prefetch or self.fused_collectives


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruled(ABC):
    """Layouts of a model on a machine, and how the rules look at them; a `Space`, or a pool."""

    role: Role = "mixed"
    spec: ModelSpec
    cluster: Cluster
    engine: EngineProfile
    cards: int
    reach: Reach
    """What is searched beyond the plain axes."""
    choices: tuple[Choice, ...]

    @abstractmethod
    def raw(self) -> Iterator[Parallelism]:
        """Every layout in a fixed order, legal or not, ranks ordered as the engine does."""

    @property
    @abstractmethod
    def points(self) -> int:
        """Points of the grid of one layout and choice."""

    def ways(self) -> Iterator[Parallelism]:
        """Every layout with every order of its ranks, legal or not."""
        return (replace(par, order=one) for par in self.raw() for one in self.raw_orders_of(par))

    def raw_orders_of(self, par: Parallelism) -> tuple[tuple[Axis, ...], ...]:
        """Orders of a layout's axes, legal or not, its own first."""
        return (par.order, *other_orders(par, self.reach))

    def cuts_of(self, par: Parallelism) -> int:
        """Ways to cut the layers into the stages of a layout; 1 where there are too few layers."""
        return max(cut_count(self.spec.layers, par.pp), 1) if self.reach.ways else 1

    def subject(self, par: Parallelism) -> Subject:
        """A layout as the rules look at it."""
        return Subject(
            spec=self.spec,
            cluster=self.cluster,
            engine=self.engine,
            parallel=par,
            role=self.role,
        )

    def broken_switch(self, par: Parallelism, choice: Choice) -> str | None:
        """Id of the first rule that the choice's switches break on a layout; None when legal."""
        if not choice.switched:
            return None
        return first_broken_switch_rule(self.switch_subject(par, choice))

    def switch_subject(self, par: Parallelism, choice: Choice) -> Subject:
        """What the rules on switches look at."""
        return replace(
            self.subject(par),
            overlap=choice.overlap,
            weight_dtype=choice.weight_dtype,
            kv_dtype=choice.kv_dtype,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Space(Ruled):
    """What is searched."""

    layouts: tuple[Parallelism, ...]
    """Legal ones, in a fixed order."""
    raw_layouts: int
    broken: Mapping[str, int]
    """Layouts that each rule left out."""
    broken_ways: Mapping[str, int]
    """The same, each counted once for every way to cut its layers and to order its ranks."""
    raw_ways: int
    """All layouts, legal or not, counted likewise."""
    batches: tuple[int, ...]
    chunks: tuple[int, ...]

    @property
    def per_layout(self) -> int:
        """Strategies of one layout."""
        return len(self.choices) * self.points

    @property
    def points(self) -> int:
        """Pairs of slots and step size."""
        return len(self.batches) * len(self.chunks)

    @property
    def size(self) -> int:
        """Strategies of the whole space, legal or not."""
        return self.raw_ways * self.per_layout

    @property
    def broken_strategies(self) -> dict[str, int]:
        """Strategies that each rule left out."""
        return {rule: count * self.per_layout for rule, count in self.broken_ways.items()}

    def raw(self) -> Iterator[Parallelism]:
        """Every layout in a fixed order, legal or not; modules are split where one is legal."""
        for par in raw_layouts(self.spec, self.engine, self.cards, self.reach):
            yield par
            if self.reach.modules and self.broken_rule(par) is None:
                yield from module_splits(self.spec, par)

    def judged(self) -> Iterator[tuple[Parallelism, str | None, dict[str, int]]]:
        """(layout, first rule that it breaks, its cuts and orders by their rule, "" for none)."""
        for par in self.raw():
            first, *others = self.raw_orders_of(par)
            rule, cuts = self.broken_rule(replace(par, order=first)), self.cuts_of(par)
            each: dict[str, int] = {rule or "": cuts}
            for order in others:
                name = self.broken_rule(replace(par, order=order)) or ""
                each[name] = each.get(name, 0) + cuts
            yield par, rule, each

    def orders_of(self, par: Parallelism) -> tuple[tuple[Axis, ...], ...]:
        """Legal orders of a layout's axes, its own first."""
        if not self.reach.ways:
            return (par.order,)
        every = self.raw_orders_of(par)
        return tuple(one for one in every if self.broken_rule(replace(par, order=one)) is None)

    def broken_rule(self, par: Parallelism) -> str | None:
        """Id of the first rule that a layout breaks; None when it is legal."""
        return first_broken_rule(self.subject(par))

    def strategies(self, par: Parallelism) -> int:
        """Strategies of a layout, all its cuts and legal orders together."""
        return self.cuts_of(par) * len(self.orders_of(par)) * self.per_layout

    def layout_of(self, par: Parallelism) -> Parallelism:
        """The layout of the space that a strategy's splits belong to."""
        order = base_order(self.engine, par)
        if par.order == order and not par.stage_layers:
            return par
        return replace(par, stage_layers=(), order=order)

    def dimensions(self) -> dict[str, list[object]]:
        """Values of each dimension, for the certificate."""

        def values(name: str) -> list[object]:
            return sorted({getattr(layout, name) for layout in self.layouts})

        return {
            **{name: values(name) for name in _DIMENSIONS},
            "order": [*sorted({"-".join(o) for par in self.layouts for o in self.orders_of(par)})],
            "stage_layers": ["any" if self.reach.ways else "even"],
            "attention": [*sorted({c.attention for c in self.choices})],
            "weight_dtype": [*sorted({c.weight_dtype for c in self.choices})],
            "kv_dtype": [*sorted({c.kv_dtype for c in self.choices})],
            "weight_prefetch": [*sorted({c.weight_prefetch for c in self.choices})],
            "fused_collectives": [*sorted({c.fused_collectives for c in self.choices})],
            "collectives": [*sorted({c.collectives for c in self.choices})],
            "batch": list(self.batches),
            "chunk": list(self.chunks),
        }

    def strategy(self, par: Parallelism, choice: Choice, batch: int, chunk: int) -> StrategyInfo:
        """One point as the plan writes it."""
        return strategy_info(self.spec, par, choice, batch, chunk)


def strategy_info(
    spec: ModelSpec, par: Parallelism, choice: Choice, batch: int, chunk: int
) -> StrategyInfo:
    """A layout, a choice, slots and step size as the plan writes them."""
    layout = {one.name: getattr(par, one.name) for one in fields(Parallelism)}
    chosen = {one.name: getattr(choice, one.name) for one in fields(Choice)}
    layout["stage_layers"] = balanced_stages(spec, par)
    return StrategyInfo(**layout, **chosen, batch=batch, chunk=chunk)


def batch_grid(limit: int) -> tuple[int, ...]:
    """Slots to try: every number to 16, then sixteen an octave, and the limit itself."""
    limit = min(limit, _MAX_BATCH)
    octaves = np.arange(math.log2(_FINE), math.log2(max(limit, 2)) + 1e-9, 1.0 / _PER_OCTAVE)
    found = {*range(1, min(_FINE, limit) + 1), *(round(2.0**x) for x in octaves), limit}
    return tuple(sorted(b for b in found if 1 <= b <= limit))


def chunk_grid(engine: EngineProfile, input_len: int, output_len: int) -> tuple[int, ...]:
    """Step sizes to try, tokens: eight an octave, the engine's default, and the whole prompt.

    None is larger than the prompts that can start in one step of the most slots
    (slots / output_len, at least two): a larger step has nothing to fill it.
    """
    steps = np.arange(math.log2(_MIN_CHUNK), math.log2(_MAX_CHUNK) + 1e-9, 1.0 / _CHUNKS_PER_OCTAVE)
    useful = input_len * max(2, -(-_MAX_BATCH // output_len))
    limit = max(engine.max_num_batched_tokens, min(useful, _MAX_CHUNK))
    found = {round(2.0**x / 16) * 16 for x in steps}
    found |= {engine.max_num_batched_tokens, max(_MIN_CHUNK, min(input_len, _MAX_CHUNK))}
    return tuple(sorted(size for size in found if size <= limit))


def build_space(
    spec: ModelSpec,
    cluster: Cluster,
    engine: EngineProfile,
    *,
    cards: int,
    choices: tuple[Choice, ...],
    batches: tuple[int, ...],
    chunks: tuple[int, ...],
    reach: Reach | None = None,
) -> Space:
    """The space over `cards` ranks, with the rules applied to every layout."""
    space = Space(
        spec=spec,
        cluster=cluster,
        engine=engine,
        cards=cards,
        layouts=(),
        raw_layouts=0,
        broken={},
        broken_ways={},
        raw_ways=0,
        reach=reach or Reach(),
        choices=choices,
        batches=batches,
        chunks=chunks,
    )
    broken, broken_ways, count, ways = Counter[str](), Counter[str](), 0, 0
    legal = []
    for par, rule, each in space.judged():
        count += 1
        ways += sum(each.values())
        broken_ways.update({name: many for name, many in each.items() if name})
        if rule is None:
            legal.append(par)
        else:
            broken[rule] += 1
    return replace(
        space,
        layouts=tuple(legal),
        raw_layouts=count,
        broken=dict(sorted(broken.items())),
        broken_ways=dict(sorted(broken_ways.items())),
        raw_ways=ways,
    )
