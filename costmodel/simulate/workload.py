"""Workloads: which requests come, and when.

    lengths    of a trace, or drawn from distributions (`lengths`)
    arrivals   the trace's own times; `rate` requests a second, gaps drawn from a gamma distribution
               of shape `burstiness` (1: Poisson; below 1: bursts); or `concurrency` requests in
               flight, where the next one comes as one ends
    prefixes   a trace's ids; or `prefix_groups` beginnings of `prefix_len` tokens, of which every
               prompt has one; or the share `prefix_hit` of every prompt

The same seed gives the same requests. They are drawn some thousands at a time as they are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardplan.costmodel.simulate.lengths import Lengths
from shardplan.costmodel.simulate.request import Asked
from shardplan.costmodel.simulate.traces import PART_TOKENS, read_trace
from shardplan.models.errors import InputError

__all__ = ["Demand", "requests"]

_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of a deployment, request by request."""

    input_len: Lengths
    output_len: Lengths
    """Drawn where there is no trace."""
    trace: Path | None = None
    """Lengths come from here, and times where neither a rate nor a concurrency is given."""
    rate: float | None = None
    burstiness: float = 1.0
    concurrency: int | None = None
    count: int | None = None
    """Requests; None: all of the trace."""
    prefix_hit: float = 0.0
    prefix_groups: int = 0
    prefix_len: int = 0
    seed: int = 0

    @property
    def own_times(self) -> bool:
        """Whether arrivals are the trace's."""
        return self.rate is None and self.concurrency is None

    @property
    def shares_prefixes(self) -> bool:
        """Whether requests may tell which prefix they have."""
        return self.trace is not None or self.prefix_groups > 0


def requests(demand: Demand, longest: int = 0) -> Iterator[Asked]:
    """The requests in order; of a closed loop all at time 0.

    `InputError` for a request of more than `longest` tokens (0: any), or a trace that breaks a
    rule.
    """
    found = _drawn(demand) if demand.trace is None else _traced(demand, demand.trace)
    for number, one in enumerate(found):
        if demand.count is not None and number >= demand.count:
            return
        if longest and one.input_len + one.output_len > longest:
            raise InputError(
                "prompt and output are within the model's context",
                got=f"request {number}: {one.input_len} + {one.output_len} tokens, "
                f"context {longest}",
                hint="leave it out of the workload, or cut it (`max` of a distribution)",
            )
        yield one


def _gaps(demand: Demand, luck: np.random.Generator) -> Iterator[float]:
    """Arrival times in seconds; all 0 of a closed loop."""
    now = 0.0
    while demand.rate is not None:
        shape = demand.burstiness
        gaps = luck.gamma(shape, 1.0 / (shape * demand.rate), _AT_ONCE)
        times = now + np.cumsum(gaps)
        now = float(times[-1])
        yield from times.tolist()
    while True:
        yield 0.0


def _streams(demand: Demand) -> list[np.random.Generator]:
    """One of their own for arrivals, prompts, outputs and prefixes."""
    return [np.random.default_rng([demand.seed, which]) for which in range(4)]


def _traced(demand: Demand, path: Path) -> Iterator[Asked]:
    if demand.own_times:
        yield from read_trace(path)
        return
    times = _gaps(demand, _streams(demand)[0])
    for one in read_trace(path):
        yield one._replace(arrival_s=next(times))


def _drawn(demand: Demand) -> Iterator[Asked]:
    arrivals, prompts, outputs, groups = _streams(demand)
    times = _gaps(demand, arrivals)
    left = math.inf if demand.count is None else demand.count
    while left > 0:
        some = int(min(left, _AT_ONCE))
        left -= some
        lengths = zip(
            demand.input_len.draw(prompts, some).tolist(),
            demand.output_len.draw(outputs, some).tolist(),
            _prefixes(demand, groups, some),
            strict=True,
        )
        for prompt, output, prefix in lengths:
            yield Asked(next(times), prompt, output, prefix[: prompt // PART_TOKENS])


def _prefixes(demand: Demand, luck: np.random.Generator, count: int) -> list[tuple[int, ...]]:
    """Ids of the shared parts of `count` prompts: those of a group, whole parts alone."""
    if not demand.prefix_groups:
        return [()] * count
    parts = demand.prefix_len // PART_TOKENS
    drawn = luck.integers(0, demand.prefix_groups, count).tolist()
    return [tuple(range(one * parts, (one + 1) * parts)) for one in drawn]
