"""The winner's confidence: its steady state priced once more, with every kernel's section told."""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.bulk import Dtypes, Fleet
from shardplan.costmodel.confidence import serving_confidence
from shardplan.costmodel.serving import serve
from shardplan.search.evaluate import LayoutScorer
from shardplan.search.how_sure import confidence_summary
from shardplan.search.kept import Kept
from shardplan.search.plan import Confidence

__all__ = ["plan_confidence"]


def plan_confidence(scorer: LayoutScorer, best: Kept) -> Confidence:
    """What the performance of the winner rests on, its band and its weakest part."""
    question, choice = scorer.question, best.choice
    one = np.zeros(1, dtype=np.int64)
    dtypes = Dtypes(choice.weight_dtype, choice.kv_dtype, choice.attention)
    fleet = Fleet.of([scorer.model_for(choice)], one, [dtypes], one)
    batch, chunk = np.full(1, float(best.batch)), np.full(1, float(best.chunk))
    given = scorer.serving_input(choice, batch, chunk)
    sure = serving_confidence(fleet, given, serve(fleet, given))
    cluster = question.cluster
    found = confidence_summary(sure, device=cluster.device.name, cluster=cluster.name)
    low, high = found.pop("low_factor"), found.pop("high_factor")
    rate, tpot_s = best.columns["output_tokens_per_s"], best.columns["tpot_s"]
    return Confidence(
        output_tokens_per_s_low=rate / high,
        output_tokens_per_s_high=rate / low,
        tpot_low_s=tpot_s * low,
        tpot_high_s=tpot_s * high,
        **found,
    )
