"""What a rule sees of an ONNX node, and what it says: the loop of each dim of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardplan.models.errors import InputError
from shardplan.models.frontends.drafts import alike
from shardplan.models.frontends.loops import Draft
from shardplan.models.frontends.onnx_walk import Array, Walked, node_error

if TYPE_CHECKING:
    from shardplan.models.frontends.onnx_lib import NodeProto

__all__ = ["Rule", "View", "follow"]


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A node with the shapes and the constants that it reads."""

    node: NodeProto
    walked: Walked
    attrs: Mapping[str, Any]

    @property
    def op(self) -> str:
        """The operator's type."""
        return str(self.node.op_type)

    def has(self, slot: int) -> bool:
        """Whether an input is given."""
        return slot < len(self.node.input) and bool(self.node.input[slot])

    def shape(self, slot: int) -> tuple[int, ...]:
        """Shape of an input."""
        return self.walked.shapes[self.node.input[slot]]

    def out(self, index: int = 0) -> tuple[int, ...]:
        """Shape of an output."""
        return self.walked.shapes[self.node.output[index]]

    def value(self, slot: int) -> Array | None:
        """The elements of an input that is a known constant."""
        return self.walked.values.get(self.node.input[slot]) if self.has(slot) else None

    def fixed(self, slot: int) -> bool:
        """Whether an input is a weight or a constant."""
        name = self.node.input[slot]
        weights = self.walked.weights
        return name in self.walked.values or name in weights

    def axis(self, rank: int, default: int, key: str = "axis") -> int:
        """An axis attribute, counted from the front."""
        return int(self.attrs.get(key, default)) % max(rank, 1)

    def axes(self, slot: int, rank: int) -> tuple[int, ...] | None:
        """Axes given as attribute or as constant input, counted from the front; None for none."""
        given = self.attrs.get("axes")
        if given is None and self.has(slot):
            value = self.value(slot)
            if value is None:
                raise self.error("axes are constants")
            given = value.reshape(-1).tolist()
        return None if given is None else tuple(int(one) % rank for one in given)

    def error(self, rule: str, hint: str = "") -> InputError:
        """A refusal of this node."""
        return node_error(self.walked.file, self.node, rule, hint)


Rule = Callable[[View], Draft]


def follow(view: View, kind: str, *, without: tuple[int, ...] = ()) -> Draft:
    """First input and first output alike, dim by dim; dims in `without` stay whole."""
    return alike(kind, view.shape(0), without=without)
