"""A program with some of its equal layers: what a proof on numbers has to run.

Equal layers are split alike, and what one hands to the next lies alike at every border, so the
first two and the last of each kind read and write all layouts that there are. What they read of a
layer that is left out they read of the last one before that was kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardplan.models.opfold import alike_layers
from shardplan.models.opgraph import OpGraph
from shardplan.models.opshard import Key, Move, Placed, Program
from shardplan.search.oplevel.quotient import HELD, Quotient

__all__ = ["shortened"]

_FIRST = 2
"""Layers of a kind that are kept, besides the last."""


def shortened(program: Program, quotient: Quotient) -> Program:
    """The program without layers that repeat others; itself where what is read is then missing."""
    kept = _kept_layers(program.graph)
    short = _Short(program, quotient)
    for step in program.steps:
        if isinstance(step, Move):
            if step.tensor in short.there:
                short.steps.append(step)
        elif (step.op.layer < 0 or step.op.layer in kept) and not short.place(step):
            return program
    return short.program()


def _kept_layers(graph: OpGraph) -> set[int]:
    groups: dict[int, list[int]] = {}
    for layer, first in alike_layers(graph).items():
        groups.setdefault(first, []).append(layer)
    return {layer for own in groups.values() for layer in (*own[:_FIRST], own[-1])}


@dataclass(init=False, slots=True)
class _Short:
    """Steps that are kept, and what their tensors are called."""

    whole: Program
    quotient: Quotient
    steps: list[Move | Placed]
    there: set[str]
    """Inputs, and what kept operators made."""
    latest: dict[int, str]
    """Class -> the last tensor of it that is there."""
    held: dict[tuple[str, Key], None]

    def __init__(self, whole: Program, quotient: Quotient) -> None:
        self.whole, self.quotient = whole, quotient
        self.steps, self.there, self.latest, self.held = [], set(whole.inputs), {}, {}

    def place(self, step: Placed) -> bool:
        """Keep an operator; False where it reads what no kept layer has."""
        tensors, reads = self.whole.graph.tensors, []
        for access, key in zip(step.op.reads, step.reads, strict=True):
            name = access.tensor
            if tensors[name].kind in HELD:
                self.held[name, key] = None
            elif name not in self.there:
                name = self.latest.get(self.quotient.class_of[name], "")
                if not name:
                    return False
            reads.append(replace(access, tensor=name))
        self.steps.append(replace(step, op=replace(step.op, reads=tuple(reads))))
        for access in step.op.writes:
            self.there.add(access.tensor)
            self.latest[self.quotient.class_of[access.tensor]] = access.tensor
        return True

    def program(self) -> Program:
        """The steps as a program."""
        whole = self.whole
        operators = tuple(one.op for one in self.steps if isinstance(one, Placed))
        outputs = tuple((name, key) for name, key in whole.outputs if name in self.there)
        named: Mapping[str, Key] = dict(outputs)
        graph = replace(whole.graph, operators=operators, outputs=tuple(named))
        return replace(
            whole, graph=graph, steps=tuple(self.steps), outputs=outputs, held=tuple(self.held)
        )
