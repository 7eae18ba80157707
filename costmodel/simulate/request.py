"""A request on its way through the engines."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Asked", "Request"]


class Asked(NamedTuple):
    """What a client sends."""

    arrival_s: float
    input_len: int
    output_len: int
    prefix: tuple[int, ...] = ()
    """Ids of the parts of its prompt, of 512 tokens each; the last may be short."""


class Request:
    """One request; times in seconds, negative until they are known."""

    __slots__ = (
        "arrival_s",
        "blocks",
        "computed",
        "context",
        "end_s",
        "end_step",
        "first_s",
        "input_len",
        "made",
        "number",
        "output_len",
        "place",
        "preempted",
        "prefix",
        "prompt",
        "shared",
        "step",
        "tokens_a_step",
        "unit",
    )

    def __init__(self, number: int, asked: Asked) -> None:
        self.number = number
        self.arrival_s, self.input_len, self.output_len, self.prefix = asked
        self.first_s = self.end_s = -1.0
        self.made = 0
        """Output tokens, up to the last time that it left the decoding sequences."""
        self.prompt, self.computed = self.input_len, 0
        """Tokens that a prefill computes (with those made before a preemption), and those done."""
        self.blocks = 0
        self.shared: list[int] = []
        """Blocks of its own; parts of a prefix that it shares."""
        self.place = 0
        """Order of admission: the last one is the first to be preempted."""
        self.step = self.end_step = 0
        """Decode steps of its microbatch when it began to decode, and when it ends."""
        self.context, self.tokens_a_step = 0.0, 1.0
        """Cached tokens when it began to decode, and what a decode step adds."""
        self.preempted = 0
        self.unit = -1
        """Which engine served it last."""
