"""Stages of a pipeline on top of the split: which layers each holds, by the search of `cuts`.

All stages split alike. For a strategy of the operators the cut is the one with the fastest slowest
stage that fits (`cuts.least`, exact). Which strategy is asked for in three turns, each of which
asks for more memory than the last; the first answer that fits is the optimum, since every strategy
that fits was allowed:

    1   the fastest one without a limit on memory
    2   the fastest one that fits but for the copies of tensors that are moved; of several stages,
        whose mean stage does, which every cut needs
    3   the fastest one that fits, copies and all; of several stages, in the cut that makes the
        fullest stage of turn 2 least full: its gap is to the bound of turn 2

Seconds of a stage are those of its layers, of what stands before or after all layers, and of
sending what the next stages read. What follows from inputs and constants alone (positions, masks)
is made by every stage that reads it and not sent; its seconds count once. Where borders between
layers pass different tensors, each counts with the mean of all.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardplan.costmodel.kernels.collectives import collective
from shardplan.costmodel.opcost import OperatorPrices
from shardplan.costmodel.placement import neighbour_tiers
from shardplan.models.errors import InfeasibleError, InputError
from shardplan.search.cuts import CostRow, Cut, least
from shardplan.search.oplevel.ilp import MemoryRow, Sends, Solution, least_memory_bytes, solve
from shardplan.search.oplevel.memory import (
    alive_bytes,
    held_bytes,
    mean_rows,
    stage_rows,
    used_bytes,
)
from shardplan.search.oplevel.problem import Problem
from shardplan.search.oplevel.quotient import Quotient
from shardplan.search.oplevel.strategy import Chosen, chosen_of

__all__ = ["Found", "cut_segments", "find", "layer_count", "stage_seconds"]

_GIB = 2.0**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A strategy with its cut, and the solution that proves it."""

    chosen: Chosen
    cut: Cut
    solution: Solution
    bound_s: float
    sends: Sends


def layer_count(quotient: Quotient) -> int:
    """Repeated layers of the graph."""
    return len({s for one in quotient.operators for s in one.segments if one.op.layer >= 0})


def cut_segments(cut: Cut, layers: int) -> list[range]:
    """Segments of each stage: its layers, and what comes before the first or after the last."""
    starts = [0, *np.cumsum(cut).tolist()]
    found = [range(a, b) for a, b in itertools.pairwise(starts)]
    found[0] = range(-1, found[0].stop)
    found[-1] = range(found[-1].start, layers + 1)
    return found


def find(
    problem: Problem,
    prices: OperatorPrices,
    stages: int,
    limit_bytes: float,
    time_limit_s: float | None = None,
    below_s: float = np.inf,
) -> Found | None:
    """The best strategy and cut; None where a bound says that none takes less than `below_s`.

    `InputError` for stages that layers cannot fill, `InfeasibleError` where nothing fits, with how
    much it would take.
    """
    layers = layer_count(problem.quotient)
    if not 1 <= stages <= max(layers, 1):
        raise InputError(
            "every stage of a pipeline holds at least one layer",
            got=f"stages={stages}, layers={layers}",
            hint=f"try 1 to {max(layers, 1)}",
        )
    sends = _sends(problem, prices, stages, layers)
    quotient, pruned = problem.quotient, problem.pruned()
    one = _all_rows(problem, (layers,)) if stages == 1 else mean_rows(quotient, layers, stages)
    chosen, bound_s = Chosen(picks=(), steps=()), 0.0
    for rows in ([], one):
        solution = solve(
            pruned, rows, limit_bytes, sends, time_limit_s, copies=False, below_s=below_s
        )
        if solution is None and below_s < np.inf:
            return None
        if solution is None:
            raise _does_not_fit(problem, rows, limit_bytes)
        bound_s = solution.bound_s
        chosen = _same_steps(pruned, problem, chosen_of(pruned, solution))
        cut = _cut(problem, chosen, stages, layers, limit_bytes, sends)
        if cut is not None:
            return Found(chosen=chosen, cut=cut, solution=solution, bound_s=bound_s, sends=sends)
    even = _least_full(problem, chosen, stages, layers)
    rows = _all_rows(problem, even)
    last = solve(problem, rows, limit_bytes, sends, time_limit_s)
    if last is None:
        raise _does_not_fit(problem, rows, limit_bytes, even)
    chosen = chosen_of(problem, last)
    cut = _cut(problem, chosen, stages, layers, limit_bytes, sends) or even
    bound_s = last.bound_s if stages == 1 else bound_s
    return Found(chosen=chosen, cut=cut, solution=last, bound_s=bound_s, sends=sends)


def _same_steps(pruned: Problem, problem: Problem, chosen: Chosen) -> Chosen:
    """The strategy with the places of its steps among all steps."""
    steps = tuple(
        tuple(full.steps.index(part.steps[i]) for i in own)
        for part, full, own in zip(pruned.tensors, problem.tensors, chosen.steps, strict=True)
    )
    return Chosen(picks=chosen.picks, steps=steps)


def _all_rows(problem: Problem, cut: Cut) -> list[MemoryRow]:
    layers = layer_count(problem.quotient)
    return [r for one in cut_segments(cut, layers) for r in stage_rows(problem.quotient, one)]


def _cut(
    problem: Problem, chosen: Chosen, stages: int, layers: int, limit_bytes: float, sends: Sends
) -> Cut | None:
    """The cut with the fastest slowest stage that fits; None where none does."""
    if stages == 1:
        fits = used_bytes(problem, chosen, _all_rows(problem, (layers,))) <= limit_bytes
        return (layers,) if fits else None
    parts = stage_seconds(problem, chosen, stages, layers, sends)
    rows = [CostRow.of(parts), _memory_row(problem, chosen, stages, layers)]
    return least(rows, [np.inf, limit_bytes], 0)


def _least_full(problem: Problem, chosen: Chosen, stages: int, layers: int) -> Cut:
    """The cut whose fullest stage is least full."""
    if stages == 1:
        return (layers,)
    return least([_memory_row(problem, chosen, stages, layers)], [np.inf], 0) or ()


def stage_seconds(
    problem: Problem, chosen: Chosen, stages: int, layers: int, sends: Sends
) -> tuple[list[float], list[float]]:
    """(seconds of each layer, of each stage's ends)."""
    spent: dict[int, float] = defaultdict(float)
    for place, one in enumerate(problem.quotient.operators):
        seconds = problem.candidates[place][chosen.picks[place]].seconds[0]
        for segment in one.segments:
            spent[segment] += seconds
    for place, part in enumerate(problem.tensors):
        seconds = sum(float(part.seconds[i]) for i in chosen.steps[place])
        for segments in part.owner.segments:
            spent[segments[0]] += seconds
    ends = [0.0] * stages
    ends[0] += spent[-1]
    ends[-1] += spent[layers]
    passed = sum(
        float(seconds[chosen.made(problem, problem.tensors[place])])
        for place, seconds in sends.items()
    )
    for stage in range(stages - 1):
        ends[stage] += passed / (stages - 1)
    return [spent[layer] for layer in range(layers)], ends


def _memory_row(problem: Problem, chosen: Chosen, stages: int, layers: int) -> CostRow:
    """Bytes of each layer and of each stage's ends; what several layers share is on every stage."""
    each, ends = [0.0] * layers, [0.0] * stages
    for place, one in enumerate(problem.quotient.tensors):
        size = held_bytes(problem, chosen, ((place, 1.0),)) if one.is_held else 0.0
        for segments in one.segments if size else ():
            inside = [s for s in segments if 0 <= s < layers]
            if len(inside) > 1:
                ends = [end + size for end in ends]
                continue
            for layer in inside:
                each[layer] += size
            ends[0] += size * (-1 in segments)
            ends[-1] += size * (layers in segments)
    alive = [0.0] * stages
    for live, where in problem.quotient.lives.items():
        size = alive_bytes(problem, chosen, MemoryRow(held=(), live=live))
        for stage in range(stages):
            at_end = (stage == 0 and -1 in where) or (stage == stages - 1 and layers in where)
            if at_end or any(0 <= s < layers for s in where):
                alive[stage] = max(alive[stage], size)
    return CostRow.of((each, [a + b for a, b in zip(ends, alive, strict=True)]))


def _sends(problem: Problem, prices: OperatorPrices, stages: int, layers: int) -> Sends:
    """Seconds of handing each tensor class to the next stages, in each of its layouts."""
    if stages == 1:
        return {}
    light = _light(problem.quotient)
    spans = neighbour_tiers(prices.cluster, ((stages, prices.mesh.ranks),))
    found = {}
    for place, part in enumerate(problem.tensors):
        every = () if place in light else part.owner.segments
        crossed = sum(_borders(segments, layers) for segments in every)
        if crossed and part.owner.maker is not None:
            share = crossed / max(layers - 1, 1) * (stages - 1)
            time = collective(
                "send", spans, part.bytes, prices.machine.calibration,
                launch="graph", in_service=True,
            )  # fmt: skip
            found[place] = time.total_s * share
    return found


def _borders(segments: Sequence[int], layers: int) -> int:
    """Borders between layers that a tensor is passed over; those beside the ends are none."""
    return min(max(segments), layers - 1) - max(segments[0], 0)


def _light(quotient: Quotient) -> set[int]:
    """Tensor classes that follow from inputs and constants alone."""
    reads: dict[int, list[int]] = {}
    for place, one in enumerate(quotient.tensors):
        for reader, _ in one.readers:
            reads.setdefault(reader, []).append(place)
    light = {
        p for p, one in enumerate(quotient.tensors) if one.tensor.kind in ("input", "constant")
    }
    for place, one in enumerate(quotient.tensors):
        if one.maker is not None and all(p in light for p in reads.get(one.maker[0], ())):
            light.add(place)
    return light


def _does_not_fit(
    problem: Problem, rows: Sequence[MemoryRow], limit_bytes: float, cut: Cut = ()
) -> InfeasibleError:
    needed = least_memory_bytes(problem, rows)
    where = f" with stages of {', '.join(map(str, cut))} layers" if len(cut) > 1 else ""
    return InfeasibleError(
        "a rank holds its part of the graph in its memory",
        got=f"the least that any split needs{where} is {_size(needed)}, "
        f"{_size(needed - limit_bytes)} more than a rank's {_size(limit_bytes)}",
        hint="use more ranks, more stages, a narrower dtype or a smaller batch",
    )


def _size(count: float) -> str:
    """Bytes as GiB, small ones as MiB."""
    return f"{count / _GIB:.2f} GiB" if count >= 0.1 * _GIB else f"{count / 2**20:.3f} MiB"
