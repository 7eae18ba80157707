"""A module's stack of repeated layers, and how many of them say all.

Layers are of one kind where their modules have the same classes, the same parameters and the same
plain attributes, apart from what counts the layers (`layer_idx`). The first layers until each kind
was met twice are enough: in the second nothing depends any more on what stands before the stack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardplan.models.fx.torch_lib import torch_lib

__all__ = ["Stack", "find_stack"]

_MET = 2
_PLAIN = (bool, int, float, str)


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """A list of layers: `getattr(owner, attribute)`."""

    owner: Any
    attribute: str
    kinds: tuple[int, ...]
    """Number of the kind of each layer."""
    kept: int
    """Layers from the first on that are captured."""

    def folded(self) -> Mapping[int, int]:
        """Captured layer -> how many it stands for: the last of each kind for all left out."""
        total = Counter(self.kinds)
        seen = Counter(self.kinds[: self.kept])
        last = {kind: layer for layer, kind in enumerate(self.kinds[: self.kept])}
        return {layer: 1 + total[kind] - seen[kind] for kind, layer in last.items()}


def find_stack(module: Any) -> Stack | None:
    """The longest list of modules whose first entries are enough; None where all are needed."""
    torch = torch_lib()
    lists = [
        (owner, name, list(entry))
        for owner in module.modules()
        for name, entry in owner.named_children()
        if type(entry) is torch.nn.ModuleList and not isinstance(owner, torch.nn.ModuleList)
    ]
    if not lists:
        return None
    owner, name, layers = max(lists, key=lambda one: _elements(one[2]))
    kinds = _kinds(layers)
    total = Counter(kinds)
    met: Counter[int] = Counter()
    for kept, kind in enumerate(kinds, start=1):
        met[kind] += 1
        if all(met[one] >= min(_MET, count) for one, count in total.items()):
            return Stack(owner, name, kinds, kept) if kept < len(kinds) else None
    return None


def _elements(layers: list[Any]) -> int:
    return sum(int(one.numel()) for layer in layers for one in layer.parameters())


def _kinds(layers: list[Any]) -> tuple[int, ...]:
    """A number for each layer, equal for equal layers."""
    facts = [_facts(layer) for layer in layers]
    counting = {
        key
        for key in facts[0]
        if len(layers) > 1
        and all(type(one.get(key)) is int for one in facts)
        and all(one[key] - facts[0][key] == place for place, one in enumerate(facts))
    }
    numbers: dict[frozenset[Any], int] = {}
    kinds = []
    for one in facts:
        rest = frozenset((key, value) for key, value in one.items() if key not in counting)
        kinds.append(numbers.setdefault(rest, len(numbers)))
    return tuple(kinds)


def _facts(layer: Any) -> dict[tuple[str, str], Any]:
    """What tells layers apart: classes, parameters and plain attributes of all their modules."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in layer.named_modules():
        found[path, "class"] = type(module).__qualname__
        for name, value in vars(module).items():
            if type(value) in _PLAIN and name != "training":
                found[path, name] = value
        own = (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in (*own[0], *own[1]):
            found[path, name] = (tuple(tensor.shape), str(tensor.dtype))
    return found
