"""The PyTorch front end: a captured export as an `OpGraph`, operators named as its FX nodes.

    export -> normal form -> rule of each operator -> layers numbered

`TorchGraph` keeps both: `graph` for searches, `capture` with the program and the FX graph for
whoever applies a strategy to it. `TorchGraph.nodes` gives the FX node of each operator.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shardplan.models.errors import InputError
from shardplan.models.frontends.loops import Draft
from shardplan.models.frontends.torch_capture import Capture
from shardplan.models.frontends.torch_layers import check_alike, number_layers
from shardplan.models.frontends.torch_masks import hides_later
from shardplan.models.frontends.torch_node import (
    Shape,
    View,
    is_tensor,
    node_error,
    operator_of,
    path_of,
)
from shardplan.models.frontends.torch_rules import COMPUTE, pointwise
from shardplan.models.frontends.torch_rules_shape import MOVE
from shardplan.models.fx.torch_lib import torch_lib
from shardplan.models.opgraph import Access, Operator, OpGraph, Tensor, check_graph

__all__ = ["TorchGraph", "graph_of"]

_RULES = COMPUTE | MOVE
_COMPLEX = ("pointwise", "reshape", "constant")
"""Kinds of operators that complex numbers may pass: no products, no sums."""


@dataclass(frozen=True, eq=False)
class TorchGraph:
    """A PyTorch export as a captured graph."""

    graph: OpGraph
    capture: Capture

    @cached_property
    def nodes(self) -> Mapping[str, Any]:
        """The FX node of each operator and tensor, by name."""
        return {node.name: node for node in self.capture.graph.nodes}


def graph_of(capture: Capture) -> TorchGraph:
    """The graph of a capture.

    `InputError` with the node, its operator and its module where an operator has no rule, a shape
    depends on data, or complex numbers are multiplied out.
    """
    reader = _Reader(capture)
    for node in capture.graph.nodes:
        reader.visit(node)
    operators, layers = number_layers(reader.operators, reader.tensors)
    folded: Mapping[int, int] = {}
    if capture.stack is not None:
        check_alike(operators, reader.tensors, capture.stack.kinds[:layers])
        layers, folded = len(capture.stack.kinds), capture.stack.folded()
    made = OpGraph(
        name=capture.name,
        tensors=reader.tensors,
        operators=operators,
        outputs=reader.outputs,
        layers=layers,
        folded=folded,
        source=capture.source,
    )
    check_graph(made)
    return TorchGraph(made, capture)


class _Reader:
    """Collects the tensors and operators of a capture, node after node."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.kinds = capture.kinds()
        self.tensors: dict[str, Tensor] = {}
        self.operators: list[Operator] = []
        self.outputs: tuple[str, ...] = ()
        self.same: dict[str, str] = {}
        """Node -> the node whose tensor it holds: tied parameters, parts taken twice."""
        self.held: set[Any] = set()
        self.masks: dict[Any, bool] = {}

    def visit(self, node: Any) -> None:
        """One node, after those that it reads."""
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "output":
            found = [one for one in node.args[0] if hasattr(one, "meta") and is_tensor(one)]
            self.outputs = tuple(dict.fromkeys(self._named(one) for one in found))
        elif node.target is operator.getitem:
            self._part(node)
        elif node.op == "call_function":
            self._operator(node)

    def _named(self, node: Any) -> str:
        name = str(node.name)
        return self.same.get(name, name)

    def _placeholder(self, node: Any) -> None:
        if not is_tensor(node):
            return
        kind, source = self.kinds.get(node.name, ("input", ""))
        owner = self.capture.tied.get(node.name)
        if owner is not None:
            self.same[node.name] = owner
        if kind not in ("input", "state"):
            self.held.add(node)
        self._tensor(node, kind, source)

    def _tensor(self, node: Any, kind: str, source: str = "") -> None:
        value = node.meta["val"]
        dtype = str(value.dtype).removeprefix("torch.")
        if node.name not in self.same:
            shape = self.sizes(node)(value)
            self.tensors[node.name] = Tensor(
                name=node.name, shape=shape, dtype=dtype, kind=kind, source=source
            )

    def sizes(self, node: Any) -> Any:
        """A function that gives the shape of a value; `InputError` where a size is not known."""

        def known(value: Any) -> Shape:
            return tuple(self._size(node, one) for one in value.shape)

        return known

    def _size(self, node: Any, size: Any) -> int:
        if isinstance(size, int):
            return size
        inner = size.node
        given = {s: self.capture.sizes.get(str(s)) for s in inner.expr.free_symbols}
        if all(value is not None for value in given.values()):
            return int(inner.expr.xreplace(given))
        if inner.has_hint():
            return int(inner.hint)
        raise node_error(
            node,
            f"a size depends on data or on a dynamic dim: {inner.expr}",
            "give its symbol a number in `sizes`, or export with fixed shapes",
        )

    def _part(self, node: Any) -> None:
        """One result of several: the first node that takes it names it."""
        source, index = node.args
        first = next(user for user in source.users if user.args[1] == index)
        if first is not node:
            self.same[node.name] = first.name

    def _operator(self, node: Any) -> None:
        value = node.meta.get("val")
        if not is_tensor(node) and not isinstance(value, (tuple, list)):
            if value is None or not _touches_data(node):
                return
            raise node_error(
                node,
                "a number that depends on data decides what is computed",
                "write it without .item(), nonzero() or branches on values",
            )
        view = self._view(node)
        draft = self._draft(view)
        writes = self._writes(node, draft)
        for one, _ in writes:
            self._tensor(one, "result")
        moved = [one.meta["val"].dtype.is_complex for one in (*view.tensors, *dict(writes))]
        if any(moved) and draft.kind not in _COMPLEX:
            raise view.error("complex numbers are only moved and multiplied element by element")
        slots = range(len(view.tensors))
        self.operators.append(
            Operator(
                name=node.name,
                kind=draft.kind,
                reads=tuple(
                    Access(
                        tensor=self._named(view.tensors[slot]),
                        loops=draft.reads.get(slot, ("",) * len(view.shape(slot))),
                    )
                    for slot in slots
                ),
                writes=tuple(Access(tensor=one.name, loops=loops) for one, loops in writes),
                loops=draft.loops(),
                linear=draft.linear,
                flop=draft.flop,
                where=path_of(node),
                attrs={"torch": view.op.rpartition("::")[2], **draft.attrs, **self._mask(view)},
            )
        )

    def _mask(self, view: View) -> dict[str, float | str]:
        """Whether the mask that an attention reads is causal."""
        if not view.has("attn_mask") or view.op != "aten::scaled_dot_product_attention":
            return {}
        mask = view.tensors[view.slot("attn_mask")]
        if mask not in self.masks:
            self.masks[mask] = hides_later(mask)
        return {"causal": int(self.masks[mask])}

    def _draft(self, view: View) -> Draft:
        torch = torch_lib()
        rule = _RULES.get(view.op)
        if rule is None and torch.Tag.pointwise in getattr(view.node.target, "tags", ()):
            rule = pointwise
        if rule is None:
            raise view.error(
                "no rule for the operator",
                "write that part with operators of PyTorch that have one, or give the model's "
                "config.json",
            )
        try:
            return rule(view)
        except InputError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
            raise view.error(f"the operator is called in a way that has no rule, {said}") from None

    def _writes(self, node: Any, draft: Draft) -> list[tuple[Any, tuple[str, ...]]]:
        """Nodes that hold the results that are used, with their loops."""
        if is_tensor(node):
            return [(node, draft.writes[0])]
        taken: dict[int, Any] = {}
        for user in node.users:
            taken.setdefault(int(user.args[1]), user)
        return [(taken[i], draft.writes[i]) for i in sorted(taken)]

    def _view(self, node: Any) -> View:
        torch = torch_lib()
        given: dict[str, Any] = {}
        tensors: list[Any] = []
        slots: dict[str, tuple[int, ...]] = {}
        names = [one.name for one in node.target._schema.arguments]
        for name, value in [*zip(names, node.args, strict=False), *node.kwargs.items()]:
            found: list[Any] = []
            torch.fx.node.map_arg(value, found.append)
            own = [one for one in found if is_tensor(one)]
            given[name] = value
            if own:
                slots[name] = tuple(range(len(tensors), len(tensors) + len(own)))
                tensors += own
        return View(node, given, tuple(tensors), slots, frozenset(self.held), self.sizes(node))


def _touches_data(node: Any) -> bool:
    """Whether a number is read from a tensor's elements, not from its shape."""
    return operator_of(node) in ("aten::item", "aten::_local_scalar_dense", "aten::equal")
