"""A strategy written on an ONNX model as its own sharding annotations, and read back from them.

For every tensor of a node that the strategy splits, a ShardingSpecProto: the dims, and for each
shard the device that holds it, or the group of devices that hold it alike. Partial sums have no
annotation; they follow from what the operator reads and gives. The mesh stands in the model's
metadata (`shardplan.mesh`), because groups of devices do not tell axes of equal size apart.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardplan.models.atomic import write_atomically
from shardplan.models.errors import InputError, LayoutError
from shardplan.models.frontends.onnx_graph import OnnxGraph, Strategy
from shardplan.models.onnxout.laid import Placed, lay, shard
from shardplan.models.onnxout.spec_check import FIRST_IR, check_annotations
from shardplan.models.opgraph import Access, Layout
from shardplan.models.parallel import Mesh

if TYPE_CHECKING:
    from shardplan.models.frontends.onnx_lib import ModelProto

__all__ = ["CONFIGURATION", "annotate", "read_annotations"]

CONFIGURATION = "shardplan"
"""Name of the configuration that is written."""
_MESH = "shardplan.mesh"


def annotate(
    source: OnnxGraph,
    strategy: Strategy,
    mesh: Mesh,
    path: Path,
    stage_layers: Sequence[int] = (),
) -> None:
    """Write the whole model with the strategy as annotations; arguments as those of `lay`.

    A model whose weights lie outside is written into their folder. `LayoutError` for a strategy
    that cannot be laid, `InputError` for another folder or a file that cannot be written.
    """
    proto = source.file.whole()
    outside = any(one.data_location for one in proto.graph.initializer)
    if outside and path.resolve().parent != source.file.path.resolve().parent:
        raise InputError(
            "an annotated model stands beside the weights that the original keeps outside",
            got=f"file={path}",
            hint=f"write it into {source.file.path.parent}",
        )
    laid = lay(source, strategy, mesh, stage_layers)
    stage = {one.op.name: one.stage for one in laid.steps if isinstance(one, Placed)}
    proto.ir_version = max(proto.ir_version, FIRST_IR)
    proto.configuration.add(name=CONFIGURATION, num_devices=laid.ranks)
    told = {"axes": mesh.axes, "shape": mesh.shape, "stage_layers": list(stage_layers)}
    proto.metadata_props.add(key=_MESH, value=json.dumps(told))
    specs: dict[str, dict[str, Layout]] = {node.name: {} for node in proto.graph.node}
    places: dict[str, int] = {}
    for op, node, access, layout in _said(source, proto, source.of_nodes(strategy)):
        known = specs[node].setdefault(access.tensor, layout)
        if known != layout:
            raise LayoutError(
                "a node reads a tensor in one layout",
                got=f"node={node}, tensor={access.tensor}",
            )
        places[node] = stage[op]
    after: dict[str, int] = {}
    for node in proto.graph.node:  # arithmetic on shapes stands where its inputs are made
        before = max((after.get(name, 0) for name in node.input), default=0)
        place = places.get(node.name, stage.get(node.name, before))
        after |= dict.fromkeys(node.output, place)
        layouts = {name: one for name, one in specs[node.name].items() if one}
        if not layouts and laid.stages == 1:
            continue
        entry = node.device_configurations.add(configuration_id=CONFIGURATION)
        entry.pipeline_stage = place
        for name, layout in layouts.items():
            _write_spec(entry, name, layout, source.walked.shapes[name], mesh, place)
    check_annotations(proto, source.walked.shapes)
    write_atomically(path, proto.SerializeToString())


def read_annotations(source: OnnxGraph) -> tuple[Mesh, dict[str, dict[str, str]], list[int]]:
    """(mesh, strategy of `source.raw`, layers of each stage) of an annotated model.

    Operators that run whole are left out. `InputError` for annotations that are none of ours, that
    break a rule, or that no strategy gives.
    """
    proto = source.file.proto
    check_annotations(proto, source.walked.shapes)
    mesh, stage_layers = _mesh(proto, source.file.path)
    known = {
        (node.name, spec.tensor_name): _read_spec(node.name, spec, mesh)
        for node in proto.graph.node
        for entry in node.device_configurations
        if entry.configuration_id == CONFIGURATION
        for spec in entry.sharding_spec
    }
    strategy: dict[str, dict[str, str]] = {}
    for op, node, access, _ in _said(source, proto, {}):
        for axis, dim in known.get((node, access.tensor), {}).items():
            loop = access.loops[int(dim)]
            if not loop or strategy.setdefault(op, {}).setdefault(axis, loop) != loop:
                raise InputError(
                    "the shardings of a node's tensors are those of one strategy",
                    got=f"node={node}, tensor={access.tensor}, axis={axis}",
                )
    return mesh, strategy, stage_layers


def _said(
    source: OnnxGraph, proto: ModelProto, chosen: Strategy
) -> list[tuple[str, str, Access, Layout]]:
    """(operator, node, access, layout): where each layout stands in the original model.

    A read stands on the operator's own node, a write on the node that makes the tensor there. What
    the front end added (the transpose of a tied table) stands on the node that reads it.
    """
    reads = {node.name: set(node.input) for node in proto.graph.node}
    makers = {name: node.name for node in proto.graph.node for name in node.output if name}
    readers = {name: node.name for node in proto.graph.node for name in node.input if name}
    found = []
    for op in source.raw.operators:
        strategy = chosen.get(op.name, {})
        for access in op.reads:
            if access.tensor in reads.get(op.name, ()):
                found.append((op.name, op.name, access, _layout(access, strategy)))
        for access in op.writes:
            node = makers.get(access.tensor) or readers.get(access.tensor)
            if node:
                found.append((op.name, node, access, _layout(access, strategy)))
    return found


def _layout(access: Access, strategy: Mapping[str, str]) -> Layout:
    return {a: access.loops.index(loop) for a, loop in strategy.items() if loop in access.loops}


def _write_spec(
    entry: Any, name: str, layout: Layout, shape: tuple[int, ...], mesh: Mesh, stage: int
) -> None:
    """Shards row-major over the split dims in order, each with its device or group of devices."""
    spec = entry.sharding_spec.add(tensor_name=name)
    dims = sorted({int(dim) for dim in layout.values()})
    holders: dict[tuple[int, ...], list[int]] = {}
    for rank in range(mesh.ranks):
        place = tuple(shard(layout, dim, rank, mesh)[0] for dim in dims)
        holders.setdefault(place, []).append(stage * mesh.ranks + rank)
    for index, place in enumerate(sorted(holders)):
        if len(holders[place]) == 1:
            spec.device.append(holders[place][0])
        else:
            spec.device.append(-1 - index)
            spec.index_to_device_group_map.add(key=-1 - index, value=holders[place])
    for dim in dims:
        split = spec.sharded_dim.add(axis=dim).simple_sharding.add()
        split.dim_value, split.num_shards = shape[dim], shard(layout, dim, 0, mesh)[1]


def _read_spec(node: str, spec: Any, mesh: Mesh) -> Layout:
    """{axis: dim}: an axis splits the dim along which its neighbours hold other shards.

    `InputError` where the devices of the shards are not those of such a layout.
    """
    groups = {one.key: list(one.value) for one in spec.index_to_device_group_map}
    dims = [int(dim.axis) for dim in spec.sharded_dim]
    counts = [math.prod(one.num_shards for one in dim.simple_sharding) for dim in spec.sharded_dim]
    if math.prod(counts) == 1:
        return {}
    places = itertools.product(*map(range, counts))
    held = {
        device % mesh.ranks: place
        for entry, place in zip(spec.device, places, strict=True)
        for device in groups.get(entry, [entry])
    }
    found: dict[str, int | str] = {}
    step = mesh.ranks
    for axis, size in zip(mesh.axes, mesh.shape, strict=True):
        step //= size
        pair = zip(held.get(0, ()), held.get(step, ()), strict=False)
        moved = [index for index, (first, second) in enumerate(pair) if first != second]
        if size > 1 and moved:
            found[axis] = dims[moved[0]]
    wanted = {
        rank: tuple(shard(found, dim, rank, mesh)[0] for dim in dims) for rank in range(mesh.ranks)
    }
    if held != wanted:
        told = dict(zip(mesh.axes, mesh.shape, strict=True))
        raise InputError(
            "shards lie on the devices of a mesh, row by row",
            got=f"node={node}, tensor={spec.tensor_name}, axes={told}",
        )
    return found


def _mesh(proto: ModelProto, path: Path) -> tuple[Mesh, list[int]]:
    text = next((one.value for one in proto.metadata_props if one.key == _MESH), "")
    try:
        told = json.loads(text)
        axes, shape, layers = (list(told[key]) for key in ("axes", "shape", "stage_layers"))
    except (ValueError, KeyError, TypeError):
        axes, shape, layers = [], [], []
    numbers = all(type(one) is int and one > 0 for one in (*shape, *layers))
    devices = math.prod(shape) * max(len(layers), 1) if numbers else 0
    known = {one.name: one.num_devices for one in proto.configuration}.get(CONFIGURATION)
    if len({*map(str, axes)}) != len(axes) or len(axes) != len(shape) or devices != known:
        raise InputError(
            "the mesh of the annotations stands in the model's metadata",
            got=f"file={path.name}, {_MESH}={text[:80]!r}, devices={known}",
            hint="annotate the model again",
        )
    return Mesh(tuple(map(str, axes)), tuple(shape), {}), layers
