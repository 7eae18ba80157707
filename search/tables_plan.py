"""A plan and an ablation for people: what was chosen, what it does, why, and what to run next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from shardplan.search.report.words import count_text
from shardplan.search.tables import (
    add,
    bytes_text,
    memory_table,
    new_table,
    print_confidence,
    rate_text,
    seconds_text,
    show,
    time_table,
)
from shardplan.search.tables_batching import print_batching
from shardplan.search.tables_capacity import print_capacity, print_cost
from shardplan.search.tables_disagg import instances_words, print_pools, print_servings
from shardplan.search.tables_robust import print_robustness

if TYPE_CHECKING:
    from rich.console import Console

    from shardplan.search.ablation_rows import Ablation
    from shardplan.search.plan import Certificate, Plan, StrategyInfo

__all__ = ["certificate_sentence", "print_ablation", "print_plan", "strategy_words"]


def strategy_words(one: StrategyInfo) -> str:
    """A strategy in one line."""
    words = [one.parallelism().describe(), f"batch {one.batch}", f"chunk {one.chunk}"]
    words += [f"{one.weight_dtype} weights", f"{one.kv_dtype} KV", f"{one.attention} attention"]
    if one.collectives != "auto":
        words.append(f"{one.collectives} between nodes")
    if len(set(one.stage_layers)) > 1:
        words.insert(1, "layers " + "+".join(str(count) for count in one.stage_layers))
    return ", ".join(words)


def certificate_sentence(proof: Certificate) -> str:
    """What was searched and how far the answer can be from the best."""
    counts = (
        f"{count_text(proof.space_size)} strategies: {proof.evaluated:,} priced, "
        f"{count_text(proof.pruned)} pruned"
    )
    if proof.gap == 0:
        return f"{counts}. Nothing in this space is better (gap 0, engine {proof.engine})."
    if proof.gap is None:
        return f"{counts}. Engine {proof.engine} proves no bound: the best of those priced."
    return f"{counts}. Nothing in this space is more than {proof.gap:.2%} better."


def _print_performance(plan: Plan, console: Console) -> None:
    title = "performance" if plan.at_rate is None else "performance, all slots in use"
    table = new_table(title, "what", "value", "limit", right=("value",))
    found, limits, work = plan.performance, plan.request.limits, plan.request.workload
    add(table, "output tokens/s", rate_text(found.output_tokens_per_s), "")
    add(table, "  a card", rate_text(found.output_tokens_per_s_per_card), "")
    rate = "" if work.request_rate is None else f"at least {work.request_rate:g}"
    add(table, "requests/s", rate_text(found.requests_per_s), rate)
    add(table, "requests in flight", rate_text(found.concurrency), "")
    for name, value, limit in (
        ("TTFT", found.ttft_s, limits.ttft_s),
        ("TPOT", found.tpot_s, limits.tpot_s),
    ):
        most = "" if limit is None else f"at most {seconds_text(limit)}"
        add(table, f"{name} mean", seconds_text(value), most)
    add(table, "one request", seconds_text(found.end_to_end_s), "")
    show(console, table)


def _print_at_rate(plan: Plan, console: Console) -> None:
    """What requests see at the rate that was asked, with its queue."""
    found, limits = plan.at_rate, plan.request.limits
    if found is None:
        return
    columns = ("mean", "p50", "p90", "p99")
    title = (
        f"at {found.requests_per_s:g} requests/s, {found.used:.1%} of what all slots serve, "
        f"{rate_text(found.concurrency)} in flight"
    )
    table = new_table(title, "with the queue", *columns, "limit", right=columns)
    for name, times, most in (
        ("TTFT", found.ttft, (limits.ttft_s, limits.ttft_p99_s)),
        ("TPOT", found.tpot, (limits.tpot_s, limits.tpot_p99_s)),
    ):
        told = zip(("mean", "p99"), most, strict=True)
        words = (f"{what} at most {seconds_text(one)}" for what, one in told if one is not None)
        values = (seconds_text(getattr(times, f"{column}_s")) for column in columns)
        add(table, name, *values, ", ".join(words))
    show(console, table)


def _print_quantization(plan: Plan, console: Console) -> None:
    if not plan.quantization:
        return
    numbers = ("gain",)
    table = new_table("what quantizing would buy", "weights", "KV", *numbers, "with", right=numbers)
    for row in plan.quantization:
        gain = "nothing fits" if row.gain is None else f"{row.gain:.2f}x"
        words = "" if row.strategy is None else row.strategy.parallelism().describe()
        slots = "" if row.strategy is None else f", batch {row.strategy.batch}"
        add(table, row.weight_dtype, row.kv_dtype, gain, words + slots)
    show(console, table)


def _print_switches(plan: Plan, console: Console) -> None:
    if not plan.switches:
        return
    numbers = ("gain",)
    names = ("weight prefetch", "fused collectives")
    table = new_table(
        "what the engine's switches would buy", *names, *numbers, "with", right=numbers
    )
    for row in plan.switches:
        gain = "not possible" if row.gain is None else f"{row.gain:.3f}x"
        words = "" if row.strategy is None else row.strategy.parallelism().describe()
        on = ("on" if value else "off" for value in (row.weight_prefetch, row.fused_collectives))
        add(table, *on, gain, words)
    show(console, table)


def _print_alternatives(plan: Plan, console: Console) -> None:
    if not plan.alternatives:
        return
    numbers = ("tokens/s", "TTFT", "TPOT", "memory")
    table = new_table("next best", *numbers, "strategy", right=numbers)
    for one in plan.alternatives:
        done = one.performance
        times = (seconds_text(done.ttft_s), seconds_text(done.tpot_s))
        words = instances_words(one) or one.strategy.parallelism().describe()
        words += f", batch {one.strategy.batch}"
        rate = rate_text(done.output_tokens_per_s)
        add(table, rate, *times, bytes_text(one.memory_bytes), words)
    show(console, table)


def _print_confidence(plan: Plan, console: Console) -> None:
    """The bands, what they rest on, and what would make them narrower."""
    sure = plan.confidence
    if sure is None:
        return
    rates = (rate_text(sure.output_tokens_per_s_low), rate_text(sure.output_tokens_per_s_high))
    times = (seconds_text(sure.tpot_low_s), seconds_text(sure.tpot_high_s))
    console.print("how sure", style="bold")
    console.print(
        f"{sure.level:.0%} band: {' to '.join(rates)} output tokens/s, TPOT {' to '.join(times)}",
        markup=False,
    )
    print_confidence(sure.model_dump(), console)


def _print_next(plan: Plan, folder: Path, console: Console) -> None:
    file = shlex.quote(str(folder / "plan.json"))
    target = "vllm-ascend" if "vllm" in plan.request.engine_profile else "atc"
    out = shlex.quote(str(folder / "deploy"))
    console.print("next", style="bold")
    console.print(f"  open {folder / 'report.html'}", markup=False, soft_wrap=True)
    console.print(f"  shardplan verify {file}", markup=False, soft_wrap=True)
    command = f"  shardplan emit {file} --target {target} --out {out}"
    console.print(command, markup=False, soft_wrap=True)
    table = shlex.quote(str(folder / "trials.csv"))
    console.print(f"  shardplan analyze {table}", markup=False, soft_wrap=True)


def print_plan(plan: Plan, folder: Path, timing: dict[str, float], console: Console) -> None:
    """The plan, what it does, why it is the best, what was assumed, and what to run next."""
    machine, work = plan.cluster, plan.request.workload
    if plan.pools:
        held = (f"{one.cards} x {one.cluster.device}" for one in plan.pools)
        cards = " and ".join(held)
    else:
        cards = f"{plan.strategy.ranks} x {machine.device}"
    console.print(
        f"{plan.model.name} on {cards} ({machine.name}), "
        f"{work.input_len} prompt and {work.output_len} output tokens, "
        f"engine {plan.request.engine_profile}",
        markup=False,
    )
    words = instances_words(plan) or strategy_words(plan.strategy)
    console.print(f"plan: {words}", style="bold green", markup=False)
    console.print()
    _print_performance(plan, console)
    _print_at_rate(plan, console)
    print_pools(plan, console)
    show(console, memory_table([row.model_dump() for row in plan.memory]))
    console.print(plan.largest_lever, markup=False)
    console.print()
    for phase in ("prefill", "decode"):
        rows = [row.model_dump() for row in plan.breakdown if row.phase == phase]
        rows.sort(key=lambda row: -row["total_s"])
        total = sum(row["total_s"] for row in rows)
        if rows:
            show(console, time_table(f"one {phase} step: {seconds_text(total)}", rows, total))
    _print_confidence(plan, console)
    print_robustness(plan, console)
    _print_alternatives(plan, console)
    _print_quantization(plan, console)
    _print_switches(plan, console)
    print_batching(plan, console)
    print_cost(plan, console)
    print_capacity(plan, console)
    print_servings(plan, console)
    verdict = "all hold" if plan.proof.passed else "FAILED"
    console.print(f"certificate: {certificate_sentence(plan.certificate)}", markup=False)
    console.print(f"proof: {len(plan.proof.checks)} checks of level {plan.proof.level}, {verdict}")
    took = {name.removesuffix("_s"): s for name, s in timing.items() if "_per_" not in name}
    spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in took.items())
    console.print(f"time: {spent}", markup=False)
    console.print()
    if plan.notes:
        console.print("notes", style="bold")
        for text in plan.notes:
            console.print(f"  - {text}", markup=False)
        console.print()
    _print_next(plan, folder, console)


def print_ablation(found: Ablation, console: Console) -> None:
    """What each feature buys, from the plain baseline up."""
    console.print(
        f"{found.model} on {found.cards} x {found.device} ({found.cluster}), "
        f"{found.input_len} prompt and {found.output_len} output tokens, "
        f"engine {found.engine_profile}",
        markup=False,
    )
    numbers = ("gain", "one request", "TTFT", "TPOT", "tokens/s", "fullest rank")
    table = new_table("each feature on top of the last", "step", *numbers, "split", right=numbers)
    for row in found.rows:
        held = bytes_text(row.fullest_bytes) + ("" if row.fits else " !")
        times = (seconds_text(s) for s in (row.end_to_end_s, row.ttft_s, row.tpot_s))
        rate = rate_text(row.output_tokens_per_s)
        add(table, row.step, f"{row.speedup:.2f}x", *times, rate, held, row.split)
    show(console, table)
    heads = ("tokens", "naive", "flash", "gain", "whole prefill")
    table = new_table("attention of one prompt", *heads, right=heads)
    for one in found.attention:
        pair = (seconds_text(one.naive_s), seconds_text(one.flash_s))
        add(table, one.tokens, *pair, f"{one.gain:.2f}x", f"{one.prefill_gain:.2f}x")
    show(console, table)
    sizes = ("prompt", "output", "one request")
    table = new_table("lengths of about eight seconds", *sizes, right=sizes)
    for length in found.lengths:
        add(table, length.input_len, length.output_len, seconds_text(length.end_to_end_s))
    show(console, table)
    for text in found.notes:
        console.print(f"  - {text}", markup=False)
