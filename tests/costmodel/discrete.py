"""A serving engine step by step: fixed lengths, a step time linear in its tokens.

The oracle of the steady-state formulas. It shares nothing with them: it keeps every request, fills
every step as the scheduler of an engine does, and counts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.load import Load, Parts
from shardplan.costmodel.optable import Group

__all__ = ["BASE_S", "TOKEN_S", "LinearModel", "Measured", "Setting", "measure", "run_prompts"]

BASE_S, TOKEN_S = 0.02, 1e-5
_ZERO = np.zeros(())


class Setting(NamedTuple):
    """Slots, tokens a step, prompt and output lengths; tokens predicted ahead, and kept of them."""

    slots: int
    chunk: int
    prompt: int
    output: int
    ahead: int = 0
    kept: float = 0.0

    @property
    def load(self) -> float:
        """Tokens that the slots ask of a step, of those it holds."""
        chunks = -(-self.prompt // self.chunk)
        asked = self.slots * (self.prompt + self.output - 1) / (self.output - 1 + chunks)
        return asked / self.chunk


class Measured(NamedTuple):
    """Means of the later part of a run."""

    requests_per_s: float
    ttft_s: float
    tpot_s: float


class LinearModel:
    """Stands for a StepModel of equal stages whose step takes BASE_S + TOKEN_S * tokens."""

    groups = 1
    context_ranks = 1
    memo = None

    def __init__(self, engine: str, stages: int = 1, locked: int = 1) -> None:
        self.engine = load_engine(engine)
        self.stages, self.locked = stages, locked

    def parts(self, group: Group, load: Load) -> list[Parts]:
        """All of the time is the token rows'."""
        if group != "token":
            return [Parts(_ZERO, _ZERO, _ZERO, _ZERO, 0.0)] * self.stages
        whole = Parts(TOKEN_S * load.tokens, _ZERO, _ZERO, np.asarray(BASE_S), 1.0)
        return [whole.times(1.0 / self.stages)] * self.stages

    def step_s(self, stages: list[Parts], _: str) -> list[Array]:
        """Seconds of each stage."""
        return [parts.total_s for parts in stages]

    def host_s(self, _: str) -> float:
        """The host costs nothing."""
        return 0.0


@dataclass(slots=True)
class _Request:
    prompt_left: int
    decode_left: int
    started_s: float
    first_s: float = -1.0
    """Of the first token; negative until there is one, or where it is older than the run."""


class _Engine:
    """Slots of running requests; one that ends is followed by the next prompt there is."""

    def __init__(self, setting: Setting, prompts_first: bool, prompts: int) -> None:
        self.setting, self.prompts_first, self.left = setting, prompts_first, prompts
        self.now_s, self.uneven = 0.0, False
        self.waiting: list[_Request] = []
        self.running: list[_Request] = []
        self.ended: list[tuple[_Request, float]] = []
        self.luck = random.Random(1)

    def start(self) -> None:
        """One more prompt, where there is one."""
        if self.left:
            self.left -= 1
            now = self.now_s
            later = self.setting.output - 1
            if self.uneven:
                later = self.luck.randint(later // 2, later + later // 2)
            self.waiting.append(_Request(self.setting.prompt, later, now))

    def _gained(self) -> int:
        """Tokens of one step: its own, and those predicted ahead up to the first refused."""
        gained = 1
        while gained <= self.setting.ahead and self.luck.random() < self.setting.kept:
            gained += 1
        return gained

    def step(self) -> None:
        """One forward pass: every running request a token, then prompts in order of arrival."""
        stopped = self.prompts_first and self.waiting
        decoding = [] if stopped else list(self.running)
        room = self.setting.chunk - len(decoding) * (1 + self.setting.ahead)
        fed: list[_Request] = []
        for request in self.waiting:
            if self.prompts_first and fed and request.prompt_left > room:  # whole prompts
                break
            take = min(request.prompt_left, room)
            request.prompt_left -= take
            room -= take
            fed.append(request)
            if not room:
                break
        self.now_s += BASE_S + TOKEN_S * (self.setting.chunk - room)
        for request in decoding:
            request.decode_left -= self._gained()
        for request in fed:
            if not request.prompt_left:
                self.waiting.remove(request)
                request.first_s = self.now_s
                self.running.append(request)
        for request in [one for one in self.running if one.decode_left <= 0]:
            self.running.remove(request)
            self.ended.append((request, self.now_s))
            self.start()


def measure(setting: Setting, *, prompts_first: bool = False) -> Measured:
    """Closed loop in steady state: sixty rounds of all slots, of which the last two thirds count.

    Requests start somewhere in their outputs, as if the engine had run for long.
    """
    most = max(60 * setting.slots, 100)
    engine = _Engine(setting, prompts_first, 2 * most)
    rng = random.Random(0)
    for _ in range(setting.slots):
        if setting.output > 1:
            engine.running.append(_Request(0, rng.randint(1, setting.output - 1), -1.0))
        else:
            engine.start()
    while len(engine.ended) < most:
        engine.step()
    rounds = len(engine.ended) * 2 // 3 // setting.slots
    late = engine.ended[-rounds * setting.slots :]
    after = sum(end > late[0][1] for _, end in late)
    return _means(setting, late, after / (late[-1][1] - late[0][1]))


def run_prompts(
    setting: Setting, prompts: int, *, prompts_first: bool = False, uneven: bool = False
) -> Measured:
    """A benchmark: all slots filled at time zero, `prompts` in all, until the last token.

    `uneven`: outputs are up to a half longer or shorter. Prompts that go first start together, so
    that those of one length would end and start together for ever.
    """
    engine = _Engine(setting, prompts_first, prompts)
    engine.uneven = uneven
    for _ in range(setting.slots):
        engine.start()
    while len(engine.ended) < prompts:
        engine.step()
    return _means(setting, engine.ended, prompts / engine.now_s)


def _means(
    setting: Setting, ended: list[tuple[_Request, float]], requests_per_s: float
) -> Measured:
    later = max(setting.output - 1, 1)
    return Measured(
        requests_per_s=requests_per_s,
        ttft_s=float(np.mean([one.first_s - one.started_s for one, _ in ended])),
        tpot_s=float(np.mean([(end - one.first_s) / later for one, end in ended])),
    )
