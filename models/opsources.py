"""Where the tensors of a captured graph come from: products with weights, and the way to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from shardplan.models.opgraph import Operator, OpGraph, Tensor

__all__ = ["Latent", "Wiring", "columns", "rows"]

_PASSES = ("pointwise", "reshape")


@dataclass(frozen=True, slots=True)
class Latent:
    """The products of multi-head latent attention: tokens to latent, latent to keys and values."""

    down: Operator
    up: Operator

    @property
    def rotary(self) -> int:
        """Elements a token of the keys' rotary part, shared by all heads."""
        return columns(self.down) - rows(self.up)


def rows(product: Operator) -> int:
    """Elements that a product with a weight sums over."""
    return product.loops["k"].size


def columns(product: Operator) -> int:
    """Elements that a product with a weight gives a token."""
    return product.loops["n"].size


@dataclass(frozen=True, eq=False)
class Wiring:
    """A graph with who makes what."""

    graph: OpGraph

    @cached_property
    def made(self) -> Mapping[str, Operator]:
        """The operator that gives each result."""
        return self.graph.producers()

    @cached_property
    def layers(self) -> Mapping[int, list[Operator]]:
        """Operators of each layer in computing order; -1 for those of none."""
        found: dict[int, list[Operator]] = {}
        for one in self.graph.operators:
            found.setdefault(one.layer, []).append(one)
        return found

    def weight(self, one: Operator) -> Tensor | None:
        """The parameter that a product multiplies with, through casts and transposes."""
        if one.kind not in ("matmul", "grouped_matmul") or not {"k", "n"} <= one.loops.keys():
            return None
        name = one.inputs[1]
        while name in self.made and self.made[name].kind in _PASSES:
            maker = self.made[name]
            if len(maker.inputs) != 1:
                return None
            name = maker.inputs[0]
        tensor = self.graph.tensors[name]
        return tensor if tensor.kind == "parameter" and len(tensor.shape) > 1 else None

    def sources(self, names: Iterable[str]) -> list[Operator]:
        """The nearest products with weights from which tensors come."""
        waiting, seen, found = list(names), set[str](), []
        while waiting:
            maker = self.made.get(waiting.pop())
            if maker is None or maker.name in seen:
                continue
            seen.add(maker.name)
            if self.weight(maker) is not None:
                found.append(maker)
            else:
                waiting += maker.inputs
        return found

    def before(self, one: Operator) -> set[str]:
        """Names of the operators of the same layer from which an operator's inputs come."""
        waiting, seen = list(one.inputs), set[str]()
        while waiting:
            maker = self.made.get(waiting.pop())
            if maker is not None and maker.layer == one.layer and maker.name not in seen:
                seen.add(maker.name)
                waiting += maker.inputs
        return seen

    def latent(self, attention: Operator) -> Latent | None:
        """The latent that keys and values of an attention come from, None where there is none.

        Keys and values come from one product, and keys beside it from the product that gave the
        latent, which has the rotary part too.
        """
        match [self.sources([name]) for name in attention.inputs[1:3]]:
            case [[one, other], [up]] if up in (one, other):
                down = other if up is one else one
            case _:
                return None
        wider = columns(down) > rows(up) and down in self.sources([up.inputs[0]])
        return Latent(down, up) if wider else None
