"""The oracle: every candidate of every operator, and for each tensor every tree of moves.

Nothing of the search is used but the prices and the rules of `models`. Of a tensor's trees those
that no other beats in both seconds and bytes are kept, since memory asks for bytes alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from shardplan.costmodel.opcost import OperatorPrices
from shardplan.models.errors import LayoutError
from shardplan.models.opgraph import Operator, OpGraph, layouts_of
from shardplan.models.redistribute import PARTIAL, redistributions

Lies = tuple[tuple[str, int | str], ...]
Option = tuple[float, float]
"""Seconds of a tree of moves, bytes of all copies."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run an operator."""

    reads: tuple[Lies, ...]
    writes: tuple[Lies, ...]
    seconds: float


@dataclass(slots=True)
class Oracle:
    """Tries everything on a graph that is written out."""

    graph: OpGraph
    prices: OperatorPrices
    moved: dict[tuple[str, Lies, frozenset[Lies]], list[Option]] = field(default_factory=dict)
    known: dict[tuple[str, Lies, Lies], float] = field(default_factory=dict)
    reached: dict[tuple[str, Lies, frozenset[Lies]], float] = field(default_factory=dict)
    used: Mapping[str, dict[str, set[int | str]]] = field(default_factory=dict)

    def best(self, limit_bytes: float = math.inf) -> float:
        """Least seconds of any strategy within the memory, inf where there is none."""
        least = math.inf
        ways = [list(self.ways(op)) for op in self.graph.operators]
        self.used = self.states(ways)
        for choice in itertools.product(*ways):
            least = min(least, self.cost(choice, limit_bytes, least))
        return least

    def least_bytes(self) -> float:
        """Least bytes that any strategy needs."""
        ways = [list(self.ways(op)) for op in self.graph.operators]
        self.used = self.states(ways)
        return min(self.needs(choice) for choice in itertools.product(*ways))

    def ways(self, op: Operator) -> Iterator[Way]:
        """All that an operator may do."""
        mesh = self.prices.mesh
        states = ["", *(name for name, one in op.loops.items() if not one.whole)]
        states += [PARTIAL] if op.linear else []
        for choice in itertools.product(states, repeat=len(mesh.axes)):
            named = dict(zip(mesh.axes, choice, strict=True))
            chosen = {a: s for a, s in named.items() if s not in ("", PARTIAL)}
            sums = {a: PARTIAL for a, s in named.items() if s == PARTIAL}
            try:
                reads, writes = layouts_of(op, chosen, mesh, self.graph.tensors)
            except LayoutError:
                continue
            took = [{**one, **(sums if i in op.linear else {})} for i, one in enumerate(reads)]
            seconds = float(self.prices.operator(op, [chosen]).total_s[0])
            gave = tuple(self.key({**one, **sums}) for one in writes)
            yield Way(tuple(map(self.key, took)), gave, seconds)

    def key(self, layout: Mapping[str, int | str]) -> Lies:
        """A layout in mesh order."""
        return tuple((a, layout[a]) for a in self.prices.mesh.axes if a in layout)

    def states(self, ways: list[list[Way]]) -> dict[str, dict[str, set[int | str]]]:
        """{tensor: {axis: states that some operator gives or takes}}."""
        found: dict[str, dict[str, set[int | str]]] = {}
        for op, options in zip(self.graph.operators, ways, strict=True):
            for way in options:
                pairs = zip((*op.reads, *op.writes), (*way.reads, *way.writes), strict=True)
                for access, lies in pairs:
                    for axis, state in lies:
                        found.setdefault(access.tensor, {}).setdefault(axis, set()).add(state)
        return found

    def layouts(self, tensor: str) -> list[Lies]:
        """All layouts of a tensor that divide."""
        used = self.used.get(tensor, {})
        options = [[None, *sorted(used.get(a, ()), key=str)] for a in self.prices.mesh.axes]
        found = []
        for choice in itertools.product(*options):
            pairs = zip(self.prices.mesh.axes, choice, strict=True)
            lies = tuple((a, s) for a, s in pairs if s is not None)
            if self.bytes(tensor, lies) is not None:
                found.append(lies)
        return found

    def bytes(self, tensor: str, lies: Lies) -> float | None:
        """Bytes of one rank, None where a dim does not divide."""
        one = self.graph.tensors[tensor]
        shape = list(one.shape)
        for axis, dim in lies:
            if isinstance(dim, int):
                if shape[dim] % self.prices.mesh.size((axis,)):
                    return None
                shape[dim] //= self.prices.mesh.size((axis,))
        return math.prod(shape) * self.prices.width_bytes(one)

    def step(self, tensor: str, have: Lies, want: Lies) -> float:
        """Seconds of one collective from one layout to another, inf where none does it."""
        key = (tensor, have, want)
        if key not in self.known:
            self.known[key] = self.step_seconds(*key)
        return self.known[key]

    def step_seconds(self, tensor: str, have: Lies, want: Lies) -> float:
        """The same, not remembered."""
        mesh = self.prices.mesh
        names = [{a: str(d) for a, d in lies} for lies in (have, want)]
        try:
            made = list(redistributions(names[0], names[1], mesh))
        except LayoutError:
            return math.inf
        if len(made) != 1:
            return math.inf
        kind, axes, _ = made[0]
        if kind == "all_to_all" and {names[0][a] for a in axes} & {names[1][a] for a in axes}:
            return math.inf
        size = self.bytes(tensor, want if kind in ("all_gather", "slice") else have) or 0.0
        size *= mesh.size(axes) if kind == "all_to_all" else 1
        return float(self.prices.move(kind, axes, np.array([size]))[0])

    def reach(self, tensor: str, made: Lies, wanted: frozenset[Lies]) -> float:
        """Least seconds of a tree of moves from where a tensor is made to all that is wanted."""
        known = (tensor, made, wanted)
        if known not in self.reached:
            step = functools.partial(self.step, tensor)
            ends = sorted(wanted - {made}, key=str)
            self.reached[known] = reaching_seconds(self.layouts(tensor), made, ends, step)
        return self.reached[known]

    def trees(self, tensor: str, made: Lies, wanted: frozenset[Lies]) -> list[Option]:
        """Trees of moves from where a tensor is made to all that is wanted: the best of them."""
        known = (tensor, made, wanted)
        if known not in self.moved:
            self.moved[known] = best_options(self.every_tree(tensor, made, wanted - {made}))
        return self.moved[known]

    def every_tree(self, tensor: str, made: Lies, wanted: frozenset[Lies]) -> Iterator[Option]:
        nodes = [one for one in self.layouts(tensor) if one != made]
        step = functools.partial(self.step, tensor)
        extra = [one for one in nodes if one not in wanted]
        own = self.bytes(tensor, made) or 0.0
        for count in range(len(extra) + 1 if wanted else 1):
            for through in itertools.combinations(extra, count):
                held = (made, *wanted, *through)
                size = own + sum(self.bytes(tensor, one) or 0.0 for one in held[1:])
                yield spanning_seconds(held, step), size

    def tensors(self, choice: tuple[Way, ...]) -> Iterator[tuple[str, Lies, frozenset[Lies]]]:
        """(tensor, how it is made, how it is wanted) of inputs and results."""
        wants: dict[str, set[Lies]] = {}
        made: dict[str, Lies] = {n: () for n, t in self.graph.tensors.items() if t.kind == "input"}
        for op, way in zip(self.graph.operators, choice, strict=True):
            for access, lies in zip(op.reads, way.reads, strict=True):
                wants.setdefault(access.tensor, set()).add(lies)
            made |= {a.tensor: lies for a, lies in zip(op.writes, way.writes, strict=True)}
        for name in self.graph.outputs:
            wants.setdefault(name, set()).add(())
        for name, lies in made.items():
            yield name, lies, frozenset(wants.get(name, ()))

    def cost(self, choice: tuple[Way, ...], limit_bytes: float, least: float) -> float:
        """Seconds of one choice; inf where memory or layouts refuse it, or it is not the least."""
        seconds = sum(way.seconds for way in choice)
        if seconds >= least:
            return math.inf
        if limit_bytes == math.inf:
            return seconds + sum(self.reach(*one) for one in self.tensors(choice))
        parts = [(one[0], self.trees(*one)) for one in self.tensors(choice)]
        found = math.inf
        for picked in itertools.product(*(options for _, options in parts)):
            sizes = {name: size for (name, _), (_, size) in zip(parts, picked, strict=True)}
            total = seconds + sum(t for t, _ in picked)
            if total < found and self.peak(choice, sizes) <= limit_bytes:
                found = total
        return found

    def needs(self, choice: tuple[Way, ...]) -> float:
        """Least bytes of one choice, inf where layouts refuse it."""
        parts = [(one[0], self.trees(*one)) for one in self.tensors(choice)]
        if any(math.isinf(min(t for t, _ in options)) for _, options in parts):
            return math.inf
        sizes = {n: min(s for t, s in options if t < math.inf) for n, options in parts}
        return self.peak(choice, sizes)

    def peak(self, choice: tuple[Way, ...], sizes: Mapping[str, float]) -> float:
        """Bytes of parameters and of the most that is alive at once."""
        held: set[tuple[str, Lies]] = set()
        for op, way in zip(self.graph.operators, choice, strict=True):
            for access, lies in zip(op.reads, way.reads, strict=True):
                if self.graph.tensors[access.tensor].kind == "parameter":
                    held.add((access.tensor, lies))
        fixed = sum(self.bytes(name, lies) or 0.0 for name, lies in held)
        first, last = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, -1)
        for at, op in enumerate(self.graph.operators):
            first |= {one.tensor: at for one in op.writes}
            last |= {one.tensor: max(last[one.tensor], at) for one in op.writes}
            last |= {n: at for n in op.inputs if n in sizes}
        end = len(self.graph.operators)
        last |= {n: end for n in self.graph.outputs if n in sizes}
        alive = [sum(s for n, s in sizes.items() if first[n] <= at <= last[n]) for at in range(end)]
        return fixed + max(alive)


def spanning_seconds(held: tuple[Lies, ...], step: Callable[[Lies, Lies], float]) -> float:
    """Least seconds of a tree of single steps from the first layout over all the others."""
    root, *rest = held
    able = []
    for one in rest:
        ways = [(other, step(other, one)) for other in held if other != one]
        able.append([(other, seconds) for other, seconds in ways if seconds < math.inf])
    least = math.inf
    for choice in itertools.product(*able):
        total = sum(seconds for _, seconds in choice)
        parents = dict(zip(rest, (other for other, _ in choice), strict=True))
        if total < least and is_tree(root, parents):
            least = total
    return least


def reaching_seconds(
    nodes: list[Lies], root: Lies, ends: list[Lies], step: Callable[[Lies, Lies], float]
) -> float:
    """Least seconds of a tree from a layout to all ends, by dynamic programming over sets of ends.

    Dreyfus and Wagner, The Steiner problem in graphs (1971).
    """
    away = np.array([[0.0 if a == b else step(a, b) for b in nodes] for a in nodes])
    for middle in range(len(nodes)):
        away = np.minimum(away, away[:, middle, None] + away[middle])
    least = {1 << i: away[:, nodes.index(end)] for i, end in enumerate(ends)}
    for mask in range(1, 1 << len(ends)):
        if mask not in least:
            parts = [sub for sub in range(1, mask) if sub & mask == sub]
            split = np.min([least[sub] + least[mask ^ sub] for sub in parts], axis=0)
            least[mask] = np.min(away + split[None, :], axis=1)
    return float(least[(1 << len(ends)) - 1][nodes.index(root)]) if ends else 0.0


def is_tree(root: Lies, parents: Mapping[Lies, Lies]) -> bool:
    """Whether all parents lead to the root."""
    for node in parents:
        seen, at = set(), node
        while at != root:
            if at in seen:
                return False
            seen.add(at)
            at = parents[at]
    return True


def best_options(options: Iterator[Option]) -> list[Option]:
    """Those that no other beats in both; (inf, 0) where there is none."""
    kept: list[Option] = []
    for seconds, size in sorted(options):
        if seconds < math.inf and all(size < other for _, other in kept):
            kept.append((seconds, size))
    return kept or [(math.inf, 0.0)]
