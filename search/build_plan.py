"""From the outcome of a search to the plan: the winner priced in full, proven and explained."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from shardplan.costmodel.basis import basis_in
from shardplan.costmodel.confidence import fact_kind
from shardplan.costmodel.forward import forward_loads, parts_by_kind
from shardplan.costmodel.hardware import Cluster, Device
from shardplan.costmodel.kernels.attention import kv_element_bytes
from shardplan.costmodel.ledger import StageMemory, weight_element_bytes
from shardplan.costmodel.load import Load, Parts
from shardplan.costmodel.optable import Group
from shardplan.models.counts import active_parameter_count, kv_bytes_per_token, parameter_count
from shardplan.models.graph import Phase
from shardplan.search.at_rate import Point, at_rate
from shardplan.search.build_confidence import plan_confidence
from shardplan.search.evaluate import LayoutScorer, context_tokens
from shardplan.search.kept import (
    Kept,
    Outcome,
    column_of,
    feasible_of,
    first_of_each,
    pareto_mask,
)
from shardplan.search.legal_layout import fast_ranks
from shardplan.search.plan import (
    BreakdownRow,
    Candidate,
    Certificate,
    ClusterInfo,
    MemoryRow,
    ModelInfo,
    Performance,
    Plan,
    ProofInfo,
    QuantizationRow,
    SwitchRow,
)
from shardplan.search.proof import model_digest
from shardplan.search.request import Resolved

__all__ = [
    "bounded_wall_s",
    "breakdown",
    "build_plan",
    "candidate",
    "cluster_info",
    "lever",
    "memory_rows",
    "pareto_front",
    "performance",
    "plan_info",
    "step_loads",
    "time_note",
]

_PARETO_KEPT = 200


def candidate(outcome: Outcome, kept: Kept) -> Candidate:
    """One remembered strategy as the plan writes it."""
    columns = kept.columns
    return Candidate(
        strategy=outcome.space.strategy(kept.parallel, kept.choice, kept.batch, kept.chunk),
        performance=performance(columns),
        memory_bytes=columns["memory_bytes"],
        objective=columns["objective"],
    )


def performance(columns: Mapping[str, float]) -> Performance:
    """The columns of a score that a plan tells."""
    return Performance(**{name: columns[name] for name in Performance.model_fields})


def pareto_front(outcome: Outcome) -> list[Kept]:
    """Feasible strategies that no other beats in both throughput and TPOT, fastest first."""
    feasible = feasible_of(outcome.kept)
    if not feasible:
        return []
    gain, cost = column_of(feasible, "output_tokens_per_s"), column_of(feasible, "tpot_s")
    front = [feasible[i] for i in np.flatnonzero(pareto_mask(gain, cost)).tolist()]
    return sorted(front, key=lambda one: -one.columns["output_tokens_per_s"])


def plan_info(resolved: Resolved) -> tuple[ModelInfo, ClusterInfo]:
    spec = resolved.spec
    kv = resolved.choices[0].kv_dtype
    model = ModelInfo(
        name=spec.name,
        architecture=spec.architecture,
        source=spec.source,
        digest=model_digest(spec),
        parameters=parameter_count(spec),
        active_parameters=active_parameter_count(spec),
        layers=spec.layers,
        kv_bytes_per_token=float(kv_bytes_per_token(spec, dtype_bytes=int(kv_element_bytes(kv)))),
        max_context=spec.max_context,
    )
    return model, cluster_info(resolved.cluster)


def cluster_info(cluster: Cluster) -> ClusterInfo:
    """The machine as plans tell it."""
    device = cluster.device
    return ClusterInfo(
        name=cluster.name,
        title=cluster.title,
        device=device.name,
        soc_versions=device.soc_versions,
        ranks_per_node=cluster.ranks_per_node,
        nodes=cluster.nodes,
        ranks=cluster.ranks,
        hbm_bytes=device.hbm_bytes,
        fast_ranks=int(min(fast_ranks(cluster), cluster.ranks)),
    )


def memory_rows(scorer: LayoutScorer, best: Kept) -> tuple[MemoryRow, ...]:
    """The ledger of the winner, stage by stage."""
    stages: list[StageMemory] = scorer.ledger.stages(
        scorer.model.machine,
        weight_dtype=best.choice.weight_dtype,
        kv_dtype=best.choice.kv_dtype,
        attention=best.choice.attention,
        batch=float(best.batch),
        tokens=float(best.chunk),
        context=float(context_tokens(scorer.question.workload)),
    )
    return tuple(
        MemoryRow(
            stage=row.stage,
            layers=row.layers,
            weights_bytes=row.weights_bytes,
            kv_cache_bytes=float(row.kv_cache_bytes),
            activations_bytes=float(row.activations_bytes),
            communicators_bytes=row.communicators_bytes,
            reserve_bytes=row.reserve_bytes,
            total_bytes=float(row.total_bytes),
            capacity_bytes=scorer.ledger.capacity_bytes,
        )
        for row in stages
    )


def step_loads(scorer: LayoutScorer, best: Kept, phase: Phase) -> dict[Group, Load]:
    """What one prefill of one prompt, or one decode step of every slot, asks of each group."""
    work, choice = scorer.question.workload, best.choice
    ask = functools.partial(
        forward_loads,
        phase,
        scorer.question.engine,
        weight_dtype=choice.weight_dtype,
        kv_dtype=choice.kv_dtype,
        attention=choice.attention,
        mtp=scorer.parallel.mtp,
    )
    if phase == "prefill":
        return ask(batch=1.0, new=float(min(work.input_len, best.chunk)), prefix=0.0)
    slots = float(-(-best.batch // scorer.parallel.pp))
    verified = 1.0 + scorer.parallel.mtp
    return ask(batch=slots, new=verified, prefix=work.input_len + work.output_len / 2.0)


def breakdown(scorer: LayoutScorer, best: Kept) -> tuple[BreakdownRow, ...]:
    """Seconds by kind of operator of one prefill piece and one decode step, largest first.

    The engine's own time is there too, so that the rows make the step.
    """
    rows: list[BreakdownRow] = []
    phases: tuple[Phase, ...] = ("prefill", "decode")
    for phase in phases:
        sums = parts_by_kind(scorer.model_for(best.choice), step_loads(scorer, best, phase))
        found = [_breakdown_row(scorer, best, phase, kind, parts) for kind, parts in sums.items()]
        found += _engine_rows(scorer, phase, sum(parts.kernels for parts in sums.values()))
        rows += sorted(found, key=lambda row: -row.total_s)
    return tuple(rows)


def _engine_rows(scorer: LayoutScorer, phase: Phase, kernels: float) -> list[BreakdownRow]:
    """The host's time between steps as `host`, gaps between kernels as `launch_gap`."""
    engine = scorer.question.engine
    host = "step_host_s" if phase == "decode" else "prefill_step_host_s"
    gaps_s = engine.launch_gap_s * kernels
    nothing = dict.fromkeys(("compute_s", "memory_s", "collective_s"), 0.0)
    return [
        BreakdownRow(
            phase=phase,
            kind=kind,
            calls=calls,
            **nothing,
            overhead_s=seconds,
            total_s=seconds,
            basis=fact_kind(engine.facts[fact]),
        )
        for kind, calls, seconds, fact in (
            ("host", 1, scorer.model.host_s(phase), host),
            ("launch_gap", round(kernels), gaps_s, "launch_gap_s"),
        )
        if seconds
    ]


def _breakdown_row(
    scorer: LayoutScorer, best: Kept, phase: Phase, kind: str, parts: Parts
) -> BreakdownRow:
    choice = best.choice
    return BreakdownRow(
        phase=phase,
        kind=kind,
        calls=round(parts.kernels),
        compute_s=float(parts.compute_s),
        memory_s=float(parts.memory_s),
        collective_s=float(parts.collective_s),
        overhead_s=float(parts.overhead_s),
        total_s=float(parts.total_s),
        basis=basis_in(
            scorer.model_for(choice), kind, choice.weight_dtype, phase, attention=choice.attention
        ),
    )


def _mean_note(best: Kept) -> str:
    """Why TPOT is not the time of a decode step."""
    columns = best.columns
    ahead = best.parallel.mtp
    each = f", each of up to {1 + ahead} tokens a sequence" if ahead else ""
    return (
        f"TPOT is a mean over steps{each}: {columns['mixed_share']:.0%} of them also carry prompt "
        f"tokens and take {columns['mixed_step_s'] * 1e3:.1f} ms, the others "
        f"{columns['decode_step_s'] * 1e3:.1f} ms"
    )


def lever(rows: tuple[MemoryRow, ...], best: Kept, device: Device) -> str:
    """What frees most memory on the fullest rank, in one sentence."""
    row = max(rows, key=lambda one: one.total_bytes)
    free = (row.capacity_bytes - row.total_bytes) / 2**30
    levers = []
    own = weight_element_bytes(best.choice.weight_dtype)
    smaller = [w for w in map(weight_element_bytes, device.weight_dtypes) if w < own]
    if smaller:
        left = max(smaller)
        levers.append((row.weights_bytes * (1 - left / own), f"{left * 8:.0f}-bit weights"))
    if best.choice.kv_dtype in ("bf16", "fp16") and "int8" in device.kv_dtypes:
        levers.append((row.kv_cache_bytes / 2, "an int8 KV cache"))
    levers.append((row.activations_bytes / 2, "half the tokens a step"))
    size, what = max(levers)
    return (
        f"stage {row.stage} is fullest with {free:.1f} GiB free; {what} would free about "
        f"{size / 2**30:.1f} GiB more a card"
    )


def _proven(outcomes: list[Outcome]) -> tuple[float | None, float | None]:
    """(bound, gap): the largest objective that any strategy could have, and how far the best is.

    Both are None where an engine proves nothing, or a smaller number of cards was not searched to
    its end.
    """
    last = outcomes[-1]
    if last.best is None or last.bound is None or not all(o.complete for o in outcomes[:-1]):
        return None, None
    reached = last.best.columns["objective"]
    return last.bound, max(last.bound / reached - 1.0, 0.0)


def _certificate(resolved: Resolved, outcomes: list[Outcome]) -> Certificate:
    last = outcomes[-1]
    pruned: dict[str, int] = defaultdict(int)
    refused: dict[str, int] = defaultdict(int)
    for outcome in outcomes:
        for name, count in outcome.tally.pruned_by.items():
            pruned[name] += count
        for name, count in outcome.tally.infeasible.items():
            refused[name] += count
    bound, gap = _proven(outcomes)
    wall = sum(outcome.wall_s for outcome in outcomes)
    return Certificate(
        engine=resolved.request.engine,
        space={
            **last.space.dimensions(),
            **({"cards": [o.space.cards for o in outcomes]} if len(outcomes) > 1 else {}),
        },
        space_size=sum(outcome.space.size for outcome in outcomes),
        evaluated=sum(outcome.tally.evaluated for outcome in outcomes),
        pruned=sum(pruned.values()),
        pruned_by=dict(sorted(pruned.items())),
        infeasible=dict(sorted(refused.items())),
        bound=bound,
        gap=gap,
        wall_s=bounded_wall_s(wall),
    )


def bounded_wall_s(wall_s: float) -> float:
    """An upper bound on a search's seconds that runs of one question share: 100, 1000, ...

    The seconds themselves differ from run to run; `timing.json` has them.
    """
    return 10.0 ** max(2, int(np.ceil(np.log10(max(wall_s, 1e-9)))))


def time_note(limit_s: float | None, *, complete: bool) -> tuple[str, ...]:
    """What a reader must know of a search that a time limit ended."""
    if limit_s is None or complete:
        return ()
    return (
        f"the time limit of {limit_s:g} s ended the search: another plan may be better by as much "
        "as the gap says",
    )


def build_plan(
    resolved: Resolved,
    scorer: LayoutScorer,
    outcomes: list[Outcome],
    best: Kept,
    proof: ProofInfo,
    *,
    quantization: tuple[QuantizationRow, ...],
    switches: tuple[SwitchRow, ...],
    top: int,
    version: str,
    notes: tuple[str, ...],
) -> Plan:
    """The plan of the winner `best`, found in the last of `outcomes`; `scorer`: of its layout."""
    outcome = outcomes[-1]
    rows = memory_rows(scorer, best)
    model, cluster = plan_info(resolved)
    chosen = candidate(outcome, best)
    return Plan(
        shardplan_version=version,
        request=resolved.request,
        model=model,
        cluster=cluster,
        strategy=chosen.strategy,
        performance=chosen.performance,
        at_rate=at_rate(Point(scorer, best.choice, best.batch, best.chunk)),
        memory=rows,
        largest_lever=lever(rows, best, resolved.cluster.device),
        breakdown=breakdown(scorer, best),
        confidence=plan_confidence(scorer, best),
        proof=proof,
        certificate=_certificate(resolved, outcomes),
        pareto=tuple(candidate(outcome, one) for one in pareto_front(outcome)[:_PARETO_KEPT]),
        alternatives=tuple(_distinct(outcome, best, top)),
        quantization=quantization,
        switches=switches,
        notes=(*notes, _mean_note(best)),
    )


def _distinct(outcome: Outcome, best: Kept, top: int) -> list[Candidate]:
    """The best strategy of each other layout: what else one might run."""
    seen = {replace(best.parallel, stage_layers=())}
    found: list[Candidate] = []
    for one in first_of_each(outcome.kept):
        if len(found) == top or not one.feasible:  # the feasible ones stand first
            break
        layout = replace(one.parallel, stage_layers=())
        if layout not in seen:
            seen.add(layout)
            found.append(candidate(outcome, one))
    return found
