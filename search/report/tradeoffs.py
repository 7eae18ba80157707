"""What else there is: the Pareto plot, the next best strategies, other dtypes.

Of many trials a sample is drawn: every k-th feasible one in the order of the table, which is by
rank, so that good and bad ones are thinned alike. The page says how many are drawn of how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from shardplan.search.analyze import row_name
from shardplan.search.plan import Candidate, Performance, Plan, StrategyInfo
from shardplan.search.report.markup import Html, legend, table, tag
from shardplan.search.report.svg import Point, scale, scatter
from shardplan.search.report.words import gib, limit_time, number, signed_percent, time
from shardplan.search.trial_table import TrialTable

__all__ = [
    "alternatives_section",
    "quantization_section",
    "switches_section",
    "tradeoff_section",
]

MAX_POINTS = 2_000
MAX_FRONT = 400
MAX_ROWS = 40
_MS = 1e3
_Item = TypeVar("_Item")


def tradeoff_section(plan: Plan, trials: TrialTable) -> Html:
    """Throughput per card over time per output token: the trials, the front, the plan."""
    feasible = trials.only(trials.columns["feasible"])
    drawn = feasible.every(_stride(len(feasible), MAX_POINTS))
    cloud = _cloud(drawn)
    front = [_candidate_point(item) for item in _thin(plan.pareto, MAX_FRONT)]
    chosen = _point(f"This plan: {plan_name(plan)}", plan.performance)
    every = [*cloud, *front, chosen]
    limit = plan.request.limits.tpot_s
    axes = (
        scale([point.x for point in every], from_zero=False),
        scale([point.y for point in every], from_zero=True),
    )
    chart = scatter(
        f"Throughput per card over time per output token of {len(drawn):,} strategies",
        axes,
        cloud=cloud,
        front=front,
        line=_outline(front),
        chosen=chosen,
        limit=None if limit is None else (limit * _MS, f"TPOT limit {limit_time(limit)}"),
    )
    return tag(
        "section",
        tag("h2", "Trade-offs"),
        tag("p", _sample_sentence(len(trials), len(feasible), len(drawn))),
        tag(
            "p", "Point at a dot of the front, or go there with the Tab key.", class_="soft screen"
        ),
        chart,
        tag("p", f"Up: output tokens/s per card. {_x_label(axes[0].log)}.", class_="axis"),
        _legend(has_limit=limit is not None and limit * _MS <= axes[0].high),
        _front_details(plan),
    )


def strategy_name(strategy: StrategyInfo) -> str:
    """A strategy in a few words."""
    return row_name(strategy.model_dump())


def candidate_name(item: Candidate) -> str:
    """The same of a candidate, with its prefill instances where it has any."""
    if item.prefill is None:
        return strategy_name(item.strategy)
    return _pools_name(
        (item.prefill_instances, item.prefill), (item.decode_instances, item.strategy)
    )


def plan_name(plan: Plan) -> str:
    """The same of the plan itself."""
    if not plan.pools:
        return strategy_name(plan.strategy)
    return _pools_name(*((pool.instances, pool.strategy) for pool in plan.pools))


def _pools_name(*pools: tuple[int, StrategyInfo]) -> str:
    """`16P tp1 pp16 ... + 1D dp128 ...`."""
    return " + ".join(
        f"{count}{role} {strategy_name(way)}"
        for role, (count, way) in zip("PD", pools, strict=True)
    )


def _stride(count: int, most: int) -> int:
    return max(1, -(-count // most))


def _thin(items: Sequence[_Item], most: int) -> Sequence[_Item]:
    return items[:: _stride(len(items), most)]


def _sample_sentence(trials: int, feasible: int, drawn: int) -> str:
    """What the cloud shows of the trial table."""
    table_says = f"The trial table holds {trials:,} strategies, {feasible:,} of them feasible."
    if drawn == feasible:
        return f"{table_says} All feasible ones are drawn."
    step = _stride(feasible, MAX_POINTS)
    return (
        f"{table_says} {drawn:,} of them are drawn, one in {step} by rank, with the Pareto front"
        " and the plan besides."
    )


def _x_label(log: bool) -> str:
    return "Right: time per output token, ms" + (" (logarithmic)" if log else "")


def _cloud(rows: TrialTable) -> list[Point]:
    columns = rows.columns
    names = [
        row_name(dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    ]
    x = [tpot_s * _MS for tpot_s in columns["tpot_s"]]
    y = columns["output_tokens_per_s_per_card"]
    return [
        Point(x=x_value, y=y_value, title=_title(name, x_value, y_value))
        for name, x_value, y_value in zip(names, x, y, strict=True)
    ]


def _title(name: str, tpot_ms: float, rate: float) -> str:
    return f"{name}: {number(rate)} tokens/s per card, TPOT {tpot_ms:.3g} ms"


def _point(name: str, does: Performance) -> Point:
    x, y = does.tpot_s * _MS, does.output_tokens_per_s_per_card
    numbers = f"{number(y)} tokens/s a card, TPOT {time(does.tpot_s)}, TTFT {time(does.ttft_s)}"
    pools = tuple(name.replace(" + ", " +\n").splitlines())
    return Point(x=x, y=y, title=_title(name, x, y), lines=(numbers, *pools))


def _candidate_point(item: Candidate) -> Point:
    return _point(candidate_name(item), item.performance)


def _outline(front: Sequence[Point]) -> list[Point]:
    """The part of the front that is best in TPOT and throughput alone, TTFT left aside."""
    line: list[Point] = []
    for point in sorted(front, key=lambda point: (point.x, -point.y)):
        if not line or point.y > line[-1].y:
            line.append(point)
    return line


def _legend(*, has_limit: bool) -> Html:
    keys = [("chosen", "This plan"), ("front", "Pareto front (TTFT included)"), ("cloud", "Trials")]
    if has_limit:
        keys.append(("limit", "TPOT limit"))
    return legend((f"dot {style}", name) for style, name in keys)


def _candidate_rows(plan: Plan, items: Sequence[Candidate]) -> list[list[str]]:
    return [_row(plan, candidate_name(item), item.performance, item.memory_bytes) for item in items]


def _row(plan: Plan, name: str, does: Performance, memory_bytes: float) -> list[str]:
    """What a strategy does, against the plan."""
    own, rate = plan.performance.output_tokens_per_s_per_card, does.output_tokens_per_s_per_card
    change = signed_percent(rate / own - 1) if own else ""
    times = [time(does.ttft_s), time(does.tpot_s), time(does.end_to_end_s)]
    return [name, number(rate), change, *times, f"{gib(memory_bytes)} GiB"]


_HEADINGS = (
    "Strategy",
    "Tokens/s per card",
    "Against plan",
    "TTFT",
    "TPOT",
    "End to end",
    "Memory",
)


def _front_details(plan: Plan) -> Html:
    if not plan.pareto:
        return Html("")
    shown = _thin(plan.pareto, MAX_ROWS)
    whole = len(shown) == len(plan.pareto)
    caption = "Pareto front" if whole else f"{len(shown)} of {len(plan.pareto):,} on the front"
    return tag(
        "details",
        tag("summary", "The Pareto front as a table"),
        table(caption, _HEADINGS, _candidate_rows(plan, shown)),
    )


def alternatives_section(plan: Plan) -> Html:
    """The next best strategies, in the order of the objective."""
    if not plan.alternatives:
        return Html("")
    shown = plan.alternatives[:MAX_ROWS]
    left_out = len(plan.alternatives) - len(shown)
    fullest = max((row.total_bytes for row in plan.memory), default=0.0)
    own = _row(plan, f"This plan: {plan_name(plan)}", plan.performance, fullest)
    parts = [
        tag("h2", "Beside the next best"),
        tag("p", "The best strategy of each other layout, in the order of the objective."),
        table(
            "This plan and the next best strategies",
            _HEADINGS,
            [own, *_candidate_rows(plan, shown)],
            chosen=0,
        ),
    ]
    if left_out:
        parts.append(tag("p", f"{left_out:,} more are in plan.json.", class_="soft"))
    return tag("section", *parts)


def switches_section(plan: Plan) -> Html:
    """What the engine's switches would buy; never applied unasked."""
    if not plan.switches:
        return Html("")
    rows = []
    for item in plan.switches:
        gain = "" if item.gain is None else signed_percent(item.gain - 1)
        name = "not possible" if item.strategy is None else strategy_name(item.strategy)
        on = ["on" if value else "off" for value in (item.weight_prefetch, item.fused_collectives)]
        rows.append([*on, name, gain])
    return tag(
        "section",
        tag("h2", "What the engine's switches would buy"),
        tag(
            "p",
            "Weight prefetch brings weights into L2 behind other kernels; fused collectives run a"
            " product and its all_reduce as one kernel in prefill. Both rest on assumptions more"
            " than on measurements.",
        ),
        table(
            "Best strategy with switches on",
            ("Weight prefetch", "Fused collectives", "Strategy", "Objective"),
            rows,
            words=3,
        ),
    )


def quantization_section(plan: Plan) -> Html:
    """What other dtypes would buy; never applied unasked."""
    if not plan.quantization:
        return Html("")
    own = f"{plan.strategy.weight_dtype} weights, {plan.strategy.kv_dtype} KV cache"
    rows = []
    for item in plan.quantization:
        gain = "" if item.gain is None else signed_percent(item.gain - 1)
        nothing = "nothing fits or meets the limits"
        name = nothing if item.strategy is None else strategy_name(item.strategy)
        rows.append([item.weight_dtype, item.kv_dtype, name, gain])
    return tag(
        "section",
        tag("h2", "What other dtypes would buy"),
        tag(
            "p",
            f"The plan keeps {own}. Best strategy at other dtypes, and its objective against the"
            " plan's. Accuracy is not judged here.",
        ),
        table(
            "Best strategy at other dtypes",
            ("Weights", "KV cache", "Strategy", "Objective"),
            rows,
            words=3,
        ),
    )
