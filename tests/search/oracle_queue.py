"""What the oracle of the search knows of requests at a rate, of all points of a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shardplan.costmodel.run_out import run_out
from shardplan.search.evaluate import LayoutScorer
from shardplan.search.space import Choice

__all__ = ["queued_of"]

_TOLD = ("ttft_mean_s", "ttft_p99_s", "tpot_p99_s")


def queued_of(
    scorer: LayoutScorer, choice: Choice, grid: Sequence[tuple[int, int]], left: float
) -> dict[tuple[int, int], dict[str, float]]:
    """What clients measure at the rate, or of a closed loop, by slots and step size.

    `left`: the share of the replicas that serve. Zeros where the question limits none of it.
    """
    question = scorer.question
    rate = question.workload.request_rate
    if (rate is None and not question.limits.has_tails) or not left:
        return {at: dict.fromkeys(_TOLD, 0.0) for at in grid}
    slots, tokens = (np.array([float(one[axis]) for one in grid]) for axis in (0, 1))
    tokens = np.maximum(tokens, slots * (1 + scorer.parallel.mtp))
    given = scorer.serving_input(choice, slots, tokens)
    run = run_out(scorer.model_for(choice), given, request_rate=rate or math.inf, left=left)
    found = {name: getattr(run, name) for name in _TOLD}
    if rate is None:
        found["ttft_mean_s"] = np.zeros(len(grid))
    return {at: {name: float(found[name][i]) for name in _TOLD} for i, at in enumerate(grid)}
