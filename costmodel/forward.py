"""One forward pass: what it asks of each group of rows, and where its time goes by kind.

A pass of `batch` sequences of one dp group with `new` tokens each, after `prefix` cached ones,
runs batch * new tokens through the token rows, the sequences through attention, and wants the
logits of one token a sequence in prefill, of all of them in decode.

Where `mtp` tokens are predicted ahead the first draft goes with the token and attention rows and
wants logits of one token a sequence; each further draft of a decode step (`mtp` - 1 of them) is one
token a sequence after all that the step has verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.load import Load, Parts
from shardplan.costmodel.memo import Memo
from shardplan.costmodel.optable import Group
from shardplan.costmodel.step import StepModel
from shardplan.models.graph import Phase

__all__ = ["Pricer", "forward_loads", "parts_by_kind"]


class Pricer(Protocol):
    """What prices steps: the `StepModel` of one layout, or a `Fleet` of points of many."""

    @property
    def memo(self) -> Memo | None:
        """What it remembers; None where every point is priced as it is."""

    @property
    def engine(self) -> EngineProfile:
        """The engine of all points."""

    @property
    def groups(self) -> ArrayLike:
        """Data-parallel groups, of all points or `[points]`."""

    @property
    def locked(self) -> ArrayLike:
        """Data-parallel groups whose steps run together, of all points or `[points]`."""

    @property
    def context_ranks(self) -> ArrayLike:
        """Ranks that share a context, of all points or `[points]`."""

    @property
    def stages(self) -> ArrayLike:
        """Pipeline stages, of all points or `[points]`."""

    def parts(self, group: Group, load: Load) -> list[Parts]:
        """Per stage, the rows of one group under a load."""

    def step_s(self, stages: list[Parts], phase: Phase) -> list[Array]:
        """Seconds of each stage, launches included; the engine's host time is not."""

    def host_s(self, phase: Phase) -> float | Array:
        """Host time of a step that the device waits for."""


def forward_loads(
    phase: Phase,
    engine: EngineProfile,
    *,
    batch: ArrayLike,
    new: ArrayLike,
    prefix: ArrayLike,
    weight_dtype: str,
    kv_dtype: str,
    attention: AttentionKernel,
    mtp: ArrayLike = 0.0,
) -> dict[Group, Load]:
    """The load of each group of rows; `batch`, `new`, `prefix` and `mtp` broadcast."""
    sequences = as_array(batch)
    tokens = sequences * as_array(new)
    wanted = tokens if phase == "decode" else sequences
    loads: dict[Group, Load] = {
        "token": Load.of(phase, engine, tokens=tokens, weight_dtype=weight_dtype),
        "attention": Load.of(
            phase,
            engine,
            batch=sequences,
            new=new,
            prefix=prefix,
            kv_dtype=kv_dtype,
            attention=attention,
        ),
        "logits": Load.of(phase, engine, tokens=wanted, weight_dtype=weight_dtype),
    }
    deepest = np.max(as_array(mtp))
    if deepest > 0.0:
        one = Load.of(phase, engine, tokens=sequences, weight_dtype=weight_dtype)
        loads["draft_logits"] = one
    if deepest > 1.0 and phase == "decode":
        seen = as_array(prefix) + as_array(new)
        loads["draft"] = one
        loads["draft_attention"] = replace(loads["attention"], new=as_array(1.0), prefix=seen)
    return loads


def parts_by_kind(model: StepModel, loads: Mapping[Group, Load]) -> dict[str, Parts]:
    """Seconds of a pass by kind of operator, summed over rows and stages."""
    found: dict[str, Parts] = {}
    for group, load in loads.items():
        for kind, parts in model.by_kind(group, load):
            found[kind] = found[kind].plus(parts) if kind in found else parts
    return found
