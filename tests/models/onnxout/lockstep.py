"""Models of all ranks run in lock step: cut at their collectives, the pieces by onnxruntime.

A piece is what lies between two collectives; numpy does what a collective does, over the ranks that
the node's metadata names. Stages run one after the other and hand over what `ranks.json` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from shardplan.models.onnxout.nodes import COLLECTIVES, GROUP

Values = dict[str, Any]


def run_whole(path: Path, inputs: Mapping[str, Any]) -> Values:
    """Outputs of the original model, by onnxruntime."""
    model = onnx.load(path)
    names = [one.name for one in model.graph.output]
    return dict(zip(names, _session(model).run(names, dict(inputs)), strict=True))


def run_ranks(
    folder: Path, inputs: Sequence[Mapping[str, Any]] | Mapping[str, Any]
) -> list[Values]:
    """Outputs of every rank; inputs are those of all ranks or of each."""
    told = json.loads((folder / "ranks.json").read_text(encoding="utf-8"))
    entries = told["ranks"]
    given = [inputs] * len(entries) if isinstance(inputs, Mapping) else list(inputs)
    sent: list[Values] = [{} for _ in entries]
    for stage in range(told["stages"]):
        ours = [one for one in entries if one["stage"] == stage]
        models = {one["rank"]: onnx.load(folder / one["file"]) for one in ours}
        values: dict[int, Values] = {}
        for one in ours:
            taken = {n: sent[maker][n] for n, maker in one["receives"].items()}
            values[one["rank"]] = {**given[one["rank"]], **taken}
        run_models(models, values)
        for rank, found in values.items():
            sent[rank] = found
    return [{name: sent[one["rank"]][name] for name in one["outputs"]} for one in entries]


def run_models(models: Mapping[int, onnx.ModelProto], values: dict[int, Values]) -> None:
    """One stage: every rank's values are filled in."""
    plans = {rank: _pieces(model) for rank, model in models.items()}
    first = next(iter(plans.values()))
    assert all(len(plan) == len(first) for plan in plans.values())
    for index in range(len(first)):
        for rank, plan in plans.items():
            _run_piece(models[rank], plan[index].nodes, plan[index].needed, values[rank])
        for places in zip(*(plan[index].collectives for plan in plans.values()), strict=True):
            _meet(dict(zip(plans, places, strict=True)), values)


@dataclass
class _Piece:
    nodes: list[Any]
    needed: list[str]
    """What others read of it."""
    collectives: list[Any]
    """Those that follow it."""


def _pieces(model: onnx.ModelProto) -> list[_Piece]:
    level: dict[str, int] = {}
    pieces: dict[int, _Piece] = {}
    for node in model.graph.node:
        depth = max((level.get(name, 0) for name in node.input), default=0)
        piece = pieces.setdefault(depth, _Piece([], [], []))
        meets = node.op_type in COLLECTIVES and node.domain == "com.microsoft"
        (piece.collectives if meets else piece.nodes).append(node)
        level |= dict.fromkeys(node.output, depth + meets)
        if meets:
            pieces.setdefault(depth + 1, _Piece([], [], []))
    outputs = {one.name for one in model.graph.output}
    reads = [(n, id(p)) for p in pieces.values() for one in p.nodes for n in one.input]
    reads += [(n, 0) for p in pieces.values() for one in p.collectives for n in one.input]
    for piece in pieces.values():
        made = {name for node in piece.nodes for name in node.output if name}
        outside = {name for name, owner in reads if owner != id(piece)} | outputs
        piece.needed = sorted(made & outside)
    return [pieces[depth] for depth in sorted(pieces)]


def _run_piece(model: onnx.ModelProto, nodes: list[Any], needed: list[str], values: Values) -> None:
    if not needed:
        return
    made = {name for node in nodes for name in node.output}
    reads = {name for node in nodes for name in node.input if name} - made
    weights = [one for one in model.graph.initializer if one.name in reads]
    taken = sorted(reads - {one.name for one in weights})
    infos = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(values[name].dtype), values[name].shape
        )
        for name in taken
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in needed]
    graph = helper.make_graph(nodes, "piece", infos, outputs, weights)
    piece = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    found = _session(piece).run(needed, {name: values[name] for name in taken})
    values.update(zip(needed, found, strict=True))


def _session(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _meet(nodes: Mapping[int, Any], values: dict[int, Values]) -> None:
    """One collective: what every rank gets."""
    found = {}
    for rank, node in nodes.items():
        group = next(
            [int(r) for r in p.value.split(",")] for p in node.metadata_props if p.key == GROUP
        )
        assert rank in group
        assert len({nodes[r].op_type for r in group}) == 1
        parts = [values[r][nodes[r].input[0]] for r in group]
        if node.op_type == "AllReduce":
            found[rank] = np.sum(parts, axis=0, dtype=parts[0].dtype)
        elif node.op_type == "AllGather":
            assert node.attribute[0].name in ("axis", "group_size")
            found[rank] = np.concatenate(parts)
        else:
            place = group.index(rank)
            found[rank] = np.concatenate([np.split(part, len(group))[place] for part in parts])
    for rank, node in nodes.items():
        values[rank][node.output[0]] = found[rank]
