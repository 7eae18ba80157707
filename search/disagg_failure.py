"""When no pair of pools serves: which pool binds, by how much, and what to try."""

from __future__ import annotations

import math
from collections import Counter

from shardplan.costmodel.disagg_serve import BOUNDS
from shardplan.models.errors import InfeasibleError
from shardplan.search.disagg import DisaggOutcome
from shardplan.search.disagg_combine import Combination
from shardplan.search.disagg_options import Priced
from shardplan.search.disagg_space import Pool
from shardplan.search.failure import out_of_time
from shardplan.search.only import only_words

__all__ = ["nothing_disaggregated"]

_GIB = 2.0**30


def nothing_disaggregated(outcome: DisaggOutcome, limit_s: float | None) -> InfeasibleError:
    """The error that says why; `limit_s`: the time limit of the search."""
    question = outcome.question
    if limit_s is not None and not outcome.complete:
        return out_of_time(limit_s, outcome.tally.evaluated)
    for pool, priced in ((question.prefill, outcome.prefill), (question.decode, outcome.decode)):
        if not priced.options.size:
            return _one_pool(outcome, pool, priced)
    if not outcome.kept:
        return _too_few(outcome)
    return _limit(outcome, outcome.kept[0])


def _one_pool(outcome: DisaggOutcome, pool: Pool, priced: Priced) -> InfeasibleError:
    """No instance of one role is possible."""
    first = pool.role == "prefill"
    name, what = ("ttft", "one prompt") if first else ("tpot", "a token")
    allowed = outcome.question.most_s[0 if first else 1]
    if getattr(outcome.question.limits, f"{name}_s") != allowed:
        name = f"{name}-p99"
    if math.isfinite(priced.least_s) and math.isfinite(allowed):
        return InfeasibleError(
            f"no {pool.role} instance meets the {_written(name)} limit",
            got=f"{pool.role} binds: {what} takes {priced.least_s * 1e3:.1f} ms at least, "
            f"{allowed * 1e3:.4g} ms allowed, {priced.least_s / allowed:.3g} times too slow",
            hint=f"try --{name}-ms {_enough_ms(outcome, pool)}, or more cards",
        )
    if math.isfinite(priced.least_bytes):
        room = pool.engine.memory_fraction * pool.cluster.device.hbm_bytes
        return InfeasibleError(
            f"no {pool.role} instance of {pool.spec.name} fits on {pool.cluster.name}",
            got=f"{pool.role} binds: memory, {priced.least_bytes / _GIB:.1f} GiB a card needed on "
            f"{max(pool.sizes, default=0)}, {room / _GIB:.1f} GiB may be used",
            hint=f"try about {_more_cards(outcome, pool, priced.least_bytes / room)}, or types of "
            "fewer bits",
        )
    reasons: Counter[str] = Counter()
    for (_, reason), count in priced.left_out.items():
        reasons[reason] += count
    held = only_words(pool.reach.only)
    removed = ", ".join(f"removed by {name} ({count})" for name, count in reasons.items())
    return InfeasibleError(
        f"no {pool.role} instance is legal on {pool.cards} cards of {pool.cluster.name}",
        got="; ".join(filter(None, (held, removed))),
        hint="try another number of cards or --serving agg"
        + (", or other sizes of --only" if held else ""),
    )


def _enough_ms(outcome: DisaggOutcome, pool: Pool) -> int:
    """A limit that the fastest instances meet: of TTFT, with transfer and first step."""
    if pool.role == "decode":
        return math.ceil(outcome.decode.least_s * 1e3) + 1
    seconds, other = outcome.prefill.least_s, outcome.decode
    if other.options.size:
        link = outcome.question.link
        sent_s = float(other.options.columns["bytes"].max()) / link.bytes_per_s
        seconds += float(other.options.columns["step_s"].min()) + link.latency_s + sent_s
    return math.ceil(seconds * 1e3) + 1


def _more_cards(outcome: DisaggOutcome, pool: Pool, over: float) -> str:
    """The option of cards that hold the weights `over` times as many as the largest instance."""
    cluster = pool.cluster
    node = cluster.ranks_per_node
    least = over * max(pool.sizes, default=1)
    inside = [size for size in cluster.rank_counts if node % size == 0 and size >= least]
    own = min(inside, default=math.ceil(least / node) * node)
    cards = own * 2 if outcome.question.shared else own
    if cards > node:
        cards = math.ceil(cards / node) * node
    elif cards not in cluster.rank_counts:
        cards = min(count for count in cluster.rank_counts if count >= cards)
    flag = "prefill-" if pool.role == "prefill" and not outcome.question.shared else ""
    nodes = -(-cards // node)
    more = f" --{flag}nodes {nodes}" if nodes > cluster.nodes else ""
    return f"--{flag}cards {cards}{more}"


def _too_few(outcome: DisaggOutcome) -> InfeasibleError:
    """Instances of both roles exist, but no pair of them fits or is legal together."""
    question = outcome.question
    least = [int(one.options.columns["cards"].min()) for one in (outcome.prefill, outcome.decode)]
    if question.shared and sum(least) > question.cards:
        over = sum(least) - question.cards
        return InfeasibleError(
            "both pools together need more cards",
            got=f"prefill binds with {least[0]} cards at least, decode with {least[1]}: "
            f"{sum(least)} of {question.cards}, {over} too many",
            hint=f"try --cards {sum(least)} or more, or --serving agg",
        )
    return InfeasibleError(
        "no prefill and decode instances are legal together within the cards",
        got=f"{outcome.prefill.options.size} prefill and {outcome.decode.options.size} decode "
        f"options on {question.cards} cards",
        hint="try more cards, or --serving agg",
    )


def _limit(outcome: DisaggOutcome, near: Combination) -> InfeasibleError:
    """Every deployment breaks the TTFT limit or serves too few requests."""
    question, columns = outcome.question, near.columns
    asked, allowed = question.decode.workload.request_rate, question.limits.ttft_s
    if near.limit == "rate" and asked is not None:
        most = max(one.columns["requests_per_s"] for one in outcome.kept if one.limit == "rate")
        pool = BOUNDS[int(columns["bound"])]
        return InfeasibleError(
            "no deployment serves the request rate",
            got=f"rate binds, by the {pool} pool: saturated at {most:.4g} requests/s, {asked:g} "
            f"asked, {asked / max(most, 1e-12):.3g} times more, on {question.cards} cards",
            hint=f"try --rate {most * 0.999:.3g}, or more cards",
        )
    name = near.limit.replace("_", "-")
    if name == "ttft-p99":
        allowed = question.limits.ttft_p99_s
    column = f"{near.limit}_s"
    near = min(outcome.kept, key=lambda one: one.columns[column])
    ttft = near.columns[column]
    return InfeasibleError(
        f"no deployment meets the {_written(name)} limit",
        got=f"{name} binds: the nearest has {ttft * 1e3:.1f} ms, "
        f"{(allowed or ttft) * 1e3:.4g} ms allowed, with "
        f"{near.prefill_instances} prefill and {near.decode_instances} decode instances",
        hint=f"try --{name}-ms {math.ceil(ttft * 1e3) + 1}, more cards, or fewer requests in "
        "flight",
    )


def _written(name: str) -> str:
    """A limit as it is told: TTFT, TTFT p99."""
    what, _, rest = name.partition("-")
    return f"{what.upper()} {rest}".strip()
