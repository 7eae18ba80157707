"""What no deployment can do better: bounds on pairs of instances, priced or not.

p and q are the seconds that a card of a prefill and of a decode instance is taken by a request, s
the seconds of a prompt alone, t those of a decode step, d those of all steps after the first, O
output tokens, C requests in flight. With N cards of both pools, or N_P and N_D apart:

    rate   <= N / (p + q), or min(N_P / p, N_D / q)      rate <= C / (s + t + d)
    latency >= s + t + d                                 cards >= rate asked * (p + q)

p, q, s, t and d of layouts that were not priced are at least what the device's peak leaves of them
(`shardplan.search.bounds`): f operations a token, I' computed prompt tokens, at F a rank

    p >= I' f / F      q >= O f / F
    s >= I' f / (tp pp cp F)      t >= f / (tp F)      d >= (O - 1) f / (tp F)

(a step of k + 1 verified tokens gives at most as many).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from shardplan.costmodel.step_mix import computed_prompt
from shardplan.models.parallel import Parallelism
from shardplan.search.bounds import layer_flop_per_token, peak_flop_per_s
from shardplan.search.disagg_combine import DisaggQuestion
from shardplan.search.disagg_options import Options, Priced
from shardplan.search.disagg_space import Pool

__all__ = ["Floor", "floor_of", "most_of", "most_unreached", "peak_floor"]

_SLACK = 1.0 + 1e-6
"""Bounds are wide by this, so that rounding rules nothing out."""


class Floor(NamedTuple):
    """The least of some instances of one pool."""

    card_s: float = math.inf
    """Seconds that a card is taken by a request; inf where there are no instances."""
    alone_s: float = math.inf
    """Seconds of one prompt, or of a decode step."""
    later_s: float = math.inf
    """Decode: seconds of all steps of a request after the first."""

    def either(self, other: Floor) -> Floor:
        """Of both together."""
        return Floor(*map(min, self, other))


def floor_of(options: Options, role: str) -> Floor:
    """The least of priced options."""
    if not options.size:
        return Floor()
    names = ("service_s", "service_s") if role == "prefill" else ("step_s", "later_s")
    return Floor(*(float(options.columns[name].min()) for name in ("slow_s", *names)))


def peak_floor(pool: Pool, layouts: Iterable[Parallelism]) -> Floor:
    """What no instance of these layouts can do with less, at the device's peak."""
    found, work = Floor(), pool.workload
    device = pool.cluster.device
    peak = max(peak_flop_per_s(device, choice.weight_dtype) for choice in pool.choices)
    token_s = layer_flop_per_token(pool.spec) / peak
    prompt = float(computed_prompt(work.input_len, work.prefix_hit))
    for par in layouts:
        if pool.role == "prefill":
            alone_s = prompt * token_s / (par.tp * par.pp * par.cp)
            found = found.either(Floor(prompt * token_s, alone_s))
        else:
            each_s, later = token_s / par.tp, work.output_len - 1.0
            found = found.either(Floor(work.output_len * token_s, each_s, later * each_s))
    return found


def most_of(question: DisaggQuestion, prefill: Floor, decode: Floor) -> float:
    """An objective that no deployment of instances above these floors exceeds; -inf for none.

    Of the objective `cards`: minus the fewest cards.
    """
    demand, limits = question.demand, question.limits
    if not (math.isfinite(prefill.card_s) and math.isfinite(decode.card_s)):
        return -math.inf
    first_s = prefill.alone_s + decode.alone_s
    latency_s = first_s + decode.later_s
    rate = _most_rate(question, prefill, decode)
    if demand.in_flight is not None:
        rate = min(rate, demand.in_flight / latency_s)
    asked = question.decode.workload.request_rate or 0.0
    if rate * _SLACK < asked or first_s > (limits.ttft_s or math.inf) * _SLACK:
        return -math.inf
    if question.objective == "cards":
        return -max(2.0, math.ceil(asked * (prefill.card_s + decode.card_s) / _SLACK))
    if question.objective == "latency":
        return _SLACK / latency_s
    return _SLACK * rate * question.decode.workload.output_len


def _most_rate(question: DisaggQuestion, prefill: Floor, decode: Floor) -> float:
    if question.shared:
        return question.cards / (prefill.card_s + decode.card_s)
    return min(question.prefill.cards / prefill.card_s, question.decode.cards / decode.card_s)


def most_unreached(question: DisaggQuestion, prefill: Priced, decode: Priced) -> float:
    """The same of every pair with a layout that was not priced."""
    one, two = question.prefill, question.decode
    priced = floor_of(prefill.options, one.role), floor_of(decode.options, two.role)
    left = peak_floor(one, prefill.unreached), peak_floor(two, decode.unreached)
    return max(
        most_of(question, left[0], priced[1].either(left[1])),
        most_of(question, priced[0], left[1]),
    )
