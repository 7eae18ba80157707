"""Executors that do one thing wrong with a context that ranks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from tests.models.faults import Computes, Fault

from shardplan.models.apply import ShardedGraph, ShardedOp
from shardplan.models.kernels import own_part
from shardplan.models.kvcache import Places, Slots
from shardplan.models.lockstep import LockStep
from shardplan.models.weights import Array

__all__ = ["CONTEXT_EXECUTORS"]


class MislaidEntry(Computes):
    """A new token's entry is kept by the rank beside the one whose slot it is."""

    kinds = ("cache",)

    def instead(self, compute: Callable[[ShardedOp, int], Array], call: dict[str, Any]) -> Array:
        out, graph, key = compute(call["node"], call["past"]), call["graph"], call["node"].op.state
        lead, where = graph.mesh.axes.index("cp0"), len(graph.mesh.shape) + 1
        if call["past"]:
            self.hit()
            entries = np.moveaxis(np.array(out), where, 0)
            entries[-1] = np.roll(entries[-1], 1, lead)
            out = np.moveaxis(entries, 0, where)
        self._cache[call["layer"], key] = out
        return out


class OneRankTakesAll(Fault):
    """New tokens all go to the last rank of a context."""

    def _append(
        self, node: ShardedOp, graph: ShardedGraph, layer: int, inputs: tuple[Array, ...]
    ) -> tuple[Slots, Places]:
        slots, source = LockStep._append(self, node, graph, layer, inputs)
        if graph.model.phase == "prefill":
            return slots, source
        self.hit()
        held = self._slots[layer, node.op.state if node.op is not None else ""]
        parts, old = held.at.shape
        empty = np.full((parts - 1, 1), -1)
        at = np.concatenate([held.at, np.append(empty, [[held.tokens]], axis=0)], axis=1)
        ranks = np.arange(old + 2) - np.zeros((parts, 1), dtype=np.int64)
        taken = np.where(at >= 0, ranks[:, : old + 1], old + 1)
        return Slots(at), taken[own_part(node.layout, "S", graph.mesh)]


class EmptySlotsSeen(Fault):
    """Attention takes an empty slot for the first token's."""

    def _keys_at(self, node: ShardedOp, graph: ShardedGraph, layer: int) -> Places:
        at = LockStep._keys_at(self, node, graph, layer)
        self.hit()
        return np.maximum(at, 0)


class EvenMerge(Computes):
    """Results of the parts of a context are averaged, whatever they have seen."""

    kinds = ("context_merge",)

    def instead(self, compute: Callable[[ShardedOp, int], Array], call: dict[str, Any]) -> Array:
        (x,) = call["given"][0]
        self.hit()
        return np.asarray(x[..., :-1].mean(axis=-2))


class OnlyOwnPart(Computes):
    """A rank takes the first part's result for the whole context's."""

    kinds = ("context_merge",)

    def instead(self, compute: Callable[[ShardedOp, int], Array], call: dict[str, Any]) -> Array:
        (x,) = call["given"][0]
        self.hit()
        return np.asarray(x[..., 0, :-1])


class OwnPositions(Computes):
    """Ranks of a prompt all count its tokens from the first."""

    kinds = ("rope",)

    def instead(self, compute: Callable[[ShardedOp, int], Array], call: dict[str, Any]) -> Array:
        node = call["node"]
        self.hit()
        return compute(
            replace(node, layout=tuple(p for p in node.layout if p[1] != "T")), call["past"]
        )


CONTEXT_EXECUTORS: dict[str, type[Fault]] = {
    "cache entry on the wrong rank": MislaidEntry,
    "new entries all on one rank": OneRankTakesAll,
    "empty slots attended to": EmptySlotsSeen,
    "parts of a context averaged": EvenMerge,
    "one part for the whole context": OnlyOwnPart,
    "positions of the rank beside": OwnPositions,
}
