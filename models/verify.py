"""The proof that an applied graph computes what the model computes.

L0  on the real sizes: every cut dim divides, every weight element is held by exactly as many
    ranks as the mesh replicates it, and every block hands its output over as the next reads it.
L1  on a model shrunk with its ratios kept (`shardplan.models.shrink`): numpy float64, all ranks
    in lock step, prefill, decode steps against the sharded cache, reset, a second request. The
    logits must equal the unsharded run to 1e-10 relative; the collectives that ran, with their
    sizes, must equal the prediction; weights and cache must be held as accounted; every weight
    element must lie on the right number of ranks. A second pass repeats it with int8 weights cut
    with their scales.

With tokens predicted ahead (depth k) a decode step verifies 1 + k tokens a sequence and drafts k
more; the logits of all of them must agree. Both runs are given the same tokens and accept them
all: which drafts an engine accepts depends on their values, not on the cut, and is no part of the
proof.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from shardplan.models.accounting import (
    predict_communication,
    stage_weights,
    state_elements,
)
from shardplan.models.apply import Layout, ShardedGraph, ShardedOp, apply
from shardplan.models.build import build_graph
from shardplan.models.errors import LayoutError, ProofError
from shardplan.models.graph import ModelGraph
from shardplan.models.lockstep import Communication, LockStep
from shardplan.models.parallel import Parallelism
from shardplan.models.shrink import Case, shrink
from shardplan.models.spec import ModelSpec
from shardplan.models.weights import Array, Weight, param_key, random_weights

__all__ = ["TOLERANCE", "Check", "Proof", "attempt", "check_static", "prove", "prove_case"]

TOLERANCE = 1e-10
DECODE_STEPS = 3
_BYTES_FLOAT64 = 8
_BYTES_SCALE = 4

Mutate = Callable[[ShardedGraph], ShardedGraph]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One fact that was checked, and what was found."""

    level: int
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was proven of one strategy on one model."""

    model: str
    strategy: str
    checks: tuple[Check, ...]
    wall_s: float
    """Wall time; kept out of files that must be reproducible."""

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)


def attempt(level: int, name: str, run: Callable[[], str]) -> Check:
    try:
        return Check(level=level, name=name, passed=True, detail=run())
    except (ProofError, LayoutError) as error:
        return Check(level=level, name=name, passed=False, detail=str(error))


def _divides(graph: ShardedGraph) -> str:
    cuts = 0
    for block in graph.blocks.values():
        for node in block.ops():
            weight = node.op.weight if node.op is not None else ()
            pairs = [(d, node.layout) for d in node.dims]
            pairs += [(d, node.weight_layout) for d in weight]
            for dim, layout in pairs:
                size, ways = graph.model.sizes.get(dim), graph.split(dim, layout)
                if size is not None and size % ways:
                    raise ProofError(
                        "a cut dim must divide", got=f"{node.name}.{dim}: {size} / {ways}"
                    )
                cuts += ways > 1
    return f"{cuts} cuts"


def _owned(graph: ShardedGraph) -> str:
    """Local elements times the ways they are cut equal the whole, for every weight."""
    total = 0
    for block in graph.blocks.values():
        for node in block.ops():
            if node.op is None or not node.op.weight:
                continue
            ways = graph.mesh.size(tuple(axis for axis, _ in node.weight_layout))
            whole = graph.model.size(node.op.weight)
            local = whole
            for dim in node.op.weight:
                local //= graph.split(dim, node.weight_layout)
            if local * ways != whole:
                raise ProofError(
                    "each weight element is held by ranks / ways ranks",
                    got=f"{block.name}.{node.name}: {local} * {ways} != {whole}",
                )
            total += 1
    return f"{total} parameters"


def _logits(graph: ShardedGraph) -> Layout:
    """Logits lie whole on each rank of a data-parallel group."""
    return tuple((axis, "B") for axis in graph.mesh.axes if axis in graph.mesh.groups["dp"])


def _joined(graph: ShardedGraph) -> str:
    """A block's output lies as the next one reads it; logits lie whole on each rank of a group."""
    logits = _logits(graph)
    for stage in graph.stages:
        names = [name for name, _ in graph.sequence(stage) if not name.startswith("mtp")]
        for name, reader in zip(names, [*names[1:], ""], strict=True):
            block = graph.blocks[name]
            lies = block.op(block.exit).layout
            if reader:
                want = graph.blocks[reader].op(graph.blocks[reader].entry).layout
            else:
                want = logits if name == "head" else graph.blocks["recv"].op("recv").layout
            if lies != want:
                raise ProofError(
                    "a block's output lies as its reader expects",
                    got=f"{name} to {reader or 'the end'}: {lies} for {want}",
                )
    return f"stages: {len(graph.stages)}"


def _joined_ahead(graph: ShardedGraph) -> str:
    """The prediction layer reads what the last layer gives, and what it gives itself."""
    last, block = graph.blocks[graph.model.layers[-1]], graph.blocks["mtp"]
    want, reader = block.op(block.entry).layout, graph.blocks["mtp_head"]
    for one in (last, block):
        if one.op(one.exit).layout != want:
            raise ProofError(
                "the prediction layer's input lies as it expects",
                got=f"{one.name}: {one.op(one.exit).layout} for {want}",
            )
    if reader.op(reader.entry).layout != want:
        raise ProofError("the prediction layer's output lies as its head expects")
    if reader.op(reader.exit).layout != _logits(graph):
        raise ProofError("drafts' logits lie whole on each rank of a group", got=f"{reader.exit}")
    return f"depth {graph.parallel.mtp}"


def check_static(graphs: tuple[ShardedGraph, ...]) -> list[Check]:
    """L0: the checks that need no arithmetic, on the real sizes."""
    found = []
    for graph in graphs:
        phase = graph.model.phase
        found.append(attempt(0, f"{phase}: dims divide", partial(_divides, graph)))
        found.append(attempt(0, f"{phase}: weights owned", partial(_owned, graph)))
        found.append(attempt(0, f"{phase}: blocks joined", partial(_joined, graph)))
        if graph.parallel.mtp:
            ahead = partial(_joined_ahead, graph)
            found.append(attempt(0, f"{phase}: prediction layer joined", ahead))
    return found


@dataclass(slots=True)
class _Pair:
    """The sharded and the unsharded run of one small case, fed the same tokens."""

    case: Case
    whole: LockStep
    cut: LockStep
    rng: np.random.Generator
    context: int = 0
    worst: float = 0.0

    def step(self, phase: str) -> None:
        """One step of both; remembers the worst error and checks the collectives."""
        depth = self.case.parallel.mtp
        tokens = self.case.tokens if phase == "prefill" else 1 + depth
        ids = self.rng.integers(0, self.case.spec.vocab, size=(self.case.batch, tokens))
        if depth:
            ahead = self.rng.integers(0, self.case.spec.vocab, size=(self.case.batch, depth))
            self.whole.ahead = self.cut.ahead = ahead
        self.context += tokens
        self.cut.log.clear()
        graph = self.cut.prefill_graph if phase == "prefill" else self.cut.decode_graph
        want = self._call(self.whole, phase, ids)
        got = self._call(self.cut, phase, ids)
        if got.shape != want.shape:
            raise ProofError("logits have the wrong shape", got=f"{got.shape} for {want.shape}")
        error = float(np.abs(got - want).max() / np.abs(want).max())
        self.worst = max(self.worst, error)
        if not error <= TOLERANCE:
            raise ProofError(
                f"{phase} differs from the unsharded run",
                got=f"relative error {error:.3g}, allowed {TOLERANCE:g}, context {self.context}",
            )
        predicted = predict_communication(graph, self.case.batch, tokens, self.context)
        if predicted != self.cut.log:
            raise ProofError(
                "collectives differ from the prediction",
                got=f"{phase}: {len(self.cut.log)} made, {len(predicted)} predicted; first "
                f"difference {_first_difference(self.cut.log, predicted)}",
            )

    @staticmethod
    def _call(run: LockStep, phase: str, ids: np.ndarray) -> Array:
        return run.prefill(ids) if phase == "prefill" else run.decode(ids)

    def reset(self) -> None:
        """A new request on the same ranks."""
        self.whole.reset()
        self.cut.reset()
        self.context = 0


def _first_difference(made: list[Communication], predicted: list[Communication]) -> str:
    for one, two in zip(made, predicted, strict=False):
        if one != two:
            return f"{one} for {two}"
    return "in length"


def _check_held(pair: _Pair, quantized: bool) -> str:
    """Bytes of weights and elements of cache on one rank of each stage, against the accounts."""
    graph = pair.cut.decode_graph
    for stage in graph.stages:
        want = 0
        for held in stage_weights(graph, stage):
            if quantized and held.weight_class in ("linear", "expert"):
                want += held.count * (held.elements + held.channels * _BYTES_SCALE)
            else:
                want += held.count * held.elements * _BYTES_FLOAT64
        got = pair.cut.weight_bytes.get(stage.index, 0)
        if got != want:
            raise ProofError(
                "weights are held as accounted", got=f"stage {stage.index}: {got} for {want} bytes"
            )
        expected = state_elements(graph, stage, pair.case.batch, pair.context)
        if pair.cut.cached_elements(stage) != expected:
            raise ProofError(
                "the cache is held as accounted",
                got=f"stage {stage.index}: {pair.cut.cached_elements(stage)} for {expected}",
            )
    return f"stages: {len(graph.stages)}, weights: {sum(pair.cut.weight_bytes.values()):,} bytes"


def _check_elements(
    cut: list[ShardedGraph], weights: Mapping[str, Weight], executor: type[LockStep]
) -> str:
    """What the ranks load of weights whose elements are numbered.

    Every element lies on exactly ranks / ways ranks of its stage, and one copy serves both
    phases and tied uses.
    """
    numbered = {
        key: Weight(np.arange(one.values.size).reshape(one.values.shape), one.dims)
        for key, one in weights.items()
    }
    run = executor(cut[0], cut[1], numbered)
    copies: dict[tuple[int, str], Array] = {}
    for graph in cut:
        for stage in graph.stages:
            for name, layer in graph.sequence(stage):
                for node in graph.blocks[name].ops():
                    held = run.weight(node, graph, stage, layer)
                    if held is None or node.op is None:
                        continue
                    _check_copies(node, graph, held)
                    key = (stage.index, param_key(node.op, layer))
                    if not np.array_equal(copies.setdefault(key, held), held):
                        raise ProofError(
                            "one copy of a weight serves both phases", got=f"{name}.{node.name}"
                        )
    return f"{sum(copy.size for copy in copies.values())} elements, {len(copies)} parameters"


def _check_copies(node: ShardedOp, graph: ShardedGraph, held: Array) -> None:
    whole = graph.model.size(node.op.weight) if node.op is not None else 0
    ways = graph.mesh.size(tuple(axis for axis, _ in node.weight_layout))
    copies = np.bincount(held.ravel().astype(np.int64), minlength=whole)
    if copies.size != whole or not (copies == graph.mesh.ranks // ways).all():
        raise ProofError("an element lies on the wrong number of ranks", got=node.name)


def _run(pair: _Pair, quantized: bool) -> str:
    pair.step("prefill")
    for _ in range(DECODE_STEPS):
        pair.step("decode")
    detail = _check_held(pair, quantized)
    pair.reset()
    pair.step("prefill")
    pair.step("decode")
    return f"relative error {pair.worst:.2g}; {detail}"


def _graphs(spec: ModelSpec, par: Parallelism) -> list[ModelGraph]:
    return [build_graph(spec, phase, mtp=par.mtp > 0) for phase in ("prefill", "decode")]


def prove_case(
    case: Case,
    *,
    quantized: bool = False,
    seed: int = 0,
    mutate: Mutate | None = None,
    executor: type[LockStep] = LockStep,
) -> list[Check]:
    """L1 on one small case. `mutate` and `executor` exist so that faults can be planted."""
    graphs = _graphs(case.spec, case.parallel)
    weights = random_weights(graphs[0], seed, quantized=quantized)
    alone = [apply(g, Parallelism(mtp=case.parallel.mtp)) for g in graphs]
    cut = [apply(g, case.parallel) for g in graphs]
    if mutate is not None:
        cut = [mutate(g) for g in cut]
    pair = _Pair(
        case,
        LockStep(alone[0], alone[1], weights),
        executor(cut[0], cut[1], weights),
        np.random.default_rng(seed + 1),
    )
    kind = "int8 weights" if quantized else "float64"
    checks = [attempt(1, f"{kind}: prefill, decode, reset", lambda: _run(pair, quantized))]
    if quantized:
        return checks
    elements = partial(_check_elements, cut, weights, executor)
    joins = [attempt(1, f"{g.model.phase}: blocks joined", partial(_joined, g)) for g in cut]
    if case.parallel.mtp:
        name = "prediction layer joined"
        joins += [attempt(1, f"{g.model.phase}: {name}", partial(_joined_ahead, g)) for g in cut]
    return [*checks, attempt(1, "elements on the right ranks", elements), *joins]


def prove(spec: ModelSpec, par: Parallelism, *, level: int = 1, seed: int = 0) -> Proof:
    """Prove one strategy on one model up to `level` (0 or 1).

    Raises `LayoutError` where the strategy cannot be laid on the model at all.
    """
    start = time.perf_counter()
    graphs = tuple(apply(graph, par) for graph in _graphs(spec, par))
    checks = check_static(graphs)
    if level >= 1:
        case = shrink(spec, par)
        checks += prove_case(case, seed=seed)
        checks += prove_case(case, seed=seed, quantized=True)
    return Proof(
        model=spec.name,
        strategy=par.describe(),
        checks=tuple(checks),
        wall_s=time.perf_counter() - start,
    )
