"""A strategy of all classes, and what it costs: the sum that the ILP minimises, added up again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from shardplan.search.oplevel.ilp import Sends, Solution
from shardplan.search.oplevel.problem import Problem, TensorPart

__all__ = ["Chosen", "chosen_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Candidate of each operator class and the steps of each tensor class, in order."""

    picks: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]

    def made(self, problem: Problem, part: TensorPart) -> int:
        """The layout that an input or result is made in."""
        maker = part.owner.maker
        if maker is None:
            return part.source or 0
        place, slot = maker
        return part.place(problem.candidates[place][self.picks[place]].writes[slot])

    def seconds(self, problem: Problem, sends: Sends) -> float:
        """Seconds of one run of the whole graph."""
        classes = zip(problem.quotient.operators, problem.candidates, self.picks, strict=True)
        total = sum(one.times * options[pick].seconds[0] for one, options, pick in classes)
        for place, part in enumerate(problem.tensors):
            total += part.owner.times * sum(float(part.seconds[i]) for i in self.steps[place])
            if place in sends:
                total += float(sends[place][self.made(problem, part)])
        return float(total)


def chosen_of(problem: Problem, solution: Solution) -> Chosen:
    """The strategy of a solution: of the steps those that are on a way to a reader, in order."""
    first = Chosen(picks=solution.picks, steps=solution.steps)
    steps = []
    for place, part in enumerate(problem.tensors):
        wanted = set() if part.owner.is_held else set(_wanted(problem, first, place))
        steps.append(_ways(part, first, problem, solution.steps[place], wanted) if wanted else ())
    return Chosen(picks=solution.picks, steps=tuple(steps))


def _wanted(problem: Problem, chosen: Chosen, place: int) -> Iterator[int]:
    """Layouts in which a tensor is read; an output that stays as it lies adds none."""
    part = problem.tensors[place]
    for reader, slot in part.owner.readers:
        yield part.place(problem.candidates[reader][chosen.picks[reader]].reads[slot])
    if part.given is not None:
        reached = {part.steps[i].target for i in chosen.steps[place]}
        reached.add(chosen.made(problem, part))
        yield next(node for node in part.given if node in reached)


def _ways(
    part: TensorPart, chosen: Chosen, problem: Problem, paid: tuple[int, ...], wanted: set[int]
) -> tuple[int, ...]:
    """Steps on the ways from where a tensor is made, breadth first."""
    start = chosen.made(problem, part)
    by: dict[int, int] = {}
    order = [start]
    waiting = deque(order)
    while waiting:
        node = waiting.popleft()
        for i in paid:
            step = part.steps[i]
            if step.source == node and step.target not in order:
                by[step.target] = i
                order.append(step.target)
                waiting.append(step.target)
    used: set[int] = set()
    for end in wanted:
        node = end
        while node != start:
            used.add(by[node])
            node = part.steps[by[node]].source
    return tuple(by[node] for node in order if node in by and by[node] in used)
