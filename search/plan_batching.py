"""What `plan.json` tells of graph sizes and step sizes (`search.batching`). Units in the names."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, field_validator

from shardplan.search.plan_confidence import Part

__all__ = ["Batching", "GraphSizes", "OtherSizes", "SettingRow"]


class OtherSizes(Part):
    """Sizes that one might take instead."""

    name: str
    count: int = Field(ge=1)
    expected_s: float
    padding: float
    """Share of the computed tokens or sequences that is padding."""


class GraphSizes(Part):
    """Shapes that loads of one phase are padded to, each a graph of its own."""

    phase: Literal["prefill", "decode"]
    unit: Literal["tokens", "sequences"]
    sizes: tuple[int, ...] = Field(min_length=1)
    """Ascending. Prefill: tokens of one prompt, or of a piece of it. Decode: sequences."""
    expected_s: float
    """Prefill: one prompt, all its pieces. Decode: one step."""
    unpadded_s: float
    """The same with a graph for every load, of multiples of `step`."""
    padding: float
    step: int = Field(ge=1)
    """Sizes are multiples of it, the largest apart."""
    most: int = Field(ge=1)
    """Graphs at most."""
    bound: Literal["price", "graphs", "memory"]
    """What ends their number: the price of their memory, the limit, or the memory that is free."""
    price_s: float
    """What one graph's memory would have earned as cache, as seconds of a load."""
    loads: str
    """Where the distribution of loads comes from."""
    others: tuple[OtherSizes, ...]

    @field_validator("sizes")
    @classmethod
    def _ascending(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if sizes[0] < 1 or any(one >= after for one, after in pairwise(sizes)):
            raise ValueError("sizes are whole numbers from 1 on that ascend")
        return sizes


class SettingRow(Part):
    """One setting of the plan set back to the engine's default, the rest kept."""

    setting: str
    """max_num_seqs, max_num_batched_tokens, or both."""
    value: int | None
    """The plan's; None of both."""
    default: int | None
    objective: float | None
    """At the default; None where it breaks a limit."""
    gain: float | None
    """Objective of the plan over it."""
    limit: str
    """The limit that the default breaks, "" where it breaks none."""


class Batching(Part):
    """Graph sizes of both phases, and what the step sizes gain."""

    lengths: str | None
    """File of the lengths that it was made for; None: the plan's own workload."""
    graph_bytes: float
    """Memory of one graph on a rank."""
    graph_bytes_kind: Literal["datasheet", "measured", "derived", "assumed", "asked"]
    graph_bytes_source: str
    max_graphs: int | None = None
    """Graphs of a phase at most, as asked."""
    prefill: GraphSizes
    decode: GraphSizes | None
    """None where the engine launches decode steps kernel by kernel."""
    settings: tuple[SettingRow, ...]
    """Empty of pools: their sizes are those of two kinds of instances."""
    notes: tuple[str, ...]
