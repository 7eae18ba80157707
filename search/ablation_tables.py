"""The ablation as Markdown, for `results/`: milliseconds, seconds and GiB, as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from shardplan.search.ablation_rows import Ablation
from shardplan.search.tables import rate_text

__all__ = ["to_markdown"]

_GIB = 2.0**30


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table; the first column holds words, the others numbers or words."""
    yield "| " + " | ".join(heads) + " |"
    yield "|---|" + "---:|" * (len(heads) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _steps(found: Ablation) -> Iterator[str]:
    heads = (
        "step",
        "split",
        "requests at once",
        "weights, GiB",
        "KV cache, GiB",
        "fullest card, GiB",
        "TTFT, ms",
        "TPOT, ms",
        "one request, s",
        "tokens/s",
        "gain",
    )
    yield from _table(
        heads,
        (
            (
                row.step + ("" if row.fits else " (does not fit)"),
                row.split,
                str(row.batch),
                f"{row.weights_bytes / _GIB:.1f}",
                f"{row.kv_cache_bytes / _GIB:.2f}",
                f"{row.fullest_bytes / _GIB:.1f} of {row.capacity_bytes / _GIB:.1f}",
                f"{row.ttft_s * 1e3:,.0f}",
                f"{row.tpot_s * 1e3:,.1f}",
                f"{row.end_to_end_s:,.2f}",
                rate_text(row.output_tokens_per_s),
                f"{row.speedup:,.2f}x",
            )
            for row in found.rows
        ),
    )


def _attention(found: Ablation) -> Iterator[str]:
    yield from _table(
        ("prompt tokens", "naive, ms", "flash, ms", "gain", "gain of the whole prefill"),
        (
            (
                f"{row.tokens}",
                f"{row.naive_s * 1e3:,.1f}",
                f"{row.flash_s * 1e3:,.1f}",
                f"{row.gain:.2f}x",
                f"{row.prefill_gain:.2f}x",
            )
            for row in found.attention
        ),
    )


def _lengths(found: Ablation) -> Iterator[str]:
    yield from _table(
        ("prompt tokens", "output tokens", "one request, s"),
        (
            (str(row.input_len), str(row.output_len), f"{row.end_to_end_s:.2f}")
            for row in found.lengths
        ),
    )


def _section(found: Ablation) -> Iterator[str]:
    yield f"## {found.cards} x {found.device} ({found.cluster}), engine {found.engine_profile}"
    yield ""
    yield (
        f"{found.input_len} prompt tokens, {found.output_len} output tokens. Each step is on top "
        "of the last, on the split that is fastest with it. Gain: time of one request, baseline "
        "over this step; of auto batching, tokens/s over the baseline's. Weights and cache are of "
        "all cards together."
    )
    yield ""
    yield from _steps(found)
    yield ""
    yield "Attention of one prompt, all layers:"
    yield ""
    yield from _attention(found)
    yield ""
    yield "Lengths at which one request takes about 8 s, with everything but batching:"
    yield ""
    yield from _lengths(found)
    yield ""
    yield from (f"- {note}" for note in found.notes)
    yield ""


def _command(found: Ablation) -> str:
    return (
        f"shardplan search --model {found.model} --cluster {found.cluster} --cards {found.cards} "
        f"--input-len {found.input_len} --output-len {found.output_len} "
        f"--engine-profile {found.engine_profile} --ablation"
    )


def to_markdown(ablations: Sequence[Ablation]) -> str:
    """The page of one model on one or more clusters, with the commands that print each table."""
    lines = [f"# What each feature buys: {ablations[0].model}", ""]
    lines += ["Priced by the cost model; nothing here was measured on a device.", ""]
    lines += [f"    {_command(found)}" for found in ablations]
    lines.append("")
    for found in ablations:
        lines += _section(found)
    return "\n".join(lines).rstrip() + "\n"
