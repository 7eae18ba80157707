"""The module of one rank: a per-rank graph with that rank's part of every parameter.

Its inputs and outputs are the captured module's, as they lie on the rank; the input `rank` of the
graph becomes a buffer. Groups of its collectives are names until `bind_groups` puts process groups
in their place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from shardplan.models.errors import InputError
from shardplan.models.fx.collectives import GROUP_ARGUMENT, bind, collective_of
from shardplan.models.fx.emit import Held
from shardplan.models.fx.lockstep import groups_of_axes
from shardplan.models.fx.torch_lib import torch_lib
from shardplan.models.opshard import Key
from shardplan.models.parallel import Mesh
from shardplan.models.redistribute import PARTIAL

__all__ = [
    "bind_groups",
    "cut",
    "group_names",
    "held_by",
    "process_groups",
    "rank_module",
    "save_weights",
]


def cut(tensor: Any, lies: Key, mesh: Mesh, rank: int) -> Any:
    """A rank's part of a tensor; of a partial sum its first rank holds all, the others zeros."""
    places = place_of(mesh, rank)
    for axis, dim in lies:
        if dim == PARTIAL:
            if places[axis]:
                tensor = torch_lib().zeros_like(tensor)
        else:
            tensor = tensor.tensor_split(mesh.size((axis,)), int(dim))[places[axis]]
    return tensor


def place_of(mesh: Mesh, rank: int) -> dict[str, int]:
    """A rank's number on each axis."""
    found = {}
    for axis, size in zip(reversed(mesh.axes), reversed(mesh.shape), strict=True):
        rank, found[axis] = divmod(rank, size)
    return found


def held_by(
    held: Mapping[str, Held], tensors: Mapping[str, Any], mesh: Mesh, rank: int
) -> dict[str, Any]:
    """What a rank holds, by the name of the attribute: copies that share no memory."""
    return {
        name: cut(tensors[one.source], one.lies, mesh, rank).detach().clone()
        for name, one in held.items()
    }


def rank_module(
    graph: Any,
    held: Mapping[str, Held],
    tensors: Mapping[str, Any],
    mesh: Mesh,
    rank: int,
    *,
    device: Any = None,
) -> Any:
    """The `torch.fx.GraphModule` of a rank (its number in its stage) on a device.

    It returns a tensor where the captured module does, else a tuple.
    """
    torch = torch_lib()
    own = torch.fx.Graph()
    copied: dict[Any, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.target == "rank":
            copied[node] = own.create_node("get_attr", "rank")
        elif node.op == "output":
            results = torch.fx.node.map_arg(node.args[0], copied.__getitem__)
            own.output(results[0] if len(results) == 1 else results)
        else:
            copied[node] = own.node_copy(node, copied.__getitem__)
    where = None if device is None else torch.device(device)
    if where is not None:
        _set_device(own, where)
    root = torch.nn.Module()
    root.register_buffer("rank", torch.tensor(rank, device=where), persistent=False)
    for name, tensor in held_by(held, tensors, mesh, rank).items():
        _put(root, name, tensor if where is None else tensor.to(where), held[name].parameter)
    own.eliminate_dead_code()
    return torch.fx.GraphModule(root, own)


def _put(root: Any, name: str, tensor: Any, parameter: bool) -> None:
    """Attach a tensor under a dotted name."""
    torch = torch_lib()
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, torch.nn.Module())
        root = getattr(root, part)
    if parameter:
        root.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
    else:
        root.register_buffer(last, tensor)


def _set_device(graph: Any, device: Any) -> None:
    """Put a device in place of the one that the captured graph names."""
    kind = torch_lib().device

    def put(argument: Any) -> Any:
        return device if isinstance(argument, kind) else argument

    for node in graph.nodes:
        node.args = tuple(map(put, node.args))
        node.kwargs = {name: put(value) for name, value in node.kwargs.items()}


def group_names(graphs: Iterable[Any]) -> tuple[str, ...]:
    """Names of the groups that graphs use, sorted."""
    return tuple(
        sorted(
            {
                node.args[GROUP_ARGUMENT[kind]]
                for graph in graphs
                for node in graph.nodes
                if (kind := collective_of(node))
            }
        )
    )


def process_groups(
    names: Iterable[str], mesh: Mesh, stages: int, number: Callable[[int, int], int]
) -> dict[str, Any]:
    """The process group of this process for each name; every process calls this alike.

    `number(stage, rank)` is the global rank of a rank of a stage.
    """
    torch_lib()
    distributed = importlib.import_module("torch.distributed")
    own, found = distributed.get_rank(), {}
    for name in names:
        for stage in range(stages):
            for group in groups_of_axes(mesh, tuple(name.split("."))):
                ranks = [number(stage, rank) for rank in group]
                made = distributed.new_group(ranks)
                if own in ranks:
                    found[name] = made
    return found


def bind_groups(module: Any, groups: Mapping[str, Any]) -> None:
    """Let a rank's module use process groups."""
    bind(module.graph, {name: group.group_name for name, group in groups.items()})
    module.recompile()


def save_weights(module: Any, path: Path) -> None:
    """Write what a rank holds as safetensors. `InputError` where the package is missing."""
    try:
        safetensors = importlib.import_module("safetensors.torch")
    except ImportError:
        raise InputError(
            "weights are written by the package safetensors",
            hint='install the extra: pip install "shardplan[torch]"',
        ) from None
    safetensors.save_file(module.state_dict(), path)
