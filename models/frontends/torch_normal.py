"""A PyTorch export in normal form: no node changes a tensor, what is fused by habit is apart.

    y.add_(x)                           y' = add(y, x), read in y's place from there on
    base[.., a:b].copy_(x)              base' = slice_scatter(base, x, ..)
    linear(x, w, b)                     add(linear(x, w), b): x may then be split along what is
                                        summed, since b is added once, after the sum
    attention(q, repeated(k), ..)       attention(q, k, .., enable_gqa=True)

The graph is a copy: the program that it comes from is left as it is. Node names stay.
"""

from __future__ import annotations

from typing import Any

from shardplan.models.frontends.torch_node import node_error, operator_of
from shardplan.models.fx.torch_lib import torch_lib

__all__ = ["normal_graph"]

_MAYBE_VIEWS = ("reshape", "flatten", "to", "contiguous", "view_as", "reshape_as", "type_as")
"""Operators that give their input itself where nothing is to be done."""
_MOVES = ("aten::reshape", "aten::_unsafe_view", "aten::clone", "aten::contiguous", "aten::view")


def normal_graph(graph: Any) -> tuple[Any, dict[str, str]]:
    """(a copy of an export's graph in normal form, {input that it changes: node of the new value}).

    New values of inputs are added to the outputs. `InputError` for nodes that hold other graphs
    and for changes through views that are not followed.
    """
    torch = torch_lib()
    made = torch.fx.Graph()
    result = made.graph_copy(graph, {})
    made.output(result)
    for node in made.nodes:
        _check(node)
    states = _Functional(made).run()
    for node in list(made.nodes):
        if node.op == "call_function":
            _parted(made, node)
            _ungrouped(made, node)
    _drop_dead(made)
    return made, {name: node.name for name, node in states.items()}


def _check(node: Any) -> None:
    """Refuse what has no fixed list of operators."""
    if node.op == "get_attr" or "higher_order" in str(node.target) or _opens_block(node):
        hint = "capture under torch.no_grad(), without branches or loops that depend on data"
        raise node_error(node, "an operator that runs another graph has no rule", hint)


def _opens_block(node: Any) -> bool:
    return type(node.target).__name__ == "HigherOrderOperator" or str(node.target) in (
        "cond",
        "while_loop",
        "map",
        "scan",
        "wrap_with_set_grad_enabled",
        "wrap_with_autocast",
    )


class _Functional:
    """Replaces what changes tensors by what makes new ones."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.now: dict[Any, Any] = {}
        """Node -> the node that holds its tensor's value at this point."""
        self.place = {node: at for at, node in enumerate(graph.nodes)}
        self.views: dict[Any, list[Any]] = {}
        """Node -> views of it."""

    def run(self) -> dict[str, Any]:
        """{placeholder: node of its last value} of the inputs that are changed."""
        torch = torch_lib()
        dead = []
        for node in list(self.graph.nodes):
            node.args = torch.fx.node.map_arg(node.args, self._value)
            node.kwargs = torch.fx.node.map_arg(node.kwargs, self._value)
            if node.op != "call_function":
                continue
            base = _viewed(node)
            if base is not None:
                self.views.setdefault(base, []).append(node)
            if _changes(node):
                self._replace(node)
                dead.append(node)
        for node in reversed(dead):
            self.graph.erase_node(node)
        changed = {n.name: self._value(n) for n in self.now if n.op == "placeholder"}
        if changed:
            output = next(iter(reversed(self.graph.nodes)))
            output.args = ((*output.args[0], *changed.values()),)
        return changed

    def _value(self, node: Any) -> Any:
        while node in self.now:
            node = self.now[node]
        return node

    def _replace(self, node: Any) -> None:
        """One node that changes its first argument."""
        target = node.args[0]
        with self.graph.inserting_before(node):
            new = _copied(self.graph, node) if _name(node) == "copy_" else None
            new = new or self._function(node)
        self._write(target, new, node)
        self.now[node] = new

    def _function(self, node: Any) -> Any:
        """The same operator without the underscore, on the same arguments."""
        torch = torch_lib()
        namespace, _, name = operator_of(node).partition("::")
        packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
        overload = getattr(packet, node.target._overloadname, None)
        if overload is None or not name.endswith("_"):
            raise node_error(node, "an operator that changes its input has a twin that does not")
        return _call(self.graph, overload, node.args, node.kwargs, node)

    def _write(self, target: Any, new: Any, node: Any) -> None:
        """`target` has a new value: so has what it is a view of."""
        for view in self.views.get(target, []):
            if view not in self.now and self._read_after(view, node):
                raise node_error(
                    node,
                    f"a tensor is changed while {view.name}, a view of it, is read later",
                    "clone the tensor before it is changed",
                )
        self.now[target] = new
        base = _viewed(target) if target.op == "call_function" else None
        if base is None:
            return
        scatter = {"aten::slice": "slice_scatter", "aten::select": "select_scatter"}
        name = scatter.get(operator_of(target))
        if name is None:
            if self._read_after(base, node):
                raise node_error(node, f"a tensor is changed through its view {target.name}")
            return
        torch = torch_lib()
        overload = getattr(torch.ops.aten, name).default
        self.views[base] = [one for one in self.views[base] if one is not target]
        with self.graph.inserting_before(node):
            whole = _call(self.graph, overload, (base, new, *target.args[1:]), target.kwargs, base)
            whole.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        self._write(base, whole, node)

    def _read_after(self, one: Any, node: Any) -> bool:
        """Whether a node is read behind another one."""
        return any(self.place.get(user, 0) > self.place[node] for user in one.users)


def _name(node: Any) -> str:
    return operator_of(node).partition("::")[2]


def _call(graph: Any, target: Any, args: Any, kwargs: Any, like: Any) -> Any:
    """A new node whose value and place are those of another."""
    made = graph.call_function(target, args, kwargs)
    made.meta = dict(like.meta)
    return made


def _copied(graph: Any, node: Any) -> Any:
    """What `copy_` leaves: its source, in the shape and type of what it overwrites."""
    torch = torch_lib()
    source, value = node.args[1], node.meta["val"]
    made = source
    if tuple(source.meta["val"].shape) != tuple(value.shape):
        made = _call(graph, torch.ops.aten.expand.default, (made, list(value.shape)), {}, node)
        made.meta["val"] = source.meta["val"].expand(value.shape)
    if source.meta["val"].dtype != value.dtype:
        made = _call(graph, torch.ops.aten.to.dtype, (made, value.dtype), {}, node)
    return made


def _changes(node: Any) -> bool:
    """Whether a node writes to an argument."""
    schema = getattr(node.target, "_schema", None)
    given = schema.arguments if schema is not None else ()
    return any(one.alias_info is not None and one.alias_info.is_write for one in given)


def _viewed(node: Any) -> Any:
    """What a node may share its memory with, None where it makes its own."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not node.args or not hasattr(node.args[0], "meta"):
        return None
    shares = any(one.alias_info is not None for one in schema.returns)
    if _name(node) in _MAYBE_VIEWS:
        shares = node.args[0].meta["val"].dtype == node.meta["val"].dtype
    return node.args[0] if shares and not _changes(node) else None


def _parted(graph: Any, node: Any) -> None:
    """Take the bias out of a linear layer."""
    torch = torch_lib()
    if operator_of(node) != "aten::linear":
        return
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if bias is None:
        return
    node.args, node.kwargs = node.args[:2], {}
    with graph.inserting_after(node):
        total = _call(graph, torch.ops.aten.add.Tensor, (node, bias), {}, node)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _ungrouped(graph: Any, node: Any) -> None:
    """Let an attention read keys and values before their heads are repeated."""
    if operator_of(node) != "aten::scaled_dot_product_attention":
        return
    first, second = (_before_repeat(one) for one in node.args[1:3])
    if first is None or second is None:
        return
    (key, by), (value, times) = first, second
    if by == times and node.args[0].meta["val"].shape[-3] == key.meta["val"].shape[-3] * by:
        node.args = (node.args[0], key, value, *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}


def _before_repeat(node: Any) -> tuple[Any, int] | None:
    """(keys, times) where [b, k, t, d] became [b, k times, t, d], each head several times."""
    while operator_of(node) in _MOVES:
        node, wide = node.args[0], node
        if operator_of(node) == "aten::expand":
            source = _before_unsqueeze(node.args[0])
            return _repeated(source, wide) if source is not None else None
    if operator_of(node) == "aten::repeat_interleave":
        return _repeated(node.args[0], node)
    return None


def _before_unsqueeze(node: Any) -> Any:
    """`x` of unsqueeze(x, 2), x[:, :, None] or x[:, :, None, :, :]; None for others."""
    while _name(node) in ("slice", "alias") and _shape(node) == _shape(node.args[0]):
        node = node.args[0]
    if operator_of(node) != "aten::unsqueeze" or node.args[1] != 2:
        return None
    source = node.args[0]
    while _name(source) in ("slice", "alias") and _shape(source) == _shape(source.args[0]):
        source = source.args[0]
    return source


def _repeated(source: Any, wide: Any) -> tuple[Any, int] | None:
    before, after = _shape(source), _shape(wide)
    if len(before) != 4 or len(after) != 4 or after[1] % before[1]:
        return None
    times = after[1] // before[1]
    alike = (before[0], *before[2:]) == (after[0], *after[2:])
    return (source, times) if alike and times > 1 else None


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _drop_dead(graph: Any) -> None:
    """Leave out what no output depends on, assertions among it."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
