"""The numeric executor: every rank of an applied graph, in lock step, in numpy float64.

A tensor is one array [*mesh, *local dims], so one operator runs on all ranks at once and a
collective is an operation over the leading axes. Pipeline stages run one after another and hand
the hidden state over through a mailbox that only `send` fills and only `recv` empties. KV caches
are per-rank state: appended by `cache` operators, cleared by `reset`; `shardplan.models.kvcache`
keeps which token lies where.

The executor also writes down what it did (`log`): each collective with the elements that it
really moved, so that the cost model's prediction can be held against it.

A graph with a prediction layer drafts after each step, at depth k: its first pass takes the
tokens of the step, each with the token after it, and fills the layer's cache; the k - 1 others of
a decode step take one token each and what the pass before gave for the last one, and their cache
entries are dropped, as the next step writes the right ones in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from shardplan.models.apply import ShardedGraph, ShardedOp, Stage
from shardplan.models.errors import ProofError
from shardplan.models.kernels import KERNELS, Call, own_part
from shardplan.models.kvcache import Places, Slots
from shardplan.models.parallel import Mesh
from shardplan.models.weights import Array, Weight, local_weight, param_key, place

__all__ = ["Communication", "LockStep"]


@dataclass(frozen=True, slots=True)
class Communication:
    """One collective as it happened: elements of the full tensor of its group, on one rank."""

    stage: int
    block: str
    kind: str
    axes: tuple[str, ...]
    ranks: int
    elements: int


@dataclass(slots=True)
class LockStep:
    """Runs the prefill and decode graphs of one plan on one set of weights.

    `weights` are whole; each stage cuts what it owns on first use. Batch and token counts must
    divide by the axes that split them.
    """

    prefill_graph: ShardedGraph
    decode_graph: ShardedGraph
    weights: Mapping[str, Weight]
    log: list[Communication] = field(default_factory=list)
    ahead: np.ndarray | None = None
    """Tokens [B, k] that follow those of the next step, for the layer that predicts ahead."""
    weight_bytes: dict[int, int] = field(default_factory=dict)
    """Bytes of weights that one rank of each stage holds."""
    _cache: dict[tuple[int, str], Array] = field(default_factory=dict)
    _slots: dict[tuple[int, str], Slots] = field(default_factory=dict)
    _mail: dict[int, Array] = field(default_factory=dict)
    _local: dict[tuple[int, str, int, str], Array] = field(default_factory=dict)
    _counted: set[tuple[int, str]] = field(default_factory=set)

    def prefill(self, ids: np.ndarray) -> Array:
        """Logits of the last token, [B, 1, V]; `ids` [B, T] are new tokens of each sequence.

        With a prediction layer those of its first draft stand behind.
        """
        return self._run(self.prefill_graph, ids)

    def decode(self, ids: np.ndarray) -> Array:
        """Logits of each given token, [B, T, V], against the cache; then of each draft."""
        return self._run(self.decode_graph, ids)

    def reset(self) -> None:
        """Forget every cached token."""
        self._cache.clear()
        self._slots.clear()

    def cached_elements(self, stage: Stage) -> int:
        """KV elements that one rank of a stage holds now."""
        graph = self.decode_graph
        return sum(
            array.size // graph.mesh.ranks
            for (layer, _), array in self._cache.items()
            if stage.first <= layer < stage.last + stage.counts.get("mtp", 0)
        )

    def _run(self, graph: ShardedGraph, ids: np.ndarray) -> Array:
        past = self._past()
        logits: list[Array] = []
        for stage in graph.stages:
            logits = self._run_stage(graph, stage, ids, past)
        if not logits:
            raise ProofError("a plan has at least one stage")
        return np.concatenate(logits, axis=1)

    def _past(self) -> int:
        for key in self._cache:
            return self._slots[key].tokens
        return 0

    def _run_stage(
        self, graph: ShardedGraph, stage: Stage, ids: np.ndarray, past: int
    ) -> list[Array]:
        """Logits [B, tokens, V] that the last stage gives; the others give none."""
        mesh = graph.mesh
        value = place(ids, ("B", "T"), graph.blocks["embed"].op("x").layout, mesh)
        hidden, logits = value, []
        for name, layer in graph.sequence(stage):
            if name == "mtp":
                logits += self._draft(graph, stage, ids, hidden, past)
                break
            hidden = value
            value = self._run_block(graph, stage, name, layer, value, past)
            if name == "head":
                logits.append(self._logits(graph, name, value))
        return logits

    @staticmethod
    def _logits(graph: ShardedGraph, name: str, value: Array) -> Array:
        head = graph.blocks[name]
        return unplace(value, head.op(head.exit), graph.mesh)

    def _draft(
        self, graph: ShardedGraph, stage: Stage, ids: np.ndarray, hidden: Array, past: int
    ) -> list[Array]:
        """Logits [B, 1, V] of each pass of the prediction layer over what the last layer gave."""
        if self.ahead is None:
            raise ProofError("a prediction layer is told the tokens that follow")
        where, length = len(graph.mesh.shape) + 1, past + ids.shape[1]
        tokens = np.concatenate([ids[:, 1:], self.ahead[:, :1]], axis=1)
        logits: list[Array] = []
        kept: dict[tuple[int, str], tuple[Array, Slots]] = {}
        for turn in range(1 + graph.runs(stage).get("draft", 0)):
            if turn:
                past, tokens = length + turn - 1, self.ahead[:, turn : turn + 1]
                hidden = np.take(hidden, [-1], axis=where)
            hidden = self._run_block(graph, stage, "mtp", stage.last, hidden, past, tokens)
            ahead = self._run_block(graph, stage, "mtp_head", -1, hidden, past)
            logits.append(self._logits(graph, "mtp_head", ahead))
            if not turn:
                kept = {
                    key: (array, self._slots[key])
                    for key, array in self._cache.items()
                    if key[0] == stage.last
                }
        self._forget(kept)
        return logits

    def _forget(self, kept: Mapping[tuple[int, str], tuple[Array, Slots]]) -> None:
        """Drop what only further drafts cached: back to the caches after the first."""
        for key, (array, slots) in kept.items():
            self._cache[key], self._slots[key] = array, slots

    def _run_block(
        self,
        graph: ShardedGraph,
        stage: Stage,
        name: str,
        layer: int,
        value: Array,
        past: int,
        ids: np.ndarray | None = None,
    ) -> Array:
        block = graph.blocks[name]
        values: dict[str, Array] = {}
        for node in block.ops():
            inputs = tuple(values[source] for source in node.inputs)
            if node.kind == "input" and ids is not None and node.name != block.entry:
                values[node.name] = place(ids, node.dims, node.layout, graph.mesh)
            elif node.kind == "input":
                values[node.name] = value
            elif node.kind in ("send", "recv"):
                values[node.name] = self._hand_over(node, stage, graph, inputs[0])
            elif node.op is None or node.axes:
                values[node.name] = self._communicate(node, graph, stage, name, inputs[0])
            else:
                dims = tuple(block.op(source).dims for source in node.inputs)
                values[node.name] = self._compute(node, graph, stage, layer, (inputs, dims), past)
        return values[block.exit]

    def _hand_over(self, node: ShardedOp, stage: Stage, graph: ShardedGraph, x: Array) -> Array:
        if node.kind == "recv":
            if stage.index not in self._mail:
                raise ProofError("a stage received nothing", got=f"stage={stage.index}")
            return self._mail.pop(stage.index)
        self._mail[stage.index + 1] = x
        elements = x.size // graph.mesh.ranks
        self.log.append(Communication(stage.index, "send", "send", ("pp",), 2, elements))
        return x

    def _communicate(
        self, node: ShardedOp, graph: ShardedGraph, stage: Stage, block: str, x: Array
    ) -> Array:
        out = MOVES[node.kind](node, x, graph.mesh)
        if node.kind != "slice":
            ranks = graph.mesh.size(node.axes)
            local = {"all_gather": out.size, "all_to_all": x.size * ranks}.get(node.kind, x.size)
            elements = round(local // graph.mesh.ranks * node.density)
            self.log.append(
                Communication(stage.index, block, node.kind, node.axes, ranks, elements)
            )
        return out

    def _compute(
        self,
        node: ShardedOp,
        graph: ShardedGraph,
        stage: Stage,
        layer: int,
        given: tuple[tuple[Array, ...], tuple[tuple[str, ...], ...]],
        past: int,
    ) -> Array:
        op = node.op
        if op is None:
            raise ProofError("an operator lost its definition", got=node.name)
        key = (layer, op.state)
        slots, source = self._append(node, graph, layer, given[0]) if op.state else (None, None)
        call = Call(
            node=node,
            op=op,
            graph=graph.model,
            mesh=graph.mesh,
            inputs=given[0],
            input_dims=given[1],
            weight=self.weight(node, graph, stage, layer),
            past=past,
            held=self._cache.get(key),
            source=source,
            keys_at=self._keys_at(node, graph, layer) if "S" in op.whole else None,
        )
        try:
            out = KERNELS[op.kind](call)
        except ValueError as error:
            raise ProofError(
                "an operator cannot run on the shards it is given", got=f"{node.name}: {error}"
            ) from error
        if slots is not None:
            self._cache[key], self._slots[key] = out, slots
        return out

    def _append(
        self, node: ShardedOp, graph: ShardedGraph, layer: int, inputs: tuple[Array, ...]
    ) -> tuple[Slots, Places]:
        """Slots of a cache after this call, and where their entries come from, `[*mesh, slots]`."""
        op = node.op
        key = (layer, op.state if op is not None else "")
        held = (
            self._slots[key] if key in self._cache else Slots.empty(graph.split("S", node.layout))
        )
        tokens = inputs[0].shape[len(graph.mesh.shape) + 1]
        slots, source = held.appended(tokens, dealt=op is not None and bool(op.cut_as))
        return slots, source[own_part(node.layout, "S", graph.mesh)]

    def _keys_at(self, node: ShardedOp, graph: ShardedGraph, layer: int) -> Places:
        """Positions of the keys that each rank attends to: its own part's, or those of all."""
        slots = next(one for (where, _), one in self._slots.items() if where == layer)
        if "W" in node.dims:
            return slots.at[own_part(node.layout, "W", graph.mesh)]
        return slots.at.reshape([1] * len(graph.mesh.shape) + [-1])

    def weight(
        self, node: ShardedOp, graph: ShardedGraph, stage: Stage, layer: int
    ) -> Array | None:
        """An operator's parameter on every rank of a stage, [*mesh, *local dims]; None without."""
        op = node.op
        if op is None or not op.weight:
            return None
        key = (stage.index, op.param, layer, graph.model.phase)
        if key not in self._local:
            name = param_key(op, layer)
            array, stored = local_weight(self.weights[name], node.weight_layout, graph.mesh)
            self._local[key] = array
            if (stage.index, name) not in self._counted:
                self._counted.add((stage.index, name))
                self.weight_bytes[stage.index] = self.weight_bytes.get(stage.index, 0) + stored
        return self._local[key]


def _sub(mesh: Mesh, axes: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(mesh.axes.index(a) for a in axes)


def _all_reduce(node: ShardedOp, x: Array, mesh: Mesh) -> Array:
    total = x.sum(axis=_sub(mesh, node.axes), keepdims=True)
    return np.broadcast_to(total, x.shape)


def _slice(node: ShardedOp, x: Array, mesh: Mesh) -> Array:
    """Each rank keeps its part of the dims that `node.axes` come to split, major first."""
    after = dict(node.layout)
    for axis in node.axes:
        x = _keep_own(x, mesh.axes.index(axis), _position(node, after[axis], mesh))
    return x


def _position(node: ShardedOp, dim: str, mesh: Mesh) -> int:
    return len(mesh.shape) + node.dims.index(dim)


def _keep_own(x: Array, lead: int, where: int) -> Array:
    """Part i of axis `where` for the ranks at coordinate i of leading axis `lead`."""
    ways = x.shape[lead]
    if x.shape[where] % ways:
        raise ProofError("a sliced dim must divide", got=f"size={x.shape[where]}, ways={ways}")
    parts = x.reshape([*x.shape[:where], ways, x.shape[where] // ways, *x.shape[where + 1 :]])
    own = np.diagonal(parts, axis1=lead, axis2=where)
    return np.moveaxis(own, -1, lead)


def _spread(x: Array, lead: int, where: int) -> Array:
    """Leading axis `lead` gathered into axis `where` (as its minor-most part's parent)."""
    ways = x.shape[lead]
    moved = np.moveaxis(x, lead, where - 1)
    shape = [*moved.shape[: where - 1], ways * moved.shape[where], *moved.shape[where + 1 :]]
    whole = np.expand_dims(moved.reshape(shape), lead)
    target = list(whole.shape)
    target[lead] = ways
    return np.broadcast_to(whole, target)


def _all_gather(node: ShardedOp, x: Array, mesh: Mesh) -> Array:
    before = dict(node.before)
    for axis in reversed(node.axes):
        x = _spread(x, mesh.axes.index(axis), _position(node, before[axis], mesh))
    return x


def _reduce_scatter(node: ShardedOp, x: Array, mesh: Mesh) -> Array:
    return _slice(node, _all_reduce(node, x, mesh), mesh)


def _all_to_all(node: ShardedOp, x: Array, mesh: Mesh) -> Array:
    return _slice(node, _all_gather(node, x, mesh), mesh)


MOVES: Mapping[str, Callable[[ShardedOp, Array, Mesh], Array]] = {
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "all_to_all": _all_to_all,
    "slice": _slice,
}


def unplace(x: Array, node: ShardedOp, mesh: Mesh) -> Array:
    """The whole tensor from its shards; replicas must agree."""
    layout = dict(node.layout)
    for axis in reversed(mesh.axes):
        lead = mesh.axes.index(axis)
        if axis in layout:
            x = _spread(x, lead, _position(node, layout[axis], mesh))
    first = x[(0,) * len(mesh.shape)]
    spread = float(np.abs(x - first).max()) if x.size else 0.0
    if not spread <= 1e-9 * max(1.0, float(np.abs(first).max())):
        raise ProofError("replicas of the output disagree", got=f"largest difference {spread:.3g}")
    return np.asarray(first)
