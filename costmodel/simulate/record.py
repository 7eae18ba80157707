"""What a simulation is remembered by, in bounded memory.

    TTFT      first token - arrival          TPOT   (end - first token) / (output tokens - 1)
    rates     requests and tokens that ended, over the time from the first counted arrival to the
              last end
    goodput   requests a second that meet both limits of the SLO, those with a single token by TTFT
    KV        blocks in use over all blocks, while steps run, weighted by time
    saturated an open loop whose queue grew over its second half by more than a fiftieth of the
              requests that came then and by more than chance (three standard deviations of their
              number, whose variance over its mean is that of gaps over their mean squared): it is
              served at the rate of that half

The first `warmup` requests are simulated and not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from shardplan.costmodel.simulate.request import Request
from shardplan.costmodel.simulate.sketch import Course, Spread
from shardplan.costmodel.simulate.unit import Lane, Unit

__all__ = ["COLUMNS", "Limits", "Mark", "Recorder", "row_of", "saturation"]

COLUMNS = (
    "request",
    "engine",
    "arrival_s",
    "first_token_s",
    "end_s",
    "input_tokens",
    "output_tokens",
    "preemptions",
)


class Limits(NamedTuple):
    """Upper limits of a request's TTFT and TPOT; None: any."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def meets(self, ttft_s: float, tpot_s: float) -> bool:
        """Whether a request is as good as asked."""
        return ttft_s <= (self.ttft_s or math.inf) and tpot_s <= (self.tpot_s or math.inf)


class Mark(NamedTuple):
    """How far a run had come."""

    now_s: float
    arrived: int
    done: int
    waiting: int


def row_of(request: Request) -> str:
    """A request as a line of CSV."""
    return (
        f"{request.number},{request.unit},{request.arrival_s:.10g},{request.first_s:.10g},"
        f"{request.end_s:.10g},{request.input_len},{request.output_len},{request.preempted}\n"
    )


def saturation(marks: list[Mark], uneven: float = 1.0) -> dict[str, float] | None:
    """Rates offered and served of the second half, where the queue grew in it; else None.

    `uneven`: variance of the gaps between arrivals over their mean squared; 1 of random ones.
    """
    if not marks:
        return None
    last = marks[-1]
    half = min(marks, key=lambda one: abs(one.arrived - last.arrived / 2.0))
    came, span = last.arrived - half.arrived, last.now_s - half.now_s
    grown = last.waiting - half.waiting
    if span <= 0.0 or grown <= max(0.02 * came, 3.0 * math.sqrt(came * uneven)):
        return None
    return {
        "offered_requests_per_s": came / span,
        "served_requests_per_s": (last.done - half.done) / span,
        "waiting": float(last.waiting),
    }


@dataclass(slots=True)
class _Steps:
    """Counts of steps of all units."""

    decode: int = 0
    mixed: int = 0
    decode_s: float = 0.0
    mixed_s: float = 0.0
    sequences: float = 0.0
    prompt_tokens: int = 0


class Recorder:
    """Keeps figures of the requests and steps of a run.

    `blocks` of all engines are told before the run. `rows` and `steps` are told every request and
    every step as it ends.
    """

    def __init__(
        self,
        *,
        limits: Limits = Limits(),  # noqa: B008  immutable
        warmup: int = 0,
        rows: Callable[[Request], None] | None = None,
        steps: Callable[[Unit, Lane], None] | None = None,
    ) -> None:
        self.blocks = 1
        self._limits, self._warmup = limits, warmup
        self._rows, self._told = rows, steps
        self.ttft, self.tpot, self.end_to_end = Spread(), Spread(), Spread()
        self.course = Course()
        self.kv_peak = 0.0
        self.steps = _Steps()
        self.requests = self.preemptions = self.preempted = self.good = 0
        self.input_tokens = self.output_tokens = 0
        self._first_s, self._last_s = math.inf, 0.0

    def step(self, unit: Unit, lane: Lane) -> None:
        """Count a step, or decode steps in a row, that ends."""
        held = 0
        for engine in unit.engines:
            used = engine.blocks.in_use
            held += used
            share = used / engine.blocks.total
            self.kv_peak = max(self.kv_peak, share)
        share = held / (self.blocks * len(unit.lanes))
        self.course.add(lane.begin_s, lane.end_s, share)
        steps, span = self.steps, lane.end_s - lane.begin_s
        tokens = sum(batch.tokens for batch in lane.batches)
        if tokens:
            steps.mixed += 1
            steps.mixed_s += span
            steps.prompt_tokens += tokens
        else:
            steps.decode += lane.steps
            steps.decode_s += span
        steps.sequences += lane.steps * sum(batch.active for batch in lane.batches)
        if self._told is not None:
            self._told(unit, lane)

    def request(self, request: Request) -> None:
        """Count a request that has ended."""
        if self._rows is not None:
            self._rows(request)
        if request.number < self._warmup:
            return
        ttft = request.first_s - request.arrival_s
        later = request.output_len - 1
        tpot = (request.end_s - request.first_s) / later if later else 0.0
        self.requests += 1
        self.ttft.add(ttft)
        if later:
            self.tpot.add(tpot)
        self.end_to_end.add(request.end_s - request.arrival_s)
        self.good += self._limits.meets(ttft, tpot)
        self.preemptions += request.preempted
        self.preempted += request.preempted > 0
        self.input_tokens += request.input_len
        self.output_tokens += request.output_len
        self._first_s = min(self._first_s, request.arrival_s)
        self._last_s = max(self._last_s, request.end_s)

    @property
    def span_s(self) -> float:
        """From the first counted arrival to the last end."""
        return max(self._last_s - self._first_s, 0.0)

    def figures(self) -> dict[str, Any]:
        """All figures by name; seconds, tokens and their rates."""
        span, steps = self.span_s or math.nan, self.steps
        return {
            "requests": self.requests,
            "duration_s": span,
            "requests_per_s": self.requests / span,
            "input_tokens_per_s": self.input_tokens / span,
            "output_tokens_per_s": self.output_tokens / span,
            "goodput_requests_per_s": self.good / span,
            "good_share": self.good / max(self.requests, 1),
            "slo": self._limits._asdict(),
            "ttft_s": self.ttft.figures(),
            "tpot_s": self.tpot.figures(),
            "end_to_end_s": self.end_to_end.figures(),
            "preemptions": self.preemptions,
            "preempted_requests": self.preempted,
            "kv": {"mean": self._kv_mean(), "peak": self.kv_peak},
            "steps": {
                "decode": steps.decode,
                "mixed": steps.mixed,
                "decode_mean_s": steps.decode_s / steps.decode if steps.decode else math.nan,
                "mixed_mean_s": steps.mixed_s / steps.mixed if steps.mixed else math.nan,
                "decoding_sequences_mean": steps.sequences / max(steps.decode + steps.mixed, 1),
                "prompt_tokens": steps.prompt_tokens,
            },
        }

    def _kv_mean(self) -> float:
        cells = self.course.means()
        last = self.course.last_s
        if not cells or last <= 0.0:
            return math.nan
        width = self.course.width_s
        return sum(share * min(width, last - begin) for begin, share in cells) / last
