"""Simulations whose steps take a time linear in their tokens, as those of the tiny reference do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.costmodel.discrete import LinearModel

from shardplan.costmodel.simulate.batch import Policy
from shardplan.costmodel.simulate.blocks import Blocks
from shardplan.costmodel.simulate.events import Sending, Simulation
from shardplan.costmodel.simulate.prices import StepPrices, StepTypes
from shardplan.costmodel.simulate.request import Asked, Request
from shardplan.costmodel.simulate.router import Router
from shardplan.costmodel.simulate.scheduler import Engine
from shardplan.costmodel.simulate.unit import Lane, Unit
from shardplan.models.graph import Phase

__all__ = ["Linear", "Watched", "served", "simulation"]


class Linear(LinearModel):
    """The reference's model, with what tables ask for."""

    def __init__(self, engine: str = "vllm-ascend", ahead: int = 0, stages: int = 1) -> None:
        super().__init__(engine, stages)
        self.mtp = ahead

    def launch_floor_s(self, phase: Phase) -> float:
        """Launches cost nothing."""
        return 0.0


class Watched:
    """Every request that ended; checks at every step that no engine holds more than it has."""

    def __init__(self) -> None:
        self.ended: list[Request] = []
        self.peak = 0
        self.steps: list[tuple[int, int]] = []
        """(steps in a row, prompt tokens) of each."""

    def step(self, unit: Unit, lane: Lane) -> None:
        """Hold what is used against what there is."""
        for engine in unit.engines:
            blocks = engine.blocks
            assert 0 <= blocks.free <= blocks.total
            assert engine.running + engine.claimed <= engine.policy.slots
            held = {id(one): one for batch in engine.batches for one in batch.running.values()}
            assert sum(one.blocks for one in held.values()) <= blocks.in_use
            self.peak = max(self.peak, blocks.in_use)
        self.steps.append((lane.steps, sum(batch.tokens for batch in lane.batches)))

    def request(self, request: Request) -> None:
        """Keep it."""
        self.ended.append(request)


def simulation(
    asked: Iterator[Asked],
    *,
    policy: Policy,
    blocks: int = 10**6,
    block_tokens: int = 128,
    engines: int = 1,
    together: int = 1,
    stages: int = 1,
    senders: int = 0,
    sending: Sending | None = None,
    router: Router = "least-load",
    **run: Any,
) -> tuple[Simulation, Watched]:
    """Engines in units of `together`, `senders` of them before the others; not yet run."""
    watched = Watched()
    made = Simulation(asked, watched, **run)
    name = "mindie" if policy.prompts_first else "vllm-ascend"
    model = Linear(name, policy.width - 1, stages)
    prices = StepPrices(model, StepTypes(), slots=policy.slots, chunk=policy.chunk, longest=1 << 14)

    def units(count: int, first: int, own: Policy) -> list[Unit]:
        return [
            Unit(
                start,
                [
                    Engine(number, own, Blocks(blocks, block_tokens, 512 // block_tokens), made)
                    for number in range(start, start + together)
                ],
                prices,
            )
            for start in range(first, first + count, together)
        ]

    if sending is None:
        made.serve_with(units(engines, 0, policy), router)
    else:
        alone = Policy(slots=policy.slots, chunk=policy.chunk, sends=True)
        made.serve_with(
            units(senders, 0, alone),
            router,
            decode=units(engines, senders, policy),
            sending=sending,
        )
    return made, watched


def served(asked: list[Asked], **how: Any) -> Watched:
    """Run to the end, and check what every run must satisfy."""
    made, watched = simulation(iter(asked), **how)
    made.run()
    check(asked, made, watched)
    return watched


def check(asked: list[Asked], made: Simulation, watched: Watched) -> None:
    """Every request ended once, in order of its times, and everything was given back."""
    numbers = [one.number for one in watched.ended]
    assert sorted(numbers) == list(range(len(asked)))
    for one in watched.ended:
        sent = asked[one.number]
        assert (one.input_len, one.output_len) == (sent.input_len, sent.output_len)
        assert one.arrival_s <= one.first_s <= one.end_s
        assert (one.output_len == 1) <= (one.first_s == one.end_s)
    for unit in made.units:
        for engine in unit.engines:
            assert engine.blocks.in_use == 0
            assert engine.load == 0
            assert engine.waiting_tokens == 0
