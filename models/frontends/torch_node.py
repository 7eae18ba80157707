"""What a rule sees of a node of a PyTorch export: its arguments by name, its tensors by slot.

A slot counts the tensors among the arguments, in the order of the operator's schema; a list of
tensors takes as many slots as it has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shardplan.models.errors import InputError
from shardplan.models.frontends.drafts import alike
from shardplan.models.frontends.loops import Draft
from shardplan.models.fx.torch_lib import torch_lib

__all__ = ["Rule", "Shape", "View", "follow", "is_tensor", "node_error", "operator_of", "path_of"]

Shape = tuple[int, ...]
_PLACE = re.compile(r'File "(.+)", line (\d+), in ')


def is_tensor(node: Any) -> bool:
    """Whether a node's value is one tensor."""
    return isinstance(node.meta.get("val"), torch_lib().Tensor)


def operator_of(node: Any) -> str:
    """The operator's name without overload, such as `aten::add`; of other targets their text."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name) if schema is not None else str(node.target)


def path_of(node: Any) -> str:
    """Path of the module that a node was traced in, "" where the export does not say."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def line_of(node: Any) -> str:
    """File and number of the line that a node was traced at, "" where the export does not say."""
    places = _PLACE.findall(str(node.meta.get("stack_trace") or ""))
    return ":".join(places[-1]) if places else ""


def node_error(node: Any, rule: str, hint: str = "") -> InputError:
    """What every refusal of a node says: the rule, the node, its operator, module and line."""
    told = {"module": path_of(node), "line": line_of(node)}
    return InputError(
        rule,
        got=f"node={node.name}, operator={operator_of(node)}"
        + "".join(f", {name}={value}" for name, value in told.items() if value),
        hint=hint or "write that part with operators that have a rule",
    )


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A node with what it reads."""

    node: Any
    given: Mapping[str, Any]
    """Arguments by the name in the schema, defaults left out."""
    tensors: tuple[Any, ...]
    """Nodes whose tensors are read, by slot."""
    slots: Mapping[str, tuple[int, ...]]
    """Slots of each argument that holds tensors."""
    held: frozenset[Any]
    """Nodes of parameters, buffers and constants."""
    sizes: Callable[[Any], Shape]

    @property
    def op(self) -> str:
        """The operator's name, such as `aten::add`."""
        return operator_of(self.node)

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument by name."""
        value = self.given.get(name)
        return default if value is None else value

    def has(self, name: str) -> bool:
        """Whether an argument holds a tensor."""
        return name in self.slots

    def slot(self, name: str) -> int:
        """Slot of an argument that is one tensor."""
        return self.slots[name][0]

    def shape(self, slot: int | str = 0) -> Shape:
        """Shape of what is read in a slot, or of an argument."""
        place = self.slot(slot) if isinstance(slot, str) else slot
        return self.sizes(self.tensors[place].meta["val"])

    def out(self, index: int = 0) -> Shape:
        """Shape of a result."""
        value = self.node.meta["val"]
        return self.sizes(value[index] if isinstance(value, (tuple, list)) else value)

    def dtype(self, slot: int = 0) -> Any:
        """Element type of what is read in a slot."""
        return self.tensors[slot].meta["val"].dtype

    @property
    def results(self) -> int:
        """Number of results."""
        value = self.node.meta["val"]
        return len(value) if isinstance(value, (tuple, list)) else 1

    def fixed(self, slot: int) -> bool:
        """Whether a parameter, a buffer or a constant is read."""
        return self.tensors[slot] in self.held

    def dim(self, name: str = "dim", default: int = 0, rank: int | None = None) -> int:
        """A dim that an argument names, counted from the front."""
        return int(self.arg(name, default)) % max(len(self.shape()) if rank is None else rank, 1)

    def dims(self, name: str = "dim") -> tuple[int, ...]:
        """Dims that an argument names, counted from the front; all where it names none."""
        rank = len(self.shape())
        asked = self.arg(name)
        if asked is None or asked == []:
            return tuple(range(rank))
        many = asked if isinstance(asked, (list, tuple)) else [asked]
        return tuple(int(one) % max(rank, 1) for one in many)

    def error(self, rule: str, hint: str = "") -> InputError:
        """A refusal of this node."""
        return node_error(self.node, rule, hint)


Rule = Callable[[View], Draft]


def follow(view: View, kind: str, *, without: tuple[int, ...] = ()) -> Draft:
    """The first tensor and every result alike, dim by dim; dims in `without` stay whole."""
    return alike(kind, view.shape(), results=view.results, without=without)
