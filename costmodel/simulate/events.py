"""The clock: arrivals, ends of steps and caches on their way, in the order of time.

    clients -> router -> engines                                    aggregated
    clients -> router -> prefill engines -> link -> decode engines    apart

Apart, the blocks of a prompt stay with its prefill engine until its cache has been sent, and it is
sent once a decode engine (the router's pick, when the prompt is done) has a slot and blocks for it:
a full decode pool holds up the prefill pool. Of a cache of B bytes, the r ranks of an engine send
or take B / r each at v bytes/s, one cache after another on each side:

    start = max(now, sender free, receiver free)    end = start + latency + B max(1/r_P, 1/r_D) / v

All that happens at one moment happens before any step begins at that moment.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from shardplan.costmodel.disagg import Link
from shardplan.costmodel.simulate.request import Asked, Request
from shardplan.costmodel.simulate.router import Router, router
from shardplan.costmodel.simulate.scheduler import Engine
from shardplan.costmodel.simulate.unit import Lane, Unit
from shardplan.models.errors import InputError

__all__ = ["Sending", "Simulation", "Watcher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """How caches get from prefill to decode engines."""

    link: Link
    token_bytes: float
    """Cache of a token, over all ranks of a decode engine; whole blocks are sent."""
    senders: int
    """Ranks of a prefill engine."""
    receivers: int


class Watcher(Protocol):
    """Who keeps what happens."""

    def step(self, unit: Unit, lane: Lane) -> None:
        """A step, or decode steps in a row, are about to end."""

    def request(self, request: Request) -> None:
        """A request has ended."""


class Simulation:
    """Engines, the requests that come to them, and the time.

    `asked` are in the order of arrival; `closed`: as many are in flight at once, and each that ends
    lets the next one come. `depth` tokens are predicted ahead, each kept with `acceptance` where
    those before it were.
    """

    def __init__(
        self,
        asked: Iterator[Asked],
        watcher: Watcher,
        *,
        closed: int | None = None,
        depth: int = 0,
        acceptance: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._asked, self._watcher, self._closed = asked, watcher, closed
        self._depth, self._acceptance = depth, acceptance
        self._luck = random.Random(seed)
        self._events: list[tuple[float, int, Lane | None, int, Callable[[], None]]] = []
        self._issued = 0
        self.now_s = 0.0
        self.arrived = self.done = 0
        self.sending: Sending | None = None
        self._due: Asked | None = None
        self._reserve: Asked | None = None
        self._begun = False
        self._touched: dict[int, Unit] = {}
        self._unit_of: dict[int, Unit] = {}
        self._out_s: dict[int, float] = {}
        self._in_s: dict[int, float] = {}

    def serve_with(
        self,
        units: Sequence[Unit],
        name: Router,
        *,
        decode: Sequence[Unit] = (),
        sending: Sending | None = None,
    ) -> None:
        """The engines: all that there are, or those of prefill with those of `decode`."""
        self.units = [*units, *decode]
        for unit in self.units:
            for engine in unit.engines:
                self._unit_of[engine.number] = unit
        first = [engine for unit in units for engine in unit.engines]
        later = [engine for unit in decode for engine in unit.engines]
        self._pick = router(name, [unit.engines for unit in units])
        self._first = first[0]
        if sending is not None:
            self.sending = sending
            self._pick_decode = router(name, [unit.engines for unit in decode])
            self._last = later[0]
            self._out_s = {engine.number: 0.0 for engine in first}
            self._in_s = {engine.number: 0.0 for engine in later}

    @property
    def waiting(self) -> int:
        """Requests that have come and not been admitted."""
        return sum(len(engine.waiting) for unit in self.units for engine in unit.engines)

    def run(self, ended: int | None = None) -> None:
        """Until so many requests have ended, None: all; a later call goes on from there.

        `InputError` for one that no engine can hold.
        """
        if not self._begun:
            self._begin()
        due, most = self._due, math.inf if ended is None else ended
        while (due is not None or self._events) and self.done < most:
            self._drop_stale()
            if due is None and not self._events:
                break
            if due is not None and (not self._events or due.arrival_s <= self._events[0][0]):
                self.now_s = due.arrival_s
            else:
                self.now_s = self._events[0][0]
            while self._events and self._events[0][0] <= self.now_s:
                _, _, lane, version, action = heappop(self._events)
                if lane is None or lane.version == version:
                    action()
            while due is not None and due.arrival_s <= self.now_s:
                self._arrive(due)
                due = self._next()
            self._start()
        self._due = due

    def _begin(self) -> None:
        """The first request is awaited, or those of a closed loop come at once."""
        self._begun, due = True, self._next()
        if self._closed is not None:
            for _ in range(self._closed):
                if due is not None:
                    self._arrive(due._replace(arrival_s=0.0))
                    due = self._next()
            self._start()
            self._reserve, due = due, None
        self._due = due

    def _drop_stale(self) -> None:
        events = self._events
        while events and events[0][2] is not None and events[0][2].version != events[0][3]:
            heappop(events)

    def _next(self) -> Asked | None:
        return next(self._asked, None)

    def _at(self, when_s: float, lane: Lane | None, action: Callable[[], None]) -> None:
        self._issued += 1
        version = 0 if lane is None else lane.version
        heappush(self._events, (when_s, self._issued, lane, version, action))

    def _arrive(self, asked: Asked) -> None:
        request = Request(self.arrived, asked)
        self.arrived += 1
        for engine in (self._first,) if self.sending is None else (self._first, self._last):
            if not engine.fits(request):
                raise InputError(
                    "a request fits into the cache of an engine",
                    got=f"request {request.number}: {request.input_len} tokens in, "
                    f"{request.output_len} out; an engine holds "
                    f"{engine.blocks.total * engine.blocks.tokens} tokens",
                    hint="leave it out of the workload, or plan for longer requests",
                )
        engine = self._pick(request)
        engine.add(request)
        self._touch(engine)

    def _touch(self, engine: Engine) -> None:
        """Something may be admitted: steps that were taken at once end with the one that runs."""
        unit = self._unit_of[engine.number]
        self._touched[unit.number] = unit
        if len(engine.waiting) > 1 and not engine.ready:
            return
        if not engine.ready and engine.running + engine.claimed >= engine.policy.slots:
            return
        for lane in unit.lanes:
            if lane.busy and lane.cut(self.now_s):
                self._end_of(unit, lane)

    def _start(self) -> None:
        """Begin steps wherever there is something to do and nothing runs."""
        touched, self._touched = self._touched, {}
        for unit in touched.values():
            for lane in unit.lanes:
                if not lane.busy and unit.start(lane, self.now_s):
                    self._end_of(unit, lane)

    def _end_of(self, unit: Unit, lane: Lane) -> None:
        self._at(lane.end_s, lane, lambda: self._complete(unit, lane))

    def _complete(self, unit: Unit, lane: Lane) -> None:
        self._watcher.step(unit, lane)
        unit.complete(lane, self.now_s)
        self._touched[unit.number] = unit

    # What engines tell.

    def steps_for(self, tokens: int) -> int:
        """Decode steps that give so many tokens: one each, and those predicted ahead and kept."""
        if not self._depth:
            return tokens
        steps, luck = 0, self._luck.random
        while tokens > 0:
            steps += 1
            tokens -= 1
            for _ in range(self._depth):
                if luck() >= self._acceptance:
                    break
                tokens -= 1
        return steps

    def prompt_done(self, engine: Engine, request: Request, now_s: float) -> bool:
        """Whether the request decodes elsewhere: its cache is then sent there."""
        if not engine.policy.sends:
            return False
        target = self._pick_decode(request)
        target.coming.append((request, engine))
        target.load += 1
        self._send(target)
        return True

    def ended(self, engine: Engine, request: Request, now_s: float) -> None:
        """A request is over: there is room for others, and its client may send another."""
        self.done += 1
        self._watcher.request(request)
        if self._closed is not None and self._reserve is not None:
            following, self._reserve = self._reserve, self._next()
            self._arrive(following._replace(arrival_s=now_s))
        if engine.coming:
            self._send(engine)

    def _send(self, target: Engine) -> None:
        """Send what the decode engine has room for, in order."""
        coming, sending = target.coming, self.sending
        while coming and sending is not None:
            request, source = coming[0]
            blocks = target.claim(request)
            if not blocks:
                return
            coming.popleft()
            size = blocks * target.blocks.tokens * sending.token_bytes
            rate = sending.link.bytes_per_s
            start = max(self.now_s, self._out_s[source.number], self._in_s[target.number])
            self._out_s[source.number] = start + size / (sending.senders * rate)
            self._in_s[target.number] = start + size / (sending.receivers * rate)
            end = max(self._out_s[source.number], self._in_s[target.number])
            self._at(
                end + sending.link.latency_s, None, self._sent(request, source, target, blocks)
            )

    def _sent(
        self, request: Request, source: Engine, target: Engine, blocks: int
    ) -> Callable[[], None]:
        def done() -> None:
            source.release(request)
            self._touch(source)
            target.ready.append((request, blocks))
            self._touch(target)

        return done
