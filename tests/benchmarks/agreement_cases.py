"""What `bench_agreement` runs: deployments and loads, and what either model says of them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.run_out import run_out
from shardplan.costmodel.serving import ServingInput
from shardplan.costmodel.simulate.deploy import Instance, units_of
from shardplan.costmodel.simulate.events import Simulation
from shardplan.costmodel.simulate.lengths import Fixed, Histogram
from shardplan.costmodel.simulate.prices import StepTypes
from shardplan.costmodel.simulate.request import Asked, Request
from shardplan.costmodel.simulate.unit import Lane, Unit
from shardplan.costmodel.simulate.workload import Demand, requests
from shardplan.models.catalog import load_model
from shardplan.models.parallel import Parallelism
from shardplan.search.evaluate import LayoutScorer, Question
from shardplan.search.plan import Limits, Workload
from shardplan.search.space import Choice

ACCEPTANCE = 0.85
ROUNDS, SETTLED = 40, 3
"""Of a closed loop: how often every slot is filled anew, and how many of these do not count."""
OPEN_REQUESTS, OPEN_SKIPPED = 40_000, 0.1
ENGINES = ("vllm-ascend", "mindie")


class Case(NamedTuple):
    """One deployment and its lengths."""

    model: str
    cluster: str
    axes: dict[str, int]
    dtype: str
    slots: int
    chunk: int
    input_len: int
    output_len: int
    engines: tuple[str, ...] = ENGINES
    prefix_hit: float = 0.0

    @property
    def name(self) -> str:
        """Model and axes."""
        return f"{self.model} {' '.join(f'{name}{size}' for name, size in self.axes.items())}"

    @property
    def lengths(self) -> str:
        """Prompt and output, and what is found of the prompt."""
        hit = f", {self.prefix_hit:.0%} found" if self.prefix_hit else ""
        return f"{self.input_len}/{self.output_len}{hit}"


_SHARED = {"tp": 2, "dp": 4, "ep": 8}
_WIDE = {"tp": 4, "dp": 8, "ep": 32}
_EVEN = {"tp": 4, "dp": 4, "ep": 16}
_PLAIN = ({"tp": 1}, {"tp": 2}, {"tp": 4})
CASES = (
    Case("llama-3.1-8b", "atlas-800t-a2", {"tp": 2}, "bf16", 64, 4096, 512, 256),
    Case("llama-3.1-8b", "atlas-800t-a2", {"tp": 2, "dp": 2}, "bf16", 48, 2048, 2048, 128),
    Case("qwen3-32b", "atlas-800i-a2", {"tp": 4}, "w8a8", 32, 4096, 1024, 512),
    Case("llama-3.1-70b", "atlas-800t-a2", {"tp": 8}, "bf16", 64, 8192, 1024, 256),
    Case(
        "llama-3.1-70b",
        "atlas-800t-a2",
        {"tp": 4, "pp": 2},
        *("bf16", 64, 4096, 1024, 256),
        ENGINES[:1],
    ),
    Case("qwen3-30b-a3b", "atlas-800t-a2", {"tp": 4, "ep": 4}, "bf16", 64, 4096, 512, 256),
    Case(
        "qwen3-30b-a3b",
        "atlas-800t-a2",
        {"tp": 2, "dp": 4, "ep": 8},
        *("bf16", 32, 2048, 512, 512),
    ),
    Case("mixtral-8x7b", "atlas-800t-a2", {"tp": 8, "ep": 8}, "bf16", 64, 4096, 1024, 128),
    Case("deepseek-v3", "atlas-800i-a3", {"tp": 4, "dp": 8, "ep": 32}, "w8a8", 24, 2048, 1024, 512),
    Case(
        "deepseek-v3",
        "atlas-800i-a3",
        {"tp": 4, "dp": 8, "ep": 32, "mtp": 1},
        *("w8a8", 16, 2048, 512, 512),
    ),
    Case("llama-3.1-8b", "atlas-800t-a2", {"tp": 2}, "bf16", 48, 8192, 3072, 256, prefix_hit=0.5),
    Case("qwen3-32b", "atlas-800i-a2", {"tp": 4}, "w8a8", 16, 8192, 8192, 512, prefix_hit=0.75),
    Case("llama-3.1-70b", "atlas-800t-a2", {"tp": 8}, "bf16", 32, 2048, 6000, 512, ENGINES[:1]),
)


DRAWN = (
    (
        "llama-3.1-8b",
        "atlas-800t-a2",
        "bf16",
        (*_PLAIN, {"tp": 1, "dp": 4}),
    ),
    ("qwen2.5-14b", "atlas-800t-a2", "bf16", ({"tp": 2}, {"tp": 4})),
    ("qwen3-32b", "atlas-800i-a2", "w8a8", ({"tp": 4}, {"tp": 8}, {"tp": 4, "dp": 2})),
    ("llama-3.1-70b", "atlas-800t-a2", "bf16", ({"tp": 8}, {"tp": 4, "pp": 2})),
    ("qwen3-30b-a3b", "atlas-800t-a2", "bf16", ({"tp": 2}, {"tp": 4, "ep": 4}, _SHARED)),
    (
        "qwen3-235b-a22b",
        "atlas-800i-a3",
        "w8a8",
        ({"tp": 8, "ep": 8}, _EVEN),
    ),
    ("deepseek-v3", "atlas-800i-a3", "w8a8", ({"tp": 8, "dp": 2, "ep": 16}, _WIDE)),
)
"""What `drawn` draws from: model, cluster, weights, layouts."""
DRAWN_LOADS = (
    *("closed 0.5", "closed 0.75", "closed 0.9"),
    *("Poisson 0.3", "Poisson 0.5", "Poisson 0.6", "Poisson 0.7", "Poisson 0.8", "Poisson 0.85"),
)


def drawn(count: int, seed: int) -> list[tuple[Case, str]]:
    """Cases and loads at random, of those that fit: nobody chose them.

    Prompts of 128 to 6,000 tokens, outputs of 64 to 776, 8 to 128 slots, 2,048 to 16,384 tokens a
    step; an engine that lets prompts go first has them whole, and no pipeline.
    """
    luck = random.Random(seed)
    found: list[tuple[Case, str]] = []
    while len(found) < count:
        model, cluster, dtype, layouts = luck.choice(DRAWN)
        axes, engine, load = luck.choice(layouts), luck.choice(ENGINES), luck.choice(DRAWN_LOADS)
        prompt, output = round(2 ** luck.uniform(7, 12.55)), round(2 ** luck.uniform(6, 9.6))
        slots = luck.choice([8, 16, 24, 32, 48, 64, 96, 128])
        chunk = luck.choice([2048, 4096, 8192, 16384])
        if engine == "mindie" and (prompt > chunk or "pp" in axes):
            continue
        case = Case(model, cluster, axes, dtype, slots, chunk, prompt, output, (engine,))
        made = scorer(case, engine)
        choice = Choice(attention="flash", weight_dtype=dtype, kv_dtype="bf16")
        held = made.memory(choice, np.array([float(slots)]), np.array([float(chunk)]))
        if float(held[0]) <= made.ledger.capacity_bytes:
            found.append((case, load))
    return found


@dataclass(frozen=True, slots=True)
class Seen:
    """What one of the two says, in seconds."""

    requests_per_s: float
    tpot_s: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float


class Kept:
    """Keeps every request."""

    def __init__(self) -> None:
        self.ended: list[Request] = []

    def step(self, unit: Unit, lane: Lane) -> None:
        """Not wanted."""

    def request(self, request: Request) -> None:
        """Keep it."""
        self.ended.append(request)


def scorer(case: Case, engine: str) -> LayoutScorer:
    """The layout, priced as a search prices it."""
    par = Parallelism(**case.axes)  # type: ignore[arg-type]  # sizes of axes
    nodes = -(-par.ranks // load_cluster(case.cluster).ranks_per_node)
    question = Question(
        spec=load_model(case.model),
        cluster=load_cluster(case.cluster, nodes=nodes),
        engine=load_engine(engine),
        workload=Workload(
            input_len=case.input_len, output_len=case.output_len, prefix_hit=case.prefix_hit
        ),
        limits=Limits(),
        objective="throughput",
        cards=par.ranks,
    )
    return LayoutScorer(question, par)


def instance(case: Case, made: LayoutScorer) -> Instance:
    """The same layout for the simulator."""
    return Instance(
        model=made.model,
        ledger=made.ledger,
        types=StepTypes(case.dtype),
        slots=case.slots,
        chunk=case.chunk,
        context=case.input_len + case.output_len,
        max_context=0,
    )


def steady(
    case: Case,
    made: LayoutScorer,
    *,
    flight: float,
    rate: float = math.inf,
) -> Any:
    """The steady state with so many in flight of all groups, or at a rate."""
    groups = made.model.groups
    given = ServingInput(
        batch=np.asarray([float(case.slots)]),
        chunk=np.asarray([float(case.chunk)]),
        input_len=float(case.input_len),
        output_len=float(case.output_len),
        prefix_hit=case.prefix_hit,
        weight_dtype=case.dtype,
        in_flight=np.asarray([flight / groups]),
        mtp=made.model.mtp,
        acceptance=ACCEPTANCE if made.model.mtp else 0.0,
    )
    return run_out(made.model, given, request_rate=np.asarray([rate]))


def said(run: Any) -> Seen:
    """What the steady state says."""
    return Seen(
        requests_per_s=float(run.requests_per_s[0]),
        tpot_s=float(run.tpot_mean_s[0]),
        ttft_mean_s=float(run.ttft_mean_s[0]),
        ttft_p50_s=float(run.ttft_p50_s[0]),
        ttft_p99_s=float(run.ttft_p99_s[0]),
    )


def _spread(asked: Iterator[Asked], first: int) -> Iterator[Asked]:
    """The first requests of a closed loop are somewhere in their outputs."""
    luck = random.Random(0)
    for number, one in enumerate(asked):
        yield one._replace(output_len=luck.randint(1, one.output_len)) if number < first else one


def simulated(case: Case, made: LayoutScorer, *, flight: int | None, rate: float | None) -> Seen:
    """What the simulator says.

    In a closed loop outputs are up to a tenth longer or shorter: requests of one length that begin
    with one step would do so for ever, as chance had it at the start.
    """
    tokens, tenth = case.output_len, case.output_len // 10
    output = Histogram((tokens - tenth, tokens + tenth + 1), (1.0,)) if flight else Fixed(tokens)
    demand = Demand(
        input_len=Fixed(case.input_len),
        output_len=output,
        concurrency=flight,
        rate=rate,
        count=OPEN_REQUESTS if flight is None else ROUNDS * flight,
        prefix_hit=case.prefix_hit,
    )
    kept = Kept()
    run = Simulation(
        _spread(requests(demand), flight or 0),
        kept,
        closed=flight,
        depth=made.model.mtp,
        acceptance=ACCEPTANCE,
    )
    units = units_of(instance(case, made), run, prefix_hit=case.prefix_hit)
    run.serve_with(units, "least-load")
    run.run()
    return settled(kept.ended, SETTLED * flight if flight else None)


def settled(requests: list[Request], first: int | None) -> Seen:
    """Of requests between start and end: `first` do not count, or a share of those at a rate."""
    ended = sorted(requests, key=lambda one: one.end_s)
    last = max(one.arrival_s for one in ended)
    start = OPEN_SKIPPED * last if first is None else ended[first].end_s
    inside = [one for one in ended if start < one.end_s <= last]
    chosen = [one for one in ended if one.arrival_s > start and one.end_s <= last]
    waits = np.asarray([one.first_s - one.arrival_s for one in chosen])
    paces = [(one.end_s - one.first_s) / (one.output_len - 1) for one in chosen]
    return Seen(
        requests_per_s=len(inside) / (last - start),
        tpot_s=float(np.mean(paces)),
        ttft_mean_s=float(waits.mean()),
        ttft_p50_s=float(np.percentile(waits, 50)),
        ttft_p99_s=float(np.percentile(waits, 99)),
    )
