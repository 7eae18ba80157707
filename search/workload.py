"""The workload of a request: what was asked or stands in a TOML file, checked, defaults stated.

Keys of the file: input_len, output_len (tokens, or a distribution of them), concurrency (requests
in flight), rate (requests a second), prefix_hit (share of the prompt), mtp_acceptance (share of the
tokens predicted ahead that are kept), ttft_ms, tpot_ms, ttft_p99_ms, tpot_p99_ms. Times are
milliseconds here, as people write them, and seconds behind. The same file serves a simulation;
those of its keys that the search does not price (`simulate_demand`) are for `refine_simulated`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardplan.models.errors import InputError
from shardplan.search.plan import Limits, Workload

if TYPE_CHECKING:
    from shardplan.search.request import Asked

__all__ = [
    "DEFAULT_INPUT",
    "DEFAULT_OUTPUT",
    "DEFAULT_TPOT_S",
    "DEFAULT_TTFT_S",
    "WORKLOAD_KEYS",
    "acceptance",
    "one_of",
    "positive",
    "prefix_hit",
    "read_workload",
    "shown",
    "whole",
    "workload_table",
]

DEFAULT_INPUT = 1024
DEFAULT_OUTPUT = 256
DEFAULT_TTFT_S = 2.0
DEFAULT_TPOT_S = 0.1
_MOST_TOKENS = 2**24
_MOST_REQUESTS = 2**20
_MOST_RATE = 1e9
_MOST_MS = 1e9
_MAX_WORKLOAD_BYTES = 2**20
_MOST_SHOWN = 80
WORKLOAD_KEYS = (
    "input_len",
    "output_len",
    "rate",
    "burstiness",
    "concurrency",
    "num_prompts",
    "prefix_hit",
    "prefix_groups",
    "prefix_len",
    "mtp_acceptance",
    "seed",
    "ttft_ms",
    "tpot_ms",
    "ttft_p99_ms",
    "tpot_p99_ms",
)
_SIMULATED_KEYS = ("burstiness", "num_prompts", "prefix_groups", "prefix_len", "seed")
"""What only a simulation heeds."""
_WORKLOAD_HINT = "write lines such as input_len = 1024"


def one_of(name: str, value: object, known: tuple[str, ...]) -> str:
    """The word, if it is a known one; `InputError` otherwise."""
    if not isinstance(value, str) or value not in known:
        close = get_close_matches(str(value), known, n=1)
        raise InputError(
            f"`{name}` is one of {', '.join(known)}",
            got=f"{name}={shown(value)}",
            hint=f"try {(close or known)[0]}",
        )
    return value


def shown(value: object) -> str:
    """A value as a message quotes it: not longer than a line."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def whole(name: str, value: object, most: int, *, try_: int, least: int = 1) -> int:
    """The number, if it is whole and from `least` to `most`; `InputError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(
            f"`{name}` is a whole number from {least} to {most:,}",
            got=f"{name}={shown(value)}",
            hint=f"try {try_}",
        )
    return value


def positive(name: str, value: object, most: float, *, try_: str) -> float:
    """The number, if it is above 0 and at most `most`; `InputError` otherwise."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= most:  # type: ignore[operator]  # a number here
        raise InputError(
            f"`{name}` is a number above 0 and at most {most:g}",
            got=f"{name}={shown(value)}",
            hint=f"try {try_}",
        )
    return float(value)  # type: ignore[arg-type]  # a number here


def workload_table(path: str | None, keys: tuple[str, ...]) -> dict[str, Any]:
    """What a workload TOML says; `InputError` for a key that is not among `keys`."""
    if path is None:
        return {}
    text = _workload_text(path)
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not TOML, a number too long, nested too deep
        raise InputError(
            "a workload file is TOML in UTF-8", got=f"{path}: {error}", hint=_WORKLOAD_HINT
        ) from None
    unknown = sorted(set(table) - set(keys))
    if unknown:
        raise InputError(
            "a workload file has keys " + ", ".join(keys),
            got=f"{path}: {shown(', '.join(unknown))}",
            hint="leave the others out",
        )
    return table


def _workload_text(path: str) -> str:
    file = Path(path)
    try:
        if not file.is_file():
            raise InputError(
                "a workload file exists and is a regular file", got=path, hint=_WORKLOAD_HINT
            )
        if file.stat().st_size > _MAX_WORKLOAD_BYTES:
            raise InputError("a workload file is at most 1 MiB", got=path, hint=_WORKLOAD_HINT)
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            "the workload file cannot be read",
            got=f"{path}: {error.strerror}",
            hint="check its name and its permissions",
        ) from None
    except ValueError as error:  # not UTF-8, or a path that no system takes
        raise InputError(
            "a workload file is TOML in UTF-8", got=f"{path!r}: {error}", hint=_WORKLOAD_HINT
        ) from None


def read_workload(asked: Asked, notes: list[str]) -> tuple[Workload, Limits]:
    """The workload and limits of a question; a default that is filled in adds a note.

    What was said directly stands before what the workload file says. `InputError` for a value or
    a file that breaks a rule.
    """
    table = workload_table(asked.workload, WORKLOAD_KEYS)
    if asked.workload is not None and set(table) & set(_SIMULATED_KEYS):
        from shardplan.search.simulate_demand import read_demand

        read_demand(asked.workload, {}, None)

    def said(name: str) -> Any:
        own = getattr(asked, name)
        return table.get(name) if own is None else own

    lengths = {}
    for name, default in (("input_len", DEFAULT_INPUT), ("output_len", DEFAULT_OUTPUT)):
        value = said(name)
        if value is None:
            notes.append(f"{name} was not given: {default} tokens assumed")
            value = default
        lengths[name] = whole(name, _mean(name, value, notes), _MOST_TOKENS, try_=default)
    concurrency, rate = said("concurrency"), said("rate")
    limits = {
        f"{name}_s": None
        if said(f"{name}_ms") is None
        else positive(f"{name}_ms", said(f"{name}_ms"), _MOST_MS, try_=f"{default_s * 1e3:g}") / 1e3
        for name, default_s in (
            ("ttft", DEFAULT_TTFT_S),
            ("tpot", DEFAULT_TPOT_S),
            ("ttft_p99", DEFAULT_TTFT_S),
            ("tpot_p99", DEFAULT_TPOT_S),
        )
    }
    work = Workload(
        **lengths,
        concurrency=None
        if concurrency is None
        else whole("concurrency", concurrency, _MOST_REQUESTS, try_=32),
        request_rate=None if rate is None else positive("rate", rate, _MOST_RATE, try_="1"),
        prefix_hit=prefix_hit(said("prefix_hit"), notes),
        mtp_acceptance=acceptance(said("mtp_acceptance")),
    )
    if work.concurrency is None and work.request_rate is None:
        notes.append("no concurrency or rate was given: as many requests in flight as serve best")
    return work, Limits(**limits)


def _mean(name: str, value: object, notes: list[str]) -> object:
    """The mean of lengths that are a distribution, in whole tokens."""
    if not isinstance(value, Mapping):
        return value
    from shardplan.costmodel.simulate.lengths import mean_tokens, read_lengths

    mean = round(mean_tokens(read_lengths(name, value)))
    notes.append(f"{name} is a distribution: the search prices its mean, {mean} tokens")
    return mean


def acceptance(value: object) -> float | None:
    """Share of the tokens predicted ahead that are kept; `InputError` for what is no share."""
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:  # type: ignore[operator]  # a number here
        raise InputError(
            "`mtp_acceptance` is a share from 0 to 1",
            got=f"mtp_acceptance={shown(value)}",
            hint="try 0.85",
        )
    return float(value)  # type: ignore[arg-type]  # a number here


def prefix_hit(value: object, notes: list[str]) -> float:
    """Share of a prompt that is found; a default that is filled in adds a note."""
    if value is None:
        notes.append("prefix_hit was not given: no prompt token is found in the prefix cache")
        return 0.0
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1:  # type: ignore[operator]  # a number here
        raise InputError(
            "`prefix_hit` is a share from 0 to below 1",
            got=f"prefix_hit={shown(value)}",
            hint="try 0.5",
        )
    return float(value)  # type: ignore[arg-type]  # a number here
