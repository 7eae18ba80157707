"""One predicted step of each phase of a plan: its kernels by pipeline stage, and who runs them.

The pass is that of the plan's `breakdown`: a piece of one prompt, or one token of every slot of a
microbatch; seconds of its stages and the host's sum to the rows there, but for what launches by
the host add. Each phase is of its own pool where the plan has pools.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.program import Program, program_of
from shardplan.models.errors import InputError
from shardplan.models.graph import Phase
from shardplan.models.spec import ModelSpec
from shardplan.search.build_plan import step_loads
from shardplan.search.evaluate import LayoutScorer
from shardplan.search.kept import Kept
from shardplan.search.plan import ClusterInfo, Plan, StrategyInfo
from shardplan.search.proof import model_of, scorer_on
from shardplan.search.space import Choice

__all__ = ["MOST_PIECES", "Predicted", "known_steps", "predicted_steps", "ways_of"]

MOST_PIECES = 256
"""Pieces of a prompt whose times are told; a pipeline has no more stages than layers."""

_PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """One step of a phase."""

    phase: Phase
    way: StrategyInfo
    machine: ClusterInfo
    instances: int
    program: Program
    pieces: int
    """Prefill: pieces of a prompt, one after another. Decode: microbatches in flight."""

    @property
    def _apart_s(self) -> float:
        """Between the starts of one piece or microbatch and the next.

        Pieces of a prompt follow at the pace of the slowest stage and the host. Microbatches share
        a rotation evenly, which leaves each stage room for all of them.
        """
        program = self.program
        if self.phase == "prefill":
            return program.slowest_s + program.host_s
        return (program.rotation_s - program.host_s) / self.pieces

    @property
    def what(self) -> str:
        """What goes through the stages one after another."""
        return "piece" if self.phase == "prefill" else "microbatch"

    def end_s(self, most: int | None = None) -> float:
        """When the last piece, of at most the first `most`, or the first microbatch leaves."""
        drawn = self.pieces if most is None else min(self.pieces, most)
        later = drawn - 1 if self.phase == "prefill" else 0
        return self.program.step_s + later * self._apart_s

    def starts_s(self, most: int = MOST_PIECES) -> list[list[float]]:
        """When each stage begins with each piece or microbatch `[pieces][stages]`, host first.

        At most the first `most` of them.
        """
        host_s, apart_s = self.program.host_s, self._apart_s
        stages_s = [stage.seconds for stage in self.program.stages[:-1]]
        return [
            list(accumulate(stages_s, initial=host_s + piece * apart_s))
            for piece in range(min(self.pieces, most))
        ]


def predicted_steps(
    plan: Plan, *, model: str | None = None, cluster: str | None = None, device: str | None = None
) -> tuple[Predicted, ...]:
    """Prefill and decode. `model`, `cluster`, `device`: files, where the plan's are no presets.

    `InputError` where one of them is not found, or the model has other sizes than the plan's.
    """
    spec = model_of(plan, model)
    found = []
    for phase, machine, way, instances in ways_of(plan):
        try:
            place = load_cluster(
                cluster or machine.name, nodes=machine.nodes, device=device or machine.device
            )
        except InputError as error:
            raise InputError(
                "the plan's cluster and device are presets, or files that are named",
                got=str(error)[:200],
                hint="add --cluster FILE or --device FILE",
            ) from None
        scorer = scorer_on(plan, spec, place, way)
        found.append(_predicted(scorer, spec, phase, machine, way, instances))
    return tuple(found)


def known_steps(
    plan: Plan, *, model: str | None = None, cluster: str | None = None, device: str | None = None
) -> tuple[Predicted, ...]:
    """The same; nothing where a part is not at hand."""
    try:
        return predicted_steps(plan, model=model, cluster=cluster, device=device)
    except InputError:
        return ()


def ways_of(plan: Plan) -> Iterator[tuple[Phase, ClusterInfo, StrategyInfo, int]]:
    """(phase, machine, strategy, instances) of each phase."""
    pools = {pool.role: pool for pool in plan.pools}
    for phase in _PHASES:
        pool = pools.get(phase)
        if pool is None:
            yield phase, plan.cluster, plan.strategy, 1
        else:
            yield phase, pool.cluster, pool.strategy, pool.instances


def _predicted(
    scorer: LayoutScorer,
    spec: ModelSpec,
    phase: Phase,
    machine: ClusterInfo,
    way: StrategyInfo,
    instances: int,
) -> Predicted:
    choice = Choice.of(way)
    kept = Kept(
        parallel=scorer.parallel,
        choice=choice,
        batch=way.batch,
        chunk=way.chunk,
        limit=-1,
        columns={},
    )
    loads = step_loads(scorer, kept, phase)
    program = program_of(scorer.model_for(choice), scorer.question.cluster, choice.overlap, loads)
    pieces = way.pp if phase == "decode" else -(-scorer.question.workload.input_len // way.chunk)
    return Predicted(
        phase=phase,
        way=way,
        machine=machine,
        instances=instances,
        program=program,
        pieces=pieces,
    )
