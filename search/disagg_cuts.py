"""Other cuts of the layers of a pool's instances, built where they may serve better.

All that a deployment takes of a cut is the sum of its stages, the slowest of them, and that the
fullest fits; what the formulas take grows with the first two (`shardplan.costmodel.disagg`). So of
each layout, choice and point of the grid only the cut with the least slowest stage among those that
fit counts (`shardplan.search.cuts`). Before it is looked for,

  1. the same strategy with stages as equal as single layers allow, and the least sum, and
  2. with the least slowest stage of any cut, fitting or not,

must be able to be part of a deployment better than the best with layers cut evenly
(`disagg_bounds`), and not be one that another priced option may take the place of
(`disagg_dominance`). A cut that is
built for one point is priced at all points of its layout, so that most need none of their own.

Launch floors make the sum over stages depend on the cut. Where the cut that is built does not reach
the least sum, what it might reach is handed on as a hope: an option that none is proven to be.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.pace import Span
from shardplan.models.apply import Stage, apply
from shardplan.models.parallel import balanced_stages
from shardplan.search.cuts import CostRow, least, least_of_many
from shardplan.search.disagg_bounds import Floor, floor_of
from shardplan.search.disagg_dominance import Partners, beaten, undominated
from shardplan.search.disagg_options import Options, Row, limited_s, stacked
from shardplan.search.disagg_pools import Base, PoolPricing, cost_columns, priced_columns
from shardplan.search.space import Choice
from shardplan.search.stage_costs import ends_of, template_seconds

__all__ = ["Refining", "refine_cuts"]

_SAME = 1.0 + 1e-9
"""Costs are equal but for rounding."""


def _all_may(some: Options) -> NDArray[np.bool_]:
    return np.ones(some.size, dtype=bool)


class _Way:
    """One layout and choice, and what its stages cost at each point of the grid."""

    def __init__(self, base: Base, choice: Choice) -> None:
        self.base, self.choice, self.par = base, choice, base.par
        stages = apply(base.graph.model, base.par).stages
        graph = replace(base.graph, parallel=base.par, stages=stages)
        self.ledger = replace(base.ledger, graph=graph)
        self.layers, self.ends = graph.model.layers, ends_of(graph)
        model, prices = base.model(choice), base.templates(choice, base.par.pp)
        points = len(base.pool.grid)
        found = template_seconds(model, graph.model.phase, list(prices), list(prices.values()))
        self.seconds = [self._row(costs, points) for costs in found]

    def _row(self, costs: dict[str, Array], points: int) -> tuple[Array, Array]:
        """Layers `[n, L]` and ends `[n, p]` of one part of a step."""
        each = {name: np.broadcast_to(values, (points,)) for name, values in costs.items()}
        ends = [
            sum((count * each[name] for name, count in end.items()), np.zeros(points))
            for end in self.ends
        ]
        return np.stack([each[name] for name in self.layers], axis=1), np.stack(ends, axis=1)

    @property
    def total_s(self) -> Array:
        """All stages together at least, however the layers are cut, `[n]`."""
        sums = [each.sum(axis=1) + ends.sum(axis=1) for each, ends in self.seconds]
        return np.asarray(np.max(sums, axis=0))

    @property
    def even_s(self) -> Array:
        """What the slowest stage takes at least, `[n]`.

        The stages share all there is; of n layers alike some stage holds n / p, rounded up.
        """
        found = self.total_s / self.par.pp
        for each, ends in self.seconds:
            for name, count in Counter(self.layers).items():
                most = -(-count // self.par.pp)
                alike = most * each[:, self.layers.index(name)] + ends.min(axis=1)
                found = np.maximum(found, alike)
        return found

    def costs(self, slowest_s: Array) -> dict[str, Array]:
        """Costs over the grid with the least sum and this slowest stage."""
        span = Span(self.total_s, slowest_s)
        return cost_columns(self.base, self.par, self.choice, span)

    def span(self, cut: tuple[int, ...]) -> Span:
        """Seconds of all stages and of the slowest of a cut, `[n]`."""
        firsts = np.cumsum([0, *cut[:-1]])
        found = [np.add.reduceat(each, firsts, axis=1) + ends for each, ends in self.seconds]
        stages = np.max(found, axis=0)
        return Span(stages.sum(axis=1), stages.max(axis=1))

    def bytes_at(self, costs: dict[str, Array]) -> tuple[Array, Array, Array]:
        """(layers `[n, L]`, ends `[n, p]`, room `[n]`): weights and cache, and what may be held."""
        base, pool, dtype = self.base, self.base.pool, self.choice.kv_dtype
        ledger, work = self.ledger, pool.workload
        common = ledger.grid_bytes(
            base.model(self.choice).machine,
            attention=self.choice.attention,
            batch=costs["slots"],
            tokens=costs["chunk"],
            context=work.input_len + (1 if pool.role == "prefill" else work.output_len),
        )
        cached, activations = common["cached_tokens"], common["activations_bytes"]

        def held(counts: dict[str, int]) -> Array:
            stage = Stage(index=0, first=0, last=0, counts=counts)
            own = base.held.stage_bytes(ledger, stage, self.choice.weight_dtype)
            return own + cached * base.held.token_bytes(ledger, stage, dtype)

        one = {name: held({name: 1}) for name in dict.fromkeys(self.layers)}
        ends = [held(dict(end)) for end in self.ends]
        ends[-1] = ends[-1] + np.maximum(common["logits_bytes"] - activations, 0.0)
        fixed = ledger.communicators * ledger.engine.communicator_bytes
        room = ledger.capacity_bytes - fixed - ledger.engine.reserve_bytes - activations
        layers = np.stack([one[name] for name in self.layers], axis=1)
        return layers, np.stack(ends, axis=1), np.broadcast_to(room, cached.shape)


@dataclass(slots=True)
class Refining:
    """One pool while its layers are cut otherwise."""

    pricing: PoolPricing
    partners: Partners
    limit_s: float
    rough: Options
    """Every strategy that can be cut otherwise, with stages as equal as may be."""
    may_win: Callable[[Options], NDArray[np.bool_]] = _all_may
    """Which options a deployment may have that is better than what is found."""
    front: Options = field(init=False)
    """Options that others must not be beaten by."""
    cuts: list[tuple[int, ...]] = field(init=False)
    built: list[Options] = field(default_factory=list)
    hopes: list[Options] = field(default_factory=list)
    missed: Floor = field(default_factory=Floor)
    """The least of what the time limit left out."""

    @classmethod
    def of(cls, pricing: PoolPricing, partners: Partners, limit_s: float) -> Refining:
        """A pool whose layouts are priced with their layers cut evenly."""
        rows: list[Row] = []
        for place, base in pricing.bases.items():
            for number, choice in enumerate(pricing.pool.choices):
                if pricing.pool.broken_switch(base.par, choice) is None:
                    way = _Way(base, choice)
                    rows.append((place, number, way.costs(way.even_s)))
        found = cls(pricing, partners, limit_s, _options(pricing, rows))
        found.cuts = pricing.priced.options.cuts
        found.set_front(pricing.priced.options)
        return found

    @property
    def role(self) -> str:
        """Of the pool."""
        return self.pricing.pool.role

    def set_front(self, options: Options) -> None:
        """What is not beaten of options."""
        index = np.zeros(0, dtype=np.int64)
        if options.size:
            index = undominated(options, self.role, self.partners)
        self.front = options.at(index)

    def options(self, row: Row) -> Options:
        """A row of columns as options of this pool."""
        return replace(_options(self.pricing, [row]), cuts=self.cuts)

    def open(self, some: Options) -> NDArray[np.bool_]:
        """Which options keep the limit, may win and are not beaten."""
        able = np.asarray((limited_s(some, self.role) <= self.limit_s) & self.may_win(some))
        at = np.flatnonzero(able)
        lost = beaten(self.front, some.at(at), self.role, self.partners)
        able[at[lost]] = False
        return able


def _options(pricing: PoolPricing, rows: list[Row]) -> Options:
    columns = stacked(rows, len(pricing.pool.grid))
    return Options(pricing.legal, pricing.pool.choices, columns)


def refine_cuts(state: Refining, until_s: float) -> Options:
    """Add the options of other cuts that may serve better; what none is proven to reach.

    `until_s`: reading of `time.perf_counter` after which no other layout is begun; what those might
    reach is noted as missed.
    """
    rough, points = state.rough, len(state.pricing.pool.grid)
    if not rough.size:
        return rough
    open_at = state.open(rough).reshape(-1, points)
    slow = np.where(open_at, rough.columns["slow_s"].reshape(open_at.shape), np.inf)
    for turn in np.argsort(slow.min(axis=1), kind="stable").tolist():
        at = turn * points + np.flatnonzero(open_at[turn])
        if not at.size:
            break
        if time.perf_counter() > until_s:
            state.missed = state.missed.either(floor_of(rough.at(at), state.role))
        elif state.open(rough.at(at)).any():
            row = (int(rough.columns[name][at[0]]) for name in ("layout", "choice"))
            _refine(state, *row)
    return _settled(state)


def _refine(state: Refining, place: int, number: int) -> None:
    """Build the best cuts of one layout and choice where they may serve better."""
    way = _Way(state.pricing.bases[place], state.pricing.pool.choices[number])
    even = balanced_stages(way.base.pool.spec, way.par)
    least_s = least_of_many(way.seconds, way.span(even).slowest_s)
    bound = Span(way.total_s, np.maximum(least_s, way.even_s))
    costs = way.costs(bound.slowest_s)
    able = state.options((place, number, costs))
    layers, ends, room = held = way.bytes_at(costs)
    fits = layers.sum(axis=1) + ends.sum(axis=1) <= room * way.par.pp * _SAME
    left, cut, done = state.open(able) & fits, even, {even}
    while left.any():
        own = priced_columns(way.base, replace(way.par, stage_layers=cut), way.choice)
        span, fits = way.span(cut), own["free"] >= 0.0
        best = fits & left & (span.slowest_s <= bound.slowest_s * _SAME)
        if cut not in done:
            done.add(cut)
            _add(state, state.options((place, number, own)), cut, fits & left)
        _hope(state, (place, number, own), way, span, best & (span.total_s > bound.total_s * _SAME))
        left &= ~best & state.open(able)
        if not left.any():
            return
        at = int(np.argmin(np.where(left, costs["slow_s"], np.inf)))
        found = _best_cut(way, held, at)
        if found is None or (found == cut and not fits[at]):
            left[at] = False
            continue
        cut = found
        bound.slowest_s[at] = max(bound.slowest_s[at], way.span(cut).slowest_s[at])


def _best_cut(way: _Way, held: tuple[Array, Array, Array], at: int) -> tuple[int, ...] | None:
    """The cut with the least slowest stage of those that fit, at one point; None where none do."""
    layers, ends, room = held
    times = CostRow.of(*((each[at].tolist(), last[at].tolist()) for each, last in way.seconds))
    sizes = CostRow.of((layers[at].tolist(), ends[at].tolist()))
    return least((times, sizes), (math.inf, float(room[at])), 0)


def _add(state: Refining, found: Options, cut: tuple[int, ...], keep: NDArray[np.bool_]) -> None:
    """Add the options of a cut that keep the limit and are not beaten."""
    found.columns["cut"][:] = len(state.cuts)
    some = found.at(keep)
    some = some.at(state.open(some))
    if some.size:
        state.cuts.append(cut)
        state.built.append(some)
        state.front = state.front.joined(some)


def _hope(state: Refining, row: Row, way: _Way, span: Span, points: NDArray[np.bool_]) -> None:
    """Note what another cut might reach whose stages are no slower, but less all in all."""
    if points.any():
        place, number, own = row
        hope = state.options((place, number, {**own, **way.costs(span.slowest_s)}))
        state.hopes.append(hope.at(points))


def _settled(state: Refining) -> Options:
    """The pool's options with those that were built; the hopes that nothing real fulfils."""
    priced = state.pricing.priced
    for one in state.built:
        priced.options = priced.options.joined(one)
        sizes, counts = np.unique(one.columns["cards"], return_counts=True)
        for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
            priced.left_out[int(size), "cut"] -= count
    hopes = state.rough.at(np.zeros(0, dtype=np.int64))
    for one in state.hopes:
        hopes = one if not hopes.size else hopes.joined(one)
    return hopes.at(state.open(hopes)) if hopes.size else hopes
