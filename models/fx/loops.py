"""The loops of the operators that decoders are exported to: an export as an `OpGraph`.

    pointwise      every dim of the result is a loop; an operand of size 1 there has none
    linear         y[.., n] = sum over h of x[.., h] w[n, h] (+ b[n])
    embedding      y[.., h] = sum over v of (x[..] = v) w[v, h]
    attention      batch and heads; queries, keys and the head's size stay whole
    reshape        dims that stay, and the major part of dims that are joined or split
    softmax, mean, cat, slice, split, ...     the dim that they work on stays whole

An operator that is not known here is refused as a whole: it is computed alike on every rank, from
whole inputs. What only describes a tensor (assertions) is left out.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardplan.models.fx.torch_lib import torch_lib
from shardplan.models.opgraph import Access, Loop, Operator, OpGraph, Tensor

__all__ = ["opgraph_of"]

Dims = list[str]


def opgraph_of(exported: Any, name: str = "export") -> OpGraph:
    """The graph of an `ExportedProgram` (its `graph` and `graph_signature` are read).

    Tensors and operators are called as their nodes; layers are numbered by the module path.
    """
    signature = exported.graph_signature
    kinds = dict.fromkeys(signature.inputs_to_parameters, "parameter")
    kinds |= dict.fromkeys(signature.inputs_to_buffers, "constant")
    kinds |= dict.fromkeys(signature.inputs_to_lifted_tensor_constants, "constant")
    tensors: dict[str, Tensor] = {}
    operators = []
    outputs: tuple[str, ...] = ()
    for node in exported.graph.nodes:
        if node.op == "output":
            outputs = tuple(one.name for one in node.args[0])
            continue
        if _is_tensor(node):
            kind = kinds.get(node.name, "input") if node.op == "placeholder" else "result"
            tensors[node.name] = _tensor(node, kind)
        if node.op == "call_function" and _counts(node):
            operators.append(_operator(node))
    layers = 1 + max((one.layer for one in operators), default=-1)
    return OpGraph(
        name=name, tensors=tensors, operators=tuple(operators), outputs=outputs, layers=layers
    )


def _is_tensor(node: Any) -> bool:
    return isinstance(node.meta.get("val"), torch_lib().Tensor)


def _tensor(node: Any, kind: str) -> Tensor:
    value = node.meta["val"]
    dtype = str(value.dtype).removeprefix("torch.")
    return Tensor(name=node.name, shape=tuple(value.shape), dtype=dtype, kind=kind)


def _counts(node: Any) -> bool:
    """Whether a node computes: no part of a tuple, and nothing that only asserts."""
    if node.target is operator.getitem:
        return False
    value = node.meta.get("val")
    return isinstance(value, (torch_lib().Tensor, tuple, list))


def _operator(node: Any) -> Operator:
    rules = _Rules(node)
    where = _where(node)
    return Operator(
        name=node.name,
        kind=rules.kind,
        reads=tuple(rules.reads),
        writes=tuple(rules.writes),
        loops=rules.loops,
        linear=rules.linear,
        where=where,
        layer=_layer(where),
        refused=rules.refused,
    )


def _where(node: Any) -> str:
    """Path of the module that a node belongs to."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def _layer(path: str) -> int:
    """The first number in a module path, as in `model.layers.3.mlp`; -1 for none."""
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)


class _Rules:
    """The loops of one node."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.kind = "other"
        self.reads: list[Access] = []
        self.writes: list[Access] = []
        self.loops: dict[str, Loop] = {}
        self.linear: tuple[int, ...] = ()
        self.refused = ""
        name = getattr(node.target, "_opname", str(node.target))
        rule = RULES.get(name)
        tags = getattr(node.target, "tags", ())
        if rule is None and torch_lib().Tag.pointwise in tags and node.all_input_nodes:
            rule = _pointwise
        if rule is None:
            self.refuse(name)
        else:
            rule(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return tuple(self.node.meta["val"].shape)

    def refuse(self, name: str) -> None:
        """Nothing may be split."""
        self.kind, self.refused = name, "it is not known how it is split"
        for one in self.tensors():
            self.read(one, [""] * len(_shape(one)))
        for one in _results(self.node):
            self.write(one, [""] * len(_shape(one)))

    def tensors(self) -> list[Any]:
        """Tensors that the node reads, in the order of its arguments, with repeats."""
        found: list[Any] = []
        torch_lib().fx.node.map_arg((self.node.args, self.node.kwargs), found.append)
        return found

    def loop(self, name: str, size: int, *, whole: bool = False) -> str:
        """A loop; dims of size 1 run over none."""
        if size == 1:
            return ""
        self.loops.setdefault(name, Loop(size=size, whole=whole))
        return name

    def each(self, shape: Sequence[int], *, whole: Sequence[int] = ()) -> Dims:
        """A loop for each dim, some of which stay whole."""
        return [self.loop(f"d{i}", size, whole=i in whole) for i, size in enumerate(shape)]

    def read(self, node: Any, dims: Dims) -> None:
        """Note a tensor that is read."""
        self.reads.append(Access(tensor=node.name, loops=tuple(dims)))

    def write(self, node: Any, dims: Dims) -> None:
        """Note a result."""
        self.writes.append(Access(tensor=node.name, loops=tuple(dims)))

    def arg(self, at: int, name: str, default: Any = None) -> Any:
        """An argument by place or name."""
        if len(self.node.args) > at:
            return self.node.args[at]
        return self.node.kwargs.get(name, default)


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _results(node: Any) -> list[Any]:
    """Nodes that hold the results: the node, or what is taken out of its tuple."""
    if _is_tensor(node):
        return [node]
    taken = [user for user in node.users if user.target is operator.getitem]
    return sorted(taken, key=lambda user: int(user.args[1]))


def _pointwise(rules: _Rules) -> None:
    """Operands are broadcast against the result from the last dim on."""
    rules.kind = "pointwise"
    out = rules.each(rules.shape)
    operands = rules.tensors()
    for one in operands:
        shape = _shape(one)
        lead = len(out) - len(shape)
        rules.read(one, [out[lead + i] if size > 1 else "" for i, size in enumerate(shape)])
    rules.write(rules.node, out)
    name = getattr(rules.node.target, "_opname", "")
    same = all(_shape(one) == rules.shape for one in operands)
    if name in _SUMS and same and len(operands) > 1:
        rules.linear = tuple(range(len(operands)))
    elif name in _LINEAR and len(operands) == 1:
        rules.linear = (0,)


_SUMS = ("add", "sub")
_LINEAR = ("neg", "to", "_to_copy", "alias", "contiguous", "clone", "detach", "lift_fresh_copy")


def _product(rules: _Rules) -> None:
    rules.kind = "matmul"
    x, weight = rules.node.args[:2]
    lead = rules.each(_shape(x)[:-1])
    row, column = rules.loop("h", _shape(x)[-1]), rules.loop("n", _shape(weight)[0])
    rules.read(x, [*lead, row])
    rules.read(weight, [column, row])
    bias = rules.arg(2, "bias")
    if bias is not None:
        rules.read(bias, [column])
    rules.write(rules.node, [*lead, column])
    rules.linear = (0,) if bias is None else ()


def _embedding(rules: _Rules) -> None:
    rules.kind = "embedding"
    table, ids = rules.node.args[:2]
    lead = rules.each(_shape(ids))
    width = rules.loop("h", _shape(table)[1])
    rules.read(table, [rules.loop("v", _shape(table)[0]), width])
    rules.read(ids, lead)
    rules.write(rules.node, [*lead, width])


def _attention(rules: _Rules) -> None:
    """[batch, heads, tokens, size]; fewer kv heads are a loop over blocks of the queries'."""
    rules.kind = "attention"
    query, key, value = rules.node.args[:3]
    batch = rules.loop("b", _shape(query)[0])
    heads = rules.loop("k", _shape(key)[1])
    tokens = rules.loop("t", _shape(query)[2], whole=True)
    context = rules.loop("s", _shape(key)[2], whole=True)
    size = rules.loop("d", _shape(query)[3], whole=True)
    width = rules.loop("e", _shape(value)[3], whole=True)
    rules.read(query, [batch, heads, tokens, size])
    rules.read(key, [batch, heads, context, size])
    rules.read(value, [batch, heads, context, width])
    mask = rules.arg(3, "attn_mask")
    if mask is not None:
        dims = [batch, heads, tokens, context][4 - len(_shape(mask)) :]
        rules.read(mask, [dim if n > 1 else "" for dim, n in zip(dims, _shape(mask), strict=True)])
    rules.write(rules.node, [batch, heads, tokens, width])


def _reshape(rules: _Rules) -> None:
    """Runs of dims with equal products; the first of each shares its loop with the other side."""
    rules.kind, rules.linear = "reshape", (0,)
    source = rules.node.args[0]
    before, after = _shape(source), rules.shape
    read, write = [""] * len(before), [""] * len(after)
    for number, (i, j) in enumerate(_runs(before, after)):
        dim = rules.loop(f"d{number}", math.gcd(before[i], after[j]))
        read[i] = write[j] = dim
    rules.read(source, read)
    rules.write(rules.node, write)


def _runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int]]:
    """(first dim, first dim) of the shortest runs of dims larger than 1 with equal products."""
    left = [i for i, size in enumerate(before) if size > 1]
    right = [j for j, size in enumerate(after) if size > 1]
    found = []
    while left and right:
        i, j = left.pop(0), right.pop(0)
        found.append((i, j))
        one, two = before[i], after[j]
        while one != two:
            if one < two:
                one *= before[left.pop(0)]
            else:
                two *= after[right.pop(0)]
    return found


def _moved(order: Callable[[_Rules, Dims], Dims]) -> Callable[[_Rules], None]:
    """A rule for what keeps dims and moves, adds or drops some."""

    def rule(rules: _Rules) -> None:
        rules.kind, rules.linear = "reshape", (0,)
        source = rules.node.args[0]
        dims = rules.each(_shape(source))
        rules.read(source, dims)
        rules.write(rules.node, order(rules, list(dims)))

    return rule


def _transposed(rules: _Rules, dims: Dims) -> Dims:
    one, two = rules.node.args[1:3]
    dims[one], dims[two] = dims[two], dims[one]
    return dims


def _unsqueezed(rules: _Rules, dims: Dims) -> Dims:
    dims.insert(rules.node.args[1] % len(rules.shape), "")
    return dims


def _squeezed(rules: _Rules, dims: Dims) -> Dims:
    if len(rules.shape) < len(dims):
        del dims[rules.node.args[1]]
    return dims


def _expanded(rules: _Rules) -> None:
    rules.kind = "reshape"
    source = rules.node.args[0]
    out = rules.each(rules.shape)
    shape = _shape(source)
    kept = out[len(out) - len(shape) :]
    rules.read(source, [dim if n > 1 else "" for dim, n in zip(kept, shape, strict=True)])
    rules.write(rules.node, out)


def _along(at: int, name: str, default: int) -> Callable[[_Rules], None]:
    """A rule for what works along dims that stay whole, with as many results as it has."""

    def rule(rules: _Rules) -> None:
        rules.kind = "along"
        sources = rules.tensors()
        shape = _shape(sources[0])
        asked = rules.arg(at, name, default)
        whole = [dim % len(shape) for dim in (asked if isinstance(asked, list) else [asked])]
        dims = ["" if i in whole else rules.loop(f"d{i}", size) for i, size in enumerate(shape)]
        for one in sources:
            rules.read(one, list(dims))
        for one in _results(rules.node):
            dropped = len(_shape(one)) < len(shape)
            rules.write(one, [d for i, d in enumerate(dims) if not (dropped and i in whole)])

    return rule


def _complex(rules: _Rules) -> None:
    """Pairs of the last dim as complex numbers, or the reverse."""
    rules.kind, rules.linear = "reshape", (0,)
    source = rules.node.args[0]
    shape, out = _shape(source), rules.shape
    dims = rules.each(min(shape, out, key=len))
    rules.read(source, dims if len(shape) < len(out) else [*dims, ""])
    rules.write(rules.node, dims if len(out) < len(shape) else [*dims, ""])


def _norm(rules: _Rules) -> None:
    """Over the last dims, as many as the weight has; they stay whole."""
    rules.kind = "norm"
    source, normed = rules.node.args[:2]
    shape = _shape(source)
    first = len(shape) - len(normed)
    dims = rules.each(shape, whole=range(first, len(shape)))
    rules.read(source, dims)
    for one in rules.tensors()[1:]:
        rules.read(one, dims[first:])
    rules.write(rules.node, dims)


def _gates(rules: _Rules) -> None:
    rules.kind = "softmax"
    scores = rules.node.args[0]
    dims = rules.each(_shape(scores), whole=(2,))
    rules.read(scores, dims)
    rules.write(rules.node, dims)


def _experts(rules: _Rules) -> None:
    rules.kind = "moe"
    x, weights, gate, up, down = rules.node.args
    batch, tokens, hidden = rules.each(_shape(x), whole=(2,))
    expert, width = rules.loop("e", _shape(gate)[0]), rules.loop("i", _shape(gate)[1])
    rules.read(x, [batch, tokens, hidden])
    rules.read(weights, [batch, tokens, expert])
    rules.read(gate, [expert, width, hidden])
    rules.read(up, [expert, width, hidden])
    rules.read(down, [expert, hidden, width])
    rules.write(rules.node, [batch, tokens, hidden])


RULES: Mapping[str, Callable[[_Rules], None]] = {
    **dict.fromkeys(_LINEAR, _pointwise),
    **dict.fromkeys(("type_as", "ones_like", "zeros_like", "polar"), _pointwise),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _reshape),
    "linear": _product,
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
    "transpose": _moved(_transposed),
    "permute": _moved(lambda rules, dims: [dims[i] for i in rules.node.args[1]]),
    "t": _moved(lambda _, dims: dims[::-1]),
    "unsqueeze": _moved(_unsqueezed),
    "squeeze": _moved(_squeezed),
    "expand": _expanded,
    "view_as_complex": _complex,
    "view_as_real": _complex,
    **dict.fromkeys(("softmax", "_softmax", "cumsum", "mean"), _along(1, "dim", -1)),
    **dict.fromkeys(("cat", "slice", "select"), _along(1, "dim", 0)),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _along(2, "dim", 0)),
    **dict.fromkeys(("rms_norm", "layer_norm"), _norm),
    "gates": _gates,
    "experts": _experts,
}
