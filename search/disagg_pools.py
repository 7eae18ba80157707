"""Every strategy of one pool, priced: one table of options.

Layouts that share rows share their prices (`costmodel.memo`): a template of a layout is priced once
over the whole grid, and the layout adds up its different stages (`shardplan.costmodel.serving` and
`.disagg` price; nothing is priced here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from shardplan.costmodel.bulk_memory import Held
from shardplan.costmodel.disagg import decode_times, prefill_times, step_prompts
from shardplan.costmodel.forward import Pricer
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.ledger import Ledger, weight_element_bytes
from shardplan.costmodel.load import ZERO, Parts
from shardplan.costmodel.memo import Memo
from shardplan.costmodel.pace import Span, stage_times
from shardplan.costmodel.step import StepModel
from shardplan.costmodel.step_mix import ServingInput, computed_prompt
from shardplan.costmodel.steps import decode_stages, prompt_stages
from shardplan.models.apply import ShardedGraph, Stage, apply
from shardplan.models.build import build_graph
from shardplan.models.counts import parameter_count
from shardplan.models.parallel import AXES, Parallelism
from shardplan.search.disagg_options import Options, Priced, Row, fitting, stacked
from shardplan.search.disagg_space import Pool, Role
from shardplan.search.evaluate import served_input
from shardplan.search.space import Choice

__all__ = [
    "Base",
    "PoolPricing",
    "columns_alone",
    "cost_columns",
    "priced_columns",
    "role_input",
    "role_stages",
    "scaled_columns",
]

_INFLIGHT = 2.0
"""Prompts that a prefill rank holds for each that it computes: as many wait to be pulled."""


class Base:
    """One layout, its templates priced apart."""

    def __init__(
        self,
        pool: Pool,
        par: Parallelism,
        memo: Memo,
        ledgers: dict[Parallelism, Ledger],
    ) -> None:
        self.pool, self.par = pool, par
        prefill, graph = (
            apply(build_graph(pool.spec, phase, mtp=par.mtp > 0), par)
            for phase in ("prefill", pool.role)
        )
        wires = () if par.pp > 1 else ("send", "recv")
        self.names = [name for name in graph.blocks if name not in wires]
        alone = tuple(
            Stage(index=place, first=0, last=0, counts={name: 1})
            for place, name in enumerate(self.names)
        )
        self.graph = replace(graph, stages=alone)
        self.memo = memo
        self.models: dict[object, StepModel] = {}
        alike = replace(par, pp=1, order=AXES)
        if alike not in ledgers:
            ledgers[alike] = Ledger.of(prefill, pool.cluster.device, pool.engine)
        self.ledger = ledgers[alike]
        self.held = Held()
        self.known: dict[object, dict[str, Parts]] = {}
        self._ones: dict[Choice, Array] = {}

    def model(self, choice: Choice) -> StepModel:
        """The step model whose stages are single templates."""
        if choice.overlap not in self.models:
            self.models[choice.overlap] = StepModel.of(
                {self.graph.model.phase: self.graph},
                self.pool.cluster,
                self.pool.engine,
                self.memo,
                choice.overlap,
            )
        return self.models[choice.overlap]

    def ledger_of(self, graph: ShardedGraph, choice: Choice) -> Ledger:
        """The ledger of a layout, weights of its stages summed from those of templates."""
        ledger = replace(self.ledger, graph=graph)
        for stage in graph.stages:
            key = choice.weight_dtype, tuple(stage.counts.items())
            if key not in ledger.known:
                ledger.known[key] = self.held.stage_bytes(ledger, stage, choice.weight_dtype)
        return ledger

    def templates(self, choice: Choice, stages: int) -> dict[str, Parts]:
        """Prices of single templates over the grid; decode: of one of `stages` microbatches."""
        key = (choice, stages if self.pool.role == "decode" else 1)
        if key not in self.known:
            self.known[key] = self._first(choice, stages)
        return self.known[key]

    def templates_at(self, choice: Choice, stages: int, model: Pricer) -> dict[str, Parts]:
        """The same at the prices of `model`, whose stages are single templates too."""
        return self._priced(choice, stages, model, self._grid)

    @property
    def _grid(self) -> Array:
        return np.array(self.pool.grid, dtype=np.float64)

    def _priced(self, choice: Choice, stages: int, model: Pricer, grid: Array) -> dict[str, Parts]:
        given = role_input(self.pool, self.par, choice)
        parts = role_stages(self.pool.role, model, given, grid, stages)
        return dict(zip(self.names, parts, strict=True))

    def _first(self, choice: Choice, stages: int) -> dict[str, Parts]:
        """Prices over the grid; of prefill with the shares of `one_share`, priced beside it."""
        model, work = self.model(choice), self.pool.workload
        if self.pool.role == "decode":
            return self._priced(choice, stages, model, self._grid)
        prompt = computed_prompt(work.input_len, work.prefix_hit)
        held = step_prompts(self._grid, prompt)[0]
        wide = self._priced(choice, stages, model, np.append(self._grid, prompt))
        seconds = np.broadcast_to(self._even_s(model, wide), (held.size + 1,))
        share = np.clip(seconds[-1] / seconds[:-1], 1.0 / held, 1.0)
        self._ones[choice] = np.where(held > 1.0, share, 1.0)
        return {name: _but_last(parts) for name, parts in wide.items()}

    def one_share(self, choice: Choice) -> Array:
        """Of a full prefill step, what one with a prompt a group takes, over the grid; that of the
        even cut stands for all."""
        if choice not in self._ones:
            self._first(choice, 1)
        return self._ones[choice]

    def _even_s(self, model: Pricer, templates: Mapping[str, Parts]) -> Array:
        """Seconds until the next step begins, with the layers cut evenly."""
        stages, _ = _folded(apply(self.graph.model, self.par))
        step = stage_times(model, _summed(stages, templates), "prefill")
        return np.asarray(step.slowest_s + model.host_s("prefill"))


def _but_last(parts: Parts) -> Parts:
    """Of all points of the grid but the last."""
    a, b, c, d = (one[:-1] if one.ndim else one for one in parts.seconds)
    return Parts(a, b, c, d, parts.kernels)


def role_input(pool: Pool, par: Parallelism, choice: Choice) -> ServingInput:
    """The workload of a role at one layout and choice."""
    return served_input(pool.spec, pool.workload, par, choice, np.ones(()), np.ones(()))


def role_stages(
    role: Role, model: Pricer, given: ServingInput, grid: Array, stages: int
) -> list[Parts]:
    """A step of one role over its grid, per stage of `model`; decode: of one of `stages`
    microbatches."""
    if role == "decode":
        return decode_stages(model, given, np.maximum(np.ceil(grid / stages), 1.0))
    prompt = computed_prompt(given.input_len, given.prefix_hit)
    piece = step_prompts(grid, prompt)[2]
    return prompt_stages(model, given, piece=piece, prompt=prompt, sequences=np.zeros(()))


def _folded(graph: ShardedGraph) -> tuple[tuple[Stage, ...], list[int]]:
    """(the different stages, the last one last; how many there are of each)."""
    found: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for place, stage in enumerate(graph.stages):
        found.setdefault(tuple(stage.counts.items()), []).append(place)
    kinds = sorted(found.values(), key=lambda places: places[-1])
    stages = tuple(
        replace(graph.stages[places[-1]], index=place) for place, places in enumerate(kinds)
    )
    return stages, [len(places) for places in kinds]


def _summed(stages: Iterable[Stage], templates: Mapping[str, Parts]) -> list[Parts]:
    """Prices of stages, of those of their templates."""
    sums = []
    for stage in stages:
        total = ZERO
        for name, count in stage.counts.items():
            total = total.plus(templates[name].times(count))
        sums.append(total)
    return sums


def _memory(
    pool: Pool, base: Base, graph: ShardedGraph, choice: Choice, slots: Array, tokens: Array
) -> Array:
    """Bytes on the fullest rank over the grid."""
    work = pool.workload
    stages = base.ledger_of(graph, choice).stages(
        base.model(choice).machine,
        weight_dtype=choice.weight_dtype,
        kv_dtype=choice.kv_dtype,
        attention=choice.attention,
        batch=slots,
        tokens=tokens,
        context=work.input_len + (1 if pool.role == "prefill" else work.output_len),
    )
    total = stages[0].total_bytes
    for stage in stages[1:]:
        total = np.maximum(total, stage.total_bytes)
    return np.broadcast_to(total, slots.shape)


def _sent_bytes(base: Base, dtype: str) -> float:
    """Bytes of one prompt's cache over all ranks of a dp group, however the layers are cut."""
    pool, graph = base.pool, base.graph
    block = pool.engine.kv_block_tokens * base.par.cp
    tokens = -(-pool.workload.input_len // block) * block
    counts = {name: graph.model.layers.count(name) for name in dict.fromkeys(graph.model.layers)}
    counts |= {"mtp": 1} if base.par.mtp else {}
    every = Stage(index=0, first=0, last=0, counts=counts)
    return base.held.token_bytes(base.ledger, every, dtype) * tokens * base.par.tp


def priced_columns(base: Base, par: Parallelism, choice: Choice) -> dict[str, Array]:
    """One layout and choice over the pool's grid."""
    pool = base.pool
    graph = replace(base.graph, parallel=par, stages=apply(base.graph.model, par).stages)
    stages, runs = _folded(graph)
    graph = replace(graph, stages=stages)
    parts = _summed(stages, base.templates(choice, par.pp))
    total = ZERO
    for one, count in zip(parts, runs, strict=True):
        total = total.plus(one.times(count))
    costs = _costs(base, par, choice, base.model(choice), parts, runs)
    memory = _memory(pool, base, graph, choice, costs["slots"], costs["chunk"])
    return {
        **costs,
        "memory": memory,
        "free": base.ledger.capacity_bytes - memory,
        "compute_s": total.compute_s,
        "memory_s": total.memory_s,
        "collective_s": total.collective_s,
    }


def columns_alone(pool: Pool, par: Parallelism, choice: Choice) -> dict[str, Array]:
    """The same of a pool of which nothing else is priced."""
    return priced_columns(Base(pool, par, Memo(), {}), par, choice)


def _costs(
    base: Base, par: Parallelism, choice: Choice, model: Pricer, parts: list[Parts], runs: list[int]
) -> dict[str, Array]:
    span = stage_times(model, parts, base.graph.model.phase, runs)
    return cost_columns(base, par, choice, span, model)


def scaled_columns(base: Base, par: Parallelism, choice: Choice, model: Pricer) -> dict[str, Array]:
    """What a layout costs over the pool's grid, `[factors, grid]`, at scaled prices of its base."""
    stages, runs = _folded(apply(base.graph.model, par))
    parts = _summed(stages, base.templates_at(choice, par.pp, model))
    return _costs(base, par, choice, model, parts, runs)


def cost_columns(
    base: Base, par: Parallelism, choice: Choice, step: Span, pricer: Pricer | None = None
) -> dict[str, Array]:
    """What a layout costs over the pool's grid, were its steps these.

    `pricer`: of the host's time, in place of the choice's own model.
    """
    pool, model = base.pool, base.model(choice) if pricer is None else pricer
    grid = np.array(pool.grid, dtype=np.float64)
    rank, cards = par.tp * par.pp * par.cp, np.asarray(float(par.ranks))
    if pool.role == "prefill":
        prompt = computed_prompt(pool.workload.input_len, pool.workload.prefix_hit)
        prompts, pieces, _ = step_prompts(grid, prompt)
        times = prefill_times(model, step, groups=par.dp, prompts=prompts, pieces=pieces)
        slots, rate, tokens = _INFLIGHT * prompts * par.pp, times.prompts_per_s, grid
        share = base.one_share(choice)
        costs = {
            "busy_s": times.busy_s,
            "one_s": share * times.busy_s,
            "service_s": times.service_s,
            "alone_s": share * times.service_s,
            "prompts": prompts,
            "sent": np.asarray(1.0 / rank),
            "sent_all": prompts / rank,
        }
    else:
        found = decode_times(
            model,
            step,
            stages=par.pp,
            groups=par.dp,
            slots=grid,
            given=role_input(base.pool, base.par, choice),
        )
        slots, rate, tokens = grid, found.requests_per_s, grid * (1.0 + par.mtp)
        held = _sent_bytes(base, choice.kv_dtype)
        costs = {
            "step_s": found.step_s,
            "later_s": found.later_s,
            "tpot_s": found.tpot_s,
            "bytes": np.asarray(held),
            "received": np.asarray(held / rank),
        }
    return {
        "cards": cards,
        "chunk": tokens,
        "slots": slots,
        "rate": rate,
        "slow_s": cards / rate,
        **costs,
    }


def _legal(
    pool: Pool, refused: Callable[[Parallelism], str | None], priced: Priced
) -> Iterator[Parallelism]:
    """Layouts to price; the others are counted under what rules them out."""
    least = parameter_count(pool.spec) * min(
        weight_element_bytes(one.weight_dtype) for one in pool.choices
    )
    room = pool.engine.memory_fraction * pool.cluster.device.hbm_bytes
    for one in pool.layouts:
        par = one.parallel
        size, count = par.ranks, pool.per_cut * pool.cuts_of(par)
        every = count * (1 + sum(one.beside.values()))
        priced.total[size] += every
        if size * room < least:  # the weights alone are larger, however they are split
            priced.left_out[size, "memory"] += every
            priced.least_bytes = min(priced.least_bytes, least / size)
            continue
        rule = one.rule or refused(par)
        if rule is None:
            for reason, orders in one.beside.items():
                priced.left_out[size, reason] += count * orders
            yield par
        else:
            priced.left_out[size, f"rule {rule}"] += every


class PoolPricing:
    """The pricing of a pool, one layout at a time; `refused`: id of the rule that leaves a layout
    no partner; `ledgers`: those of layouts without a pipeline, shared by pools of one device and
    engine."""

    def __init__(
        self,
        pool: Pool,
        refused: Callable[[Parallelism], str | None],
        ledgers: dict[Parallelism, Ledger],
    ) -> None:
        self.pool, self.ledgers = pool, ledgers
        self.priced = Priced(Options([], pool.choices, {}))
        self.legal = list(_legal(pool, refused, self.priced))
        self.memo: Memo = Memo()
        self.rows: list[Row] = []
        self.bases: dict[int, Base] = {}
        """Of the layouts that can be cut otherwise, by their places."""
        self.done = 0

    @property
    def share(self) -> float:
        """Share of the layouts that are priced."""
        return self.done / len(self.legal) if self.legal else 1.0

    def step(self) -> None:
        """Price the next layout with all its choices."""
        self.memo.make_room()
        par = self.legal[self.done]
        base = Base(self.pool, par, self.memo, self.ledgers)
        points, cuts = len(self.pool.grid), self.pool.cuts_of(par)
        if cuts > 1:
            self.bases[self.done] = base
        for number, choice in enumerate(self.pool.choices):
            rule = self.pool.broken_switch(par, choice)
            if rule is None:
                self.rows.append((self.done, number, priced_columns(base, par, choice)))
                self.priced.left_out[par.ranks, "cut"] += points * (cuts - 1)
            else:
                self.priced.left_out[par.ranks, f"rule {rule}"] += points * cuts
        self.done += 1

    def finish(self, limit_s: float) -> Priced:
        """The options that fit and take no longer than `limit_s`; what was not priced beside."""
        columns = stacked(self.rows, len(self.pool.grid))
        self.priced.options = Options(self.legal, self.pool.choices, columns)
        self.priced.unreached = tuple(self.legal[self.done :])
        return fitting(self.priced, self.pool, limit_s)
