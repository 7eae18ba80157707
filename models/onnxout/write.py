"""Models of every rank written to a folder: `rank0000.onnx`, ..., their weights, `ranks.json`.

Each rank's weights are cut from the original file where they lie, one after the other, so that no
more than one cut weight is in memory; they go to `rank0000.bin` beside the model (payloads of up to
KEPT_BYTES stay in it). `ranks.json` says which rank takes what from which, and how pieces of inputs
and outputs lie.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from shardplan.models.atomic import write_atomically, written_bytes
from shardplan.models.errors import InputError
from shardplan.models.frontends.onnx_lib import need_onnx
from shardplan.models.frontends.onnx_skim import KEPT_BYTES
from shardplan.models.onnxout.laid import Laid, Move, Placed, local_shape, shard
from shardplan.models.onnxout.nodes import DOMAIN, Nodes
from shardplan.models.opgraph import Layout

if TYPE_CHECKING:
    from shardplan.models.frontends.onnx_lib import ModelProto, TensorProto

__all__ = ["rank_file", "write_ranks"]

_ALIGNED = 4096
"""Weights begin at multiples of it, so that they can be mapped (a page)."""
Step = Placed | Move


def rank_file(rank: int, ending: str = ".onnx") -> str:
    """Name of the model of one rank, or with `.bin` of the file of its large weights."""
    return f"rank{rank:04d}{ending}"


def write_ranks(laid: Laid, folder: Path) -> dict[str, Any]:
    """Write all models; what `ranks.json` says is returned. The folder is made where missing.

    `InputError` for a folder that cannot be written and for what a collective does not take.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _write(laid, folder)
    except OSError as error:
        raise InputError(
            f"the folder of the ranks cannot be written: {error.strerror}", got=f"folder={folder}"
        ) from None


def _write(laid: Laid, folder: Path) -> dict[str, Any]:
    entries = []
    for stage in range(laid.stages):
        steps = stage_steps(laid, stage)
        takes, gives = _edges(laid, stage)
        for rank in range(laid.mesh.ranks):
            number = stage * laid.mesh.ranks + rank
            path = folder / rank_file(number)
            with written_bytes(path.with_suffix(".bin")) as data:
                proto = _model(laid, stage, rank, steps, takes, gives, data)
            if not path.with_suffix(".bin").stat().st_size:
                path.with_suffix(".bin").unlink()
            write_atomically(path, proto.SerializeToString())
            entries.append(
                {
                    "rank": number,
                    "stage": stage,
                    "file": path.name,
                    "receives": {name: _maker(laid, name) * laid.mesh.ranks + rank for name in takes
                                 if name not in laid.held},
                    "outputs": [one for one in laid.outputs if one in gives],
                }
            )  # fmt: skip
    told = {
        "model": laid.source.raw.name,
        "axes": dict(zip(laid.mesh.axes, laid.mesh.shape, strict=True)),
        "stages": laid.stages,
        "caches": {
            name: {axis: int(dim) for axis, dim in layout.items()}
            for name, layout in laid.held.items()
            if laid.source.raw.tensors[name].kind == "state"
        },
        "ranks": entries,
    }
    text = json.dumps(told, indent=2, sort_keys=True)
    write_atomically(folder / "ranks.json", text + "\n")
    return told


def stage_steps(laid: Laid, stage: int) -> list[Step]:
    """What one stage runs, light operators that it reads included."""
    light = {name: one for one in laid.steps if one.light for name in one.made}
    wanted = {name for one in laid.steps if one.stage == stage and not one.light
              for name in one.reads}  # fmt: skip
    wanted |= {name for name in laid.outputs.values() if _maker(laid, name) == stage}
    waiting = [name for name in wanted if name in light]
    while waiting:
        more = [name for name in light[waiting.pop()].reads if name in light and name not in wanted]
        wanted |= set(more)
        waiting += more
    return [
        one
        for one in laid.steps
        if (any(name in wanted for name in one.made) if one.light else one.stage == stage)
    ]


def _maker(laid: Laid, name: str) -> int:
    """Stage that makes a local tensor; 0 for what is held."""
    return next((one.stage for one in laid.steps if name in one.made), 0)


def _edges(laid: Laid, stage: int) -> tuple[list[str], list[str]]:
    """(inputs of a stage's models, outputs): of the graph, and from and for other stages."""
    steps = stage_steps(laid, stage)
    made = {name for one in steps for name in one.made}
    reads = dict.fromkeys(name for one in steps for name in one.reads)
    kinds = {name: one.kind for name, one in laid.source.raw.tensors.items()}
    takes = [n for n in reads if n not in made and kinds.get(n) not in ("parameter", "constant")]
    later: dict[str, None] = {}
    for other in range(stage + 1, laid.stages):
        theirs = stage_steps(laid, other)
        own = {name for one in theirs for name in one.made}
        later |= dict.fromkeys(n for one in theirs for n in one.reads if n in made - own)
    given = [name for name, local in laid.outputs.items() if local in made]
    return takes, [*given, *(name for name in later if name not in laid.outputs.values())]


def _model(
    laid: Laid,
    stage: int,
    rank: int,
    steps: list[Step],
    takes: list[str],
    gives: list[str],
    data: BinaryIO,
) -> ModelProto:
    onnx = need_onnx()
    build = Nodes(laid, rank, stage)
    for one in steps:
        if isinstance(one, Placed):
            build.placed(one)
        else:
            build.moved(one)
    _name_outputs(laid, build, gives)
    made = {name for node in build.nodes for name in node.output}
    read = dict.fromkeys(n for node in build.nodes for n in node.input if n)
    outside = [n for n in read if n not in made and n not in takes and n not in build.constants]
    beside = rank_file(stage * laid.mesh.ranks + rank, ".bin")
    tensors = [_cut(laid, name, rank, data, beside) for name in outside]
    tensors += [onnx.numpy_helper.from_array(v, n) for n, v in build.constants.items()]
    graph = onnx.helper.make_graph(
        build.nodes,
        f"{laid.source.raw.name}.{stage}.{rank}",
        [_info(laid, name, name) for name in takes],
        [_info(laid, name, laid.outputs.get(name, name)) for name in gives],
        tensors,
    )
    opsets = [*laid.source.file.proto.opset_import]
    if not any(one.domain == DOMAIN for one in opsets):
        opsets.append(onnx.helper.make_opsetid(DOMAIN, 1))
    version = max(laid.source.file.proto.ir_version, 10)  # the first with metadata on nodes
    model: ModelProto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=version)
    return model


def _name_outputs(laid: Laid, build: Nodes, gives: list[str]) -> None:
    """Outputs keep the names that the whole model gives them."""
    names = {local: name for name, local in laid.outputs.items() if name in gives and local != name}
    renamed = {name: f"{name}/local" for name in names.values()} | names
    for node in build.nodes:
        for slots in (node.input, node.output):
            slots[:] = [renamed.get(name, name) for name in slots]


def _info(laid: Laid, name: str, local: str) -> Any:
    """Type and local shape of an input or output."""
    tensor = next((one.tensor for one in laid.moves() if one.result == local), local)
    shape = local_shape(laid.source.raw.tensors[tensor].shape, laid.layouts[local], laid.mesh)
    code = laid.source.walked.types[tensor].tensor_type.elem_type
    return need_onnx().helper.make_tensor_value_info(name, code, shape)


def _region(laid: Laid, layout: Layout, shape: tuple[int, ...], rank: int) -> tuple[slice, ...]:
    """The part of a tensor that a rank of a stage holds."""
    found = []
    for dim, size in enumerate(shape):
        piece, pieces = shard(layout, dim, rank, laid.mesh)
        found.append(slice(piece * size // pieces, (piece + 1) * size // pieces))
    return tuple(found)


def _cut(laid: Laid, name: str, rank: int, data: BinaryIO, beside: str) -> TensorProto:
    """One rank's part of a weight or constant; a large one goes to the file of the data."""
    onnx = need_onnx()
    walked = laid.source.walked
    value = walked.values[name] if name in walked.values else walked.file.weight(name)
    region = _region(laid, laid.held.get(name, {}), value.shape, rank)
    part = np.ascontiguousarray(value[region]).reshape([one.stop - one.start for one in region])
    tensor: TensorProto = onnx.TensorProto(name=name, dims=part.shape)
    tensor.data_type = walked.types[name].tensor_type.elem_type
    if part.nbytes <= KEPT_BYTES:
        tensor.raw_data = part.tobytes()
        return tensor
    data.write(b"\0" * (-data.tell() % _ALIGNED))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    places = {"location": beside, "offset": str(data.tell()), "length": str(part.nbytes)}
    for key, told in places.items():
        tensor.external_data.add(key=key, value=told)
    part.tofile(data)
    return tensor
