"""From the outcome of a disaggregated search to the plan: both pools in full, and the transfer."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from shardplan.costmodel.disagg_serve import BOUNDS
from shardplan.models.errors import ProofError
from shardplan.models.modules import MODULES
from shardplan.models.parallel import Parallelism
from shardplan.search.build_plan import (
    bounded_wall_s,
    breakdown,
    lever,
    memory_rows,
    performance,
    plan_info,
    time_note,
)
from shardplan.search.disagg import DisaggOutcome
from shardplan.search.disagg_beside import BESIDE_LAYOUTS
from shardplan.search.disagg_combine import Combination
from shardplan.search.disagg_options import Options
from shardplan.search.disagg_request import Sides, assumptions, role_question
from shardplan.search.disagg_space import Pool as Side
from shardplan.search.disagg_sure import pools_confidence
from shardplan.search.evaluate import LayoutScorer
from shardplan.search.kept import Kept, pareto_mask
from shardplan.search.plan import (
    Candidate,
    Certificate,
    Plan,
    Pool,
    PoolTimes,
    ProofInfo,
    QuantizationRow,
    StrategyInfo,
    Transfer,
)
from shardplan.search.proof import merged_proof, prove_strategy
from shardplan.search.request import Resolved
from shardplan.search.space import strategy_info
from shardplan.search.trial_table import TrialTable

__all__ = ["build_disagg_plan", "candidate_of", "disagg_front", "disagg_table"]

_PARETO_KEPT = 200
_SHOWN = ("tp", "pp", "dp", "ep", "cp", "sp", "exchange", "mtp", *(f"{one}_tp" for one in MODULES))
"""Dimensions of a layout that the certificate tells."""


def _strategy(pool: Side, options: Options, index: int) -> StrategyInfo:
    """One option as the plan writes it."""
    batch, chunk = (int(options.columns[name][index]) for name in ("slots", "chunk"))
    return strategy_info(pool.spec, options.way(index), options.choice(index), batch, chunk)


def candidate_of(outcome: DisaggOutcome, one: Combination) -> Candidate:
    """A deployment as the plan writes it."""
    question = outcome.question
    return Candidate(
        strategy=_strategy(question.decode, outcome.decode.options, one.decode),
        performance=performance(one.columns),
        memory_bytes=one.columns["memory_bytes"],
        objective=one.columns["objective"],
        prefill=_strategy(question.prefill, outcome.prefill.options, one.prefill),
        prefill_instances=one.prefill_instances,
        decode_instances=one.decode_instances,
    )


def disagg_front(outcome: DisaggOutcome) -> list[Combination]:
    """Feasible deployments that no other beats in both throughput and TPOT, fastest first."""
    feasible = [one for one in outcome.kept if one.feasible]
    if not feasible:
        return []
    gain = np.array([one.columns["output_tokens_per_s"] for one in feasible])
    cost = np.array([one.columns["tpot_s"] for one in feasible])
    front = [feasible[place] for place in np.flatnonzero(pareto_mask(gain, cost))]
    return sorted(front, key=lambda one: -one.columns["output_tokens_per_s"])


def disagg_table(outcome: DisaggOutcome, kept: Iterable[Combination]) -> TrialTable:
    """Deployments as rows of `trials.csv`, best first; columns of layout are of decode."""
    from shardplan.search.trials import LATER_COLUMNS, TRIAL_COLUMNS

    question, rows = outcome.question, []
    for place, one in enumerate(kept, start=1):
        way = _strategy(question.decode, outcome.decode.options, one.decode)
        other = _strategy(question.prefill, outcome.prefill.options, one.prefill)
        rows.append(
            {
                **LATER_COLUMNS,
                **way.model_dump(),
                **one.columns,
                "rank": place if one.feasible else 0,
                "feasible": one.feasible,
                "limit": one.limit,
                "stage_layers": ",".join(map(str, way.stage_layers)),
                "order": "-".join(way.order),
                "engine": "exact",
                "serving": "disagg",
                "prefill_instances": one.prefill_instances,
                "decode_instances": one.decode_instances,
                "prefill_cards": int(one.columns["prefill_cards"]),
                "decode_cards": int(one.columns["decode_cards"]),
                **{f"prefill_{name}": getattr(other, name) for name in ("tp", "pp", "dp", "ep")},
                "prefill_chunk": other.chunk,
            }
        )
    return TrialTable.of_rows(TRIAL_COLUMNS, rows)


def _pool(
    outcome: DisaggOutcome, resolved: Resolved, side: Side, options: Options, best: Combination
) -> tuple[Pool, ProofInfo]:
    """One pool in full, proven."""
    first = side.role == "prefill"
    index = best.prefill if first else best.decode
    count = best.prefill_instances if first else best.decode_instances
    way = _strategy(side, options, index)
    par, choice = options.way(index), options.choice(index)
    question = role_question(outcome.question, side, par.ranks)
    scorer = LayoutScorer(question, par)
    kept = Kept(parallel=par, choice=choice, batch=way.batch, chunk=way.chunk, limit=-1, columns={})
    rows = memory_rows(scorer, kept)
    held = {name: float(column[index]) for name, column in options.columns.items()}
    pool = Pool(
        role=side.role,
        instances=count,
        cluster=plan_info(resolved)[1],
        strategy=way,
        times=PoolTimes(
            requests_per_s=held["rate"],
            used=best.columns[f"{side.role}_used"],
            step_s=held["busy_s"] if first else held["step_s"],
            service_s=held["service_s"] if first else held["step_s"] + held["later_s"],
            one_s=held["one_s"] if first else None,
        ),
        memory=rows,
        largest_lever=lever(rows, kept, side.cluster.device),
        breakdown=tuple(row for row in breakdown(scorer, kept) if row.phase == side.role),
    )
    return pool, prove_strategy(side.spec, par, scorer=scorer, choice=choice)


def _proof(pools: list[tuple[Pool, ProofInfo]]) -> ProofInfo:
    """The proofs of both pools as one."""
    proof = merged_proof([(pool.role, one) for pool, one in pools])
    if not proof.passed:
        raise ProofError(
            "the best strategy does not compute what the model computes",
            got="; ".join(proof.failures),
        )
    return proof


def _transfer(outcome: DisaggOutcome, best: Combination) -> Transfer:
    link = outcome.question.link
    return Transfer(
        tier=link.tier,
        link_bytes_per_s=link.bytes_per_s,
        request_bytes=float(outcome.decode.options.columns["bytes"][best.decode]),
        request_s=best.columns["transfer_s"],
        setup_s=link.latency_s,
        used=best.columns["transfer_used"],
        overlapped=False,
        bound=BOUNDS[int(best.columns["bound"])],  # type: ignore[arg-type]  # one of them
        basis="assumed",
    )


def _certificate(outcome: DisaggOutcome) -> Certificate:
    space: dict[str, list[object]] = {}
    for pool in (outcome.question.prefill, outcome.question.decode):
        legal = [one.parallel for one in pool.layouts if not one.rule]
        space[f"{pool.role}_cards"] = list(pool.sizes)
        for name in _SHOWN:
            space[f"{pool.role}_{name}"] = sorted({getattr(par, name) for par in legal})
        space[f"{pool.role}_order"] = [*sorted({"-".join(par.order) for par in legal})]
        for name in ("attention", "weight_dtype", "kv_dtype"):
            space[f"{pool.role}_{name}"] = sorted({getattr(one, name) for one in pool.choices})
        space["prefill_chunk" if pool.role == "prefill" else "decode_batch"] = list(pool.grid)
        space[f"{pool.role}_stage_layers"] = ["any" if pool.reach.ways else "even"]
    pruned = {name: count for name, count in outcome.tally.pruned_by.items() if count}
    return Certificate(
        engine="exact",
        space=space,
        space_size=outcome.space_size,
        evaluated=outcome.tally.evaluated,
        pruned=sum(pruned.values()),
        pruned_by=dict(sorted(pruned.items())),
        infeasible={name: n for name, n in sorted(outcome.tally.infeasible.items()) if n},
        bound=outcome.bound,
        gap=_gap(outcome),
        wall_s=bounded_wall_s(outcome.wall_s),
    )


def _gap(outcome: DisaggOutcome) -> float | None:
    """How far the best is from the bound; None where there is no bound."""
    best, bound = outcome.best, outcome.bound
    return None if best is None or bound is None else bound / best.columns["objective"] - 1.0


def _quantization(
    quantized: list[tuple[str, str, DisaggOutcome]], best: Combination, objective: str
) -> tuple[QuantizationRow, ...]:
    """The best deployment at other types; `strategy`: of its decode instances."""
    rows = []
    for weight, cache, outcome in quantized:
        found = outcome.best
        gain = None
        if found is not None and objective == "cards":
            gain = best.columns["spent"] / found.columns["spent"]
        elif found is not None:
            gain = found.columns["objective"] / best.columns["objective"]
        rows.append(
            QuantizationRow(
                weight_dtype=weight,
                kv_dtype=cache,
                objective=None if found is None else found.columns["objective"],
                gain=gain,
                strategy=None if found is None else candidate_of(outcome, found).strategy,
            )
        )
    return tuple(rows)


def build_disagg_plan(
    sides: Sides,
    outcome: DisaggOutcome,
    best: Combination,
    *,
    quantized: list[tuple[str, str, DisaggOutcome]],
    top: int,
    version: str,
) -> Plan:
    """The plan of the winner `best`; `ProofError` where either pool's strategy is not proven.

    `quantized`: (weights, cache, deployments) of other types, shown beside the answer.
    """
    question = outcome.question
    pools = [
        _pool(outcome, sides.prefill, question.prefill, outcome.prefill.options, best),
        _pool(outcome, sides.decode, question.decode, outcome.decode.options, best),
    ]
    decode = pools[1][0]
    chosen = candidate_of(outcome, best)
    front = disagg_front(outcome)[:_PARETO_KEPT]
    model, cluster = plan_info(sides.decode)
    return Plan(
        shardplan_version=version,
        request=sides.decode.request,
        model=model,
        cluster=cluster,
        strategy=chosen.strategy,
        performance=chosen.performance,
        pools=tuple(pool for pool, _ in pools),
        transfer=_transfer(outcome, best),
        memory=decode.memory,
        largest_lever=decode.largest_lever,
        breakdown=tuple(row for pool, _ in pools for row in pool.breakdown),
        proof=_proof(pools),
        certificate=_certificate(outcome),
        confidence=pools_confidence(outcome, best),
        pareto=tuple(candidate_of(outcome, one) for one in front),
        alternatives=tuple(_others(outcome, best, top)),
        quantization=_quantization(quantized, best, question.objective),
        notes=(
            *sides.decode.notes,
            *assumptions(question),
            *time_note(sides.decode.time_limit_s, complete=outcome.complete),
            *_kept_notes(outcome),
        ),
    )


def _others(outcome: DisaggOutcome, best: Combination, top: int) -> Iterable[Candidate]:
    """The best deployment of each other pair of layouts and counts."""

    def place(one: Combination) -> tuple[Parallelism, Parallelism, int, int]:
        return (
            outcome.prefill.options.layout(one.prefill),
            outcome.decode.options.layout(one.decode),
            one.prefill_instances,
            one.decode_instances,
        )

    seen = {place(best)}
    for one in outcome.kept:
        if len(seen) > top:
            break
        if one.feasible and place(one) not in seen:
            seen.add(place(one))
            yield candidate_of(outcome, one)


def _kept_notes(outcome: DisaggOutcome) -> list[str]:
    return [
        f"trials.csv holds the best {len(outcome.kept)} deployments: of every pair of instances "
        "kept the best counts, and the Pareto points",
        f"other dtypes were priced on the best {BESIDE_LAYOUTS} layouts of each pool only; what "
        "the engine's switches would buy is told of aggregated serving alone",
    ]
