"""How an engine fills its steps, and what one batch of it holds."""

from __future__ import annotations

from dataclasses import dataclass

from shardplan.costmodel.simulate.request import Request

__all__ = ["Batch", "Policy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How an engine fills its steps."""

    slots: int
    """Sequences that decode together, and prompts being computed."""
    chunk: int
    """Tokens of a step."""
    width: int = 1
    """Tokens of a sequence that a decode step verifies."""
    prompts_first: bool = False
    most_prompts: int = 1 << 30
    """Prompts of a step, where they go first."""
    prefix_hit: float = 0.0
    """Share of a prompt that is found, of prompts whose prefix is not told."""
    batches: int = 1
    sends: bool = False
    """Requests decode elsewhere."""


class Batch:
    """One batch of an engine: its sequences, and the step that it runs."""

    __slots__ = (
        "active",
        "begun",
        "context",
        "decoding",
        "ends",
        "fed",
        "fresh",
        "growing",
        "growth",
        "pairs",
        "pending",
        "running",
        "step",
        "tokens",
    )

    def __init__(self) -> None:
        self.running: dict[int, Request] = {}
        """By place, in the order of admission."""
        self.decoding, self.context, self.growth, self.step = 0, 0.0, 0.0, 0
        """Sequences, their cached tokens, what a step adds to them, decode steps so far."""
        self.ends: list[tuple[int, int, Request]] = []
        self.growing: list[tuple[int, int, Request]] = []
        """(step, place): when a request ends, and when it wants another block."""
        self.begun: Request | None = None
        """A prompt of which a part is computed."""
        self.fresh: list[Request] = []
        """Sequences that came from elsewhere and have no token yet."""
        self.fed: list[tuple[Request, int]] = []
        """(prompt, tokens) of the step."""
        self.active, self.tokens, self.pairs = 0, 0, 0.0
        """Of the step: sequences that decode, prompt tokens, `StepPrices.prompts`' pairs."""
        self.pending: list[tuple[int, int, Request]] = []
