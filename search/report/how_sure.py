"""How sure the performance is: a bar of what its time rests on, the bands, the weakest part."""

from __future__ import annotations

from shardplan.search.plan import Plan
from shardplan.search.report.markup import Html, legend, table, tag
from shardplan.search.report.svg import Segment, bar
from shardplan.search.report.words import number, percent, time

__all__ = ["confidence_section"]

_STYLES = {"measured": "c0", "fitted": "c1", "derived": "c2", "assumed": "c3"}


def confidence_section(plan: Plan) -> Html:
    """Shares, bands and the weakest part with what to run; nothing in plans that do not tell."""
    sure = plan.confidence
    if sure is None:
        return Html("")
    shares = sure.basis.model_dump()
    segments = [
        Segment(share=share, style=_STYLES[kind], title=f"{kind}: {percent(share)}")
        for kind, share in shares.items()
    ]
    keys = [(_STYLES[kind], f"{kind} {percent(share)}") for kind, share in shares.items()]
    bands = (
        (
            "Output tokens/s",
            number(sure.output_tokens_per_s_low),
            number(plan.performance.output_tokens_per_s),
            number(sure.output_tokens_per_s_high),
        ),
        (
            "Time per output token",
            time(sure.tpot_low_s),
            time(plan.performance.tpot_s),
            time(sure.tpot_high_s),
        ),
    )
    weak = sure.weakest
    level = percent(sure.level)
    return tag(
        "section",
        tag("h2", "How sure"),
        tag("p", "What the time of an average step rests on:"),
        bar("Time of an average step by what it rests on", segments),
        legend(keys),
        table(f"Bands that hold {level} of true values", ("", "Low", "Plan", "High"), bands),
        tag(
            "p",
            f"Of all parts of a step, {weak.name} ({weak.kind}) widens these bands most, with"
            f" {percent(weak.error_share)} of what they add. To narrow them, ",
            _code(weak.advice),
            ".",
        ),
        tag("p", f"Its coefficients: {weak.source}.", class_="soft") if weak.source else "",
    )


def _code(advice: str) -> Html:
    """The sentence with its commands as code."""
    pieces = advice.split("`")
    return Html(
        "".join(
            tag("code", piece) if place % 2 else tag("span", piece)
            for place, piece in enumerate(pieces)
        )
    )
