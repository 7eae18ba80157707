"""Repeated blocks of a captured graph: the same operators, wired the same way, layer after layer.

Operators are put in an order that depends on their wiring alone (how far each is from the end).
Each gets a hash of what it is: kind, sizes of its loops, shapes and kinds of what it reads, how far
back what it reads is made. The longest run of one repeated word of hashes are the layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardplan.models.opgraph import Operator, Tensor

__all__ = ["MAX_BLOCK", "Blocks", "by_depth", "find_blocks"]

MAX_BLOCK = 4096
"""Largest block that is looked for, operators (a decoder layer has about a hundred)."""
_TRIED = 256
"""Runs of equal hashes whose wiring is compared, at most."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """`count` blocks of `period` operators each, the first at `start` of an order."""

    start: int = 0
    period: int = 0
    count: int = 0

    def layer(self, place: int) -> int:
        """The block of the operator at a place of the order, -1 for none."""
        if not self.start <= place < self.start + self.period * self.count:
            return -1
        return (place - self.start) // self.period


def by_depth(operators: Sequence[Operator], tensors: Mapping[str, Tensor]) -> list[Operator]:
    """The operators, those farthest from the end first; what leads nowhere follows its maker.

    Each stands after what it reads. What depends on no weight and no cache (positions, masks, read
    by every layer) stands before the rest. Of equals, the first in the given order stands first.
    """
    readers: dict[str, list[int]] = {}
    made = {write.tensor: index for index, one in enumerate(operators) for write in one.writes}
    for index, one in enumerate(operators):
        for name in one.inputs:
            readers.setdefault(name, []).append(index)
    height = [0.0] * len(operators)
    for index in reversed(range(len(operators))):
        after = [height[r] for w in operators[index].writes for r in readers.get(w.tensor, [])]
        height[index] = 1 + max(after, default=0.0)
    last = max(height, default=0.0)
    main = _reaching(operators, readers, height, last)
    light: set[str] = set()
    for index, one in enumerate(operators):
        before = [height[made[name]] for name in one.inputs if name in made]
        if all(tensors[n].kind in ("input", "constant") or n in light for n in one.inputs):
            light |= {write.tensor for write in one.writes}
            height[index] += last
        elif index not in main:
            height[index] = min(before, default=last) - 1 / (2 + len(operators))
    return [operators[index] for index in sorted(range(len(operators)), key=lambda i: -height[i])]


def _reaching(
    operators: Sequence[Operator],
    readers: Mapping[str, list[int]],
    height: list[float],
    last: float,
) -> set[int]:
    """Operators from which the end of the longest chain is reached."""
    place = next((i for i, value in enumerate(height) if value == last), 0)
    while operators:
        after = [r for w in operators[place].writes for r in readers.get(w.tensor, [])]
        if not after:
            break
        place = max(after, key=lambda i: height[i])
    made = {write.tensor: index for index, one in enumerate(operators) for write in one.writes}
    waiting, found = [place], set[int]()
    while waiting:
        index = waiting.pop()
        if index not in found:
            found.add(index)
            waiting += [made[name] for name in operators[index].inputs if name in made]
    return found


def find_blocks(order: Sequence[Operator], tensors: Mapping[str, Tensor]) -> Blocks:
    """The repeated blocks of operators in an order; count 0 where nothing with weights repeats."""
    hashes = np.array([_hash(one, tensors) for one in order], dtype=np.uint64)
    weighs = np.cumsum([0, *(_weighs(one, tensors) for one in order)])
    best, tried = Blocks(), 0
    for period in range(1, min(len(order) // 2, MAX_BLOCK) + 1):
        equal = hashes[period:] == hashes[:-period]
        start, length = _longest(equal)
        count = length // period + 1
        heavy = bool(weighs[start + period] > weighs[start])
        if count > 1 and heavy and period * count > best.period * best.count:
            tried += 1
            if tried > _TRIED:
                break
            found = Blocks(start, period, _wired_alike(Blocks(start, period, count), order))
            longer = found.count > 1 and period * found.count > best.period * best.count
            if longer and _follow(found, order, tensors):
                best = found
    return best


def _hash(one: Operator, tensors: Mapping[str, Tensor]) -> int:
    """What an operator is, apart from names and place: 64 bits."""
    kinds = {"input": "result"}  # the first block may read what the graph is given
    found = [(tensors[a.tensor], a.loops) for a in one.reads]
    reads = [(tensor.shape, kinds.get(tensor.kind, tensor.kind), loops) for tensor, loops in found]
    writes = [(tensors[a.tensor].shape, a.loops) for a in one.writes]
    loops = sorted((name, loop.size, loop.whole) for name, loop in one.loops.items())
    text = repr((one.kind, reads, writes, loops, sorted(one.attrs.items())))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _longest(equal: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> tuple[int, int]:
    """(start, length) of the longest run of True, the first of equals."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], equal, [False])).astype(np.int8)))
    if not len(edges):
        return 0, 0
    lengths = edges[1::2] - edges[::2]
    best = int(lengths.argmax())
    return int(edges[2 * best]), int(lengths[best])


def _follow(found: Blocks, order: Sequence[Operator], tensors: Mapping[str, Tensor]) -> bool:
    """Whether the blocks are layers: all that has weights waits for the block before."""
    middle = found.start + found.period
    reached = {write.tensor for one in order[found.start : middle] for write in one.writes}
    for one in order[middle : middle + found.period]:
        waits = any(name in reached for name in one.inputs)
        reached |= {write.tensor for write in one.writes} if waits else set()
        if _weighs(one, tensors) and not waits:
            return False
    return True


def _weighs(one: Operator, tensors: Mapping[str, Tensor]) -> bool:
    """Whether an operator reads a weight of two dims or more."""
    read = [tensors[name] for name in one.inputs]
    return any(tensor.kind == "parameter" and len(tensor.shape) > 1 for tensor in read)


def _wired_alike(found: Blocks, order: Sequence[Operator]) -> int:
    """How many of the blocks are wired like the first.

    Each operator reads what its twin in the block before reads: something made as far back, the
    same tensor from outside the blocks, or a weight. What the first block reads from before the
    blocks, the second may read from the first.
    """
    made = {write.tensor: place for place, one in enumerate(order) for write in one.writes}
    begin, period = found.start, found.period
    for place in range(begin, begin + period * (found.count - 1)):
        for a, b in zip(order[place].inputs, order[place + period].inputs, strict=True):
            first, second = made.get(a, -1), made.get(b, -1)
            if first >= begin:
                alike = second == first + period
            else:
                entry = place < begin + period and begin <= second < begin + period
                alike = a == b or first == second == -1 or entry
            if not alike:
                return 1 + (place - begin) // period
    return found.count
