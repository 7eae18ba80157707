"""Attention that an exporter wrote out: MatMul, scale, mask, Softmax, MatMul become one operator.

A product of two results whose first input comes from a softmax over a product of two results is an
attention, as is the operator of opset 23; with it go what lies between, the scale and
the transpose of its keys, and the repetition of kv heads. Its loops are those of its parts, tied
where one part reads what another writes: a loop that every part can split is a loop of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from shardplan.models.frontends.onnx_rules import head_attrs
from shardplan.models.frontends.onnx_walk import Array
from shardplan.models.opgraph import Access, Loop, Operator, Tensor

__all__ = ["Fused", "find_attentions", "is_causal"]

_BETWEEN = 32
"""Operators between the two products of an attention, masks included, at most."""
_MOVES = ("Reshape", "Unsqueeze", "Expand", "Transpose")
Member = tuple[str, str]
"""(operator, loop of it)"""


@dataclass(frozen=True, slots=True)
class Fused:
    """An operator of several nodes, in the place of the last: `inside` gives each part the loop of
    its own for each loop."""

    last: str

    operator: Operator
    inside: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, slots=True, eq=False)
class _Wiring:
    made: Mapping[str, Operator]
    readers: Mapping[str, list[Operator]]
    types: Mapping[str, str]
    """Operator -> ONNX operator type."""
    tensors: Mapping[str, Tensor]
    value: Callable[[str], Array | None]
    outputs: frozenset[str]


def find_attentions(
    operators: tuple[Operator, ...],
    types: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    value: Callable[[str], Array | None],
    outputs: tuple[str, ...],
) -> list[Fused]:
    """Every attention of several parts, in computing order; where two share a part, the first.

    `value` gives the elements of a constant that is not too large to look at.
    """
    made = {write.tensor: one for one in operators for write in one.writes}
    readers: dict[str, list[Operator]] = {}
    for one in operators:
        for name in dict.fromkeys(one.inputs):
            readers.setdefault(name, []).append(one)
    wiring = _Wiring(made, readers, types, tensors, value, frozenset(outputs))
    found, taken = [], set[str]()
    for one in operators:
        parts = None
        if _of_results(wiring, one):
            parts = _parts(wiring, one)
        elif types[one.name] == "Attention":
            parts = _repeated(wiring, one)
        if parts is not None and not taken & set(parts):
            taken |= set(parts)
            found.append(_fuse(wiring, [p for p in operators if p.name in parts], one))
    return found


def _repeated(wiring: _Wiring, one: Operator) -> set[str] | None:
    """An attention operator with the repetition of its kv heads, None where it has none."""
    before = [_chain(wiring, name, keys=False) for name in one.inputs[1:3]]
    repeats = [any(wiring.types[part] == "Expand" for part in chain) for chain in before]
    return {one.name}.union(*before) if all(repeats) else None


def _of_results(wiring: _Wiring, one: Operator) -> bool:
    return wiring.types[one.name] == "MatMul" and all(name in wiring.made for name in one.inputs)


def _parts(wiring: _Wiring, last: Operator) -> set[str] | None:
    """Names of the operators of the attention that ends in `last`, None where there is none."""
    between: set[str] = set()
    scores = _scores(wiring, last.inputs[0], between)
    if scores is None or not any(wiring.types[name] == "Softmax" for name in between):
        return None
    if len(wiring.tensors[scores.writes[0].tensor].shape) != 4:
        return None
    parts = between | {scores.name, last.name}
    parts |= _chain(wiring, scores.inputs[0], keys=False)
    parts |= _chain(wiring, scores.inputs[1], keys=True) | _chain(
        wiring, last.inputs[1], keys=False
    )
    inner = {name for one in parts for name in _written(wiring, one)} - {last.writes[0].tensor}
    read_outside = any(r.name not in parts for name in inner for r in wiring.readers.get(name, []))
    return None if read_outside or inner & wiring.outputs else parts


def _written(wiring: _Wiring, name: str) -> Iterator[str]:
    return (tensor for tensor, one in wiring.made.items() if one.name == name)


def _scores(wiring: _Wiring, tensor: str, between: set[str]) -> Operator | None:
    """The product of queries and keys from which a tensor follows, element by element.

    The operators between are added to `between`; None where there are several products or more
    operators than an attention has.
    """
    waiting, seen, products = [tensor], dict[str, Operator](), dict[str, Operator]()
    while waiting and len(seen) <= _BETWEEN:
        one = wiring.made.get(waiting.pop())
        if one is None or one.name in seen or one.name in products:
            continue
        if _of_results(wiring, one):
            products[one.name] = one
        elif one.kind in ("pointwise", "softmax"):
            seen[one.name] = one
            waiting += one.inputs
    if waiting or len(products) != 1:
        return None
    (found,) = products.values()
    reached = {found.name}
    while more := {
        one.name
        for one in seen.values()
        if one.name not in reached
        and any(n in wiring.made and wiring.made[n].name in reached for n in one.inputs)
    }:
        reached |= more
    between |= reached - {found.name}
    return found


def _chain(wiring: _Wiring, tensor: str, *, keys: bool) -> set[str]:
    """What belongs to attention before a product: scales, the transpose of keys, repeated heads."""
    chain: list[Operator] = []
    name = tensor
    while (one := wiring.made.get(name)) is not None and _passes(wiring, one):
        chain.append(one)
        name = _main(wiring, one)
    repeats = [at for at, one in enumerate(chain) if wiring.types[one.name] == "Expand"]
    if repeats:
        end = repeats[-1] + 1
        end += end < len(chain) and wiring.types[chain[end].name] in ("Unsqueeze", "Reshape")
        return {one.name for one in chain[:end]}
    turns = [at for at, one in enumerate(chain) if wiring.types[one.name] == "Transpose"]
    end = 0
    if keys and turns:
        end = turns[0] + 1
        wrapped = turns[0] > 0 and wiring.types[chain[turns[0] - 1].name] == "Reshape"
        end += wrapped and end < len(chain) and wiring.types[chain[end].name] == "Reshape"
    while end < len(chain) and wiring.types[chain[end].name] in ("Mul", "Div"):
        end += 1
    return {one.name for one in chain[:end]}


def _passes(wiring: _Wiring, one: Operator) -> bool:
    """Whether an operator moves or scales one tensor that nothing else reads."""
    kind = wiring.types[one.name]
    alone = len(wiring.readers.get(one.writes[0].tensor, [])) == 1
    scale = kind in ("Mul", "Div") and any(_is_scalar(wiring, name) for name in one.inputs)
    return alone and (kind in _MOVES or scale) and _main(wiring, one) in wiring.made


def _is_scalar(wiring: _Wiring, name: str) -> bool:
    return wiring.tensors[name].elements == 1 and wiring.tensors[name].kind == "constant"


def _main(wiring: _Wiring, one: Operator) -> str:
    return next((name for name in one.inputs if not _is_scalar(wiring, name)), "")


def _fuse(wiring: _Wiring, parts: list[Operator], last: Operator) -> Fused:
    loops, classes = _tie(parts)
    inside = {
        one.name: {
            kind: loop
            for (name, loop), kind in classes.items()
            if name == one.name and kind in loops
        }
        for one in parts
    }
    inner = {write.tensor for one in parts for write in one.writes}
    reads: dict[tuple[str, tuple[str, ...]], Access] = {}
    for one in parts:
        for access in one.reads:
            if access.tensor not in inner:
                named = _named(one, access, classes, loops)
                reads[access.tensor, named] = Access(tensor=access.tensor, loops=named)
    operator = Operator(
        name=f"{last.name}/attention",
        kind="attention",
        reads=tuple(reads.values()),
        writes=(
            Access(
                tensor=last.writes[0].tensor,
                loops=_named(last, last.writes[0], classes, loops),
            ),
        ),
        loops=loops,
        flop=sum(one.flop for one in parts),
        where=last.where,
        attrs=_sizes(wiring, parts, last, loops["h"].size if "h" in loops else 0),
    )
    return Fused(last.name, operator, inside)


def _named(
    one: Operator, access: Access, classes: Mapping[Member, str], loops: Mapping[str, Loop]
) -> tuple[str, ...]:
    found = (classes[one.name, loop] if loop else "" for loop in access.loops)
    return tuple(kind if kind in loops else "" for kind in found)


def _tie(parts: list[Operator]) -> tuple[dict[str, Loop], dict[Member, str]]:
    """(loops that all parts may split, the loop that each part's loop is tied to)."""
    root: dict[Member, Member] = {
        (one.name, loop): (one.name, loop) for one in parts for loop in one.loops
    }
    broken: set[Member] = set()

    def find(member: Member) -> Member:
        while root[member] != member:
            member = root[member]
        return member

    written = {write.tensor: (one, write) for one in parts for write in one.writes}
    for one in parts:
        broken |= {
            (one.name, loop)
            for loop in one.loops
            if one.loops[loop].whole or loop in one.contracted
        }
        for access in one.reads:
            if access.tensor not in written:
                continue
            maker, write = written[access.tensor]
            for here, there in zip(access.loops, write.loops, strict=True):
                if here and there:
                    root[find((one.name, here))] = find((maker.name, there))
                elif here or there:
                    broken.add((one.name, here) if here else (maker.name, there))
    lost = {find(member) for member in broken}
    sizes: dict[Member, int] = {}
    for name, loop in root:
        size = next(one for one in parts if one.name == name).loops[loop].size
        sizes[find((name, loop))] = math.gcd(sizes.get(find((name, loop)), 0), size)
    called = {member: _called(parts, member, find) for member in sizes}
    loops = {called[m]: Loop(size=size) for m, size in sizes.items() if m not in lost and size > 0}
    return loops, {member: called[find(member)] for member in root}


def _called(parts: list[Operator], top: Member, find: Callable[[Member], Member]) -> str:
    """b for sequences, h for heads, t for queries, v for the width of values, else a number."""
    products = [one.name for one in parts if one.kind in ("matmul", "attention")]
    first, last = products[0], products[-1]
    known = {(first, "b0"): "b", (first, "b1"): "h", (first, "m"): "t", (last, "n"): "v"}
    known |= {(first, one): one for one in ("b", "h", "t")}
    loops = {(one.name, loop) for one in parts for loop in one.loops}
    for member, name in known.items():
        if member in loops and find(member) == top:
            return name
    place = next(index for index, one in enumerate(parts) if one.name == top[0])
    return f"{top[1]}.{place}"


def _sizes(
    wiring: _Wiring, parts: list[Operator], last: Operator, kv_heads: int
) -> dict[str, float | str]:
    if last.kind == "attention":
        return {**last.attrs, "kv_heads": kv_heads}
    scores = next(one for one in parts if one.kind == "matmul")
    repeated = any(wiring.types[one.name] == "Expand" for one in parts)
    shape = wiring.tensors[scores.writes[0].tensor].shape
    queries = wiring.tensors[scores.inputs[0]].shape
    values = wiring.tensors[last.writes[0].tensor].shape
    inner = {write.tensor for one in parts for write in one.writes}
    masks = {name for one in parts if one.kind == "pointwise" for name in one.inputs} - inner
    causal = any(is_causal(array) for name in masks for array in _constants(wiring, name))
    causal = causal or 1 == shape[-2] < shape[-1]  # a decode step: nothing later is there
    kv_heads = kv_heads if repeated else shape[1]
    return head_attrs(shape[1], kv_heads, queries[-1], values[-1], shape[-1], int(causal))


def _constants(wiring: _Wiring, tensor: str) -> Iterator[Array]:
    """Constants from which a mask is made."""
    waiting, seen = [tensor], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        value = wiring.value(name)
        if value is not None:
            yield value
        one = wiring.made.get(name)
        if one is not None and one.kind in ("pointwise", "reshape", "gather"):
            waiting.extend(one.inputs)


def is_causal(mask: Array) -> bool:
    """Whether a mask [.., tokens, context] hides what comes later, and only that."""
    if mask.ndim < 2 or mask.shape[-1] < 2 or mask.shape[-2] < 2:
        return False
    flat = mask.reshape(-1, *mask.shape[-2:])[0]
    later = np.triu(np.ones(flat.shape, bool), 1 + flat.shape[1] - flat.shape[0])
    hidden = flat == flat[0, -1]
    return bool((hidden == later).all())
