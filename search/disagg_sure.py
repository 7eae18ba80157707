"""How sure the figures of a deployment of pools are: bands of each pool's steps, put together.

    band of a pool     that of one of its steps (`costmodel.confidence`), serving model included
    tokens a second    the deployment evaluated again with all its times at the ends of their bands
                       together: both pools' steps, and the transfer at that of its assumed rate
    TPOT               the band of the decode pool
    basis              shares of either pool's time, weighted by the cards that it keeps busy

Errors of both pools going together is the wide case: they share a calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from shardplan.costmodel.bulk import Dtypes, Fleet
from shardplan.costmodel.confidence import Cause, Tally, confidence, fact_band, level
from shardplan.costmodel.confidence import Confidence as Sure
from shardplan.costmodel.disagg import link_kind
from shardplan.costmodel.group_bands import step_bands
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.load import Parts
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism
from shardplan.search.disagg import DisaggOutcome
from shardplan.search.disagg_combine import Combination
from shardplan.search.disagg_pools import role_input, role_stages
from shardplan.search.disagg_question import DisaggQuestion, deployments
from shardplan.search.disagg_request import role_question
from shardplan.search.disagg_space import Pool
from shardplan.search.evaluate import LayoutScorer
from shardplan.search.how_sure import improve
from shardplan.search.plan_confidence import BasisShares, Confidence, WeakestPart
from shardplan.search.space import Choice

__all__ = ["Step", "pools_confidence", "role_bands"]

_RATES = ("rate",)
_TIMES = (
    "busy_s",
    "one_s",
    "alone_s",
    "service_s",
    "step_s",
    "later_s",
    "tpot_s",
    "slow_s",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of an instance of a pool, to be priced kernel by kernel."""

    question: DisaggQuestion
    pool: Pool
    par: Parallelism
    choice: Choice
    at: float
    """Of the pool's grid: tokens of a prefill step, or slots."""

    @property
    def phase(self) -> Phase:
        """Of its steps."""
        return "prefill" if self.pool.role == "prefill" else "decode"

    def fleet(self) -> Fleet:
        """Its one point."""
        one = np.zeros(1, dtype=np.int64)
        dtypes = Dtypes(self.choice.weight_dtype, self.choice.kv_dtype, self.choice.attention)
        asked = role_question(self.question, self.pool, self.par.ranks)
        model = LayoutScorer(asked, self.par).model_for(self.choice)
        return Fleet.of([model], one, [dtypes], one)

    def price(self, fleet: Fleet) -> list[Parts]:
        """Its parts, stage by stage."""
        given = role_input(self.pool, self.par, self.choice)
        return role_stages(self.pool.role, fleet, given, np.full(1, self.at), self.par.pp)


def role_bands(step: Step) -> dict[str, tuple[float, float]]:
    """(low, high) factor on the time of each cost group that the step spends time in."""
    return step_bands(step.fleet(), step.pool.cluster, step.phase, step.price)


def _sure(step: Step) -> tuple[Sure, Array]:
    """(how sure its time is, seconds)."""
    fleet = step.fleet()
    tally = Tally.of(fleet)
    stages = fleet.step_s(step.price(fleet.watched(tally)), step.phase)
    host_s = np.full(1, fleet.host_s(step.phase))
    step_s = sum(stages, np.zeros(1)) + host_s
    return confidence(tally, fleet, step.phase, step_s, host_s, serving=True), step_s


def pools_confidence(outcome: DisaggOutcome, best: Combination) -> Confidence:
    """What the performance of a deployment rests on, its band and its weakest part."""
    question = outcome.question
    places = {"prefill": best.prefill, "decode": best.decode}
    tables = {"prefill": outcome.prefill.options, "decode": outcome.decode.options}
    steps: dict[str, Step] = {}
    columns: dict[str, dict[str, Array]] = {}
    for pool in (question.prefill, question.decode):
        options, place = tables[pool.role], places[pool.role]
        columns[pool.role] = {name: one[place] for name, one in options.columns.items()}
        steps[pool.role] = Step(
            question=question,
            pool=pool,
            par=options.way(place),
            choice=options.choice(place),
            at=float(columns[pool.role]["chunk" if pool.role == "prefill" else "slots"]),
        )
    sure = {role: _sure(step) for role, step in steps.items()}
    weights: dict[str, float] = {
        role: best.columns[f"{role}_cards"] * best.columns[f"{role}_used"] for role in sure
    }
    slow, fast = (_rate(question, columns, sure, best, end) for end in ("high", "low"))
    decode, tpot_s = sure["decode"][0], best.columns["tpot_s"]
    return Confidence(
        level=level(),
        basis=_basis(sure, weights),
        output_tokens_per_s_low=slow,
        output_tokens_per_s_high=fast,
        tpot_low_s=tpot_s * float(decode.low[0]),
        tpot_high_s=tpot_s * float(decode.high[0]),
        weakest=_weakest(steps, sure, weights),
    )


def _rate(
    question: DisaggQuestion,
    columns: Mapping[str, Mapping[str, Array]],
    sure: Mapping[str, tuple[Sure, Array]],
    best: Combination,
    end: str,
) -> float:
    """Output tokens a second with every time at one end of its band."""
    scaled = {}
    for role, own in columns.items():
        factor = float(getattr(sure[role][0], end)[0])
        scaled[role] = {
            name: np.asarray(
                value * factor if name in _TIMES else value / factor if name in _RATES else value
            )
            for name, value in own.items()
        }
    link = question.link
    factor = fact_band(link_kind())[end == "high"]
    link = replace(link, bytes_per_s=link.bytes_per_s / factor, latency_s=link.latency_s * factor)
    x, y = np.asarray(best.prefill_instances), np.asarray(best.decode_instances)
    service, _ = deployments(
        replace(question, link=link), (scaled["prefill"], scaled["decode"]), x, y
    )
    return float(service.requests_per_s) * question.decode.workload.output_len


def _basis(sure: Mapping[str, tuple[Sure, Array]], weights: Mapping[str, float]) -> BasisShares:
    total = sum(weights.values())
    shares: dict[str, float] = {}
    for role, (one, _) in sure.items():
        for kind, share in one.basis.items():
            shares[kind] = shares.get(kind, 0.0) + weights[role] / total * float(share[0])
    return BasisShares(**shares)


def _weakest(
    steps: Mapping[str, Step],
    sure: Mapping[str, tuple[Sure, Array]],
    weights: Mapping[str, float],
) -> WeakestPart:
    """The part that widens the band most, of either pool; pools weighted by their busy cards."""
    found: list[tuple[float, str, Cause]] = []
    for role, (one, step_s) in sure.items():
        scale = weights[role] / float(step_s[0]) ** 2
        found += [
            (float(cause.variance[0]) * scale, role, cause)
            for cause in one.causes
            if float(cause.seconds[0]) > 0.0
        ]
    variance, role, cause = max(found, key=lambda one: one[0])
    total = sum(one[0] for one in found)
    cluster = steps[role].pool.cluster
    return WeakestPart(
        name=cause.name,
        kind=cause.kind,
        error_share=variance / total if total else 0.0,
        source=cause.source,
        advice=improve(cause, device=cluster.device.name, cluster=cluster.name),
    )
