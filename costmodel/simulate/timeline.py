"""A run as a trace that Perfetto and chrome://tracing open (Trace Event Format, JSON).

A process is a unit, its threads are the batches; steps are slices with what they held, the cache in
use and the queue are counters, and requests are arrows of time: queue and prompt up to the first
token, then decoding. The first events are kept, up to a stated number, and what was left out is
said in the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from shardplan.costmodel.simulate.request import Request
from shardplan.costmodel.simulate.unit import Lane, Unit

__all__ = ["MOST_EVENTS", "Timeline"]

MOST_EVENTS = 200_000
_US = 1e6
_REQUESTS = 1 << 20
"""Process of the requests; units have lower numbers."""


def _us(seconds: float) -> float:
    return round(seconds * _US, 3)


class Timeline:
    """Collects the events of a run."""

    def __init__(self, most: int = MOST_EVENTS) -> None:
        self._most = most
        self._events: list[str] = []
        self._units: set[int] = set()
        self.left_out = 0

    def _add(self, **event: Any) -> None:
        if len(self._events) >= self._most:
            self.left_out += 1
            return
        self._events.append(json.dumps(event, separators=(",", ":")))

    def step(self, unit: Unit, lane: Lane) -> None:
        """A step, or decode steps in a row, that ends."""
        place = unit.lanes.index(lane)
        self._units.add(unit.number)
        tokens = sum(batch.tokens for batch in lane.batches)
        active = sum(batch.active for batch in lane.batches)
        self._add(
            name=f"prompts {tokens}" if tokens else f"decode x{lane.steps}",
            ph="X",
            pid=unit.number,
            tid=place,
            ts=_us(lane.begin_s),
            dur=_us(lane.end_s - lane.begin_s),
            args={"sequences": active, "prompt_tokens": tokens, "steps": lane.steps},
        )
        held = {
            "blocks": sum(engine.blocks.in_use for engine in unit.engines),
            "waiting": sum(len(engine.waiting) for engine in unit.engines),
        }
        for name, value in held.items():
            self._add(name=name, ph="C", pid=unit.number, ts=_us(lane.end_s), args={name: value})

    def request(self, request: Request) -> None:
        """A request that has ended."""
        times = (request.arrival_s, request.first_s, request.end_s)
        for name, begin, end in (("first token", *times[:2]), ("decode", *times[1:])):
            common = {"name": name, "cat": "request", "id": request.number, "pid": _REQUESTS}
            self._add(**common, ph="b", ts=_us(begin))
            self._add(**common, ph="e", ts=_us(end))

    def chunks(self) -> Iterator[str]:
        """The file, piece by piece."""
        processes = {_REQUESTS: "requests", **{one: f"unit {one}" for one in sorted(self._units)}}
        names = [
            {"name": "process_name", "ph": "M", "pid": one, "args": {"name": name}}
            for one, name in processes.items()
        ]
        yield '{"traceEvents":[\n'
        yield ",\n".join([*(json.dumps(one) for one in names), *self._events])
        yield f'\n],"displayTimeUnit":"ms","otherData":{{"events_left_out":{self.left_out}}}}}\n'
