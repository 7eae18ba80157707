"""Sharding annotations of an ONNX model, checked: onnx.checker lets all of this pass.

Annotations are IR version 11's: `ModelProto.configuration` names sets of devices, and on a node
`device_configurations` say, for tensors that it reads or writes, which dims are split over which
devices (onnx.proto: DeviceConfigurationProto, NodeDeviceConfigurationProto, ShardingSpecProto).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shardplan.models.errors import InputError

if TYPE_CHECKING:
    from shardplan.models.frontends.onnx_lib import ModelProto, NodeProto

__all__ = ["FIRST_IR", "check_annotations"]

FIRST_IR = 11
"""The first IR version with device configurations."""


def check_annotations(proto: ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many nodes are annotated; `InputError` with the node and the rule for what is wrong.

    `shapes` are those of all tensors; those of a walked graph will do.
    """
    devices = _configurations(proto)
    stages: dict[tuple[str, str], int] = {}
    annotated = 0
    for node in proto.graph.node:
        seen: set[str] = set()
        for one in node.device_configurations:
            name = one.configuration_id
            if name not in devices or name in seen:
                raise _wrong(node, "a node names each configuration of the model once", name)
            seen.add(name)
            tensors: set[str] = set()
            for spec in one.sharding_spec:
                if spec.tensor_name in tensors:
                    raise _wrong(node, "a tensor has one sharding", spec.tensor_name)
                tensors.add(spec.tensor_name)
                _check_spec(node, spec, devices[name], shapes)
            _check_stage(node, one, stages)
        annotated += bool(seen)
    if annotated and proto.ir_version < FIRST_IR:
        raise InputError(
            f"device configurations need IR version {FIRST_IR} or later",
            got=f"ir_version={proto.ir_version}",
        )
    return annotated


def _configurations(proto: ModelProto) -> dict[str, int]:
    """Devices of each configuration of a model."""
    found: dict[str, int] = {}
    for one in proto.configuration:
        named = not one.device or len(set(one.device)) == len(one.device) == one.num_devices
        if not one.name or one.name in found or one.num_devices < 1 or not named:
            raise InputError(
                "a configuration has a name of its own and names all of its devices or none",
                got=f"configuration={one.name!r}, num_devices={one.num_devices}, "
                f"names={len(one.device)}",
            )
        found[one.name] = one.num_devices
    return found


def _wrong(node: NodeProto, rule: str, got: object) -> InputError:
    return InputError(rule, got=f"node={node.name}, operator={node.op_type}, found={got}")


def _check_spec(
    node: NodeProto, spec: Any, devices: int, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    name = spec.tensor_name
    if name not in (*node.input, *node.output) or name not in shapes:
        raise _wrong(node, "a sharding names a tensor that the node reads or writes", name)
    shape, ways, seen = shapes[name], 1, set()
    for dim in spec.sharded_dim:
        if not -len(shape) <= dim.axis < len(shape) or dim.axis % len(shape) in seen:
            raise _wrong(
                node, "a sharding names dims of its tensor, each once", f"{name}, axis={dim.axis}"
            )
        axis = dim.axis % len(shape)
        seen.add(axis)
        _check_dim(node, f"{name}, axis={axis}", dim, shape[axis])
        ways *= math.prod(one.num_shards for one in dim.simple_sharding)
    _check_devices(node, spec, devices)
    if len(spec.device) not in ((1, 0) if ways == 1 else (ways,)):
        raise _wrong(
            node, "there are as many entries of devices as shards", f"{name}, shards={ways}"
        )


def _check_dim(node: NodeProto, place: str, dim: Any, size: int) -> None:
    counts = [one.num_shards for one in dim.simple_sharding]
    if not counts or min(counts) < 1 or size % math.prod(counts):
        raise _wrong(node, "shards divide their dim", f"{place} of {size}, shards={counts}")
    parts = [one.dim_value for one in dim.simple_sharding if one.HasField("dim_value")]
    if len(parts) == len(counts) and math.prod(parts) != size:
        raise _wrong(node, "dim values give the size of the dim", f"{place} of {size}, {parts}")


def _check_devices(node: NodeProto, spec: Any, devices: int) -> None:
    groups = {one.key: list(one.value) for one in spec.index_to_device_group_map}
    if len(groups) != len(spec.index_to_device_group_map):
        raise _wrong(node, "a group of devices is named once", spec.tensor_name)
    named = [one for entry in spec.device for one in groups.get(entry, [entry])]
    unknown = [one for one in named if not 0 <= one < devices]
    if unknown:
        raise _wrong(
            node, "devices are those of the configuration", f"{spec.tensor_name}, {unknown[0]}"
        )
    if len(set(named)) != len(named) or any(not group for group in groups.values()):
        raise _wrong(node, "groups of devices are disjoint and not empty", spec.tensor_name)
    if set(groups) - set(spec.device):
        raise _wrong(node, "every group of devices is used", spec.tensor_name)


def _check_stage(node: NodeProto, one: Any, stages: dict[tuple[str, str], int]) -> None:
    if not one.HasField("pipeline_stage"):
        return
    before = [stages.get((one.configuration_id, name), 0) for name in node.input]
    if one.pipeline_stage < max(before, default=0):
        raise _wrong(node, "a stage reads what earlier stages make", one.pipeline_stage)
    stages |= {(one.configuration_id, name): one.pipeline_stage for name in node.output}
