"""From a priced layout to its engines: how much cache they have, and which of them step together.

    blocks of an engine = min over stages of floor(room / (cache bytes a token * tokens a block))
    room = capacity - weights - activations - communicators - reserve

by the memory ledger, for the slots and step size of the strategy. Groups that share experts
(`StepModel.locked`) are one unit; those of a dense model are units of their own, each a replica.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardplan.costmodel.ledger import Ledger
from shardplan.costmodel.simulate.batch import Policy
from shardplan.costmodel.simulate.blocks import Blocks
from shardplan.costmodel.simulate.prices import StepPrices, StepTypes
from shardplan.costmodel.simulate.scheduler import Engine, Events
from shardplan.costmodel.simulate.traces import PART_TOKENS
from shardplan.costmodel.simulate.unit import Unit
from shardplan.costmodel.step import StepModel
from shardplan.models.errors import InfeasibleError, InputError

__all__ = ["Instance", "cache_blocks", "price_steps", "units_of"]

_MOST_CONTEXT = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One deployment of a layout, or one instance of a pool."""

    model: StepModel
    ledger: Ledger
    types: StepTypes
    slots: int
    """Of one data-parallel group."""
    chunk: int
    context: int
    """Tokens of the longest request that memory was planned for."""
    max_context: int
    """Of the model; 0: any."""
    sends: bool = False
    """Computes prompts alone."""

    @property
    def block_tokens(self) -> int:
        """Tokens of a block: of all ranks that share a context together."""
        return self.ledger.engine.kv_block_tokens * self.model.context_ranks

    @property
    def token_bytes(self) -> float:
        """Cache of a token over all ranks of a group."""
        stages, dtype = self.ledger.graph.stages, self.types.kv_dtype
        held = sum(self.ledger.kv_bytes_per_token(stage, dtype) for stage in stages)
        return held * self.ledger.graph.parallel.tp

    @property
    def ranks(self) -> int:
        """Ranks of a group."""
        return self.ledger.graph.parallel.ranks // self.model.groups


def cache_blocks(one: Instance) -> int:
    """Blocks that an engine has for caches. `InfeasibleError` where nothing is left for one."""
    rows = one.ledger.stages(
        one.model.machine,
        weight_dtype=one.types.weight_dtype,
        kv_dtype=one.types.kv_dtype,
        attention=one.types.attention,
        batch=one.slots,
        tokens=one.chunk,
        context=one.context,
    )
    counts = []
    for row, stage in zip(rows, one.ledger.graph.stages, strict=True):
        each = one.ledger.kv_bytes_per_token(stage, one.types.kv_dtype)
        free = one.ledger.capacity_bytes - float(row.total_bytes - row.kv_cache_bytes)
        if each > 0.0:
            counts.append(math.floor(free / (each * one.block_tokens)))
    least = min(counts)
    if least < 1:
        raise InfeasibleError(
            "a strategy leaves memory for caches",
            got=f"{one.ledger.graph.parallel.describe()} on {one.ledger.device.name}",
            hint="search again: the plan does not fit this machine",
        )
    return least


def price_steps(one: Instance) -> StepPrices:
    """The tables that its steps are priced from."""
    longest = min(cache_blocks(one) * one.block_tokens, one.max_context or _MOST_CONTEXT)
    return StepPrices(
        one.model, one.types, slots=one.slots, chunk=one.chunk, longest=max(longest, 2)
    )


def _policy(one: Instance, prefix_hit: float) -> Policy:
    engine, width = one.ledger.engine, 1 + one.model.mtp
    if one.chunk < one.slots * width and not one.sends:
        raise InputError(
            "a step holds the tokens that every slot decodes",
            got=f"{one.slots} slots of {width} tokens, steps of {one.chunk}",
            hint="take fewer slots or larger steps",
        )
    return Policy(
        slots=one.slots,
        chunk=one.chunk,
        width=width,
        prompts_first=engine.prefill_first,
        most_prompts=engine.max_prefill_seqs,
        prefix_hit=prefix_hit,
        batches=min(one.model.stages, one.slots),
        sends=one.sends,
    )


def units_of(
    one: Instance,
    events: Events,
    *,
    count: int = 1,
    first: int = 0,
    first_unit: int = 0,
    prefix_hit: float = 0.0,
    shares_prefixes: bool = False,
) -> list[Unit]:
    """Engines of `count` such deployments, numbered from `first`, in the units that they form.

    `InputError` where slots and step size do not go together, or where prefixes are shared (in
    parts of 512 tokens) by blocks that do not divide those.
    """
    policy, prices, blocks = _policy(one, prefix_hit), price_steps(one), cache_blocks(one)
    if shares_prefixes and PART_TOKENS % one.block_tokens:
        raise InputError(
            f"blocks divide the {PART_TOKENS} tokens of a shared part of a prompt",
            got=f"{one.block_tokens} tokens a block",
            hint="leave the prefixes out of the workload",
        )
    part = max(PART_TOKENS // one.block_tokens, 1)
    together, units = one.model.locked, []
    for number in range(count * one.model.groups // together):
        numbers = range(first + number * together, first + (number + 1) * together)
        engines = [
            Engine(name, policy, Blocks(blocks, one.block_tokens, part), events) for name in numbers
        ]
        units.append(Unit(first_unit + number, engines, prices))
    return units
