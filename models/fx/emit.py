"""From a program to the FX graph that every rank runs.

One graph serves all ranks (SPMD): what differs between them is their part of each parameter, and
the input `rank`, a 0-d integer tensor that stands behind the captured inputs. The graph is the
captured one with

    collectives and slices where the program moves a tensor,
    sizes in the arguments of view, reshape, expand, ... made those of one rank's part,
    a vocabulary-parallel embedding looking up the tokens of its own part and giving zeros for the
    others,
    parameters as attributes, each named as in the captured module.

Assertions on tensors that the exporter left are dropped: they speak of whole shapes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardplan.models.errors import InputError
from shardplan.models.fx.collectives import Builder
from shardplan.models.fx.torch_lib import aten, torch_lib
from shardplan.models.opgraph import Access
from shardplan.models.opshard import Key, Move, Placed, Program, local_shape

__all__ = ["Held", "RankGraph", "emit"]

_SIZES = {
    "view": 1,
    "reshape": 1,
    "_unsafe_view": 1,
    "expand": 1,
    "view_copy": 1,
    "expand_copy": 1,
    "new_zeros": 1,
    "new_ones": 1,
    "new_empty": 1,
    "new_full": 1,
}
"""Operators that are told the shape of their result, and the argument that tells it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A parameter, buffer or constant as a rank holds it."""

    source: str
    """Its name in the captured module."""
    lies: Key
    parameter: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGraph:
    """The graph of every rank of one mesh."""

    graph: Any
    """`torch.fx.Graph`: captured inputs in order, then `rank`; it returns a tuple."""
    program: Program
    held: Mapping[str, Held]
    """By the name of the attribute."""
    inputs: tuple[str, ...]
    """Captured inputs, in order; without `rank`."""


def emit(exported: Any, program: Program) -> RankGraph:
    """The per-rank graph of a `torch.export.ExportedProgram` under a program.

    `InputError` for an export that writes to its inputs or buffers, or a node that the program
    lacks.
    """
    return _Emitter(exported, program).run()


class _Emitter:
    def __init__(self, exported: Any, program: Program) -> None:
        self.exported, self.program, self.mesh = exported, program, program.mesh
        self.nodes = {node.name: node for node in exported.graph.nodes}
        self.sources = _sources(exported.graph_signature)
        self.graph = torch_lib().fx.Graph()
        self.rank: Any = None
        self.build = Builder(self.graph, self.mesh, lambda: self.rank)
        self.values: dict[tuple[str, Key], Any] = {}
        self.held: dict[str, Held] = {}

    def run(self) -> RankGraph:
        names = tuple(self.exported.graph_signature.user_inputs)
        for name in names:
            self.values[name, self.program.inputs[name]] = self.graph.placeholder(name)
        self.rank = self.graph.placeholder("rank")
        pending: list[Move] = []
        for step in self.program.steps:
            if isinstance(step, Move):
                pending.append(step)
                continue
            self.build.meta = {"layer": step.op.layer, "where": step.op.where}
            self.moves(pending)
            self.operator(step)
            pending = []
        self.moves(pending)
        self.graph.output(tuple(self.value(*end) for end in self.program.outputs))
        return RankGraph(graph=self.graph, program=self.program, held=self.held, inputs=names)

    def moves(self, pending: Iterable[Move]) -> None:
        for one in pending:
            shape = self.program.graph.tensors[one.tensor].shape
            before = self.value(one.tensor, one.before)
            self.values[one.tensor, one.after] = self.build.move(before, shape, one)

    def value(self, tensor: str, lies: Key) -> Any:
        """The node of a tensor in a layout; a parameter becomes an attribute on first use."""
        found = self.values.get((tensor, lies))
        if found is None:
            if tensor not in self.sources:
                raise InputError("a node of the export is an operator of the graph", got=tensor)
            found = self.values[tensor, lies] = self.hold(tensor, lies)
        return found

    def hold(self, tensor: str, lies: Key) -> Any:
        source, parameter = self.sources[tensor]
        name = source
        if name in self.held:
            name += "__" + "_".join(f"{axis}_{dim}" for axis, dim in lies)
        self.held[name] = Held(source=source, lies=lies, parameter=parameter)
        node = self.graph.create_node("get_attr", name)
        node.meta.update(self.build.meta)
        return node

    def operator(self, step: Placed) -> None:
        node = self.nodes.get(step.op.name)
        if node is None:
            raise InputError("an operator of the graph is a node of the export", got=step.op.name)
        shapes = [self.local(one, lies) for one, lies in _written(step)]
        if step.op.kind == "embedding" and _contracted(step):
            made = self.part_of_table(node, step)
        elif step.sent:
            made = self.exchanged(node, step)
        else:
            made = self.like(node, step, shapes[0])
        self.keep(node, step, made)

    def local(self, access: Access, lies: Key) -> tuple[int, ...]:
        return local_shape(self.program.graph.tensors[access.tensor].shape, lies, self.mesh)

    def like(self, node: Any, step: Placed, shape: tuple[int, ...]) -> Any:
        """The captured node on the rank's values, and on the sizes of its part."""
        values = self.arguments(step)
        args = torch_lib().fx.node.map_arg(node.args, lambda one: next(values[one.name]))
        kwargs = torch_lib().fx.node.map_arg(node.kwargs, lambda one: next(values[one.name]))
        at = _SIZES.get(getattr(node.target, "_opname", ""))
        if at is not None:
            args = (*args[:at], list(shape), *args[at + 1 :])
        return self.build.call(node.target, *args, **kwargs)

    def arguments(self, step: Placed) -> dict[str, Any]:
        """Values of each tensor that an operator reads, one for each time that it reads it."""
        found: dict[str, list[Any]] = {}
        for access, lies in zip(step.op.reads, step.reads, strict=True):
            found.setdefault(access.tensor, []).append(self.value(access.tensor, lies))
        return {name: _again(values) for name, values in found.items()}

    def part_of_table(self, node: Any, step: Placed) -> Any:
        """Rows of a vocabulary-parallel table: zeros where another rank holds the token."""
        values = self.arguments(step)
        table, tokens = (next(values[one.name]) for one in node.args[:2])
        axes = _contracted(step)
        access, lies = step.op.reads[0], step.reads[0]
        if access.tensor != node.args[0].name:
            access, lies = step.op.reads[1], step.reads[1]
        rows = self.local(access, lies)[0]
        call = self.build.call
        first = call(aten().mul.Tensor, self.build.place(axes), rows)
        own = call(aten().sub.Tensor, tokens, first)
        there = call(
            aten().logical_and.default,
            call(aten().ge.Scalar, own, 0),
            call(aten().lt.Scalar, own, rows),
        )
        found = call(aten().embedding.default, table, call(aten().clamp.default, own, 0, rows - 1))
        return call(aten().where.ScalarOther, call(aten().unsqueeze.default, there, -1), found, 0.0)

    def exchanged(self, node: Any, step: Placed) -> Any:
        """Experts of other ranks: their rows are sent there and back."""
        from shardplan.models.fx.experts import dispatched

        values = self.arguments(step)
        return dispatched(
            self.build, [next(values[one.name]) for one in node.args], tuple(step.sent)
        )

    def keep(self, node: Any, step: Placed, made: Any) -> None:
        """Note where the results are; of several, each is taken out of the tuple."""
        if len(step.op.writes) == 1 and step.op.writes[0].tensor == node.name:
            self.values[node.name, step.writes[0]] = made
            return
        numbers = {user.name: user.args[1] for user in node.users if _takes_out(user)}
        for access, lies in _written(step):
            if access.tensor not in numbers:
                raise InputError("a result of the graph is a node of the export", got=access.tensor)
            taken = self.build.call(operator.getitem, made, numbers[access.tensor])
            self.values[access.tensor, lies] = taken


def _takes_out(node: Any) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def _again(values: list[Any]) -> Iterator[Any]:
    """The values in turn, the last of them again for ever: a graph may list a tensor once."""
    yield from values
    while True:
        yield values[-1]


def _written(step: Placed) -> list[tuple[Access, Key]]:
    return list(zip(step.op.writes, step.writes, strict=True))


def _contracted(step: Placed) -> tuple[str, ...]:
    """Axes over which an operator's sum is split."""
    return tuple(axis for axis, loop in step.chosen.items() if loop in step.op.contracted)


def _sources(signature: Any) -> dict[str, tuple[str, bool]]:
    """{placeholder: (name in the module, whether it is a parameter)} of what the module holds."""
    if signature.buffers_to_mutate or getattr(signature, "user_inputs_to_mutate", None):
        raise InputError(
            "an exported graph gives back what it changes, rather than writing to its inputs",
            got=", ".join(signature.buffers_to_mutate.values()) or "inputs",
            hint="export the module with caches as inputs and outputs",
        )
    found = {name: (at, True) for name, at in signature.inputs_to_parameters.items()}
    found |= {name: (at, False) for name, at in signature.inputs_to_buffers.items()}
    lifted = signature.inputs_to_lifted_tensor_constants
    return found | {name: (at, False) for name, at in lifted.items()}
