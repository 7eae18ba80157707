"""All ranks of a per-rank FX graph in one process: every node runs once for each rank, in step.

No processes and no ports: a collective is arithmetic over the list of the ranks' values. What
each one moved is written down (`Communication`), from the tensors that were really there, so that
it can be held against the prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from shardplan.models.errors import ProofError
from shardplan.models.fx.collectives import GROUP_ARGUMENT, axes_of, collective_of
from shardplan.models.fx.torch_lib import torch_lib
from shardplan.models.lockstep import Communication
from shardplan.models.parallel import Mesh

__all__ = ["groups_of_axes", "run_in_step"]

Ranks = list[Any]
"""One value for each rank of the mesh."""


def groups_of_axes(mesh: Mesh, axes: Sequence[str]) -> list[list[int]]:
    """The groups over some axes: ranks of each, major to minor."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(mesh.ranks):
        rest, place = rank, []
        for size in reversed(mesh.shape):
            rest, own = divmod(rest, size)
            place.append(own)
        at = dict(zip(mesh.axes, reversed(place), strict=True))
        others = tuple(at[axis] for axis in mesh.axes if axis not in axes)
        found.setdefault(others, []).append(rank)
    return list(found.values())


def run_in_step(
    graph: Any,
    mesh: Mesh,
    inputs: Sequence[Ranks],
    attributes: Mapping[str, Ranks],
    *,
    log: list[Communication] | None = None,
    stage: int = 0,
) -> list[Any]:
    """Outputs of a graph on every rank: [rank] -> what the graph returns there.

    `inputs` are the values of the placeholders, `attributes` those of get_attr nodes, each a list
    over ranks.
    """
    runner = _Runner(mesh, attributes, [] if log is None else log, stage)
    with torch_lib().no_grad():
        return runner.run(graph, iter(inputs))


class _Runner:
    def __init__(
        self,
        mesh: Mesh,
        attributes: Mapping[str, Ranks],
        log: list[Communication],
        stage: int,
    ) -> None:
        self.mesh, self.attributes, self.log, self.stage = mesh, attributes, log, stage
        self.values: dict[Any, Ranks] = {}

    def run(self, graph: Any, inputs: Iterator[Ranks]) -> list[Any]:
        last = _last_uses(graph)
        for node in graph.nodes:
            if node.op == "placeholder":
                self.values[node] = next(inputs)
            elif node.op == "get_attr":
                self.values[node] = self.attributes[node.target]
            elif node.op == "output":
                return [self.own(node.args[0], rank) for rank in range(self.mesh.ranks)]
            else:
                self.values[node] = self.compute(node)
            for one in last.get(node, ()):
                del self.values[one]
        raise ProofError("a graph has an output")

    def own(self, argument: Any, rank: int) -> Any:
        """An argument with one rank's values in place of nodes."""
        fx = torch_lib().fx
        return fx.node.map_arg(argument, lambda node: self.values[node][rank])

    def compute(self, node: Any) -> Ranks:
        kind = collective_of(node)
        if kind:
            return self.collective(node, kind)
        found = []
        for rank in range(self.mesh.ranks):
            args, kwargs = self.own(node.args, rank), self.own(node.kwargs, rank)
            if node.op == "call_method":
                found.append(getattr(args[0], node.target)(*args[1:], **kwargs))
            else:
                found.append(node.target(*args, **kwargs))
        return found

    def collective(self, node: Any, kind: str) -> Ranks:
        axes = axes_of(node.args[GROUP_ARGUMENT[kind]])
        values = self.values[node.args[0]]
        out: Ranks = list(values)
        for group in groups_of_axes(self.mesh, axes):
            given = [values[rank] for rank in group]
            splits = [self.own(node.args[1:3], rank) for rank in group]
            for rank, value in zip(group, MOVES[kind](given, splits), strict=True):
                out[rank] = value
        if not node.meta.get("counts"):
            self.write_down(kind, axes, values, out)
        return out

    def write_down(self, kind: str, axes: tuple[str, ...], given: Ranks, out: Ranks) -> None:
        ranks = self.mesh.size(axes)
        if kind == "all_to_all_single":
            # rows go where their experts are: what a group moves is known for the whole of it
            group = groups_of_axes(self.mesh, axes)[0]
            elements = sum(given[rank].numel() for rank in group)
        else:
            elements = (out if kind == "all_gather_into_tensor" else given)[0].numel()
        name = kind.removesuffix("_into_tensor").removesuffix("_tensor").removesuffix("_single")
        self.log.append(Communication(self.stage, "", name, axes, ranks, elements))


def _last_uses(graph: Any) -> dict[Any, list[Any]]:
    """Node -> values that nothing after it reads."""
    last: dict[Any, Any] = {}
    for node in graph.nodes:
        last[node] = node
        for one in node.all_input_nodes:
            last[one] = node
    found: dict[Any, list[Any]] = {}
    for one, reader in last.items():
        if reader.op != "output":
            found.setdefault(reader, []).append(one)
    return found


def _all_reduce(given: Ranks, _: Sequence[Any]) -> Ranks:
    total = sum(given[1:], given[0].clone())
    return [total.clone() for _ in given]


def _all_gather(given: Ranks, _: Sequence[Any]) -> Ranks:
    whole = torch_lib().cat(given, 0)
    return [whole.clone() for _ in given]


def _reduce_scatter(given: Ranks, _: Sequence[Any]) -> Ranks:
    return list(torch_lib().chunk(sum(given[1:], given[0].clone()), len(given), 0))


def _all_to_all(given: Ranks, splits: Sequence[Any]) -> Ranks:
    """Part j of rank i's rows goes to rank j; splits are (sizes received, sizes sent)."""
    sent = [one.split(list(sizes), 0) for one, (_, sizes) in zip(given, splits, strict=True)]
    out = []
    for rank, (expected, _) in enumerate(splits):
        parts = [one[rank] for one in sent]
        if [len(part) for part in parts] != list(expected):
            raise ProofError(
                "a rank is sent as many rows as it expects",
                got=f"rank={rank}, sent={[len(part) for part in parts]}, expected={expected}",
            )
        out.append(torch_lib().cat(parts, 0))
    return out


MOVES: Mapping[str, Callable[[Ranks, Sequence[Any]], Ranks]] = {
    "all_reduce": _all_reduce,
    "all_gather_into_tensor": _all_gather,
    "reduce_scatter_tensor": _reduce_scatter,
    "all_to_all_single": _all_to_all,
}
