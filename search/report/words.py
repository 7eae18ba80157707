"""A plan in words: numbers as people read them, the strategy and the certificate as sentences."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Mapping
from decimal import Decimal

from shardplan.search.plan import Plan, Pool, StrategyInfo

__all__ = [
    "certificate_sentences",
    "command",
    "count_text",
    "gib",
    "limit_time",
    "milliseconds",
    "number",
    "percent",
    "pool_sentences",
    "signed_percent",
    "strategy_sentences",
    "time",
]

_OBJECTIVES = {
    "throughput": "the highest throughput",
    "latency": "the lowest latency",
    "cards": "the fewest cards",
    "cost": "the least cost a token",
}
_MODEL_FILES = (".json", ".onnx")
_MOST_IN_FULL = 10**12


def number(value: float) -> str:
    """Three significant digits, all of them from a hundred on: 0.0123, 12.3, 677, 21,665."""
    size = abs(value)
    for limit, digits in ((100.0, 0), (10.0, 1), (1.0, 2), (0.1, 3)):
        if size >= limit:
            return f"{value:,.{digits}f}"
    return f"{value:.3g}"


def time(seconds: float) -> str:
    """Seconds in the unit that suits, three digits: 24.2 s, 798 ms, 3.10 µs."""
    for unit_s, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit_s:
            return f"{number(seconds / unit_s)} {unit}"
    return f"{number(seconds / 1e-6)} µs" if seconds else "0"


def limit_time(seconds: float) -> str:
    """A limit as it was asked for: 2 s, 50 ms, 1.25 s."""
    return f"{seconds:.6g} s" if seconds >= 1 else f"{seconds * 1e3:.6g} ms"


def milliseconds(seconds: float) -> str:
    """Seconds in ms for a column of a table; an en dash for none at all."""
    if 0 < seconds < 1e-6:  # noqa: PLR2004
        return "<0.001"
    return number(seconds * 1e3) if seconds else "\N{EN DASH}"


def gib(size_bytes: float) -> str:
    """Bytes in GiB, one decimal; 0.05 GiB keeps two."""
    value = size_bytes / 2**30
    return f"{value:,.1f}" if abs(value) >= 1 or not value else f"{value:.2f}"


def percent(share: float) -> str:
    """A share of 1: 12 %, 3.4 %, 0.5 %, <0.1 %."""
    value = 100 * share
    if 0 < value < 0.05:  # noqa: PLR2004
        return "<0.1 %"
    return f"{value:.0f} %" if abs(value) >= 10 or not value else f"{value:.1f} %"  # noqa: PLR2004


def signed_percent(change: float) -> str:
    """A relative change with its sign: +32 %, -3.4 %, 0 %."""
    if abs(change) < 5e-4:  # noqa: PLR2004
        return "0 %"
    return ("+" if change > 0 else "\N{MINUS SIGN}") + percent(abs(change))


def count_text(count: int) -> str:
    """A whole number in full below a million million, else three digits: 43,956, 6.42e+25."""
    return f"{count:,}" if count < _MOST_IN_FULL else f"{Decimal(count):.3g}".lower()


def _plural(count: int, word: str, many: str = "") -> str:
    return f"{count:,} {word}" if count == 1 else f"{count_text(count)} {many or word + 's'}"


def strategy_sentences(plan: Plan) -> list[str]:
    """What is deployed, and how it is split, of a plan without pools."""
    strategy, cluster = plan.strategy, plan.cluster
    idle = plan.request.cards - strategy.ranks
    servers = f"{cluster.nodes:,} x " if cluster.nodes > 1 else ""
    used = f"The plan uses {_plural(strategy.ranks, 'rank')} of {servers}{cluster.title}"
    return [
        used + (f"; {_plural(idle, 'rank')} stay free." if idle > 0 else "."),
        *_split_sentences(strategy),
        f"Up to {_plural(strategy.batch, 'sequence')} decode together in each group, and a step"
        f" takes at most {strategy.chunk:,} tokens.",
        *_choice_sentences(strategy),
    ]


def pool_sentences(pool: Pool) -> Iterator[str]:
    """The same of one pool."""
    way = pool.strategy
    yield (
        f"{_plural(pool.instances, f'{pool.role} instance')} of {_plural(way.ranks, 'rank')}"
        f"{' each' if pool.instances > 1 else ''}."
    )
    yield from _split_sentences(way)
    if pool.role == "prefill":
        yield f"A step takes at most {way.chunk:,} tokens of prompts."
    else:
        yield f"Up to {_plural(way.batch, 'sequence')} decode together in each group."
    yield from _choice_sentences(way)


def _choice_sentences(strategy: StrategyInfo) -> Iterator[str]:
    """Number formats, kernels, algorithms."""
    yield (
        f"Weights are {strategy.weight_dtype}, the KV cache is {strategy.kv_dtype}, attention is"
        f" {_attention(strategy.attention)}."
    )
    if strategy.collectives != "auto":
        yield f"Nodes exchange by HCCL's {strategy.collectives} algorithm."


def _attention(kernel: str) -> str:
    return "FlashAttention" if kernel == "flash" else "unfused (scores are written to memory)"


_MODULE_NAMES = {
    "o": "attention output",
    "ffn": "dense feed-forward network",
    "shared": "shared expert",
    "head": "LM head",
    "embed": "embedding table",
}


def _split_sentences(strategy: StrategyInfo) -> list[str]:
    """Each axis that is larger than one, and what it means."""
    sentences = []
    group = strategy.tp * strategy.pp * strategy.cp
    if strategy.dp > 1:
        sentences.append(
            f"{strategy.dp} data-parallel groups of {_plural(group, 'rank')} serve requests side"
            f" by side (dp {strategy.dp})."
        )
    if strategy.tp > 1:
        scattered = ", with tokens scattered between them (sequence parallel)"
        sentences.append(
            f"Every matrix is split over {strategy.tp} ranks (tp {strategy.tp})"
            f"{scattered if strategy.sp else ''}."
        )
    if strategy.pp > 1:
        layers = " + ".join(_runs(strategy.stage_layers))
        sentences.append(
            f"Layers form {strategy.pp} pipeline stages (pp {strategy.pp}): {layers} layers."
        )
    if strategy.cp > 1:
        sentences.append(f"Each context is split over {strategy.cp} ranks (cp {strategy.cp}).")
    if strategy.ep > 1:
        how = {
            "allgather": "every rank gathers all tokens",
            "alltoall": "tokens are sent to their experts, all to all",
        }[strategy.exchange]
        sentences.append(f"Experts are spread over {strategy.ep} ranks (ep {strategy.ep}); {how}.")
    if strategy.mtp:
        sentences.append(
            f"Each decode step verifies {_plural(strategy.mtp, 'token')} that the model's"
            f" prediction layer drafted, beside its own (mtp {strategy.mtp})."
        )
    sentences += [
        f"The {name} is split over {_plural(ranks, 'rank')} ({module}_tp {ranks})."
        for module, name in _MODULE_NAMES.items()
        if (ranks := int(getattr(strategy, f"{module}_tp"))) not in (0, strategy.tp)
    ]
    return sentences or ["Nothing is split: one rank holds the whole model."]


def _runs(counts: tuple[int, ...]) -> Iterator[str]:
    """Numbers in a row, three or more that are alike as `13 x 4`."""
    for count, same in itertools.groupby(counts):
        many = len(list(same))
        if many > 2:  # noqa: PLR2004
            yield f"{many} x {count}"
        else:
            yield from [str(count)] * many


def certificate_sentences(plan: Plan) -> list[str]:
    """Why nothing in the stated space is better, or that this is not known."""
    held = plan.certificate
    goal = _OBJECTIVES[plan.request.objective]
    searched = (
        f"The {held.engine} engine looked for {goal} in a space of"
        f" {_plural(held.space_size, 'strategy', 'strategies')}:"
        f" {held.evaluated:,} were priced and {count_text(held.pruned)} ruled out unpriced."
    )
    refused = sum(held.infeasible.values())
    sentences = [searched]
    if refused:
        sentences.append(f"{refused:,} of those priced were refused{_listed(held.infeasible)}.")
    sentences.append(_verdict(plan))
    sentences.append(f"The search took less than {held.wall_s:,.0f} s.")
    return sentences


def _verdict(plan: Plan) -> str:
    held = plan.certificate
    if held.gap is None or held.bound is None:
        return "This engine samples and proves no bound: a better strategy may exist in the space."
    bound = f"no strategy of it can serve more than {number(held.bound)} output tokens/s"
    if plan.request.objective == "latency" and held.bound > 0:
        bound = f"no strategy of it can finish a request within less than {time(1 / held.bound)}"
    if held.gap == 0:
        return f"Nothing in this space is better: {bound}, and the plan reaches that (gap 0)."
    return f"Nothing in this space is more than {percent(held.gap)} better: {bound}."


def _listed(counts: Mapping[str, int]) -> str:
    parts = [f"{name} {count_text(count)}" for name, count in counts.items() if count]
    return f" ({', '.join(parts)})" if parts else ""


def command(plan: Plan) -> list[str]:
    """The command line that makes this plan again: the command, then each option with its value."""
    pairs = [shlex.join(pair) for pair in _options(plan)]
    return ["shardplan search", *pairs, *(["--robust"] if plan.request.robust else [])]


def _options(plan: Plan) -> Iterator[tuple[str, str]]:
    """Every option of the request; a model read from a file by its path, a preset by its name."""
    asked, workload, limits = plan.request, plan.request.workload, plan.request.limits
    source = plan.model.source
    from_file = source.endswith(_MODEL_FILES) and "://" not in source
    pairs: dict[str, str | float | None] = {
        "--model": source if from_file else plan.model.name,
        "--cluster": plan.cluster.name,
        "--nodes": plan.cluster.nodes,
        "--cards": asked.cards,
        "--input-len": workload.input_len,
        "--output-len": workload.output_len,
        "--concurrency": workload.concurrency,
        "--rate": workload.request_rate,
        "--ttft-ms": None if limits.ttft_s is None else limits.ttft_s * 1e3,
        "--tpot-ms": None if limits.tpot_s is None else limits.tpot_s * 1e3,
        "--objective": asked.objective,
        "--weight-dtype": asked.weight_dtype,
        "--kv-dtype": asked.kv_dtype,
        "--attention": asked.attention,
        "--collectives": None if asked.collectives == "auto" else asked.collectives,
        "--engine": asked.engine,
        "--engine-profile": asked.engine_profile,
        "--serving": asked.serving if asked.serving != "agg" else None,
        **_prefill_options(plan),
        "--trials": asked.trials,
        "--seed": asked.seed,
    }
    for option, value in pairs.items():
        if value is not None:
            yield option, f"{value:.12g}" if isinstance(value, float) else str(value)


def _prefill_options(plan: Plan) -> dict[str, str | float | None]:
    """Where prefill instances run, where that is a cluster of their own."""
    own = [pool.cluster for pool in plan.pools if pool.role == "prefill"]
    if not own or plan.request.prefill_cards is None:
        return {}
    return {
        "--prefill-cluster": own[0].name,
        "--prefill-nodes": own[0].nodes,
        "--prefill-cards": plan.request.prefill_cards,
        "--prefill-device": own[0].device,
    }
