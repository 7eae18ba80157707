"""What no deployment can do better: bounds on pairs of instances, priced or not.

p and q are the seconds that a card of a prefill and of a decode instance is taken by a request, s
the seconds of a prompt alone, t those of a decode step, d those of all steps after the first, O
output tokens, C requests in flight. With N cards of both pools, or N_P and N_D apart:

    rate   <= N / (p / u + q), or min(N_P u / p, N_D / q)      rate <= C / (s + t + d)
    latency >= s + t + d                                       cards >= rate asked * (p / u + q)

with u the most that prefill instances may be used: 1, but where nothing bounds their queue
(`shardplan.costmodel.disagg_serve`).

Of layouts that were not priced all of them are at least what the device's peak leaves of them
(`shardplan.search.bounds`): f operations a token, I' computed prompt tokens, at F a rank

    p >= I' f / F      q >= O f / F
    s >= I' f / (tp pp cp F)      t >= f / (tp F)      d >= (O - 1) f / (tp F)

(a step of k + 1 verified tokens gives at most as many).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from shardplan.costmodel.disagg import unbounded_utilisation
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.step_mix import computed_prompt
from shardplan.models.parallel import Parallelism
from shardplan.search.bounds import layer_flop_per_token, peak_flop_per_s
from shardplan.search.disagg_options import Options, Priced
from shardplan.search.disagg_question import DisaggQuestion
from shardplan.search.disagg_space import Pool

__all__ = ["Floor", "floor_of", "floors", "most_later", "most_of", "most_unreached", "peak_floor"]

_SLACK = 1.0 + 1e-6
"""Bounds are wide by this, so that rounding rules nothing out."""


class Floor(NamedTuple):
    """The least of some instances of one pool, or of each of many `[options]`."""

    card_s: ArrayLike = math.inf
    """Seconds that a card is taken by a request; inf where there are no instances."""
    alone_s: ArrayLike = math.inf
    """Seconds of one prompt, or of a decode step."""
    rest_s: ArrayLike = math.inf
    """Of all decode steps of a request after the first."""

    def either(self, other: Floor) -> Floor:
        """Of both together."""
        return Floor(*map(np.minimum, self, other))


def floors(options: Options, role: str) -> Floor:
    """Of each priced option."""
    columns = options.columns
    if role == "prefill":
        return Floor(columns["slow_s"], columns["alone_s"], np.zeros(()))
    return Floor(columns["slow_s"], columns["step_s"], columns["later_s"])


def floor_of(options: Options, role: str) -> Floor:
    """The least of priced options."""
    if not options.size:
        return Floor()
    return Floor(*(float(np.min(one)) for one in floors(options, role)))


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
            found = found.either(Floor(prompt * token_s, alone_s, 0.0))
        else:
            each_s, later = token_s / par.tp, work.output_len - 1.0
            found = found.either(Floor(work.output_len * token_s, each_s, later * each_s))
    return found


def most_of(question: DisaggQuestion, prefill: Floor, decode: Floor) -> Array:
    """An objective that no deployment of instances above these floors exceeds; -inf for none.

    Of the objective `cards`: minus the fewest cards, by their price. The floors broadcast.
    """
    p, q = np.asarray(prefill.card_s), np.asarray(decode.card_s)
    demand, allowed_s = question.demand, question.most_s[0]
    first_s = prefill.alone_s + as_array(decode.alone_s) + question.link.latency_s
    latency_s = first_s + decode.rest_s
    with np.errstate(invalid="ignore", divide="ignore"):
        if demand.in_flight is None and demand.mean_ttft_s is None:
            p = p / unbounded_utilisation()
        if question.shared:
            rate = question.cards / (p + q)
        else:
            rate = np.minimum(question.prefill.cards / p, question.decode.cards / q)
        if demand.in_flight is not None:
            rate = np.minimum(rate, demand.in_flight / latency_s)
        asked = question.decode.workload.request_rate or 0.0
        able = (rate * _SLACK >= asked) & (rate > 0.0) & (first_s <= allowed_s * _SLACK)
        if question.objective == "cards":
            found = -_least_spent(question, asked * p, asked * q)
        elif question.objective == "latency":
            found = _SLACK / latency_s
        else:
            found = _SLACK * rate * question.decode.workload.output_len
    return np.where(able, found, -math.inf)


def _least_spent(question: DisaggQuestion, prefill: Array, decode: Array) -> Array:
    """The least that so many cards of both pools cost; whole cards where all cost one."""
    least = question.spent(prefill, decode) / _SLACK
    whole = np.ceil(least) if question.prices == (1.0, 1.0) else least
    return np.asarray(np.maximum(sum(question.prices), whole))


def most_unreached(question: DisaggQuestion, prefill: Priced, decode: Priced) -> float:
    """The same of every pair with a layout that was not priced."""
    one, two = question.prefill, question.decode
    priced = floor_of(prefill.options, one.role), floor_of(decode.options, two.role)
    left = peak_floor(one, prefill.unreached), peak_floor(two, decode.unreached)
    return float(
        max(
            most_of(question, left[0], priced[1].either(left[1])),
            most_of(question, priced[0], left[1]),
        )
    )


def most_later(question: DisaggQuestion, late: float) -> float:
    """The most of deployments whose decode instances are cut so that their steps are slower.

    With C requests in flight such steps may keep a limit on TTFT that faster ones break, of which
    `late` is the largest objective: a slower one has no larger one, but it may need fewer cards.
    """
    demand = question.demand
    if demand.in_flight is None or demand.mean_ttft_s is None:
        return -math.inf
    if question.objective == "cards":
        return -float(question.prefill.sizes[0] + question.decode.sizes[0])
    return late
