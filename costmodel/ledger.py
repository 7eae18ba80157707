"""The memory ledger: what one rank of each pipeline stage holds, in bytes.

    weights        elements at the strategy's dtype of their group, with one fp32 scale per output
                   channel where quantized per channel (4-bit: one 16-bit scale per group of 128
                   inputs)
    kv cache       elements a token * bytes * tokens in whole blocks * sequences; where c ranks
                   share a context each holds whole blocks of its share: blocks of c times as many
                   tokens, a c-th of them on a rank
    activations    the largest sum of tensors alive at once over the graph (liveness), at the
                   tokens of one step, 16-bit (logits fp32), plus the attention kernel's workspace
                   and, where ranks share a context, one layer's keys and values of all of it,
                   gathered
    communicators  buffers of every communicator that the layout needs
    reserve        runtime, captured graphs, workspaces (engine profile)

    capacity       memory_fraction * card

Where tokens are predicted ahead, the prediction layer's weights and cache are the last stage's, a
sequence's cache has room for the tokens of a step that may be refused, and a step holds the logits
of all that it verifies.
Left out: allocator fragmentation; static scales of an int8 cache (one per channel, kilobytes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Device
from shardplan.costmodel.kernels.attention import (
    AttentionKernel,
    attention_workspace_bytes,
    kv_element_bytes,
)
from shardplan.costmodel.kernels.base import Array, ArrayLike, Machine, as_array
from shardplan.costmodel.kernels.precision import precision_of
from shardplan.costmodel.weight_types import parts, type_of
from shardplan.models.accounting import (
    HeldWeight,
    local_product,
    stage_weights,
    state_elements_per_token,
)
from shardplan.models.apply import ShardedBlock, ShardedGraph, Stage
from shardplan.models.modules import MODULES

__all__ = ["Ledger", "StageMemory", "gathered_elements", "weight_element_bytes"]

_SCALE_BYTES = 4.0
_GROUP = 128.0
_GROUP_SCALE_BYTES = 2.0
_ACTIVATION_BYTES = 2.0
_LOGIT_BYTES = 4.0
_FEW_STEPS = 256
"""Activations of no more step sizes are remembered."""


def weight_element_bytes(dtype: str) -> float:
    """Bytes of one linear or expert weight, scales left out (microscaling ones are within).

    Of a type by groups, the narrowest.
    """
    return min(precision_of(one).weight_bytes for one in parts(dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on one rank of one stage; arrays broadcast over what was asked."""

    stage: int
    layers: int
    weights_bytes: float
    kv_cache_bytes: Array
    activations_bytes: Array
    communicators_bytes: float
    reserve_bytes: float

    @property
    def total_bytes(self) -> Array:
        """All of it."""
        fixed = self.weights_bytes + self.communicators_bytes + self.reserve_bytes
        return self.kv_cache_bytes + self.activations_bytes + fixed


def _weights(weights: Iterable[HeldWeight], weight_dtype: str) -> float:
    total = 0.0
    for held in weights:
        dtype = type_of(weight_dtype, held.weight_group)
        if held.weight_class not in ("linear", "expert") or dtype in ("bf16", "fp16"):
            total += held.count * held.elements * 2.0
            continue
        each = held.elements * weight_element_bytes(dtype)
        if dtype in ("w4a16", "w4a8"):
            each += held.elements / _GROUP * _GROUP_SCALE_BYTES
        elif "mx" not in dtype:
            each += held.channels * _SCALE_BYTES
        total += held.count * each
    return total


def _peak(graph: ShardedGraph, block: ShardedBlock) -> list[tuple[float, float]]:
    """The same as `_liveness`, worked out once for all layouts that share the template."""
    if "peak" not in block.known:
        block.known["peak"] = _liveness(graph, block)
    found: list[tuple[float, float]] = block.known["peak"]
    return found


def _liveness(graph: ShardedGraph, block: ShardedBlock) -> list[tuple[float, float]]:
    """(elements a token, ways tokens are cut) of the tensors alive at the peak of one template.

    Peaks are compared at one token a way; templates have no point where a different one wins.
    Caches are counted elsewhere; what MLA expands from its cache is alive for the tokens of a step.
    """
    last: dict[str, int] = {block.exit: len(block.order)}
    for index, name in enumerate(block.order):
        for source in block.op(name).inputs:
            last[source] = max(last.get(source, 0), index)
    alive: dict[str, tuple[float, float]] = {}
    best: list[tuple[float, float]] = []
    peak = -1.0
    for index, name in enumerate(block.order):
        node = block.op(name)
        if node.op is None or not node.op.state:
            held = local_product(graph, node.dims, node.layout)
            ways = float(math.prod(w for _, w in held.free))
            alive[name] = (held.factor * node.density, ways)
        now = sum(elements / ways for elements, ways in alive.values())
        if now > peak:
            peak, best = now, list(alive.values())
        alive = {n: v for n, v in alive.items() if last.get(n, index) > index}
    return best


def gathered_elements(graph: ShardedGraph) -> float:
    """Keys and values of one token that a layer gathers from the ranks that share a context."""
    return max(
        sum(
            local_product(graph, node.dims, node.layout).factor
            for node in block.ops()
            if node.kind == "all_gather" and "S" in node.dims
        )
        for block in graph.blocks.values()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Memory of one layout on one device under one engine."""

    graph: ShardedGraph
    device: Device
    engine: EngineProfile
    peaks: Mapping[str, list[tuple[float, float]]]
    known: dict[tuple[str, tuple[tuple[str, int], ...]], float] = field(
        default_factory=dict, compare=False, repr=False
    )
    """Bytes of stages that were asked for: stages of the same templates hold the same."""
    held: dict[tuple[tuple[str, int], ...], tuple[HeldWeight, ...]] = field(
        default_factory=dict, compare=False, repr=False
    )
    """Weights of the same stages."""
    peaks_known: dict[tuple[str, float, bytes], Array] = field(
        default_factory=dict, compare=False, repr=False
    )
    """Peaks of activations that were asked for: they are the same for every dtype."""

    @classmethod
    def of(cls, graph: ShardedGraph, device: Device, engine: EngineProfile) -> Ledger:
        """The ledger of an applied graph (prefill: it holds the larger activations)."""
        peaks = {
            name: _peak(graph, block)
            for name, block in graph.blocks.items()
            if name not in ("send", "recv", "head", "mtp_head")
        }
        return cls(graph=graph, device=device, engine=engine, peaks=peaks)

    @property
    def capacity_bytes(self) -> float:
        """What the engine may use of the card."""
        return self.engine.memory_fraction * self.device.hbm_bytes

    @property
    def communicators(self) -> int:
        """Communicators that one rank takes part in: tp, dp, ep, pp, cp where they have ranks.

        One more for each number of dp groups that modules are split over, but for all of them
        where the ranks of dp have one anyway.
        """
        par, groups = self.graph.parallel, self.graph.mesh.groups
        dense = self.graph.model.spec.moe is None
        used = [par.tp > 1, par.pp > 1, par.dp > 1 and not dense]
        used.append(bool(groups["ep"]) and groups["ep"] != groups["tp"])
        used.append(par.cp > 1)
        modules = {groups[f"{one}+"] for one in MODULES} - {(), groups["dp"] if not dense else ()}
        return sum(used) + len(modules)

    def kv_bytes_per_token(self, stage: Stage, kv_dtype: str) -> float:
        """Cache bytes that one token of one sequence takes on a rank of a stage, on average."""
        elements = self._known("kv", stage, lambda: state_elements_per_token(self.graph, stage))
        return elements * kv_element_bytes(kv_dtype)

    def weights_bytes(self, stage: Stage, dtype: str) -> float:
        """Weight bytes on one rank of a stage."""
        return self._known(dtype, stage, lambda: _weights(self._held(stage), dtype))

    def _held(self, stage: Stage) -> tuple[HeldWeight, ...]:
        key = tuple(stage.counts.items())
        if key not in self.held:
            self.held[key] = tuple(stage_weights(self.graph, stage))
        return self.held[key]

    def _known(self, what: str, stage: Stage, count: Callable[[], float]) -> float:
        key = (what, tuple(stage.counts.items()))
        if key not in self.known:
            self.known[key] = count()
        return self.known[key]

    def activations_bytes(
        self, machine: Machine, tokens: ArrayLike, context: ArrayLike, attention: AttentionKernel
    ) -> Array:
        """Peak of one step of `tokens` of one dp group; naive attention keeps its scores."""
        many = as_array(tokens)
        if as_array(context).ndim or many.size > _FEW_STEPS:
            return self._peak_bytes(machine, many, context, attention)
        key = (attention, float(context), repr(many.shape).encode() + many.tobytes())
        if key not in self.peaks_known:
            self.peaks_known[key] = self._peak_bytes(machine, many, context, attention)
        return self.peaks_known[key]

    def _peak_bytes(
        self, machine: Machine, tokens: Array, context: ArrayLike, attention: AttentionKernel
    ) -> Array:
        step = tokens * self.graph.parallel.dp
        peak = np.zeros(())
        for alive in self.peaks.values():
            elements = sum((np.ceil(step / ways) * each for each, ways in alive), np.zeros(()))
            peak = np.maximum(peak, elements)
        own = peak * _ACTIVATION_BYTES + self._workspace(
            machine, tokens, as_array(context), attention
        )
        gathered = gathered_elements(self.graph) if self.graph.parallel.cp > 1 else 0.0
        return own + as_array(context) * gathered * _ACTIVATION_BYTES

    def _workspace(
        self, machine: Machine, tokens: Array, context: Array, attention: AttentionKernel
    ) -> Array:
        """Scratch of the attention kernel over the prompts that fill one step."""
        spec, par = self.graph.model.spec, self.graph.parallel
        new = np.minimum(tokens, context) / par.cp
        return attention_workspace_bytes(
            machine,
            np.maximum(tokens / np.maximum(context, 1.0), 1.0),
            new,
            context,
            spec.heads / par.tp,
            spec.head_dim,
            kernel=attention,
        )

    def logits_bytes(self, sequences: ArrayLike) -> Array:
        """Logits of one step, gathered, fp32."""
        return as_array(sequences) * float(self.graph.model.spec.vocab) * _LOGIT_BYTES

    def grid_bytes(
        self,
        machine: Machine,
        *,
        attention: AttentionKernel,
        batch: ArrayLike,
        tokens: ArrayLike,
        context: ArrayLike,
    ) -> dict[str, Array]:
        """What every stage holds alike: `cached_tokens`, `activations_bytes`, `logits_bytes`."""
        par = self.graph.parallel
        block, ahead = float(self.engine.kv_block_tokens * par.cp), par.mtp
        blocks = np.ceil((as_array(context) + ahead) / block)
        return {
            "cached_tokens": as_array(batch) * blocks * block,
            "activations_bytes": self.activations_bytes(machine, tokens, context, attention),
            "logits_bytes": self.logits_bytes(as_array(batch) * (1 + ahead)),
        }

    def fullest_bytes(self, common: Mapping[str, Array], weight_dtype: str, kv_dtype: str) -> Array:
        """Bytes on a rank of the fullest stage; `common`: what `grid_bytes` gives."""
        cached, activations, logits = common.values()
        fixed = self.communicators * self.engine.communicator_bytes
        held = [
            (self.weights_bytes(stage, weight_dtype), self.kv_bytes_per_token(stage, kv_dtype))
            for stage in self.graph.stages
        ]
        alive = np.maximum(activations, logits)
        full = cached * held[-1][1] + alive + (held[-1][0] + fixed + self.engine.reserve_bytes)
        kinds = set(held)
        for weights, cache in kinds - {held[-1]}:
            larger = (w >= weights and c >= cache for w, c in kinds - {(weights, cache)})
            if not any(larger):  # else another stage holds no less
                own = weights + fixed + self.engine.reserve_bytes
                full = np.maximum(full, cached * cache + activations + own)
        return np.asarray(full, dtype=np.float64)

    def stages(
        self,
        machine: Machine,
        *,
        weight_dtype: str,
        kv_dtype: str,
        attention: AttentionKernel,
        batch: ArrayLike,
        tokens: ArrayLike,
        context: ArrayLike,
    ) -> list[StageMemory]:
        """What each stage holds for `batch` sequences of `context` tokens, steps of `tokens`."""
        common = self.grid_bytes(
            machine, attention=attention, batch=batch, tokens=tokens, context=context
        )
        cached, activations, logits = common.values()
        found = []
        for stage in self.graph.stages:
            last = stage.index == len(self.graph.stages) - 1
            found.append(
                StageMemory(
                    stage=stage.index,
                    layers=stage.last - stage.first,
                    weights_bytes=self.weights_bytes(stage, weight_dtype),
                    kv_cache_bytes=cached * self.kv_bytes_per_token(stage, kv_dtype),
                    activations_bytes=np.maximum(activations, logits) if last else activations,
                    communicators_bytes=self.communicators * self.engine.communicator_bytes,
                    reserve_bytes=self.engine.reserve_bytes,
                )
            )
        return found
