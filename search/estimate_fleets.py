"""Rows of strategies priced together: settings resolved once, rows priced by machine and engine.

A setting is a layout with its dtypes; rows that agree in `SETTING_COLUMNS` share one. Where tokens
may reach experts in two ways the setting has two layouts, and each row takes the faster. Points
(a row under a layout) of one machine and engine are a fleet and are priced in one go, at most
`_CHUNK` at once. A fleet that cannot be priced is taken apart, by dtypes and then by layout, so
that an error refuses no row but its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.bulk import Dtypes, Fleet
from shardplan.costmodel.bulk_memory import FleetMemory, Held
from shardplan.costmodel.kernels.attention import AttentionKernel
from shardplan.models.errors import ShardplanError
from shardplan.search.estimate_layout import LAYOUT_COLUMNS, Layout, LayoutMaker, check_switches
from shardplan.search.estimate_names import (
    attention_for,
    kv_dtype_for,
    own_kv_dtype,
    weight_dtype_for,
)
from shardplan.search.estimate_points import Indices, Points, grouped
from shardplan.search.estimate_serve import SERVE_ARRAYS, price_serving
from shardplan.search.estimate_steps import STEP_COLUMNS, price_steps
from shardplan.search.mtp import acceptance_note

__all__ = [
    "SETTING_COLUMNS",
    "Columns",
    "dtypes_of",
    "long_prefill",
    "price_strategies",
    "single_fleet",
]

_CHOICES = ("weight_dtype", "kv_dtype", "attention")
SETTING_COLUMNS = (*LAYOUT_COLUMNS, *_CHOICES)
_CHUNK = 1 << 15
_WAYS = 3
_SPLIT = "sequence parallel: tokens split over tp between products, where that is faster"
Columns = dict[str, NDArray[np.float64]]


def dtypes_of(points: Points, layout: Layout, row: int) -> Dtypes:
    """The dtypes and the attention kernel that a row is priced with."""
    device = layout.device
    weights = weight_dtype_for(points.cell("weight_dtype", row), layout.spec, device)
    cache = points.cell("kv_dtype", row) or own_kv_dtype(layout.engine, layout.spec, weights)
    return Dtypes(
        weights,
        kv_dtype_for(cache, device),
        cast("AttentionKernel", attention_for(points.cell("attention", row), layout.engine)),
    )


def single_fleet(layout: Layout, dtypes: Dtypes) -> tuple[Fleet, FleetMemory]:
    """A fleet of one point, and its memory."""
    one = np.zeros(1, dtype=np.int64)
    fleet = Fleet.of([layout.model], one, [dtypes], one)
    return fleet, FleetMemory.of([layout.ledger], layout.model.machine, one, [dtypes], one)


def _said(points: Points, layout: Layout, dtypes: Dtypes, row: int) -> Iterator[str]:
    """What the row left open, or what was changed in it."""
    yield from layout.notes
    unsaid = points.cell("mtp_acceptance", row) is None
    if layout.parallel.mtp and unsaid and points.cell("phase", row) == "serve":
        yield acceptance_note(layout.spec)
    own = layout.spec.dtype
    if not points.cell("weight_dtype", row) and own != dtypes.weight_dtype:
        yield f"weight_dtype={dtypes.weight_dtype}: {layout.device.name} does not run {own}"
    for name in ("weight_dtype", "kv_dtype"):
        asked, chosen = points.cell(name, row), getattr(dtypes, name)
        if asked and asked != chosen:
            yield f"{name}={chosen} for {asked}"


class _Entries(NamedTuple):
    """Points to price: rows, each with the place of its layout and of its dtypes in its fleet."""

    row: Indices
    which: Indices
    choice: Indices
    way: Indices
    """0 as asked, 1 in the second way of exchange, 2 with tokens split over tp; in this order."""

    def some(self, places: Indices) -> _Entries:
        """Some of them."""
        own = (self.row[places], self.which[places], self.choice[places])
        return _Entries(*own, self.way[places])


@dataclass(slots=True)
class _Gathered:
    """Settings of one machine and engine, as they are found."""

    layouts: list[Layout] = field(default_factory=list)
    dtypes: dict[Dtypes, int] = field(default_factory=dict)
    found: list[tuple[Indices, int, int]] = field(default_factory=list)
    """(rows, layout, dtypes) of each setting, in the first way of exchange."""
    second: list[tuple[Indices, int, int]] = field(default_factory=list)
    """The same in the second way, where there is one."""
    split: list[tuple[Indices, int, int]] = field(default_factory=list)
    """The same of long prefill steps, with tokens split over tp."""

    @property
    def ways(self) -> list[list[tuple[Indices, int, int]]]:
        """The settings, way by way."""
        return [self.found, self.second, self.split]

    def entries(self, phase: NDArray[np.bool_]) -> _Entries:
        """Points of the rows of a phase."""
        settings = [one for way in self.ways for one in way]
        sizes = [rows.size for rows, _, _ in settings]
        row = np.concatenate([rows for rows, _, _ in settings])
        way = np.repeat(np.repeat(np.arange(_WAYS), [len(one) for one in self.ways]), sizes)
        which = np.repeat([layout for _, layout, _ in settings], sizes)
        choice = np.repeat([dtypes for _, _, dtypes in settings], sizes)
        return _Entries(row, which, choice, way).some(np.flatnonzero(phase[row]))


def price_strategies(
    points: Points,
    rows: Indices,
    phases: NDArray[np.str_],
    numbers: Columns,
    messages: dict[int, str],
    progress: Callable[[int], None],
) -> None:
    """Price rows of phases prefill, decode and serve into the columns `numbers`.

    Rows that cannot be priced are refused in `points`; `messages` take what is worth knowing.
    """
    held = Held()
    for some in _settings(points, rows, numbers, messages):
        fleet, memory = _fleet(some, held)
        for phase in ("prefill", "decode", "serve"):
            entries = some.entries(phases == phase)
            for start in range(0, entries.row.size, _CHUNK):
                part = entries.some(np.arange(start, min(start + _CHUNK, entries.row.size)))
                _Pricer(points, numbers, fleet, memory, phase).attempt(part)
                progress(int(np.count_nonzero(part.way == 0)))


def _settings(
    points: Points, rows: Indices, numbers: Columns, messages: dict[int, str]
) -> list[_Gathered]:
    """The settings of all rows, by machine and engine; rows whose setting fails are refused."""
    maker = LayoutMaker()
    made: dict[tuple[Any, ...], tuple[tuple[Layout, int], ...] | ShardplanError] = {}
    split: dict[tuple[Any, ...], tuple[tuple[Layout, int], ...]] = {}
    fleets: dict[tuple[int, int], _Gathered] = {}
    for own in grouped(points, SETTING_COLUMNS, rows):
        first = int(own[0])
        key = tuple(int(points.codes[name][first]) for name in LAYOUT_COLUMNS)
        try:
            if key not in made:
                cells = {name: points.cell(name, first) for name in LAYOUT_COLUMNS}
                made[key] = _placed(maker.make(**cells), fleets)
            ways = made[key]
            if isinstance(ways, ShardplanError):
                raise ways
            layout = ways[0][0]
            dtypes = dtypes_of(points, layout, first)
            check_switches(layout, dtypes.weight_dtype)
        except ShardplanError as error:
            made.setdefault(key, error)
            points.refuse(own, error)
            continue
        fleet = fleets[_machine_key(layout)]
        choice = fleet.dtypes.setdefault(dtypes, len(fleet.dtypes))
        fleet.found.append((own, ways[0][1], choice))
        if len(ways) > 1:
            fleet.second.append((own, ways[1][1], choice))
        numbers["capacity_bytes"][own] = layout.ledger.capacity_bytes
        said = "; ".join(_said(points, layout, dtypes, first))
        if said:
            messages.update(dict.fromkeys(own.tolist(), said))
        long = long_prefill(points, layout, own)
        if long.size and key not in split:
            way = maker.split(layout, {name: points.cell(name, first) for name in LAYOUT_COLUMNS})
            split[key] = _placed((way,), fleets) if way is not None else ()
        for _, place in split.get(key, ()) if long.size else ():
            fleet.split.append((long, place, choice))
            for row in long.tolist():
                messages[row] = "; ".join(filter(None, (messages.get(row), _SPLIT)))
    return [fleet for fleet in fleets.values() if fleet.found]


def long_prefill(points: Points, layout: Layout, rows: Indices) -> Indices:
    """Prefill rows of so many tokens that the engine splits them over tp."""
    least = layout.engine.sequence_parallel_tokens
    if not least or layout.parallel.tp == 1:
        return rows[:0]
    prefill = np.asarray([one == "prefill" for one in points.values["phase"]], dtype=np.bool_)
    prefill = prefill[points.codes["phase"][rows]]
    tokens = points.floats("batch", rows) * points.floats("tokens", rows)
    return rows[prefill & (tokens > least)]


def _machine_key(layout: Layout) -> tuple[int, int]:
    """One machine under one engine; a `LayoutMaker` makes each of them once."""
    return id(layout.model.machine), id(layout.engine)


def _placed(
    layouts: tuple[Layout, ...], fleets: dict[tuple[int, int], _Gathered]
) -> tuple[tuple[Layout, int], ...]:
    """Each layout with its place in its fleet."""
    found = []
    for layout in layouts:
        fleet = fleets.setdefault(_machine_key(layout), _Gathered())
        fleet.layouts.append(layout)
        found.append((layout, len(fleet.layouts) - 1))
    return tuple(found)


def _fleet(some: _Gathered, held: Held) -> tuple[Fleet, FleetMemory]:
    """The fleet of all settings of one machine and engine, one point each, and its memory."""
    pairs = sorted({(layout, dtypes) for _, layout, dtypes in itertools.chain(*some.ways)})
    which = np.asarray([layout for layout, _ in pairs], dtype=np.int64)
    choice = np.asarray([dtypes for _, dtypes in pairs], dtype=np.int64)
    layouts, choices = some.layouts, tuple(some.dtypes)
    ledgers, machine = [one.ledger for one in layouts], layouts[0].model.machine
    return (
        Fleet.of([one.model for one in layouts], which, choices, choice),
        FleetMemory.of(ledgers, machine, which, choices, choice, held),
    )


class _Pricer(NamedTuple):
    """Prices points of one fleet in one phase, and writes what they give."""

    points: Points
    numbers: Columns
    fleet: Fleet
    memory: FleetMemory
    phase: str

    def attempt(self, entries: _Entries) -> None:
        """Price the points; where one cannot be, its own setting's rows are refused."""
        try:
            self._write(entries, self._price(entries))
        except ShardplanError as error:
            codes = next(
                (codes for codes in (entries.choice, entries.which) if np.ptp(codes)), None
            )
            if codes is None:
                self.points.refuse(entries.row, error)
                return
            for code in np.unique(codes).tolist():
                self.attempt(entries.some(np.flatnonzero(codes == code)))

    def _price(self, entries: _Entries) -> Columns:
        fleet = self.fleet.at(entries.which, entries.choice)
        memory = self.memory.at(entries.which, entries.choice)
        extra: Mapping[str, NDArray[np.float64]] = {}
        if self.phase == "serve":
            given = {name: self.points.floats(name, entries.row) for name in SERVE_ARRAYS}
            served = price_serving(fleet, memory, given)
            step, extra = served.step, served.columns
        else:
            step = price_steps(
                fleet,
                memory,
                "prefill" if self.phase == "prefill" else "decode",
                batch=self.points.floats("batch", entries.row),
                tokens=self.points.floats("tokens", entries.row),
            )
        parts = {name: getattr(step, name) for name in STEP_COLUMNS}
        return {**parts, **extra, **step.sure.columns(step.step_s)}

    def _write(self, entries: _Entries, found: Columns) -> None:
        """Points in another way than the first are written where they are better."""
        name = "output_tokens_per_s" if self.phase == "serve" else "step_s"
        for way in range(_WAYS):
            places = np.flatnonzero(entries.way == way)
            if way:
                gain = found[name][places] - self.numbers[name][entries.row[places]]
                places = places[gain > 0 if self.phase == "serve" else gain < 0]
            for column, values in found.items():
                self.numbers[column][entries.row[places]] = values[places]
