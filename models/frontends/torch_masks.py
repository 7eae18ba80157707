"""Whether an attention mask hides what comes later, and only that: a few of its rows, computed.

Masks are made of counted positions (arange, comparisons). Their nodes are run on the CPU; what is
as large as queries times context is run for a few queries alone. An input of whole numbers or
truth values (a padding mask) is taken to hide nothing.
"""

from __future__ import annotations

import operator
from typing import Any

from shardplan.models.frontends.torch_node import is_tensor, operator_of
from shardplan.models.fx.torch_lib import torch_lib

__all__ = ["hides_later"]

_SMALL = 2**16
"""Elements of what is computed whole."""
_RESHAPES = ("aten::expand", "aten::alias", "aten::clone", "aten::contiguous")


def hides_later(mask: Any) -> bool:
    """Whether a mask node [.., tokens, context] is causal, false or very negative where hidden."""
    shape = [int(size) for size in mask.meta["val"].shape]
    if len(shape) < 2 or min(shape[-2:]) < 2:
        return False
    tokens, context = shape[-2:]
    chosen = sorted({0, 1, tokens // 2, tokens - 1})
    try:
        rows = _Rows(tokens, chosen).rows(mask)
    except (LookupError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False  # it is made of more than positions
    rows = rows.expand(*shape[:-2], len(chosen), context).reshape(-1, len(chosen), context)
    seen = rows if rows.dtype == torch_lib().bool else rows > -1e4
    places = torch_lib().tensor(chosen)[:, None] + context - tokens
    return bool((seen == (torch_lib().arange(context)[None] <= places)).all())


class _Rows:
    """Values of nodes, of large ones in the chosen rows of the dim before the last."""

    def __init__(self, tokens: int, chosen: list[int]) -> None:
        self.tokens = tokens
        self.chosen = chosen
        self.known: dict[Any, Any] = {}

    def value(self, node: Any) -> Any:
        """The elements of a node; `LookupError` where they depend on more than positions."""
        if node not in self.known:
            self.known[node] = self._run(node)
        return self.known[node]

    def _run(self, node: Any) -> Any:
        torch = torch_lib()
        if node.op == "placeholder":
            return self._given(node)
        if node.target is operator.getitem:
            return self.value(node.args[0])[node.args[1]]
        large = self._is_large(node)
        if large and not self._is_pointwise(node):
            raise LookupError(node.name)
        cut = self.rows if large else self.value
        args = torch.fx.node.map_arg(node.args, cut)
        kwargs = torch.fx.node.map_arg(node.kwargs, cut)
        if large and operator_of(node) == "aten::expand":
            sizes = list(args[1])
            sizes[-2] = len(self.chosen) if sizes[-2] == self.tokens else sizes[-2]
            args = (args[0], sizes)
        return node.target(*map(_on_cpu, args), **{n: _on_cpu(v) for n, v in kwargs.items()})

    def _given(self, node: Any) -> Any:
        """A mask that is given hides nothing; what else is given is not known."""
        value = node.meta.get("val")
        if not is_tensor(node) or value.is_floating_point() or value.is_complex():
            raise LookupError(node.name)
        return torch_lib().ones([int(size) for size in value.shape], dtype=value.dtype)

    def _is_large(self, node: Any) -> bool:
        shape = list(node.meta["val"].shape) if is_tensor(node) else []
        return len(shape) > 1 and shape[-2] == self.tokens and node.meta["val"].numel() > _SMALL

    def _is_pointwise(self, node: Any) -> bool:
        tagged = torch_lib().Tag.pointwise in getattr(node.target, "tags", ())
        return tagged or operator_of(node) in (*_RESHAPES, "aten::to", "aten::where")

    def rows(self, node: Any) -> Any:
        """A node in the chosen rows, as an operand of a large node."""
        value = self.value(node)
        rows = value.ndim > 1 and value.shape[-2] == self.tokens and not self._is_large(node)
        return value[..., self.chosen, :] if rows else value


def _on_cpu(value: Any) -> Any:
    torch = torch_lib()
    return torch.device("cpu") if isinstance(value, torch.device) else value
