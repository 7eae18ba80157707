"""Blocks of the cache of one engine: what requests hold, and prefixes kept for those to come.

    blocks = held by requests + shared prefixes in use + prefixes kept + free

A prefix is told by the ids of its parts, each a fixed number of whole blocks; the same id stands
for the same tokens after the same tokens. A part is shared once the prompt that brought it is
computed, stays while requests use it, and is then kept until its blocks are wanted: the one that
was used least recently goes first, of one request the last part first (vLLM's free queue).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

__all__ = ["Blocks"]


class Blocks:
    """`total` blocks of `tokens` tokens; a part of a prefix is `part` blocks."""

    __slots__ = ("_kept", "_used", "free", "part", "tokens", "total")

    def __init__(self, total: int, tokens: int, part: int = 1) -> None:
        self.total, self.tokens, self.part = total, tokens, part
        self.free = total
        self._used: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be had: free ones, and those of prefixes that nothing uses."""
        return self.free + self.part * len(self._kept)

    @property
    def in_use(self) -> int:
        """Blocks that requests hold or share."""
        return self.total - self.available

    def needed(self, tokens: float) -> int:
        """Blocks that hold so many tokens."""
        return int(-(-tokens // self.tokens))

    def take(self, count: int) -> bool:
        """Take blocks, of kept prefixes where none are free; False, and nothing taken, if short."""
        if count > self.free:
            if count > self.available:
                return False
            while count > self.free:
                self._kept.popitem(last=False)
                self.free += self.part
        self.free -= count
        return True

    def give(self, count: int) -> None:
        """Give blocks back."""
        self.free += count

    def found(self, ids: Sequence[int]) -> int:
        """Leading parts of a prompt that are there."""
        count = 0
        for one in ids:
            if one not in self._used and one not in self._kept:
                break
            count += 1
        return count

    def use(self, ids: Iterable[int]) -> None:
        """Hold parts that were found."""
        for one in ids:
            if one in self._kept:
                del self._kept[one]
            self._used[one] = self._used.get(one, 0) + 1

    def share(self, ids: Iterable[int]) -> list[int]:
        """Let others find what a request holds; the parts that are shared now, no longer its own.

        What another request has brought meanwhile stays the request's own.
        """
        shared = []
        for one in ids:
            if one not in self._used and one not in self._kept:
                self._used[one] = 1
                shared.append(one)
        return shared

    def leave(self, ids: Sequence[int]) -> None:
        """Hold parts no longer; they are kept."""
        for one in reversed(ids):
            left = self._used[one] - 1
            if left:
                self._used[one] = left
            else:
                del self._used[one]
                self._kept[one] = None
