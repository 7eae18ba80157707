"""Robustness in words, for the terminal and the report alike."""

from __future__ import annotations

from collections.abc import Iterator

from shardplan.search.plan import Plan, StrategyInfo
from shardplan.search.plan_robustness import Flip, GroupRobustness, RobustChoice

__all__ = ["choice_sentence", "factor_words", "flips_of", "runner_words", "verdict"]

_CHOICES = ("attention", "weight_dtype", "kv_dtype", "collectives")
_SWITCHES = ("weight_prefetch", "fused_collectives")


def factor_words(factor: float | None) -> str:
    """A factor on a time: x1.25; a dash for none."""
    return "-" if factor is None else f"x{factor:.3g}" if factor < 1 else f"x{factor:.2f}"


def runner_words(flip: Flip, plan: Plan) -> str:
    """Who wins there in short, with what it chooses otherwise than the plan."""
    one = flip.strategy
    words = [deployed_words(one, flip.prefill, flip.prefill_instances, flip.decode_instances)]
    own = plan.strategy
    words += [str(getattr(one, n)) for n in _CHOICES if getattr(one, n) != getattr(own, n)]
    for name in _SWITCHES:
        if getattr(one, name) != getattr(own, name):
            words.append(f"{'with' if getattr(one, name) else 'without'} {name.replace('_', ' ')}")
    return ", ".join([*words, f"batch {one.batch}"])


def deployed_words(
    one: StrategyInfo, prefill: StrategyInfo | None, instances: int, others: int
) -> str:
    """A layout, or those of both pools with the counts of their instances."""
    words = one.parallelism().describe()
    if prefill is None:
        return words
    first = prefill.parallelism().describe()
    return f"{instances} prefill x ({first}) + {others} decode x ({words})"


def flips_of(row: GroupRobustness) -> Iterator[tuple[str, Flip]]:
    """The flips of a group with the direction of each, the nearer to no change first."""
    found = [("slower", row.slower), ("faster", row.faster)]
    known = [(name, flip) for name, flip in found if flip is not None]
    yield from sorted(known, key=lambda pair: max(pair[1].factor, 1.0 / pair[1].factor))


def verdict(plan: Plan) -> str:
    """Whether an error that the calibration's bands allow would change the ranking."""
    told = plan.robustness
    if told is None:
        return ""
    if not told.contenders:
        return "No other layout is there to win."
    near = [(row, flip) for row in told.groups for _, flip in flips_of(row) if flip.within_band]
    level = f"{told.level:.0%} bands"
    if not near:
        return f"No error of one cost group within the calibration's {level} changes the ranking."
    words = (f"{row.group} ({factor_words(flip.factor)})" for row, flip in near)
    return f"Errors within the calibration's {level} would change the ranking: {', '.join(words)}."


def choice_sentence(choice: RobustChoice) -> str:
    """What the robust plan gives up, and what for."""
    breaks = choice.nominal_breaks
    limits = f", where it breaks a limit in {breaks} of them" if breaks else ""
    left = f" ({choice.left_out} more leave nothing feasible)" if choice.left_out else ""
    nominal = choice.nominal_strategy
    words = deployed_words(
        nominal,
        choice.nominal_prefill,
        choice.nominal_prefill_instances,
        choice.nominal_decode_instances,
    )
    return (
        f"The robust plan gives up {choice.given_up:.1%} of the best objective at the prices as "
        f"they are. In {choice.scenarios} scenarios of the calibration's bands{left} it is at "
        f"worst {choice.robust_regret:.1%} below the best there ({choice.robust_worst}); the "
        f"nominal best ({words}, batch {nominal.batch}, chunk "
        f"{nominal.chunk}) is {choice.nominal_regret:.1%} below{limits}."
    )
