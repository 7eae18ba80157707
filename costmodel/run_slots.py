"""How many slots an offered rate fills, and the steady state of requests that come at random.

The slots b at which a closed loop serves the rate are found first (a bracket closed by secants and
middles; r rises with b). Random arrivals meet other steps (`open_loop`) and stay another time, so
b = rate * latency (Little's law) follows by secants in a few turns. Decode steps are those of a
number in flight that varies (`occupancy.met`); requests go to the group with the least in flight,
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
from shardplan.costmodel.occupancy import met, numbers_of
from shardplan.costmodel.open_loop import Open, open_state
from shardplan.costmodel.pace import rotate_s, stage_times
from shardplan.costmodel.run_case import Bools, Case, filled, rate_at, some_rows
from shardplan.costmodel.serving import Serving, serve
from shardplan.costmodel.steps import decode_stages

__all__ = ["AtRate", "Slots", "slots_for_rate"]

_TURNS = 6
_FEWEST = 1e-3
"""Requests in flight that are followed."""
_NEAR = 1e-2
"""Of their unevenness: close enough."""
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


class _Flight(NamedTuple):
    """Requests in flight of one dp group, `[rows]`."""

    mean: Array
    uneven: Array
    """Variance over mean, of those in one step."""
    decoding: Array
    """Share of them that decode."""
    most: Array
    """Slots."""

    def take(self, rows: Indices | Bools) -> _Flight:
        """Some rows."""
        return _Flight(*(one[rows] for one in self))


def _little(
    model: Pricer, case: Case, start: Array, full: tuple[Array, Array]
) -> tuple[Array, Serving, Open]:
    """(slots in use, the state) where slots are rate times latency: secants from `start`.

    Each row goes on until it is close by itself, whatever the others do. `full`: all slots, and the
    seconds of their decode step.
    """
    most, full_s = full
    ones, left = np.ones_like(most), np.arange(most.size)
    before = start.copy(), start.copy()
    flight = _Flight(start.copy(), ones.copy(), ones.copy(), most)
    groups = np.broadcast_to(as_array(model.groups), most.shape)
    whole = now = copy.deepcopy(_served_at(model, case, flight, full_s))
    for turn in range(_TURNS):
        if turn:
            few, own = some_rows(model, case, left)
            now = _served_at(few, own, flight.take(left), full_s[left])
            _put(whole, left, now)
        (_, found), last = now, flight.take(left)
        wanted = np.clip(case.rate[left] * found.latency_s, _FEWEST, most[left])
        moved = last.mean - before[0][left]
        slope = (wanted - before[1][left]) / np.where(moved != 0.0, moved, np.inf)
        before[0][left], before[1][left] = last.mean, wanted
        uneven, decoding = found.in_step / groups[left], found.later_s / found.latency_s
        far = np.abs(wanted - last.mean) > _CLOSE * last.mean
        far |= np.abs(uneven * last.decoding - last.uneven * decoding) > _NEAR * uneven
        if turn == _TURNS - 1 or not far.any():
            break
        step = (wanted - last.mean)[far] / (1.0 - np.clip(slope[far], -0.9, 0.9))
        left, moved_to = left[far], np.clip(last.mean[far] + step, _FEWEST, most[left][far])
        _put(flight, left, _Flight(moved_to, uneven[far], decoding[far], most[left]))
    return np.maximum(flight.mean, 1.0), *whole


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


def _decode_s(model: Pricer, case: Case, decoding: Array) -> Array:
    """Seconds of decode steps of so many sequences of one dp group `[rows, any]`.

    Groups that step together are filled evenly, and the fullest of g has (g - 1) / 2 g more. Steps
    hold whole sequences: a line between two of them.
    """
    rows, each = decoding.shape
    few, own = some_rows(model, case, np.repeat(np.arange(rows), 2 * each))
    wide = np.repeat(decoding.ravel(), 2) / as_array(few.stages)
    fullest = np.maximum(wide + (1.0 - 1.0 / as_array(few.locked)) / 2.0, 1.0)
    whole = np.floor(fullest) + np.arange(float(fullest.size)) % 2.0
    stages = decode_stages(few, own.given, whole)
    seconds = np.broadcast_to(
        rotate_s(few, stage_times(few, stages, "decode"), "decode"), whole.shape
    )
    share = (fullest - np.floor(fullest)).reshape(-1, 2)[:, 0]
    low, high = seconds.reshape(-1, 2).T
    return np.asarray(low + share * (high - low)).reshape(rows, each)


def _served_at(model: Pricer, case: Case, flight: _Flight, full_s: Array) -> tuple[Serving, Open]:
    """The steady state of random arrivals with so many in flight.

    `full_s`: seconds of a decode step of all slots. The more are in flight the longer each stays,
    which makes their number more uneven: with d ~ n^e by 1 + e / 2, as n varies while one stays.
    """
    numbers = numbers_of(flight.mean * flight.decoding, flight.uneven, flight.most)
    step = met(numbers, _decode_s(model, case, numbers))
    slots = np.clip(step.mean / np.maximum(flight.decoding, 1e-9) + 1.0, 1.0, flight.most)
    given = replace(case.given, batch=slots, in_flight=None)
    closed = replace(filled(serve(model, given), slots.shape), decode_step_s=step.step_s)
    found = open_state(model, given, closed, case.rate, step)
    room = np.log(np.maximum(flight.most / slots, 1.0 + _CLOSE))
    longer = np.clip(np.log(full_s / step.step_s) / room, 0.0, _MOST_LONGER)
    found = found._replace(uneven=found.uneven * (1.0 + longer / 2.0))
    pure, step_s = found.waits.share[:, 0], found.later_s / np.maximum(case.steps, 1e-9)
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
