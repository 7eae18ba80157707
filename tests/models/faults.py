"""Plants faults: edits of an applied graph, and executors that do one thing wrong.

An edit maps every node to the nodes that take its place: none (its readers then read its first
input), itself changed, or several in a row (its readers then read the last).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from shardplan.models.apply import ShardedBlock, ShardedGraph, ShardedOp, Stage
from shardplan.models.lockstep import Communication, LockStep
from shardplan.models.weights import Array, Weight, local_weight, param_key, place

__all__ = ["EXECUTORS", "Computes", "Fault", "edited", "rebuilt"]

Edit = Callable[[ShardedOp], Iterable[ShardedOp]]


def rebuilt(block: ShardedBlock, edit: Edit) -> tuple[ShardedBlock, int]:
    """A template after an edit, and how many of its nodes the edit changed."""
    nodes: dict[str, ShardedOp] = {}
    names: dict[str, str] = {}
    changed = 0
    for old in block.ops():
        node = replace(old, inputs=tuple(names.get(name, name) for name in old.inputs))
        new = tuple(edit(node))
        changed += new != (node,)
        names[old.name] = new[-1].name if new else node.inputs[0]
        nodes |= {one.name: one for one in new}
    exit_name = names[block.exit]
    return ShardedBlock(block.name, nodes, block.entry, exit_name, tuple(nodes)), changed


def edited(graph: ShardedGraph, edit: Edit) -> tuple[ShardedGraph, int]:
    """An applied graph after an edit of all its templates, and how many nodes changed."""
    pairs = {name: rebuilt(block, edit) for name, block in graph.blocks.items()}
    blocks = MappingProxyType({name: block for name, (block, _) in pairs.items()})
    return replace(graph, blocks=blocks), sum(changed for _, changed in pairs.values())


@dataclass(slots=True)
class Fault(LockStep):
    """An executor that does one thing wrong and counts how often."""

    hits: ClassVar[int] = 0
    _seen: dict[Any, Any] = field(default_factory=dict)

    def hit(self) -> None:
        """Once more."""
        type(self).hits += 1


class _Moves(Fault):
    """Hands a changed tensor or node to one kind of collective."""

    kind: ClassVar[str]

    def change(self, node: ShardedOp, graph: ShardedGraph, x: Array) -> tuple[ShardedOp, Array]:
        """What the collective gets instead."""
        raise NotImplementedError

    def _communicate(
        self, node: ShardedOp, graph: ShardedGraph, stage: Stage, block: str, x: Array
    ) -> Array:
        if node.kind == self.kind:
            node, x = self.change(node, graph, x)
        return LockStep._communicate(self, node, graph, stage, block, x)


class SwappedRanks(_Moves):
    """A gather puts the parts of the group in reverse order."""

    kind = "all_gather"

    def change(self, node: ShardedOp, graph: ShardedGraph, x: Array) -> tuple[ShardedOp, Array]:
        self.hit()
        return node, np.flip(x, graph.mesh.axes.index(node.axes[0]))


class WrongNesting(_Moves):
    """A gather over two axes puts the minor one outside the major one."""

    kind = "all_gather"

    def change(self, node: ShardedOp, graph: ShardedGraph, x: Array) -> tuple[ShardedOp, Array]:
        if len(node.axes) > 1:
            self.hit()
        return replace(node, axes=node.axes[::-1]), x


class WrongSlice(_Moves):
    """Every rank keeps the part of the rank beside it."""

    kind = "slice"

    def change(self, node: ShardedOp, graph: ShardedGraph, x: Array) -> tuple[ShardedOp, Array]:
        self.hit()
        lead = graph.mesh.axes.index(node.axes[0])
        where = len(graph.mesh.shape) + node.dims.index(dict(node.layout)[node.axes[0]])
        return node, np.roll(x, x.shape[where] // x.shape[lead], where)


class GatherTwice(Fault):
    """Right numbers, but every gather is made twice."""

    def _communicate(
        self, node: ShardedOp, graph: ShardedGraph, stage: Stage, block: str, x: Array
    ) -> Array:
        out = LockStep._communicate(self, node, graph, stage, block, x)
        if node.kind == "all_gather":
            self.hit()
            self.log.append(self.log[-1])
        return out


class _Weights(Fault):
    """Gives one parameter wrongly."""

    param: ClassVar[str]

    def wrong(self, weight: Weight, right: Array, node: ShardedOp, graph: ShardedGraph) -> Array:
        """What the ranks hold instead of `right`."""
        raise NotImplementedError

    def weight(
        self, node: ShardedOp, graph: ShardedGraph, stage: Stage, layer: int
    ) -> Array | None:
        right = LockStep.weight(self, node, graph, stage, layer)
        if right is None or node.op is None or node.op.param != self.param:
            return right
        self.hit()
        return self.wrong(self.weights[param_key(node.op, layer)], right, node, graph)


class NeighbourShard(_Weights):
    """A rank loads the shard of the rank beside it."""

    param = "down"

    def wrong(self, weight: Weight, right: Array, node: ShardedOp, graph: ShardedGraph) -> Array:
        return np.roll(right, 1, graph.mesh.axes.index(node.weight_layout[0][0]))


class FirstShard(_Weights):
    """Every rank loads the shard of the first."""

    param = "down"

    def wrong(self, weight: Weight, right: Array, node: ShardedOp, graph: ShardedGraph) -> Array:
        lead = graph.mesh.axes.index(node.weight_layout[0][0])
        return np.broadcast_to(np.take(right, [0], lead), right.shape)


class WholeWeightKept(_Weights):
    """Right numbers, but a rank keeps the whole weight beside its shard."""

    param = "up"

    def wrong(self, weight: Weight, right: Array, node: ShardedOp, graph: ShardedGraph) -> Array:
        self.weight_bytes[0] += weight.values.nbytes
        return right


class _Scales(_Weights):
    """Int8 weights with the right values and wrong scales."""

    param = "gate"

    def scales(self, right: Array, node: ShardedOp, graph: ShardedGraph) -> Array:
        """Scales [*mesh, *scale dims] instead of the right ones."""
        raise NotImplementedError

    def wrong(self, weight: Weight, right: Array, node: ShardedOp, graph: ShardedGraph) -> Array:
        if weight.scale is None:
            return right
        ints, _ = local_weight(Weight(weight.values, weight.dims), node.weight_layout, graph.mesh)
        own = place(weight.scale, weight.scale_dims, node.weight_layout, graph.mesh)
        scale = self.scales(own, node, graph)
        return np.asarray(ints * np.expand_dims(scale, len(graph.mesh.shape)))


class NeighbourScale(_Scales):
    """A rank loads the scales of the rank beside it."""

    def scales(self, right: Array, node: ShardedOp, graph: ShardedGraph) -> Array:
        return np.roll(right, 1, graph.mesh.axes.index(node.weight_layout[0][0]))


class UncutScale(_Scales):
    """Every rank reads the scales from the first channel on."""

    def scales(self, right: Array, node: ShardedOp, graph: ShardedGraph) -> Array:
        lead = graph.mesh.axes.index(node.weight_layout[0][0])
        return np.broadcast_to(np.take(right, [0], lead), right.shape)


class WrongCutScale(_Scales):
    """Scales are dealt out in turn where the weight is cut in runs."""

    def scales(self, right: Array, node: ShardedOp, graph: ShardedGraph) -> Array:
        lead = graph.mesh.axes.index(node.weight_layout[0][0])
        runs = np.moveaxis(right, lead, -2)
        dealt = np.reshape(np.moveaxis(runs, -1, -2), runs.shape)
        return np.moveaxis(dealt, -2, lead)


class Computes(Fault):
    """Changes how operators of one kind compute."""

    kinds: ClassVar[tuple[str, ...]]

    def instead(self, compute: Callable[[ShardedOp, int], Array], call: dict[str, Any]) -> Array:
        """The output; `compute(node, past)` runs the operator."""
        raise NotImplementedError

    def _compute(
        self,
        node: ShardedOp,
        graph: ShardedGraph,
        stage: Stage,
        layer: int,
        given: tuple[tuple[Array, ...], tuple[tuple[str, ...], ...]],
        past: int,
    ) -> Array:
        def compute(node: ShardedOp, past: int) -> Array:
            return LockStep._compute(self, node, graph, stage, layer, given, past)

        if node.kind not in self.kinds:
            return compute(node, past)
        call = {"node": node, "graph": graph, "layer": layer, "given": given, "past": past}
        return self.instead(compute, call)


class AppendDropped(Computes):
    """The cache gives what it held and forgets the new token."""

    kinds = ("cache",)

    def instead(self, compute: Callable[[ShardedOp, int], Array], call: dict[str, Any]) -> Array:
        held = self._cache.get((call["layer"], call["node"].op.state))
        if held is None:
            return compute(call["node"], call["past"])
        self.hit()
        return held


class StaleEntry(Computes):
    """A decode step writes the entry of the step before it again."""

    kinds = ("cache",)

    def instead(self, compute: Callable[[ShardedOp, int], Array], call: dict[str, Any]) -> Array:
        out = np.array(compute(call["node"], call["past"]))
        where = len(call["graph"].mesh.shape) + 1
        if call["past"]:
            self.hit()
            entries = np.moveaxis(out, where, 0)
            entries[-1] = entries[-2]
        self._cache[call["layer"], call["node"].op.state] = out
        return out


class SecondCopy(Computes):
    """Right numbers, but the cache is kept twice."""

    kinds = ("cache",)

    def instead(self, compute: Callable[[ShardedOp, int], Array], call: dict[str, Any]) -> Array:
        out = compute(call["node"], call["past"])
        self.hit()
        self._cache[call["layer"], call["node"].op.state + " again"] = out
        return out


class PositionIgnored(Computes):
    """Rotary positions start at nought in every step."""

    kinds = ("rope",)

    def instead(self, compute: Callable[[ShardedOp, int], Array], call: dict[str, Any]) -> Array:
        if call["past"]:
            self.hit()
        return compute(call["node"], 0)


class NoVocabularyOffset(Computes):
    """Every rank takes its rows of the embedding for the first ones."""

    kinds = ("embedding",)

    def instead(self, compute: Callable[[ShardedOp, int], Array], call: dict[str, Any]) -> Array:
        node, graph = call["node"], call["graph"]
        self.weight(node, graph, graph.stages[0], -1)
        self.hit()
        return compute(replace(node, weight_layout=()), call["past"])


class NoReset(Fault):
    """A new request finds the old one's cache."""

    def reset(self) -> None:
        self.hit()


class LateReset(Fault):
    """A reset forgets the keys and keeps the values."""

    def reset(self) -> None:
        self.hit()
        for key in [key for key in self._cache if key[1] == "k"]:
            del self._cache[key]


class SendDropped(Fault):
    """A stage keeps its result to itself."""

    def _hand_over(self, node: ShardedOp, stage: Stage, graph: ShardedGraph, x: Array) -> Array:
        if node.kind == "send":
            self.hit()
            ranks = graph.mesh.ranks
            self.log.append(Communication(stage.index, "send", "send", ("pp",), 2, x.size // ranks))
            return x
        return LockStep._hand_over(self, node, stage, graph, x)


class WrongStage(Fault):
    """The last stage gets what the first stage sent."""

    def _hand_over(self, node: ShardedOp, stage: Stage, graph: ShardedGraph, x: Array) -> Array:
        out = LockStep._hand_over(self, node, stage, graph, x)
        if node.kind == "send" and stage.index == 0:
            self._seen["first"] = out
        elif node.kind == "recv" and stage.index == len(graph.stages) - 1:
            self.hit()
            return np.asarray(self._seen["first"])
        return out


class RanksShifted(Fault):
    """The last stage's ranks receive what was meant for the rank beside."""

    def _hand_over(self, node: ShardedOp, stage: Stage, graph: ShardedGraph, x: Array) -> Array:
        out = LockStep._hand_over(self, node, stage, graph, x)
        if node.kind == "recv" and stage.index == len(graph.stages) - 1:
            self.hit()
            return np.roll(out, 1, 0)
        return out


EXECUTORS: dict[str, type[Fault]] = {
    "ranks swapped in a gather": SwappedRanks,
    "minor axis outside the major one": WrongNesting,
    "slice of the rank beside": WrongSlice,
    "gather made twice": GatherTwice,
    "weight shard of the rank beside": NeighbourShard,
    "weight shard of the first rank": FirstShard,
    "whole weight kept beside the shard": WholeWeightKept,
    "int8 scale of the rank beside": NeighbourScale,
    "int8 scale not cut": UncutScale,
    "int8 scale cut wrong": WrongCutScale,
    "cache append dropped": AppendDropped,
    "cache entry stale": StaleEntry,
    "cache kept twice": SecondCopy,
    "position offset ignored": PositionIgnored,
    "vocabulary offset missing": NoVocabularyOffset,
    "reset forgets nothing": NoReset,
    "reset forgets the keys only": LateReset,
    "send dropped": SendDropped,
    "send from the wrong stage": WrongStage,
    "send to the rank beside": RanksShifted,
}
