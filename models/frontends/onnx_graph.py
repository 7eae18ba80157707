"""The ONNX front end: `read_onnx("model.onnx")` gives an `OpGraph`, weights left on disk.

    file -> opened and checked -> shapes known, constants computed -> rule of each operator
         -> attentions recognised -> repeated blocks counted

`OnnxGraph` keeps both views: `raw` with one operator for each node, which strategies are applied
to, and `graph`, where a written-out attention is one operator, which models are recognised in and
strategies are chosen for. `OnnxGraph.of_nodes` takes a strategy from the second to the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardplan.models.errors import LayoutError
from shardplan.models.frontends.loops import Draft
from shardplan.models.frontends.onnx_attention import Fused, find_attentions
from shardplan.models.frontends.onnx_file import OnnxFile, open_onnx
from shardplan.models.frontends.onnx_lib import need_onnx
from shardplan.models.frontends.onnx_node import View
from shardplan.models.frontends.onnx_normal import normalise
from shardplan.models.frontends.onnx_rules import COMPUTE
from shardplan.models.frontends.onnx_rules_shape import MOVE
from shardplan.models.frontends.onnx_walk import Walked, walk
from shardplan.models.graph import topological
from shardplan.models.opblocks import by_depth, find_blocks
from shardplan.models.opgraph import Access, Operator, OpGraph, Tensor, check_graph

if TYPE_CHECKING:
    from shardplan.models.frontends.onnx_lib import NodeProto

__all__ = ["OnnxGraph", "Strategy", "graph_of", "read_onnx"]

Strategy = Mapping[str, Mapping[str, str]]
"""Operator -> {axis: loop}; operators that it does not name run whole on every rank."""

_RULES = COMPUTE | MOVE
_OF_MICROSOFT = ("Gelu", "SimplifiedLayerNormalization")
"""Operators of onnxruntime's own domain that compute what the rule of that name says."""
_WEIGHT_KINDS = ("matmul", "conv", "embedding", "norm")
_SCOPES = "pkg.torch.onnx.name_scopes"
_SORT = "pkg.torch.export.graph_signature.InputSpec.kind"


@dataclass(frozen=True, eq=False)
class OnnxGraph:
    """An ONNX file as a captured graph."""

    graph: OpGraph
    raw: OpGraph
    nodes: Mapping[str, NodeProto]
    """Node of each operator of `raw`."""
    slots: Mapping[str, tuple[int, ...]]
    """Input of the node that each read of an operator stands for."""
    fused: Mapping[str, Fused]
    walked: Walked

    @property
    def file(self) -> OnnxFile:
        """The file that it was read from."""
        return self.walked.file

    @cached_property
    def operators(self) -> Mapping[str, Operator]:
        """Operators of `raw` by name."""
        return {one.name: one for one in self.raw.operators}

    def of_nodes(self, strategy: Strategy) -> dict[str, dict[str, str]]:
        """A strategy of `graph` as one of `raw`. `LayoutError` for an operator of neither."""
        found: dict[str, dict[str, str]] = {}
        for name, chosen in strategy.items():
            if name in self.fused:
                found |= self._inside(name, chosen)
            elif name in self.operators:
                found[name] = dict(chosen)
            else:
                raise LayoutError("a strategy names operators of the model", got=f"operator={name}")
        return found

    def _inside(self, name: str, chosen: Mapping[str, str]) -> dict[str, dict[str, str]]:
        lost = [loop for loop in chosen.values() if loop not in self.fused[name].operator.loops]
        if lost:
            raise LayoutError(
                "an operator is split over a loop of its own that may be split",
                got=f"{name} (attention), loop={lost[0]}",
                hint="try " + ", ".join(self.fused[name].operator.loops),
            )
        parts = self.fused[name].inside
        return {
            part: {axis: loops[loop] for axis, loop in chosen.items() if loop in loops}
            for part, loops in parts.items()
        }


def read_onnx(path: str | Path, sizes: Mapping[str, int] | None = None) -> OnnxGraph:
    """The graph of an ONNX file. `sizes` gives symbolic dims their elements.

    `InputError` with the file, the node and the rule for all that cannot be read.
    """
    return graph_of(open_onnx(Path(path)), sizes)


def graph_of(file: OnnxFile, sizes: Mapping[str, int] | None = None) -> OnnxGraph:
    """The graph of a file that is open already; as `read_onnx`."""
    walked = walk(file, sizes)
    normalise(walked)
    drafts = {node.name: _draft(walked, node) for node in walked.nodes}
    slots = {name: tuple(draft.reads) for name, draft in drafts.items()}
    tensors = _tensors(walked, drafts)
    operators = tuple(_operator(node, drafts[node.name]) for node in walked.nodes)
    outputs = tuple(one.name for one in walked.file.proto.graph.output)
    types = {node.name: node.op_type for node in walked.nodes}
    found = find_attentions(operators, types, tensors, walked.constant, outputs)
    fused = {one.operator.name: one for one in found}
    ends = {one.last: one.operator for one in found}
    whole = [ends.get(one.name, one) for one in operators]
    hidden = {part for one in found for part in one.inside}
    order = by_depth(_sorted([one for one in whole if one.name not in hidden]), tensors)
    blocks = find_blocks(order, tensors)
    layers = {one.name: blocks.layer(place) for place, one in enumerate(order)}
    layers |= {p: layers[n] for n, one in fused.items() for p in one.inside}

    def graph(chosen: list[Operator]) -> OpGraph:
        made = OpGraph(
            name=file.path.stem,
            tensors=tensors,
            operators=tuple(replace(one, layer=layers[one.name]) for one in chosen),
            outputs=outputs,
            layers=blocks.count,
            source=str(file.path),
        )
        check_graph(made)
        return made

    nodes = {node.name: node for node in walked.nodes}
    return OnnxGraph(graph(order), graph(list(operators)), nodes, slots, fused, walked)


def _sorted(operators: list[Operator]) -> list[Operator]:
    """Each after what it reads: a fused operator may read what is made after its own last part."""
    made = {write.tensor: index for index, one in enumerate(operators) for write in one.writes}
    if all(made.get(n, -1) < i for i, one in enumerate(operators) for n in one.inputs):
        return operators
    reads = {
        one.name: tuple(operators[made[n]].name for n in one.inputs if n in made)
        for one in operators
    }
    named = {one.name: one for one in operators}
    return [named[name] for name in topological(reads)]


def _draft(walked: Walked, node: NodeProto) -> Draft:
    helper = need_onnx().helper
    attrs: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    view = View(node, walked, attrs)
    foreign = node.domain == "com.microsoft" and node.op_type not in _OF_MICROSOFT
    if foreign or node.op_type not in _RULES:
        raise view.error(f"no rule for the operator {node.op_type}")
    try:
        return _RULES[node.op_type](view)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        rule = "the inputs and attributes of a node fit its operator"
        raise view.error(rule, "check the model with onnx.checker") from error


def _operator(node: NodeProto, draft: Draft) -> Operator:
    scopes = next((one.value for one in node.metadata_props if one.key == _SCOPES), "")
    places = [word for word in scopes.strip("[]").replace("'", "").split(", ") if word]
    outputs = [name for name in node.output if name]
    position = {slot: index for index, slot in enumerate(draft.reads)}
    return Operator(
        name=node.name,
        kind=draft.kind,
        reads=tuple(
            Access(tensor=node.input[slot], loops=loops) for slot, loops in draft.reads.items()
        ),
        writes=tuple(
            Access(tensor=name, loops=loops)
            for name, loops in zip(outputs, draft.writes, strict=True)
        ),
        loops=draft.loops(),
        linear=tuple(position[slot] for slot in draft.linear),
        flop=draft.flop,
        where=".".join(places[-2:]) if places else node.name,
        attrs={"onnx": node.op_type, **draft.attrs},
    )


def _tensors(walked: Walked, drafts: Mapping[str, Draft]) -> dict[str, Tensor]:
    """Every tensor that an operator reads or writes, by name."""
    parameters = _parameters(walked, drafts)
    inputs = {one.name for one in walked.file.proto.graph.input} - walked.weights
    states = _states(walked, inputs)
    made = {name for node in walked.nodes for name in node.output}
    used = {node.input[slot] for node in walked.nodes for slot in drafts[node.name].reads} | made
    used |= {one.name for one in walked.file.proto.graph.output} & walked.shapes.keys()
    kinds = dict.fromkeys(inputs, "input") | dict.fromkeys(states, "state")
    kinds |= dict.fromkeys(made, "result") | dict.fromkeys(parameters, "parameter")
    return {
        name: Tensor(
            name=name,
            shape=walked.shapes[name],
            dtype=walked.dtypes[name],
            kind=kinds.get(name, "constant"),
            source=name if name in walked.weights else "",
        )
        for name in sorted(used)
        if name
    }


def _parameters(walked: Walked, drafts: Mapping[str, Draft]) -> set[str]:
    """Initializers that are weights: said so by the exporter, read as such, or a vector of them."""
    said = {
        one.name: prop.value
        for one in walked.file.proto.graph.value_info
        for prop in one.metadata_props
        if prop.key == _SORT
    }
    found = set()
    for node in walked.nodes:
        draft = drafts[node.name]
        for slot in draft.reads:
            name = node.input[slot]
            if name not in walked.weights or math.prod(walked.shapes[name]) == 1:
                continue
            quantized = draft.kind == "quantize" and slot == 0
            plain = not walked.dtypes[name].startswith(("int", "uint", "bool"))
            vector = plain and len(walked.shapes[name]) == 1 and draft.kind == "pointwise"
            role = quantized or vector or (draft.kind in _WEIGHT_KINDS and plain)
            if said[name] == "PARAMETER" if name in said else role:
                found.add(name)
    return found


def _states(walked: Walked, inputs: set[str]) -> set[str]:
    """Caches: inputs that are joined with what is new and given back, or given to an attention."""
    outputs = {one.name for one in walked.file.proto.graph.output}
    found = set()
    for node in walked.nodes:
        if node.op_type == "Concat" and node.output[0] in outputs:
            found |= inputs & set(node.input)
        elif node.op_type == "Attention":
            found |= inputs & set(node.input[4:6])
    return found
