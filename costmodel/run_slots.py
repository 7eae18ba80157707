"""How many slots an offered rate fills, and the steady state of requests that come at random.

The slots b at which a closed loop serves the rate are found first (a bracket closed by secants and
middles; r rises with b). Random arrivals meet other steps (`open_loop`) and stay another time, so
b = rate * latency (Little's law) follows by secants in a few turns. Steps are those of the crowd
that a request is among (`occupancy.crowd_met`); requests go to the group with the least in flight,
so that the groups of a deployment share its unevenness.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import NamedTuple

import numpy as np

from shardplan.costmodel.bulk import Indices
from shardplan.costmodel.forward import Pricer
from shardplan.costmodel.kernels.base import Array, as_array
from shardplan.costmodel.occupancy import crowd_met
from shardplan.costmodel.open_loop import Open, open_state
from shardplan.costmodel.run_case import Bools, Case, filled, rate_at, some_rows
from shardplan.costmodel.serving import Serving, serve

__all__ = ["AtRate", "Slots", "slots_for_rate"]

_TURNS = 6
_NARROW = 2e-3
"""Width of a narrow bracket, of its high end."""
_CLOSE = 1e-3
"""How much more than what is offered is hardly more."""
_MOST_TURNS = 32
_MOST_LONGER = 0.5
"""Exponent of a decode step over the requests in flight that is followed."""


class AtRate(NamedTuple):
    """Rows whose rate is served: where random arrivals fill every slot, as by a closed loop."""

    rows: Indices
    state: Open
    in_flight: Array
    """Of one dp group."""


class Slots(NamedTuple):
    """Arrays `[rows]`."""

    used: Array
    """Of one dp group."""
    saturated: Bools
    """All slots serve less than is offered, as in a closed loop."""
    served: Serving
    at_rate: AtRate | None

    def take(self, rows: Indices) -> Slots:
        """Some rows, none of which is served at a rate."""
        columns = {one.name: getattr(self.served, one.name)[rows] for one in fields(Serving)}
        return Slots(self.used[rows], self.saturated[rows], Serving(**columns), None)


def slots_for_rate(model: Pricer, case: Case, most: Array, full: Serving) -> Slots:
    """The state of a rate; `full` is that at `most` slots, `[rows]`."""
    offered = case.rate * model.groups
    saturated = full.requests_per_s <= offered
    rows = np.flatnonzero(~saturated)
    if not rows.size:
        return Slots(most, saturated, full, None)
    few, own = some_rows(model, case, rows)
    start = _fewest(few, own, most[rows], full.requests_per_s[rows], offered[rows])
    full_step_s = np.broadcast_to(full.decode_step_s, most.shape)[rows]
    used, state, found = _little(few, own, start, (most[rows], full_step_s))
    flight = own.rate * found.latency_s
    slots = most.copy()
    slots[rows] = used
    free = flight < most[rows]
    columns = {one.name: getattr(full, one.name).copy() for one in fields(Serving)}
    for name, values in columns.items():
        values[rows] = np.where(free, getattr(state, name), values[rows])
    at_rate = AtRate(rows, found, np.where(free, flight, most[rows]))
    return Slots(slots, saturated, Serving(**columns), at_rate)


def _little(
    model: Pricer, case: Case, start: Array, full: tuple[Array, Array]
) -> tuple[Array, Serving, Open]:
    """(slots in use, the state) where slots are rate times latency: secants from `start`.

    Each row goes on until it is close by itself, whatever the others do. `full`: all slots, and the
    seconds of their decode step.
    """
    most, full_s = full
    used, before, left = start.copy(), (start.copy(), start.copy()), np.arange(most.size)
    met = crowd_met(used, np.ones_like(used), most)
    groups = np.broadcast_to(as_array(model.groups), most.shape)
    whole = now = copy.deepcopy(_served_at(model, case, met, full))
    for turn in range(_TURNS):
        if turn:
            few, own = some_rows(model, case, left)
            now = _served_at(few, own, met[left], (most[left], full_s[left]))
            _put(whole, left, now)
        slots, (_, found) = used[left], now
        wanted = np.clip(case.rate[left] * found.latency_s, 1.0, most[left])
        moved = slots - before[0][left]
        slope = (wanted - before[1][left]) / np.where(moved != 0.0, moved, np.inf)
        before[0][left], before[1][left] = slots, wanted
        uneven = found.uneven / groups[left]
        crowd = crowd_met(wanted, uneven, most[left])
        far = np.abs(wanted - slots) > _CLOSE * slots
        far |= np.abs(crowd - met[left]) > _CLOSE * crowd
        if turn == _TURNS - 1 or not far.any():
            break
        step = (wanted - slots)[far] / (1.0 - np.clip(slope[far], -0.9, 0.9))
        used[left[far]] = np.clip(slots[far] + step, 1.0, most[left][far])
        left = left[far]
        met[left] = crowd_met(used[left], uneven[far], most[left])
    return used, *whole


def _arrays(one: object) -> Iterator[Array]:
    """Every array of a state, in the order of its fields."""
    if isinstance(one, np.ndarray):
        yield one
    elif isinstance(one, tuple):
        yield from itertools.chain.from_iterable(map(_arrays, one))
    elif isinstance(one, Serving):
        yield from (getattr(one, each.name) for each in fields(Serving))


def _put(whole: object, rows: Indices, part: object) -> None:
    """Write some rows into every array of a state."""
    for held, values in zip(_arrays(whole), _arrays(part), strict=True):
        held[rows] = values


def _served_at(
    model: Pricer, case: Case, met: Array, full: tuple[Array, Array]
) -> tuple[Serving, Open]:
    """The steady state of random arrivals whose requests are among `met`, themselves counted.

    `full`: all slots and the seconds of their decode step. The more are in flight the longer each
    stays, which makes their number more uneven: with d ~ n^e by 1 + e / 2, as n varies while one
    stays.
    """
    given = replace(case.given, batch=met, in_flight=None)
    closed = filled(serve(model, given), met.shape)
    found = open_state(model, given, closed, case.rate)
    room = np.log(np.maximum(full[0] / met, 1.0 + _CLOSE))
    longer = np.clip(np.log(full[1] / closed.decode_step_s) / room, 0.0, _MOST_LONGER)
    found = found._replace(uneven=found.uneven * (1.0 + longer / 2.0))
    pure, step_s = found.waits.share[:, 0], found.waits.step_s
    first, decodes = model.engine.prefill_first, case.steps > 0.0
    mixed = (1.0 - pure) / np.maximum(pure, 1e-9) if first else 1.0 - pure
    own = closed.compute_s + closed.memory_s + closed.collective_s + closed.overhead_s
    scale = np.where(decodes, step_s / own, 1.0)
    rate, ttft = case.rate * model.groups, found.latency_s - found.later_s
    state = replace(
        closed,
        ttft_s=ttft,
        tpot_s=found.later_s / np.maximum(case.steps, 1e-9) * given.steps_per_token,
        end_to_end_s=found.latency_s,
        requests_per_s=rate,
        output_tokens_per_s=rate * as_array(given.output_len),
        concurrency=rate * found.latency_s,
        mixed_share=np.where(decodes, mixed, 1.0),
        pure_share=np.where(decodes, 1.0 if first else pure, 0.0),
        wait_s=ttft - closed.prefill_s,
        compute_s=scale * closed.compute_s,
        memory_s=scale * closed.memory_s,
        collective_s=scale * closed.collective_s,
        overhead_s=scale * closed.overhead_s,
    )
    return state, found


def _fewest(model: Pricer, case: Case, most: Array, reached: Array, offered: Array) -> Array:
    """The fewest slots b that serve `offered` (R), where `most` serve `reached`, which is more.

    One slot is tried first. Then a bracket whose high end serves enough is closed around the root
    of b (R / r(b) - 1), nearly straight in b, by the Illinois rule (a secant; the end that stays
    twice counts half) and every third time by its middle, until it is narrow or its high end
    serves hardly more than R.
    """
    low, high, side = np.zeros_like(most), most.copy(), np.zeros_like(most)
    over, under = np.zeros_like(most), most * (offered / reached - 1.0)
    held, few, own = np.arange(most.size), model, case
    left = np.arange(most.size)
    for turn in range(_MOST_TURNS):
        if 2 * left.size < held.size:  # what stacks the points of a fleet is kept while it serves
            held, (few, own) = left, some_rows(model, case, left)
        share = np.full(most.shape, 0.5)
        if turn % 3 != 1:
            share = np.clip(over / np.where(over > under, over - under, 1.0), 1e-3, 1.0 - 1e-3)
        tried = low + (high - low) * share if turn else np.ones_like(most)
        served = np.full(most.shape, np.nan)
        served[held] = rate_at(few, own.given, tried[held])
        served, slots, rate = served[left], tried[left], offered[left]
        enough, off = served >= rate, slots * (rate / served - 1.0)
        again = np.where(side[left] == np.where(enough, 1.0, -1.0), 0.5, 1.0)
        ends = np.where(enough, (low[left], slots), (slots, high[left]))
        kept = over[left] * again, under[left] * again
        low[left], high[left] = ends
        over[left], under[left] = np.where(enough, (kept[0], off), (off, kept[1]))
        side[left] = np.where(enough, 1.0, -1.0)
        wide = (ends[1] > 1.0) & (ends[1] - ends[0] > _NARROW * ends[1])
        left = left[wide & ~(enough & (served <= rate * (1.0 + _CLOSE)))]
        if not left.size:
            break
    return high
