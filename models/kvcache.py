"""Which token lies in which slot of a cache that is split over ranks.

A cache of S tokens over W parts has ceil(S / W) slots on each rank. Tokens of a prompt stay on
the rank that computed them (every part gets as many); a token that all ranks have, as in decode,
goes to the part with the fewest tokens, the first of equals. Slots beyond a part's tokens are
empty: position -1, never attended to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Slots"]

Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Slots:
    """Positions `[parts, slots]` of the tokens that the parts of one cache hold; -1 for none."""

    at: Places

    @classmethod
    def empty(cls, parts: int) -> Slots:
        """A cache of no token."""
        return cls(np.empty((parts, 0), dtype=np.int64))

    @property
    def tokens(self) -> int:
        """Tokens held by all parts together."""
        return int(self.at.max(initial=-1)) + 1

    def appended(self, tokens: int, *, dealt: bool) -> tuple[Slots, Places]:
        """The slots after `tokens` new ones on each rank, and where each slot's entry comes from.

        `dealt`: the ranks have different tokens, in order; else all have the same ones. The
        second result `[parts, slots]` counts through the old slots, then the new tokens, then one
        empty entry.
        """
        parts, old = self.at.shape
        past = self.tokens
        own: list[list[tuple[int, int]]] = [
            [(int(at), slot) for slot, at in enumerate(row) if at >= 0] for row in self.at
        ]
        for token in range(tokens):
            for part in range(parts) if dealt else [min(range(parts), key=lambda w: len(own[w]))]:
                at = past + token + (part * tokens if dealt else 0)
                own[part].append((at, old + token))
        slots = max(map(len, own))
        empty = (-1, old + tokens)
        filled = np.asarray([[*one, *[empty] * (slots - len(one))] for one in own], dtype=np.int64)
        filled = filled.reshape(parts, slots, 2)
        return Slots(filled[..., 0]), filled[..., 1]
