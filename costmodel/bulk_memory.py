"""Memory of the points of a fleet: the ledger's sums over many layouts at once.

Every term of `Ledger` is linear in how often a stage runs each template, or a peak over templates:

    weights[l, s]   = sum over templates of runs * weights of one run    (a tied head: beside the
                      embedding of its own stage it holds nothing more)
    cache[l, s]     = the same of the cache bytes of a token
    activations[p]  = max over templates of sum over the tensors alive of ceil(step / ways) * each

so a template is counted once for all layouts that share it, and points are arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from shardplan.costmodel.bulk import Dtypes, Indices
from shardplan.costmodel.kernels.attention import AttentionKernel, attention_workspace_bytes
from shardplan.costmodel.kernels.base import Array, Machine
from shardplan.costmodel.ledger import Ledger, gathered_elements
from shardplan.models.apply import ShardedBlock, ShardedGraph, Stage

__all__ = ["FleetMemory", "Held"]

_ACTIVATION_BYTES = 2.0
_LOGIT_BYTES = 4.0
_SHARED = ("embed", "head", "mtp", "mtp_head")
"""Templates that stand once in a stage and may use one another's tables."""
Blocks = Mapping[str, ShardedBlock]


@dataclass(slots=True)
class Held:
    """Bytes of single templates, by the applied blocks that they belong to."""

    known: dict[tuple[int, str, tuple[str, ...]], float] = field(default_factory=dict)
    kept: dict[int, Blocks] = field(default_factory=dict)
    """The blocks, so that their ids stay theirs."""

    def stage_bytes(self, ledger: Ledger, stage: Stage, dtype: str) -> float:
        """Weight bytes of a stage, as `Ledger.weights_bytes` counts them."""
        shared = tuple(name for name in _SHARED if name in stage.counts)
        total = 0.0
        for name, count in stage.counts.items():
            before = shared[: shared.index(name)] if name in shared else ()
            if before:
                beside = self._of(ledger, f"w {dtype}", (*before, name))
                total += count * (beside - self._of(ledger, f"w {dtype}", before))
            else:
                total += count * self._of(ledger, f"w {dtype}", (name,))
        return total

    def token_bytes(self, ledger: Ledger, stage: Stage, dtype: str) -> float:
        """Cache bytes of one token on a stage, as `Ledger.kv_bytes_per_token` counts them."""
        return sum(
            count * self._of(ledger, f"c {dtype}", (name,)) for name, count in stage.counts.items()
        )

    def _of(self, ledger: Ledger, what: str, names: tuple[str, ...]) -> float:
        blocks = ledger.graph.blocks
        self.kept.setdefault(id(blocks), blocks)
        key = (id(blocks), what, names)
        if key not in self.known:
            alone = Stage(index=0, first=0, last=0, counts=dict.fromkeys(names, 1))
            of, dtype = what.split()
            self.known[key] = (
                ledger.weights_bytes(alone, dtype)
                if of == "w"
                else ledger.kv_bytes_per_token(alone, dtype)
            )
        return self.known[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Alive:
    """Tensors alive at the peaks: those of one ledger side by side, `[tensors]`."""

    start: Indices
    count: Indices
    template: Indices
    elements: Array
    ways: Array
    templates: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetMemory:
    """Bytes on the ranks of many layouts of one device under one engine; arrays `[points]`."""

    ledgers: tuple[Ledger, ...]
    machine: Machine
    which: Indices
    """Ledger of each point."""
    choices: tuple[Dtypes, ...]
    choice: Indices
    weights: Array
    """Bytes `[ledgers, choices, stages]`, communicators and reserve with them; -inf where a ledger
    has no such stage."""
    token: Array
    """Cache bytes of one token `[ledgers, choices, stages]`."""
    last: Array
    """1 where a stage holds the logits `[ledgers, stages]`."""
    alive: _Alive
    vocab: Array
    ahead: Array
    """Tokens predicted ahead."""
    groups: Array
    heads: Array
    head_dim: Array
    contexts: Array
    """Ranks that share a context, of each ledger."""
    gathered: Array
    """Elements of a token that such ranks gather in one layer, of each ledger."""

    @classmethod
    def of(
        cls,
        ledgers: Sequence[Ledger],
        machine: Machine,
        which: Indices,
        choices: Sequence[Dtypes],
        choice: Indices,
        held: Held | None = None,
    ) -> FleetMemory:
        """Points `which` (into `ledgers`) under `choice`."""
        held = Held() if held is None else held
        shape = (len(ledgers), len(choices), max(len(one.graph.stages) for one in ledgers))
        weights, token = np.full(shape, -np.inf), np.zeros(shape)
        last = np.zeros((shape[0], shape[2]))
        for pair in np.unique(which * len(choices) + choice).tolist():
            place, chosen = divmod(pair, len(choices))
            ledger, dtypes = ledgers[place], choices[chosen]
            fixed = ledger.communicators * ledger.engine.communicator_bytes
            fixed += ledger.engine.reserve_bytes
            last[place, len(ledger.graph.stages) - 1] = 1.0
            for index, stage in enumerate(ledger.graph.stages):
                own = held.stage_bytes(ledger, stage, dtypes.weight_dtype)
                weights[place, chosen, index] = own + fixed
                token[place, chosen, index] = held.token_bytes(ledger, stage, dtypes.kv_dtype)
        graphs = [one.graph for one in ledgers]
        return cls(
            ledgers=tuple(ledgers),
            machine=machine,
            which=which,
            choices=tuple(choices),
            choice=choice,
            weights=weights,
            token=token,
            last=last,
            alive=_alive(ledgers),
            vocab=_numbers([float(one.model.spec.vocab) for one in graphs]),
            ahead=_numbers([float(one.parallel.mtp) for one in graphs]),
            groups=_numbers([float(one.parallel.dp) for one in graphs]),
            heads=_numbers([_heads(one) for one in graphs]),
            head_dim=_numbers([float(one.model.spec.head_dim) for one in graphs]),
            contexts=_numbers([float(one.parallel.cp) for one in graphs]),
            gathered=_numbers(
                [gathered_elements(one) if one.parallel.cp > 1 else 0.0 for one in graphs]
            ),
        )

    def at(self, which: Indices, choice: Indices) -> FleetMemory:
        """Other points of the same ledgers and choices, of pairs that this was made for."""
        return replace(self, which=which, choice=choice)

    def fullest_bytes(self, *, batch: Array, step_tokens: Array, context: Array) -> Array:
        """Bytes on a rank of the fullest stage, for steps of `step_tokens` of one dp group."""
        stages = self._stages(batch, step_tokens, context)
        return np.asarray(stages.max(axis=0), dtype=np.float64)

    def slots(self, *, chunk: Array, context: Array) -> Array:
        """Sequences of `context` tokens that fit beside steps of `chunk`; below 1 for none."""
        empty = self._stages(np.zeros_like(context), chunk, context)
        capacity = self.ledgers[0].capacity_bytes
        each = self._blocks(context) * self.token[self.which, self.choice].T
        with np.errstate(divide="ignore", invalid="ignore"):
            free = np.where(np.isfinite(empty), np.floor((capacity - empty) / each), np.inf)
        return np.asarray(free.min(axis=0), dtype=np.float64)

    def _blocks(self, context: Array) -> Array:
        """Tokens of a sequence in whole blocks of the cache."""
        block = float(self.ledgers[0].engine.kv_block_tokens) * self.contexts[self.which]
        return np.asarray(np.ceil((context + self.ahead[self.which]) / block) * block)

    def _stages(self, batch: Array, step_tokens: Array, context: Array) -> Array:
        """Bytes `[stages, points]`; -inf where a point has no such stage."""
        weights = self.weights[self.which, self.choice].T
        cache = batch * self._blocks(context) * self.token[self.which, self.choice].T
        activations = self._activations(step_tokens, context)
        verified = batch * (1.0 + self.ahead[self.which])
        logits = verified * self.vocab[self.which] * _LOGIT_BYTES
        last = self.last[self.which].T > 0.0
        return np.asarray(
            weights + cache + np.where(last, np.maximum(activations, logits), activations)
        )

    def _activations(self, tokens: Array, context: Array) -> Array:
        alive, points = self.alive, self.which.size
        step = tokens * self.groups[self.which]
        each = alive.count[self.which]
        point = np.repeat(np.arange(points), each)
        ahead = np.repeat(np.cumsum(each) - each, each)
        tensor = alive.start[self.which][point] + np.arange(point.size) - ahead
        sums = np.zeros(alive.templates * points)
        held = np.ceil(step[point] / alive.ways[tensor]) * alive.elements[tensor]
        np.add.at(sums, alive.template[tensor] * points + point, held)
        peak = sums.reshape(alive.templates, points).max(axis=0)
        own = peak * _ACTIVATION_BYTES + self._workspace(tokens, context)
        return np.asarray(own + context * self.gathered[self.which] * _ACTIVATION_BYTES)

    def _workspace(self, tokens: Array, context: Array) -> Array:
        """Scratch of the attention kernel over the prompts that fill one step."""
        held = np.zeros(self.which.size)
        kernels: dict[AttentionKernel, list[int]] = {}
        for place, dtypes in enumerate(self.choices):
            kernels.setdefault(dtypes.attention, []).append(place)
        for kernel, places in kernels.items():
            some = np.flatnonzero(np.isin(self.choice, places))
            step, seen, ledger = tokens[some], context[some], self.which[some]
            held[some] = attention_workspace_bytes(
                self.machine,
                np.maximum(step / np.maximum(seen, 1.0), 1.0),
                np.minimum(step, seen) / self.contexts[ledger],
                seen,
                self.heads[ledger],
                self.head_dim[ledger],
                kernel=kernel,
            )
        return held


def _numbers(values: list[float]) -> Array:
    return np.asarray(values, dtype=np.float64)


def _heads(graph: ShardedGraph) -> float:
    return graph.model.spec.heads / graph.parallel.tp


def _alive(ledgers: Sequence[Ledger]) -> _Alive:
    """The tensors of all ledgers, those cut alike in one template added up."""
    templates: dict[str, int] = {}
    found: list[tuple[int, float, float]] = []
    starts, counts = [], []
    known: dict[int, tuple[int, int]] = {}
    for ledger in ledgers:
        if id(ledger.peaks) not in known:
            start = len(found)
            for name, tensors in ledger.peaks.items():
                sums: dict[float, float] = {}
                for elements, ways in tensors:
                    sums[ways] = sums.get(ways, 0.0) + elements
                number = templates.setdefault(name, len(templates))
                found += [(number, elements, ways) for ways, elements in sums.items()]
            known[id(ledger.peaks)] = (start, len(found) - start)
        start, count = known[id(ledger.peaks)]
        starts.append(start)
        counts.append(count)
    return _Alive(
        start=np.asarray(starts, dtype=np.int64),
        count=np.asarray(counts, dtype=np.int64),
        template=np.asarray([one[0] for one in found], dtype=np.int64),
        elements=_numbers([one[1] for one in found]),
        ways=_numbers([one[2] for one in found]),
        templates=len(templates),
    )
