"""Scores of strategies: one layout applied once, then its whole grid priced at a time.

`LayoutScorer` holds the applied graphs, the op tables and the ledger of one layout; `score`
prices one choice (attention, dtypes, switches) over arrays of batch and chunk. The exact
search calls it with the whole grid, a sampled search with one point: the same code and numbers.

Limits, in the order that names the one that binds: memory, context (prompt and output within the
model's), step (a step holds the tokens that every slot decodes: one, and those predicted ahead),
concurrency (slots for the requests asked for), ttft, tpot, the 99th percentiles of both, rate.
TTFT is limited with all slots in use and, where a rate is asked for, at that rate with its queue;
that and the percentiles are dear (`seen`), and priced only where they are limited and all else
holds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.acceptance import default_acceptance
from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.forward import Pricer
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.ledger import Ledger
from shardplan.costmodel.memo import Memo
from shardplan.costmodel.optable import NO_OVERLAP, Overlap
from shardplan.costmodel.serving import ServingInput, Steady, steady
from shardplan.costmodel.step import StepModel
from shardplan.costmodel.steps import Steps
from shardplan.models.apply import ShardedGraph, apply
from shardplan.models.build import build_graph
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec
from shardplan.search.plan import Limits, Request, Workload
from shardplan.search.seen import Sight, seen, seen_names, too_slow
from shardplan.search.space import Choice
from shardplan.search.spare import Spare

__all__ = [
    "LIMITS",
    "LayoutScorer",
    "Question",
    "Scores",
    "acceptance_of",
    "context_tokens",
    "served_input",
]

LIMITS = ("memory", "context", "step", "ttft", "tpot", "ttft_p99", "tpot_p99", "rate")
Objective = str
_PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a strategy is scored against."""

    spec: ModelSpec
    cluster: Cluster
    engine: EngineProfile
    workload: Workload
    limits: Limits
    objective: Objective
    cards: int
    spare: Spare | None = None
    """What may be lost while the replicas left still serve the rate."""

    @classmethod
    def of(
        cls,
        request: Request,
        spec: ModelSpec,
        cluster: Cluster,
        engine: EngineProfile,
        *,
        cards: int,
        spare: Spare | None = None,
    ) -> Question:
        """The question of a request, on `cards` ranks."""
        return cls(
            spec=spec,
            cluster=cluster,
            engine=engine,
            workload=request.workload,
            limits=request.limits,
            objective=request.objective,
            cards=cards,
            spare=spare,
        )

    def share_left(self, par: Parallelism, *, best: bool = False) -> float:
        """Share of a layout's replicas that must do; `best`: of the best order of its ranks."""
        if self.spare is None:
            return 1.0
        return self.spare.share_left(par, self.cluster.ranks_per_node, best=best)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Arrays of the grid's shape; `limit` is an index into `LIMITS`, -1 where feasible."""

    columns: Mapping[str, Array]
    """What a search decides by."""
    limit: NDArray[np.int8]
    steady: Steady
    cards: int
    capacity_bytes: float

    @property
    def feasible(self) -> NDArray[np.bool_]:
        """Which strategies satisfy every limit."""
        return np.asarray(self.limit < 0)

    def opened(self, names: Sequence[str]) -> Scores:
        """The same with further columns, still without numbers, and limits that may be written."""
        more = {name: np.full(self.limit.shape, np.nan) for name in names}
        return replace(self, columns={**self.columns, **more}, limit=self.limit.copy())

    def every(self) -> dict[str, Array]:
        """All columns of all strategies, in the grid's shape."""
        found = self.at(np.arange(self.limit.size))
        return {name: values.reshape(self.limit.shape) for name, values in found.items()}

    def at(self, places: NDArray[np.int64]) -> dict[str, Array]:
        """All columns of the strategies at flat places `[n]` of the grid."""
        timed = self.steady.timed
        pace, means = timed.pace, self.steady.mean_parts(places)

        def some(values: Array) -> Array:
            if values.shape != self.limit.shape:
                values = np.broadcast_to(values, self.limit.shape)
            return np.asarray(values.ravel()[places])

        own = {name: some(values) for name, values in self.columns.items()}
        parts = {
            "compute_s": means.compute_s,
            "memory_s": means.memory_s,
            "collective_s": means.collective_s,
            "overhead_s": some(pace.step_s) - means.compute_s - means.memory_s - means.collective_s,
        }
        return {
            **own,
            "output_tokens_per_s_per_card": own["output_tokens_per_s"] / self.cards,
            "memory_free_bytes": self.capacity_bytes - own["memory_bytes"],
            **{name: np.broadcast_to(values, places.shape) for name, values in parts.items()},
            "concurrency": own["requests_per_s"] * own["end_to_end_s"],
            "prefill_step_s": some(pace.prefill_s),
            "decode_step_s": some(timed.decode_s),
            "mixed_step_s": some(timed.mixed_s),
            "mixed_share": some(pace.mixed),
        }


def context_tokens(workload: Workload) -> int:
    """Longest sequence of a request."""
    return workload.input_len + workload.output_len


def acceptance_of(spec: ModelSpec, workload: Workload) -> float:
    """Share of the tokens predicted ahead that are kept: as asked, or the model's."""
    asked = workload.mtp_acceptance
    return default_acceptance(spec.architecture).value if asked is None else asked


def served_input(
    spec: ModelSpec,
    work: Workload,
    par: Parallelism,
    choice: Choice,
    batch: Array,
    chunk: Array,
) -> ServingInput:
    """A workload on one layout and choice, over arrays of batch and chunk; all slots filled."""
    return ServingInput(
        batch=batch,
        chunk=chunk,
        input_len=work.input_len,
        output_len=work.output_len,
        prefix_hit=work.prefix_hit,
        weight_dtype=choice.weight_dtype,
        kv_dtype=choice.kv_dtype,
        attention=choice.attention,
        mtp=par.mtp,
        acceptance=acceptance_of(spec, work),
    )


class LayoutScorer:
    """One layout of a question, ready to be priced; `memo` is shared by layouts of one question."""

    def __init__(self, question: Question, par: Parallelism, memo: Memo | None = None) -> None:
        self.question, self.parallel = question, par
        self.left = question.share_left(par)
        graphs: dict[Phase, ShardedGraph] = {
            phase: apply(build_graph(question.spec, phase, mtp=par.mtp > 0), par)
            for phase in _PHASES
        }
        self.model = StepModel.of(graphs, question.cluster, question.engine, memo)
        self.ledger = Ledger.of(graphs["prefill"], question.cluster.device, question.engine)
        self._switched: dict[Overlap, StepModel] = {}

    def recut(self, stage_layers: tuple[int, ...]) -> LayoutScorer:
        """The same layout with its layers cut otherwise; op tables and their prices are shared."""
        other = copy.copy(self)
        other.parallel = replace(self.parallel, stage_layers=stage_layers)
        graphs = {
            phase: apply(graph.model, other.parallel) for phase, graph in self.model.graphs.items()
        }
        other.model = self.model.with_graphs(graphs)
        other.ledger = replace(self.ledger, graph=graphs["prefill"])
        other._switched = {
            overlap: model.with_graphs(graphs) for overlap, model in self._switched.items()
        }
        return other

    def serving_input(self, choice: Choice, batch: Array, chunk: Array) -> ServingInput:
        """What is served, over arrays of batch and chunk."""
        work = self.question.workload
        given = served_input(self.question.spec, work, self.parallel, choice, batch, chunk)
        if not work.concurrency:
            return given
        return replace(given, in_flight=work.concurrency / self.parallel.dp)

    def common_bytes(self, choice: Choice, batch: Array, chunk: Array) -> dict[str, Array]:
        """What every stage holds alike (`Ledger.grid_bytes`)."""
        return self.ledger.grid_bytes(
            self.model.machine,
            attention=choice.attention,
            batch=batch,
            tokens=chunk,
            context=context_tokens(self.question.workload),
        )

    def model_for(self, choice: Choice) -> StepModel:
        """The step model with the choice's switches and algorithm set."""
        overlap = choice.overlap
        if overlap == NO_OVERLAP:
            return self.model
        if overlap not in self._switched:
            made = StepModel.of(
                self.model.graphs,
                self.question.cluster,
                self.question.engine,
                self.model.memo,
                overlap,
            )
            alike = made.rows == self.model.rows  # no group of the layout meets what was set
            self._switched[overlap] = self.model if alike else made
        return self._switched[overlap]

    def least_bytes(self, choice: Choice) -> float:
        """Memory that any strategy of this layout and choice needs at least: one slot."""
        return float(self.memory(choice, np.ones(1), np.ones(1))[0])

    def memory(self, choice: Choice, batch: Array, chunk: Array) -> Array:
        """Bytes on the fullest rank of the fullest stage."""
        common = self.common_bytes(choice, batch, chunk)
        return self.ledger.fullest_bytes(common, choice.weight_dtype, choice.kv_dtype)

    def even_bytes(self, choice: Choice, batch: Array, chunk: Array) -> Array:
        """What the fullest rank holds at least, however layers are cut: the mean over stages."""
        common = self.common_bytes(choice, batch, chunk)
        ledger, stages = self.ledger, self.ledger.graph.stages
        weights = sum(ledger.weights_bytes(stage, choice.weight_dtype) for stage in stages)
        cache = sum(ledger.kv_bytes_per_token(stage, choice.kv_dtype) for stage in stages)
        spread = (weights + common["cached_tokens"] * cache) / len(stages)
        fixed = ledger.communicators * ledger.engine.communicator_bytes
        return np.asarray(
            spread + common["activations_bytes"] + fixed + ledger.engine.reserve_bytes
        )

    def score(
        self,
        choice: Choice,
        batch: Array,
        chunk: Array,
        *,
        watch: Callable[[Steps], None] | None = None,
        pricer: Pricer | None = None,
        dear: bool = True,
    ) -> Scores:
        """Price arrays of batch and chunk (broadcast) of one choice.

        `watch`: as of `steady`. `pricer`: in place of the choice's own model; its prices may add
        dims from the left. Limits that are dear to price are left out without `dear`, and with a
        `pricer`.
        """
        question = self.question
        model = self.model_for(choice) if pricer is None else pricer
        found = steady(model, self.serving_input(choice, batch, chunk), watch)
        timed = found.timed
        shape = np.broadcast_shapes(batch.shape, chunk.shape, timed.end_to_end_s.shape)
        columns = {
            "ttft_s": timed.ttft_s,
            "tpot_s": timed.tpot_s,
            "end_to_end_s": timed.end_to_end_s,
            "output_tokens_per_s": timed.requests_per_s * float(question.workload.output_len),
            "requests_per_s": timed.requests_per_s,
            "memory_bytes": self.memory(choice, batch, chunk),
            "objective": self.objective(timed.end_to_end_s, timed.requests_per_s),
        }
        columns = {
            name: value if value.shape == shape else np.broadcast_to(value, shape)
            for name, value in columns.items()
        }
        limit = self._limit(columns, batch, chunk)
        if dear and pricer is None and seen_names(question):
            columns |= self._seen(choice, np.broadcast_arrays(batch, chunk), limit < 0)
            limit = self._limit(columns, batch, chunk)
        return Scores(
            columns=columns,
            limit=limit,
            steady=found,
            cards=question.cards,
            capacity_bytes=self.ledger.capacity_bytes,
        )

    def _seen(
        self, choice: Choice, grid: Sequence[Array], able: NDArray[np.bool_]
    ) -> dict[str, Array]:
        """What requests see of the strategies that are `able`, NaN of others."""
        names, places = seen_names(self.question), np.flatnonzero(able)
        found = {name: np.full(able.size, np.nan) for name in names}
        if places.size:
            slots, tokens = (np.broadcast_to(one, able.shape).ravel()[places] for one in grid)
            told = seen([Sight(self, choice, slots, tokens)])[0]
            for name, values in found.items():
                values[places] = told[name]
        return {name: values.reshape(able.shape) for name, values in found.items()}

    def objective(self, end_to_end_s: Array, requests_per_s: Array) -> Array:
        """What is maximised: 1 / latency, else output tokens a second."""
        if self.question.objective == "latency":
            return 1.0 / end_to_end_s
        return requests_per_s * float(self.question.workload.output_len)

    def _limit(self, columns: Mapping[str, Array], batch: Array, chunk: Array) -> NDArray[np.int8]:
        question, work = self.question, self.question.workload
        longest = question.spec.max_context or math.inf
        broken = {
            "memory": columns["memory_bytes"] > self.ledger.capacity_bytes,
            "context": np.full((), context_tokens(work) > longest),
            "step": chunk < batch * (1 + self.parallel.mtp),
            "ttft": columns["ttft_s"] > (question.limits.ttft_s or math.inf),
            "tpot": columns["tpot_s"] > (question.limits.tpot_s or math.inf),
            "rate": columns["requests_per_s"] * self.left < (work.request_rate or 0.0),
        }
        for name, slow in too_slow(question, columns).items():
            broken[name] = broken.get(name, np.zeros((), dtype=bool)) | slow
        limit = np.full(columns["memory_bytes"].shape, -1, dtype=np.int8)
        for index, name in reversed(list(enumerate(LIMITS))):
            if name in broken:
                np.copyto(limit, np.int8(index), where=broken[name])
        return limit
