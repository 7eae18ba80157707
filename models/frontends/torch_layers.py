"""Which repeated block each operator of an export belongs to.

Where the export keeps module paths, the layers are the entries of the list of modules that holds
most operators (`model.layers.3.mlp` belongs to layer 3), each with weights of its own. Where it
keeps none, the blocks are found by their hashes (`opblocks`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from shardplan.models.errors import InputError
from shardplan.models.opblocks import by_depth, find_blocks
from shardplan.models.opgraph import Operator, Tensor

__all__ = ["check_alike", "number_layers"]

_NUMBER = re.compile(r"^(.*?)\.?(?<![^.])(\d+)(?:\.|$)")


def number_layers(
    operators: Sequence[Operator], tensors: Mapping[str, Tensor]
) -> tuple[tuple[Operator, ...], int]:
    """(the operators with their layer, how many layers there are)."""
    places = [_place(one.where) for one in operators]
    held: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for one, place in zip(operators, places, strict=True):
        if place is not None:
            held[place[0]][place[1]] += _weighs(one, tensors)
    stacks = {
        name: found
        for name, found in held.items()
        if sorted(found) == list(range(len(found))) and all(found.values())
    }
    if not stacks:
        return _hashed(operators, tensors)
    chosen = max(stacks, key=lambda name: sum(p is not None and p[0] == name for p in places))
    numbered = (
        replace(one, layer=place[1]) if place is not None and place[0] == chosen else one
        for one, place in zip(operators, places, strict=True)
    )
    return tuple(numbered), len(stacks[chosen])


def _place(where: str) -> tuple[str, int] | None:
    """(list of modules, entry) of the outermost list in a module path."""
    found = _NUMBER.match(where)
    return (found.group(1), int(found.group(2))) if found else None


def _weighs(one: Operator, tensors: Mapping[str, Tensor]) -> bool:
    read = (tensors[name] for name in one.inputs)
    return any(tensor.kind == "parameter" and len(tensor.shape) > 1 for tensor in read)


def _hashed(
    operators: Sequence[Operator], tensors: Mapping[str, Tensor]
) -> tuple[tuple[Operator, ...], int]:
    if any(one.where for one in operators):
        return tuple(operators), 0
    order = by_depth(operators, tensors)
    blocks = find_blocks(order, tensors)
    layers = {one.name: blocks.layer(place) for place, one in enumerate(order)}
    return tuple(replace(one, layer=layers[one.name]) for one in operators), blocks.count


def check_alike(
    operators: Sequence[Operator], tensors: Mapping[str, Tensor], kinds: Sequence[int]
) -> None:
    """`InputError` unless layers of one kind (its number, by layer) hold the same operators."""
    layers: dict[int, list[object]] = defaultdict(list)
    for one in operators:
        shapes = tuple(tensors[name].shape for name in one.inputs)
        layers[one.layer].append((one.kind, one.attrs.get("torch"), one.loops, shapes))
    first: dict[int, int] = {}
    for layer, kind in enumerate(kinds):
        twin = first.setdefault(kind, layer)
        if layers[layer] != layers[twin]:
            raise InputError(
                "layers whose modules are alike compute alike",
                got=f"layers {twin} and {layer} differ",
                hint="capture every layer: folded=False",
            )
