"""What quantizing would buy disaggregated serving: other types over the layouts that did best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from shardplan.models.parallel import Parallelism
from shardplan.search.disagg import DisaggOutcome, search_disagg
from shardplan.search.disagg_combine import Combination
from shardplan.search.disagg_options import Options
from shardplan.search.disagg_question import DisaggQuestion
from shardplan.search.disagg_request import Sides
from shardplan.search.disagg_space import Judged, Pool
from shardplan.search.space import Choice

__all__ = ["BESIDE_LAYOUTS", "quantized_outcomes", "time_left"]

BESIDE_LAYOUTS = 8
"""Layouts of each pool that other types are priced on."""


def quantized_outcomes(
    sides: Sides, outcome: DisaggOutcome, time_limit_s: float | None
) -> list[tuple[str, str, DisaggOutcome]]:
    """(weights, cache, best deployments) of each other pair of types that both devices have.

    `time_limit_s`: for all of them together.
    """
    found: list[tuple[str, str, DisaggOutcome]] = []
    for weight, cache in dict.fromkeys(
        (choice.weight_dtype, choice.kv_dtype) for choice in sides.decode.beside
    ):
        question = _narrowed(sides, outcome, weight, cache)
        if question is not None:
            left_s = time_left(time_limit_s, [one for _, _, one in found])
            found.append((weight, cache, search_disagg(question, time_limit_s=left_s)))
    return found


def time_left(limit_s: float | None, outcomes: Iterable[DisaggOutcome]) -> float | None:
    """Seconds of a limit that these searches have left; None without a limit."""
    return None if limit_s is None else max(limit_s - sum(one.wall_s for one in outcomes), 0.0)


def _narrowed(
    sides: Sides, outcome: DisaggOutcome, weight: str, cache: str
) -> DisaggQuestion | None:
    """The question at other types, of the best layouts; None where a device lacks one."""
    question = outcome.question
    pools = []
    for pool, resolved, options, index in (
        (question.prefill, sides.prefill, outcome.prefill.options, "prefill"),
        (question.decode, sides.decode, outcome.decode.options, "decode"),
    ):
        device = pool.cluster.device
        if weight not in device.weight_dtypes or cache not in device.kv_dtypes:
            return None
        choices = tuple(
            replace(choice, weight_dtype=weight, kv_dtype=cache) for choice in resolved.choices
        )
        pools.append(_of_layouts(pool, choices, _best_layouts(outcome.kept, options, index)))
    return replace(question, prefill=pools[0], decode=pools[1])


def _best_layouts(
    kept: Iterable[Combination], options: Options, role: str
) -> tuple[Parallelism, ...]:
    """Layouts of the best deployments, in their order."""
    ranked = dict.fromkeys(options.layout(getattr(one, role)) for one in kept if one.feasible)
    return tuple(ranked)[:BESIDE_LAYOUTS]


def _of_layouts(pool: Pool, choices: tuple[Choice, ...], layouts: tuple[Parallelism, ...]) -> Pool:
    return replace(
        pool,
        choices=choices,
        layouts=tuple(Judged(par) for par in layouts),
        sizes=tuple(sorted({par.ranks for par in layouts})),
    )
