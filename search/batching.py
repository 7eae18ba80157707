"""Auto batching: graph sizes for a plan, and what its step sizes gain over the engine's defaults.

    lengths of prompts -> pieces of at most a step -> prices at padded lengths -> sizes
    batches that run   ->                             prices at padded batches -> sizes

Sizes are the exact optimum of `costmodel.buckets` for the given loads and prices. Lengths are those
of a workload file or trace as `shardplan simulate` reads it, else all alike as the plan's. The
batches that run are counted in a simulation of that file; without one every slot decodes
independently, as often as in the steady state. Memory: graphs fit into what the plan leaves free on
its fullest rank; of engines that run prompts as graphs, decode graphs come first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from shardplan.costmodel.buckets import graph_memory
from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Cluster
from shardplan.costmodel.simulate.lengths import Fixed, Lengths
from shardplan.costmodel.simulate.workload import Demand, requests
from shardplan.models.errors import InputError
from shardplan.models.spec import ModelSpec
from shardplan.search.batching_sizes import (
    Below,
    Room,
    decode_loads,
    decode_sizes,
    prefill_sizes,
    steady_running,
)
from shardplan.search.evaluate import LIMITS, LayoutScorer, Question
from shardplan.search.plan import MemoryRow, Plan, StrategyInfo
from shardplan.search.plan_batching import Batching, SettingRow
from shardplan.search.simulate import simulate_plan
from shardplan.search.simulate_demand import read_demand
from shardplan.search.simulate_steps import Running
from shardplan.search.space import Choice

__all__ = ["Deployed", "Wanted", "plan_batching"]

_MOST_SIMULATED = 2000
_TAIL = 1e-9
"""Share of lengths that may lie beyond the longest that is counted as itself."""
_WHOLE = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What was asked of the sizes."""

    lengths: str | None = None
    """A workload TOML or a trace."""
    graph_bytes: float | None = None
    max_graphs: int | None = None


class Deployed(NamedTuple):
    """One role of a plan: where it runs, how, and what its ranks hold."""

    cluster: Cluster
    way: StrategyInfo
    memory: tuple[MemoryRow, ...]
    scorer: LayoutScorer

    @classmethod
    def of(
        cls,
        plan: Plan,
        spec: ModelSpec,
        engine: EngineProfile,
        cluster: Cluster,
        way: StrategyInfo,
        memory: tuple[MemoryRow, ...],
    ) -> Deployed:
        """The role with its strategy laid out and ready to be priced."""
        question = Question.of(plan.request, spec, cluster, engine, cards=way.ranks)
        return cls(cluster, way, memory, LayoutScorer(question, way.parallelism()))


class _Prompts(NamedTuple):
    """Lengths of prompts: a distribution, where from, and the longest of them."""

    below: Below
    longest: int
    words: str


def _prompts(demand: Demand | None, plan: Plan, path: str | None) -> _Prompts:
    most = plan.model.max_context or _WHOLE
    if demand is None:
        return _drawn(Fixed(plan.request.workload.input_len), most, "all prompts alike")
    name = Path(path or "").name
    if demand.trace is None:
        return _drawn(demand.input_len, most, f"prompt lengths of {name}")
    found = Counter(one.input_len for one in requests(demand, plan.model.max_context))
    lengths = np.array(sorted(found))
    sums = np.cumsum([found[length] for length in lengths.tolist()]) / found.total()

    def below(tokens: np.ndarray) -> np.ndarray:
        return np.concatenate([[0.0], sums])[np.searchsorted(lengths, tokens, side="right")]

    return _Prompts(below, int(lengths[-1]), f"{found.total():,} prompts of {name}")


def _drawn(lengths: Lengths, most: int, words: str) -> _Prompts:
    """All that can be drawn; what is beyond the model's context counts as the longest."""
    low, high = 1, min(lengths.most if not isinstance(lengths, Fixed) else lengths.tokens, most)
    while low < high:
        middle = (low + high) // 2
        enough = float(lengths.below(np.array([middle]))[0]) >= 1.0 - _TAIL
        low, high = (low, middle) if enough else (middle + 1, high)
    return _Prompts(lengths.below, high, words)


def plan_batching(plan: Plan, prefill: Deployed, decode: Deployed, wanted: Wanted) -> Batching:
    """Graph sizes and gains for a plan; of a plan without pools both roles are the same.

    `InputError` for a file of lengths that breaks a rule.
    """
    engine, notes = decode.scorer.question.engine, list[str]()
    demand = None
    if wanted.lengths is not None:
        demand = read_demand(wanted.lengths, {}, plan).demand
    found = _prompts(demand, plan, wanted.lengths)
    each, fact = graph_memory(engine)
    kind: Literal["datasheet", "measured", "derived", "assumed", "asked"] = fact.kind
    source = fact.source
    if wanted.graph_bytes is not None:
        each, kind, source = wanted.graph_bytes, "asked", "as asked"
    cells, seconds = decode_loads(decode.scorer, decode.way)
    room = Room.of(decode.memory, each, cells, seconds, wanted.max_graphs)
    sizes = None
    if engine.decode_graph:
        running = _running(plan, demand, decode, notes)
        sizes = decode_sizes(decode.scorer, decode.way, cells, seconds, running, room)
    else:
        notes.append(f"{engine.name} launches decode steps kernel by kernel: no decode graphs")
    if plan.pools:
        room = Room.of(prefill.memory, each, cells, seconds, wanted.max_graphs)
    elif engine.prefill_graph and sizes is not None:
        room = room.less(len(sizes.sizes))
    if not engine.prefill_graph:
        notes.append(
            f"{engine.name} launches prompts kernel by kernel: their sizes are for a compiler of "
            "static shapes (target atc)"
        )
    return Batching(
        lengths=wanted.lengths,
        graph_bytes=each,
        graph_bytes_kind=kind,
        graph_bytes_source=source,
        max_graphs=wanted.max_graphs,
        prefill=prefill_sizes(
            prefill.scorer, prefill.way, found.below, found.longest, found.words, room
        ),
        decode=sizes,
        settings=() if plan.pools else _settings(decode),
        notes=tuple(notes),
    )


def _running(
    plan: Plan, demand: Demand | None, decode: Deployed, notes: list[str]
) -> tuple[dict[int, float], str]:
    """(share of decode steps by the sequences that decode together, where from)."""
    used = next((pool.times.used for pool in plan.pools if pool.role == "decode"), None)
    steady = steady_running(decode.scorer, decode.way, used)
    if demand is None:
        return steady
    count = min(demand.count or _MOST_SIMULATED, _MOST_SIMULATED)
    running = Running()
    try:
        simulate_plan(plan, replace(demand, count=count), watch=running)
    except InputError as error:
        notes.append(f"the batches that run were not simulated: {error}")
        return steady
    total = sum(running.counts.values())
    if not total:
        notes.append("no step of the simulation decodes without prompts beside")
        return steady
    shares = {batch: steps / total for batch, steps in running.counts.items()}
    return shares, f"decode steps of the first {count:,} requests, simulated"


def _settings(one: Deployed) -> tuple[SettingRow, ...]:
    """Each step size of the plan set back to the engine's default, the rest kept."""
    engine, way, choice = one.scorer.question.engine, one.way, Choice.of(one.way)
    own = {"max_num_seqs": way.batch, "max_num_batched_tokens": way.chunk}
    defaults = {name: int(getattr(engine, name)) for name in own}
    tried = {name: {**own, name: defaults[name]} for name in own}
    tried["both"] = defaults
    batch = np.array([float(row["max_num_seqs"]) for row in (own, *tried.values())])
    chunk = np.array([float(row["max_num_batched_tokens"]) for row in (own, *tried.values())])
    scores = one.scorer.score(choice, batch, chunk)
    value = scores.columns["objective"]
    rows = []
    for place, name in enumerate(tried, start=1):
        limit = int(scores.limit[place])
        good = limit < 0
        rows.append(
            SettingRow(
                setting=name,
                value=own.get(name),
                default=defaults.get(name),
                objective=float(value[place]) if good else None,
                gain=float(value[0] / value[place]) if good else None,
                limit="" if good else LIMITS[limit],
            )
        )
    return tuple(rows)
