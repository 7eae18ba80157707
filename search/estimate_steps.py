"""Rows of phase prefill and decode: one forward pass, priced for all points of a fleet at once.

    prefill   `batch` sequences a dp group of `tokens` prompt tokens each, in one step
    decode    one new token of each of `batch` sequences, seeing `tokens` tokens with itself; the
              tokens that are predicted ahead come after it

    step_s       = sum over stages (+ the engine's host time of a step)
    compute_s    = matrix and vector units plus HBM and L2, whichever binds each kernel
    collective_s = collectives and sends
    overhead_s   = step_s - compute_s - collective_s: floors, launches, gaps, host
    memory_bytes = the fullest stage's ranks: weights, cache of `batch` sequences of `tokens`
                   tokens, activations of the step, communicators, reserve

A batch passes the pipeline's stages one after another (no microbatches).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import cast

import numpy as np

from shardplan.costmodel.bulk import Fleet
from shardplan.costmodel.bulk_memory import FleetMemory
from shardplan.costmodel.confidence import Confidence, Tally, confidence
from shardplan.costmodel.forward import forward_loads, parts_by_kind
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.load import Parts
from shardplan.costmodel.steps import step_seconds
from shardplan.models.graph import Phase
from shardplan.search.estimate_layout import Layout

__all__ = ["STEP_COLUMNS", "KindTime", "Step", "breakdown", "price_steps"]

STEP_COLUMNS = ("step_s", "compute_s", "collective_s", "overhead_s", "memory_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Seconds and bytes of each point."""

    step_s: Array
    compute_s: Array
    collective_s: Array
    overhead_s: Array
    memory_bytes: Array
    sure: Confidence


@dataclass(frozen=True, slots=True, kw_only=True)
class KindTime:
    """Seconds of one step in all kernels of a kind, over the stages that a token passes."""

    kind: str
    calls: int
    compute_s: float
    memory_s: float
    collective_s: float
    overhead_s: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.compute_s + self.memory_s + self.collective_s + self.overhead_s


def _lengths(phase: Phase, tokens: Array, ahead: Array) -> tuple[Array, Array]:
    """(new tokens, prefix tokens) of a sequence."""
    if phase == "prefill":
        return tokens, np.zeros_like(tokens)
    return np.ones_like(tokens) + ahead, tokens - 1.0


def price_steps(
    fleet: Fleet, memory: FleetMemory, phase: Phase, *, batch: Array, tokens: Array
) -> Step:
    """Price one pass of each point `[points]` of a fleet."""
    new, prefix = _lengths(phase, tokens, fleet.mtp)
    tally = Tally.of(fleet)
    total, stages = step_seconds(
        fleet.watched(tally),
        phase,
        batch=batch,
        new=new,
        prefix=prefix,
        mtp=fleet.mtp,
        **fleet.choices[0]._asdict(),
    )
    parts = functools.reduce(Parts.plus, stages)
    compute = parts.compute_s + parts.memory_s
    host_s = np.full(total.shape, fleet.host_s(phase))
    return Step(
        step_s=total,
        compute_s=compute,
        collective_s=parts.collective_s,
        overhead_s=np.maximum(total - compute - parts.collective_s, 0.0),
        memory_bytes=memory.fullest_bytes(batch=batch, step_tokens=batch * new, context=tokens),
        sure=confidence(tally, fleet, phase, total, host_s),
    )


def breakdown(
    layout: Layout,
    phase: Phase,
    *,
    weight_dtype: str,
    kv_dtype: str,
    attention: str,
    batch: int,
    tokens: int,
) -> list[KindTime]:
    """Seconds of one step by kind of operator, the longest first."""
    ahead = np.asarray(float(layout.parallel.mtp))
    lengths = _lengths(phase, np.asarray(float(tokens)), ahead)
    new, prefix = (float(value) for value in lengths)
    loads = forward_loads(
        phase,
        layout.engine,
        batch=float(batch),
        new=new,
        prefix=prefix,
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
        attention=cast("AttentionKernel", attention),
        mtp=ahead,
    )
    found = parts_by_kind(layout.model, loads)
    rows = [
        KindTime(
            kind=kind,
            calls=round(parts.kernels),
            compute_s=float(parts.compute_s),
            memory_s=float(parts.memory_s),
            collective_s=float(parts.collective_s),
            overhead_s=float(parts.overhead_s),
        )
        for kind, parts in found.items()
    ]
    return sorted(rows, key=lambda row: -row.total_s)
