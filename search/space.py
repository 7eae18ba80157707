"""The strategy space: every combination of the searched dimensions, and which of them are legal.

    layout    tp * pp * dp = cards; ep divides tp * dp; sp; exchange of tokens among experts
    choices   attention kernel, weight dtype, KV dtype, switches of the engine
    grid      batch (slots of a dp group), chunk (tokens of a step of a dp group)

The size of the space is the full product, legal or not: |layouts| * |choices| * |grid|. A layout
that breaks a rule is left out with all its choices, under the first rule that it breaks; a choice
whose switches a layout does not allow is left out of that layout (`broken_switch`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.optable import Overlap
from shardplan.models.parallel import Parallelism, balanced_stages
from shardplan.models.spec import ModelSpec
from shardplan.search.legality import Subject, first_broken_rule, first_broken_switch_rule
from shardplan.search.plan import StrategyInfo

__all__ = ["Choice", "Space", "batch_grid", "build_space", "chunk_grid", "divisors"]

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
        """The switches of the engine."""
        return Overlap(
            weight_prefetch=self.weight_prefetch, fused_collectives=self.fused_collectives
        )

    @property
    def switched(self) -> bool:
        """Whether any switch is on."""
        return self.weight_prefetch or self.fused_collectives


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What is searched."""

    spec: ModelSpec
    cluster: Cluster
    engine: EngineProfile
    cards: int
    layouts: tuple[Parallelism, ...]
    """Legal ones, in a fixed order."""
    raw_layouts: int
    broken: Mapping[str, int]
    """Layouts that each rule left out."""
    choices: tuple[Choice, ...]
    batches: tuple[int, ...]
    chunks: tuple[int, ...]
    cuts: Callable[[Parallelism], Sequence[tuple[int, ...]]] | None = None
    """Stage lengths that a layout may have, where `layouts` holds each once; None: as they say."""

    @property
    def per_layout(self) -> int:
        """Strategies of one layout."""
        return len(self.choices) * len(self.batches) * len(self.chunks)

    @property
    def size(self) -> int:
        """Strategies of the whole space, legal or not."""
        return self.raw_layouts * self.per_layout

    def dimensions(self) -> dict[str, list[object]]:
        """Values of each dimension, for the certificate."""

        def values(name: str) -> list[object]:
            return sorted({getattr(layout, name) for layout in self.layouts})

        return {
            **{name: values(name) for name in ("tp", "pp", "dp", "ep", "sp", "exchange")},
            "attention": [*sorted({c.attention for c in self.choices})],
            "weight_dtype": [*sorted({c.weight_dtype for c in self.choices})],
            "kv_dtype": [*sorted({c.kv_dtype for c in self.choices})],
            "weight_prefetch": [*sorted({c.weight_prefetch for c in self.choices})],
            "fused_collectives": [*sorted({c.fused_collectives for c in self.choices})],
            "batch": list(self.batches),
            "chunk": list(self.chunks),
        }

    def broken_switch(self, par: Parallelism, choice: Choice) -> str | None:
        """Id of the first rule that the choice's switches break on a layout; None when legal."""
        if not choice.switched:
            return None
        return first_broken_switch_rule(
            Subject(
                spec=self.spec,
                cluster=self.cluster,
                engine=self.engine,
                parallel=par,
                overlap=choice.overlap,
                weight_dtype=choice.weight_dtype,
            )
        )

    def strategy(self, par: Parallelism, choice: Choice, batch: int, chunk: int) -> StrategyInfo:
        """One point as the plan writes it."""
        layout = {one.name: getattr(par, one.name) for one in fields(Parallelism)}
        chosen = {one.name: getattr(choice, one.name) for one in fields(Choice)}
        layout["stage_layers"] = balanced_stages(self.spec, par)
        return StrategyInfo(**layout, **chosen, batch=batch, chunk=chunk)


def divisors(n: int) -> tuple[int, ...]:
    """Divisors of n, ascending."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*low, *(n // d for d in low)}))


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


def raw_layouts(spec: ModelSpec, cards: int) -> Iterator[Parallelism]:
    """Every combination of axis sizes over `cards` ranks, legal or not, in a fixed order."""
    for tp in divisors(cards):
        for pp in divisors(cards // tp):
            dp = cards // (tp * pp)
            for ep in divisors(tp * dp) if spec.moe is not None else (1,):
                one = Parallelism(tp=tp, pp=pp, dp=dp, ep=ep)
                for sp in (False, True):
                    yield replace(one, sp=sp)
                    if ep > 1:
                        yield replace(one, sp=sp, exchange="alltoall")


def build_space(
    spec: ModelSpec,
    cluster: Cluster,
    engine: EngineProfile,
    *,
    cards: int,
    choices: tuple[Choice, ...],
    batches: tuple[int, ...],
    chunks: tuple[int, ...],
) -> Space:
    """The space over `cards` ranks, with the rules applied to every layout."""
    broken: Counter[str] = Counter()
    legal = []
    count = 0
    for par in raw_layouts(spec, cards):
        count += 1
        rule = first_broken_rule(Subject(spec=spec, cluster=cluster, engine=engine, parallel=par))
        if rule is None:
            legal.append(par)
        else:
            broken[rule] += 1
    return Space(
        spec=spec,
        cluster=cluster,
        engine=engine,
        cards=cards,
        layouts=tuple(legal),
        raw_layouts=count,
        broken=dict(sorted(broken.items())),
        choices=choices,
        batches=batches,
        chunks=chunks,
    )
