"""A simulation and a workload for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shardplan.search.tables import add, new_table, rate_text, seconds_text, show

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_description", "print_simulation"]

_SPREAD = ("mean", "p50", "p90", "p99", "max")


def _cell(value: float, seconds: bool) -> str:
    if value != value:  # noqa: PLR0124  no value
        return "-"
    return seconds_text(value) if seconds else f"{value:,.0f}"


def _spreads(title: str, rows: Mapping[str, Mapping[str, float]], *, seconds: bool) -> Any:
    table = new_table(title, "what", *_SPREAD, right=_SPREAD)
    for name, figures in rows.items():
        add(table, name, *(_cell(figures[one], seconds) for one in _SPREAD))
    return table


def print_simulation(found: Mapping[str, Any], console: Console) -> None:
    """What requests saw, what was served, and what the engines did."""
    times = {"TTFT": "ttft_s", "TPOT": "tpot_s", "one request": "end_to_end_s"}
    rows = {name: found[key] for name, key in times.items()}
    show(console, _spreads("what requests see", rows, seconds=True))
    table = new_table("what is served", "what", "value", right=("value",))
    add(table, "requests", f"{found['requests']:,}")
    add(table, "seconds", f"{found['duration_s']:,.1f}")
    add(table, "requests/s", rate_text(found["requests_per_s"]))
    add(table, "output tokens/s", rate_text(found["output_tokens_per_s"]))
    limits = [
        f"{name} at most {seconds_text(found['slo'][key])}"
        for name, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"))
        if found["slo"][key] is not None
    ]
    if limits:
        add(table, f"goodput, requests/s ({', '.join(limits)})", _good(found))
    show(console, table)
    _print_engines(found, console)
    console.print(found["verdict"] + ".", markup=False)


def _good(found: Mapping[str, Any]) -> str:
    return f"{rate_text(found['goodput_requests_per_s'])} ({found['good_share']:.1%})"


def _print_engines(found: Mapping[str, Any], console: Console) -> None:
    table = new_table("engines", "what", "value", right=("value",))
    for role, own in found["deployment"].items():
        if isinstance(own, Mapping):
            words = (
                f"{own['engines']} of {own['slots']} slots, {own['step_tokens']:,} tokens a step"
            )
            add(table, role, words)
            size = f"{own['blocks']:,} of {own['block_tokens']} tokens"
            add(table, "  cache blocks of one", size)
    add(table, "cache in use, mean", f"{found['kv']['mean']:.1%}")
    add(table, "cache in use, fullest engine", f"{found['kv']['peak']:.1%}")
    add(
        table,
        "preemptions",
        f"{found['preemptions']:,} of {found['preempted_requests']:,} requests",
    )
    steps = found["steps"]
    for name, kind in (("decode", "decode"), ("with prompts", "mixed")):
        mean = steps[f"{kind}_mean_s"]
        add(table, f"steps, {name}", f"{steps[kind]:,} of {_cell(mean, seconds=True)}")
    add(table, "decoding sequences of a step", f"{steps['decoding_sequences_mean']:.1f}")
    show(console, table)


def print_description(found: Mapping[str, Any], console: Console) -> None:
    """What a workload is like."""
    lengths = {"prompt": found["input_len"], "output": found["output_len"]}
    show(console, _spreads("tokens of a request", lengths, seconds=False))
    arrivals = found["arrivals"]
    table = new_table("workload", "what", "value", right=("value",))
    add(table, "requests", f"{found['requests']:,}")
    add(table, "prompt tokens", f"{found['input_tokens']:,}")
    add(table, "output tokens", f"{found['output_tokens']:,}")
    add(table, "arrivals", arrivals["kind"])
    if "concurrency" in arrivals:
        add(table, "requests in flight", f"{arrivals['concurrency']:,}")
    else:
        add(table, "seconds", f"{arrivals['duration_s']:,.1f}")
        for name, key in (
            ("requests/s", "requests_per_s"),
            ("prompt tokens/s", "input_tokens_per_s"),
            ("output tokens/s", "output_tokens_per_s"),
        ):
            add(table, name, "-" if arrivals[key] is None else rate_text(arrivals[key]))
        add(table, "gaps, deviation over mean", f"{arrivals['gap_cv']:.2f}")
    prefix = found["prefix"]
    told = f"{prefix['reused_share']:.1%} ({prefix['requests_with_ids']:,} requests tell)"
    add(table, "prompt tokens in prefixes that came before", told)
    show(console, table)
    if "gap_s" in arrivals:
        gaps = {"gap": arrivals["gap_s"]}
        show(console, _spreads("between arrivals", gaps, seconds=True))
