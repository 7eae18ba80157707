"""Bytes on a rank: what is held, and a bound on what is alive at once.

    held    parameters and constants in every layout in which they are read, states (caches)
            likewise, at their full size: exact
    alive   while an operator runs, every input and result from its making to its last read, in
            each layout that it is made in or moved to at any time: a bound, since a copy that is
            moved is counted as long as its tensor, and stages count what passes them by
    limit   memory_fraction * card - reserve - communicator buffers (one for each group of axes)

Kernel workspaces are the engine's reserve. In a pipeline each stage has rows of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Device
from shardplan.models.parallel import Mesh
from shardplan.search.oplevel.ilp import MemoryRow
from shardplan.search.oplevel.layouts import Key
from shardplan.search.oplevel.problem import Problem, TensorPart
from shardplan.search.oplevel.quotient import Quotient, largest
from shardplan.search.oplevel.strategy import Chosen

__all__ = ["alive_bytes", "capacity_bytes", "held_keys", "mean_rows", "stage_rows", "used_bytes"]


def capacity_bytes(device: Device, engine: EngineProfile, mesh: Mesh) -> float:
    """What a graph may use of a card."""
    groups = 2 ** sum(size > 1 for size in mesh.shape) - 1
    taken = engine.reserve_bytes + groups * engine.communicator_bytes
    return float(engine.memory_fraction * device.hbm_bytes - taken)


def stage_rows(quotient: Quotient, segments: range) -> list[MemoryRow]:
    """Rows of the stage that runs these segments (-1: before the layers)."""
    held = tuple(
        (place, float(count))
        for place, one in enumerate(quotient.tensors)
        if one.is_held and (count := sum(any(s in segments for s in own) for own in one.segments))
    )
    here = (live for live, where in quotient.lives.items() if any(s in segments for s in where))
    return [MemoryRow(held=held, live=live) for live in largest(here)]


def mean_rows(quotient: Quotient, layers: int, stages: int) -> list[MemoryRow]:
    """What holds for every cut into stages: the mean of what is held fits, and all that is alive.

    What is alive in every layer is alive in every stage, beside the mean.
    """
    held = tuple(
        (place, one.times / stages) for place, one in enumerate(quotient.tensors) if one.is_held
    )
    every = set(range(layers))
    common = [live for live, where in quotient.lives.items() if every <= set(where)]
    rows = [MemoryRow(held=held, live=live) for live in largest(common) or [()]]
    return rows + [MemoryRow(held=(), live=live) for live in largest(quotient.lives)]


def held_keys(problem: Problem, chosen: Chosen, part: TensorPart) -> tuple[Key, ...]:
    """Layouts in which a parameter, constant or state is held."""
    reads = (problem.candidates[p][chosen.picks[p]].reads[s] for p, s in part.owner.readers)
    return tuple(dict.fromkeys(reads))


def used_bytes(problem: Problem, chosen: Chosen, rows: Iterable[MemoryRow]) -> float:
    """Bytes of the fullest row."""
    return max(
        (held_bytes(problem, chosen, row.held) + alive_bytes(problem, chosen, row) for row in rows),
        default=0.0,
    )


def held_bytes(
    problem: Problem, chosen: Chosen, held: Sequence[tuple[int, float]], *kinds: str
) -> float:
    """Bytes held, of tensors of these kinds (all unless told)."""
    total = 0.0
    for place, count in held:
        part = problem.tensors[place]
        if not kinds or part.owner.tensor.kind in kinds:
            keys = held_keys(problem, chosen, part)
            total += count * sum(part.bytes[part.place(key)] for key in keys)
    return total


def alive_bytes(problem: Problem, chosen: Chosen, row: MemoryRow) -> float:
    """Bytes of a row's inputs and results in all their layouts."""
    total = 0.0
    for place, count in row.live:
        part = problem.tensors[place]
        nodes = {chosen.made(problem, part)} | {part.steps[i].target for i in chosen.steps[place]}
        total += count * sum(float(part.bytes[node]) for node in nodes)
    return total
