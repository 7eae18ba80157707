"""The oracle of the search: every strategy by plain loops, one price at a time.

It shares the scorer of single points with the search and nothing else: it has its own
enumeration, its own legality (whether the layout can be applied, and the engine's and cluster's
own limits), its own limits and its own idea of what is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, pairwise, permutations, product
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tests.search.oracle_queue import queued_of
from tests.search.small_models import dense, latent, sparse, specs

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.errors import LayoutError
from shardplan.models.parallel import (
    AXES,
    Axis,
    Exchange,
    Parallelism,
    balanced_stages,
    make_mesh,
)
from shardplan.models.spec import ModelSpec
from shardplan.search.evaluate import LayoutScorer, Question
from shardplan.search.layouts import Reach
from shardplan.search.plan import Limits, Workload
from shardplan.search.space import Choice, Space, build_space

__all__ = [
    "Case",
    "Found",
    "best_of",
    "brute_force",
    "cases",
    "dense",
    "latent",
    "small_case",
    "sparse",
    "specs",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One question and the choices and grid that it is asked over."""

    question: Question
    choices: tuple[Choice, ...]
    batches: tuple[int, ...]
    chunks: tuple[int, ...]
    depths: tuple[int, ...] = (0,)

    def space(self) -> Space:
        """As the search sees it."""
        question = self.question
        return build_space(
            question.spec,
            question.cluster,
            question.engine,
            cards=question.cards,
            choices=self.choices,
            batches=self.batches,
            chunks=self.chunks,
            reach=Reach(depths=self.depths),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A strategy and what the oracle knows of it."""

    parallel: Parallelism
    choice: Choice
    batch: int
    chunk: int
    objective: float
    memory_bytes: float
    feasible: bool


def _ahead(case: Case) -> Iterator[Parallelism]:
    """Every split with every depth of prediction."""
    for par in _layouts(case.question):
        for depth in case.depths:
            yield replace(par, mtp=depth)


def _layouts(question: Question) -> Iterator[Parallelism]:
    """Every split of the cards, legal or not."""
    cards, exchanges = question.cards, ("allgather", "alltoall")
    for tp in range(1, cards + 1):
        for pp in range(1, cards + 1):
            for dp in (d for d in range(1, cards + 1) if tp * pp * d == cards):
                for ep in range(1, tp * dp + 1 if question.spec.moe else 2):
                    for sp in (False, True):
                        for exchange in exchanges if ep > 1 else exchanges[:1]:
                            way: Exchange = "alltoall" if exchange == "alltoall" else "allgather"
                            yield Parallelism(tp=tp, pp=pp, dp=dp, ep=ep, sp=sp, exchange=way)


def _legal(question: Question, par: Parallelism) -> bool:
    """Whether a layout can be applied and both engine and cluster allow it."""
    if par.sp and par.tp == 1:
        return False
    if not (_vllm_starts(question, par) and _mindie_starts(question, par)):
        return False
    if question.cluster.device.name.startswith("a3") and _deployment(par) in range(3, 999, 2):
        return False
    if par.mtp and "vllm-ascend" in question.engine.name and par.pp > 1:
        return False
    node = question.cluster.ranks_per_node
    reach = math.prod(getattr(par, one) for one in par.order[par.order.index("tp") :])
    far = reach > node and par.tp > 1
    if any(t.topology == "roce" for t in question.cluster.tiers) and far:
        return False
    try:
        make_mesh(question.spec, par)
        for phase in ("prefill", "decode"):
            apply(build_graph(question.spec, phase, mtp=par.mtp > 0), par)
    except LayoutError:
        return False
    return True


def _deployment(par: Parallelism) -> int:
    """Ranks of what shares experts: dp groups that do not are deployments of their own."""
    groups = par.ep // par.tp if par.ep > par.tp else 1
    return par.tp * par.pp * groups


def _vllm_starts(question: Question, par: Parallelism) -> bool:
    """Whether vLLM can start the layout, and its Ascend plugin run the experts."""
    if "vllm" not in question.engine.name:
        return True
    spec, node = question.spec, question.cluster.ranks_per_node
    if spec.mla is None and max(par.tp, spec.kv_heads) % min(par.tp, spec.kv_heads):
        return False
    if 1 < par.ep < par.tp:
        return False
    for size in (par.tp * par.pp, _deployment(par)):
        if (size > node and size % node) or (size < node < par.ranks and node % size):
            return False
    if question.engine.name == "vllm" or spec.moe is None:
        return True
    if par.ep == 1:
        return not par.sp
    if par.ep > par.tp and par.tp * par.pp > node:
        return False
    sent = par.exchange == "alltoall"
    if question.cluster.device.name.startswith("a3"):
        return sent and 1024 <= spec.hidden <= 8192 and (par.ep <= 16 or par.ep in (32, 64))
    return not sent or (par.ep >= 16 and spec.moe.experts <= 24 * par.ep)


def _mindie_starts(question: Question, par: Parallelism) -> bool:
    """MindIE has one stage, whole tokens, and splits the experts of latent attention alone."""
    if question.engine.name != "mindie":
        return True
    whole = par.exchange == "allgather" or par.ep % par.tp == 0
    plain = par.pp == 1 and not par.sp
    return plain and whole and (par.ep == 1 or question.spec.mla is not None)


def _allowed(question: Question, par: Parallelism, choice: Choice) -> bool:
    """Whether the switches of a choice may be on: A2 alone fuses, in 16 bits, in a node of 8."""
    engine, name = question.engine.name, question.cluster.device.name
    a2, a3 = name.startswith("910b"), name.startswith("a3")
    fused, prefetch = choice.fused_collectives, choice.weight_prefetch
    if fused and not (a2 and par.tp in (2, 4, 8) and not par.sp and choice.weight_dtype == "bf16"):
        return False
    if fused and engine == "torch-graph":
        return False
    if not prefetch:
        return True
    if engine == "mindie":
        return question.spec.mla is not None
    if engine not in ("vllm-ascend", "vllm-ascend-eager") or not (a2 or a3):
        return False
    return question.spec.moe is not None or par.sp or fused


def _holds(
    question: Question, par: Parallelism, columns: dict[str, float], tokens: int, chunk: int
) -> bool:
    """Whether one strategy, whose slots decode `tokens` a step, satisfies every limit."""
    work, limits = question.workload, question.limits
    most = question.engine.memory_fraction * question.cluster.device.hbm_bytes
    length = work.input_len + work.output_len
    return all(
        (
            columns["memory_bytes"] <= most,
            not question.spec.max_context or length <= question.spec.max_context,
            chunk >= tokens,
            limits.ttft_s is None or columns["ttft_s"] <= limits.ttft_s,
            limits.tpot_s is None or columns["tpot_s"] <= limits.tpot_s,
            limits.ttft_s is None or columns["ttft_mean_s"] <= limits.ttft_s,
            limits.ttft_p99_s is None or columns["ttft_p99_s"] <= limits.ttft_p99_s,
            limits.tpot_p99_s is None or columns["tpot_p99_s"] <= limits.tpot_p99_s,
            work.request_rate is None
            or columns["requests_per_s"] * _left(question, par) >= work.request_rate,
        )
    )


def _left(question: Question, par: Parallelism) -> float:
    """Share of the replicas that is left of a layout, ranks walked one by one."""
    spare = question.spare
    if spare is None:
        return 1.0
    order = ("dp", "pp", "cp", "tp") if par.order == AXES else par.order
    many = par.dp // max(par.ep // (par.tp * par.cp), 1) or 1
    on_node: dict[int, set[int]] = {}
    for rank, place in enumerate(product(*(range(getattr(par, axis)) for axis in order))):
        group = place[order.index("dp")]
        replica = group * many // par.dp
        on_node.setdefault(rank // question.cluster.ranks_per_node, set()).add(replica)
    each = max(map(len, on_node.values())) if spare.unit == "node" else 1
    return max(many - each * spare.count, 0) / many


def _numbered(question: Question, par: Parallelism) -> Iterator[Parallelism]:
    """A layout with its ranks in every order that differs and that the engine can start."""
    live = [axis for axis in AXES if getattr(par, axis) > 1]
    seen = set()
    orders = [AXES, *permutations(AXES)]
    for order in orders:
        own = tuple(axis for axis in order if axis in live)
        wanted = tuple(axis for axis in ("dp", "pp", "cp", "tp") if axis in live)
        if own not in seen and ("vllm" not in question.engine.name or own == wanted):
            yield replace(par, order=next(o for o in permutations(AXES) if _shown(o, live) == own))
        seen.add(own)


def _shown(order: tuple[str, ...], live: list[Axis]) -> tuple[str, ...]:
    return tuple(axis for axis in order if axis in live)


def _cuts(question: Question, par: Parallelism) -> Iterator[Parallelism]:
    """A layout with its layers cut evenly, which needs no telling, then in every other way."""
    yield par
    layers = question.spec.layers
    for places in combinations(range(1, layers), par.pp - 1):
        cut = tuple(b - a for a, b in pairwise((0, *places, layers)))
        if cut != balanced_stages(question.spec, par):
            yield replace(par, stage_layers=cut)


def brute_force(case: Case) -> list[Found]:
    """Every legal strategy, one at a time, in the order of the space."""
    question, found = case.question, []
    grid = list(product(case.batches, case.chunks))
    legal = (
        par for one in _ahead(case) for par in _numbered(question, one) if _legal(question, par)
    )
    for par in (cut for one in legal for cut in _cuts(question, one)):
        scorer = LayoutScorer(question, par)
        for choice in (one for one in case.choices if _allowed(question, par, one)):
            queued = queued_of(scorer, choice, grid, _left(question, par))
            for batch in case.batches:
                for chunk in case.chunks:
                    at = np.array([float(batch)]), np.array([float(chunk)])
                    scores = scorer.score(choice, *at, dear=False)
                    columns = {name: float(one[0]) for name, one in scores.every().items()}
                    columns |= queued[batch, chunk]
                    value = (
                        1.0 / columns["end_to_end_s"]
                        if question.objective == "latency"
                        else columns["output_tokens_per_s"]
                    )
                    found.append(
                        Found(
                            parallel=par,
                            choice=choice,
                            batch=batch,
                            chunk=chunk,
                            objective=value,
                            memory_bytes=columns["memory_bytes"],
                            feasible=_holds(question, par, columns, batch * (1 + par.mtp), chunk),
                        )
                    )
    return found


def best_of(found: list[Found]) -> Found | None:
    """Largest objective, then least memory, then the first."""
    best = None
    for one in found:
        if one.feasible and (
            best is None
            or one.objective > best.objective
            or (one.objective == best.objective and one.memory_bytes < best.memory_bytes)
        ):
            best = one
    return best


def small_case(spec: ModelSpec, *, cards: int = 4, hbm_bytes: float = 1e9, **asked: Any) -> Case:
    """A question on an Atlas 800T A2 of small cards; `asked` are fields of workload and limits."""
    cluster = load_cluster("atlas-800t-a2", cards=cards)
    engine = replace(load_engine("vllm-ascend"), reserve_bytes=2.0**20, communicator_bytes=2.0**18)
    limits = {name: asked.pop(name) for name in Limits.model_fields if name in asked}
    objective = asked.pop("objective", "throughput")
    return Case(
        question=Question(
            spec=spec,
            cluster=replace(cluster, device=replace(cluster.device, hbm_bytes=hbm_bytes)),
            engine=engine,
            workload=Workload(**{"input_len": 300, "output_len": 64, **asked}),
            limits=Limits(**limits),
            objective=objective,
            cards=cards,
        ),
        choices=(
            Choice(attention="flash", weight_dtype="bf16", kv_dtype="bf16"),
            Choice(attention="naive", weight_dtype="w8a8", kv_dtype="int8"),
        ),
        batches=(1, 2, 3, 4, 6, 8, 12, 16, 32, 64),
        chunks=(16, 64, 256, 512, 1024, 2048, 4096, 8192),
    )


_CLUSTERS = {
    "atlas-800t-a2": ("vllm-ascend", "vllm-ascend-eager", "mindie", "torch-graph"),
    "atlas-800i-a3": ("vllm-ascend", "torch-graph"),
    "hgx-h100": ("vllm", "torch-graph"),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A question over 1 to 16 cards whose memory and limits bind about as often as not."""
    spec = draw(specs())
    cards = draw(st.sampled_from([1, 2, 2, 4, 4, 8, 16]))
    name = draw(st.sampled_from(sorted(_CLUSTERS)))
    cluster = load_cluster(name, cards=cards)
    many = cards * (1 if spec.moe is None else 2) > 4  # layouts: one price takes milliseconds
    engine = load_engine(draw(st.sampled_from(_CLUSTERS[name][: 1 if many else None])))
    engine = replace(engine, reserve_bytes=2.0**20, communicator_bytes=2.0**18)
    memory = draw(st.sampled_from([8e6, 16e6, 32e6, 64e6, 1e9]))
    cluster = replace(cluster, device=replace(cluster.device, hbm_bytes=memory))
    workload = Workload(
        input_len=draw(st.sampled_from([16, 300, 2000])),
        output_len=draw(st.sampled_from([1, 2, 64, 500])),
        concurrency=draw(st.sampled_from([None, None, 1, 12])),
        request_rate=draw(st.sampled_from([None, None, None, 5.0])),
        prefix_hit=draw(st.sampled_from([0.0, 0.5])),
    )
    limits = Limits(
        ttft_s=draw(st.sampled_from([None, None, 0.02, 0.5])),
        tpot_s=draw(st.sampled_from([None, None, 0.003, 0.02])),
    )
    every = [
        Choice(attention=attention, weight_dtype=weight, kv_dtype=kv)
        for attention in ("flash", "naive")
        for weight in ("bf16", "w8a8", "w8a8,attention=bf16")
        for kv in ("bf16", "int8")
    ]
    picked = draw(st.lists(st.sampled_from(every), min_size=1, max_size=2, unique=True))
    picked = picked[: 1 if many else None]
    fused, prefetch = draw(st.booleans()), draw(st.booleans())
    if fused or prefetch:
        on = replace(picked[0], fused_collectives=fused, weight_prefetch=prefetch)
        picked = [*picked, on]
    return Case(
        question=Question(
            spec=spec,
            cluster=cluster,
            engine=engine,
            workload=workload,
            limits=limits,
            objective=draw(st.sampled_from(["throughput", "latency"])),
            cards=cards,
        ),
        choices=tuple(picked),
        batches=draw(st.sampled_from([(1,), (8,), (1, 8), (4, 64)])),
        chunks=(256,) if many else draw(st.sampled_from([(256,), (2048,), (64, 2048)])),
    )
