"""The workload of a simulation: options, a workload TOML or a trace, or that of the plan.

What was said directly stands before what the file says, and that before the plan's own workload.
Keys of the file: those of `search --workload` (input_len, output_len, concurrency, rate,
prefix_hit, mtp_acceptance, ttft_ms, tpot_ms), where lengths may also be distributions
(`costmodel.simulate.lengths`), burstiness, num_prompts, prefix_groups, prefix_len, seed, which a
search takes too, and trace (a path beside the file), which it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardplan.costmodel.simulate.lengths import read_lengths
from shardplan.costmodel.simulate.record import Limits
from shardplan.costmodel.simulate.traces import is_trace
from shardplan.costmodel.simulate.workload import Demand
from shardplan.models.errors import InputError
from shardplan.search.plan import Plan, Workload
from shardplan.search.workload import (
    DEFAULT_INPUT,
    DEFAULT_OUTPUT,
    DEFAULT_TPOT_S,
    DEFAULT_TTFT_S,
    WORKLOAD_KEYS,
    acceptance,
    positive,
    prefix_hit,
    whole,
    workload_table,
)

__all__ = ["KEYS", "Asked", "planned_demand", "read_demand"]

KEYS = ("trace", *WORKLOAD_KEYS)
_REQUESTS = 1000
_ROUNDS = 10
"""Requests of a closed loop, over those in flight, where nothing is said."""
_MOST_REQUESTS = 10**9
_MOST_FLIGHT = 2**20
_MOST_RATE = 1e9
_MOST_MS = 1e9
_MOST_SEED = 2**32 - 1
_MOST_TOKENS = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A workload, and what is asked of its serving."""

    demand: Demand
    limits: Limits
    acceptance: float | None
    notes: tuple[str, ...]


def _said(path: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What file and options say together."""
    table: dict[str, Any] = {}
    if path is not None and is_trace(Path(path)):
        table = {"trace": path}
    elif path is not None:
        table = workload_table(path, KEYS)
        if isinstance(table.get("trace"), str):
            table["trace"] = str(Path(path).parent / table["trace"])
    own = {name: value for name, value in given.items() if value is not None}
    if "rate" in own:
        table.pop("concurrency", None)
    if "concurrency" in own:
        table.pop("rate", None)
    if {"input_len", "output_len"} & set(own):
        table.pop("trace", None)
    return {**table, **own}


def read_demand(path: str | None, given: Mapping[str, Any], plan: Plan | None) -> Asked:
    """The workload; `given` holds options by the names of `KEYS`, None where not given.

    `InputError` for a value or a file that breaks a rule.
    """
    said, notes = _said(path, given), list[str]()
    trace = said.get("trace")
    if trace is not None and (not isinstance(trace, str) or not is_trace(Path(trace))):
        raise InputError(
            "`trace` is a .csv or .jsonl file, or either with .gz", got=f"trace={str(trace)[:80]!r}"
        )
    work = None if plan is None else plan.request.workload
    lengths = {
        name: said.get(name, default if work is None else getattr(work, name))
        for name, default in (("input_len", DEFAULT_INPUT), ("output_len", DEFAULT_OUTPUT))
    }
    arrivals = _arrivals(said, trace is not None, plan, notes)
    hit = said.get("prefix_hit", 0.0 if work is None else work.prefix_hit)
    groups = whole("prefix_groups", said.get("prefix_groups", 0), 2**20, try_=8, least=0)
    prefix = whole("prefix_len", said.get("prefix_len", 0), _MOST_TOKENS, try_=1024, least=0)
    if bool(groups) != bool(prefix):
        raise InputError(
            "`prefix_groups` and `prefix_len` are given together",
            got=f"prefix_groups={groups}, prefix_len={prefix}",
            hint="try prefix_groups = 8 and prefix_len = 1024",
        )
    demand = Demand(
        input_len=read_lengths("input_len", lengths["input_len"]),
        output_len=read_lengths("output_len", lengths["output_len"]),
        trace=None if trace is None else Path(trace),
        **arrivals,
        count=_count(said, trace is not None, arrivals["concurrency"], notes),
        prefix_hit=prefix_hit(hit, notes),
        prefix_groups=groups,
        prefix_len=prefix,
        seed=whole("seed", said.get("seed", 0), _MOST_SEED, try_=0, least=0),
    )
    return Asked(
        demand=demand,
        limits=_limits(said, plan),
        acceptance=acceptance(said.get("mtp_acceptance")),
        notes=tuple(notes),
    )


def planned_demand(path: str | None, work: Workload) -> Demand:
    """What a search is asked to serve: its file, if any, with what was said beside it."""
    table = workload_table(path, WORKLOAD_KEYS)
    own = {name: getattr(work, name) for name in ("input_len", "output_len")}
    given = {name: value for name, value in own.items() if not isinstance(table.get(name), Mapping)}
    given |= {"prefix_hit": work.prefix_hit, "rate": work.request_rate}
    return read_demand(path, given, None).demand


def _arrivals(
    said: Mapping[str, Any], traced: bool, plan: Plan | None, notes: list[str]
) -> dict[str, Any]:
    rate, flight = said.get("rate"), said.get("concurrency")
    if rate is not None and flight is not None:
        raise InputError(
            "requests come at a rate, or as those in flight end",
            got=f"rate={rate}, concurrency={flight}",
            hint="give one of the two",
        )
    if rate is None and flight is None and not traced:
        rate, flight = _as_planned(plan, notes)
    bursty = positive("burstiness", said.get("burstiness", 1.0), 1e3, try_="1")
    if rate is not None:
        rate = positive("rate", rate, _MOST_RATE, try_="1")
    if flight is not None:
        flight = whole("concurrency", flight, _MOST_FLIGHT, try_=32)
    return {"rate": rate, "concurrency": flight, "burstiness": bursty}


def _as_planned(plan: Plan | None, notes: list[str]) -> tuple[float | None, int | None]:
    """(rate, concurrency) where neither is said."""
    if plan is None:
        notes.append("no rate or concurrency was given: 1 request/s assumed")
        return 1.0, None
    work = plan.request.workload
    if work.request_rate is not None:
        notes.append(f"rate was not given: {work.request_rate:g} requests/s, as the plan serves")
        return work.request_rate, None
    flight = work.concurrency or max(round(plan.performance.concurrency), 1)
    notes.append(f"no rate or concurrency was given: {flight} in flight, as the plan has")
    return None, flight


def _count(
    said: Mapping[str, Any], traced: bool, flight: int | None, notes: list[str]
) -> int | None:
    if "num_prompts" in said:
        return whole("num_prompts", said["num_prompts"], _MOST_REQUESTS, try_=_REQUESTS)
    if traced:
        return None
    count = max(_REQUESTS, _ROUNDS * (flight or 0))
    notes.append(f"num_prompts was not given: {count:,} requests")
    return count


def _limits(said: Mapping[str, Any], plan: Plan | None) -> Limits:
    """Of TTFT and TPOT: as said, else the plan's."""
    own = None if plan is None else plan.request.limits
    found: list[float | None] = []
    for name, default_s in (("ttft", DEFAULT_TTFT_S), ("tpot", DEFAULT_TPOT_S)):
        value = said.get(f"{name}_ms")
        if value is not None:
            try_ = f"{default_s * 1e3:g}"
            found.append(positive(f"{name}_ms", value, _MOST_MS, try_=try_) / 1e3)
        else:
            found.append(None if own is None else getattr(own, f"{name}_s"))
    return Limits(*found)
