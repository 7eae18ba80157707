"""Errors of predictions against measured figures, by group, and the guard against their growth.

    error of a figure = predicted / measured - 1
    MAPE = mean |error|, median and p90 of |error|, bias = median error with its sign

A time that is predicted too long and a rate that is predicted too high both have a positive error.
`worse` holds the errors of today against a baseline: a group fails where its MAPE or its median
grows by more than a tenth of itself and 0.2 points more. A baseline is a ratchet (`tightened`):
each number in it is the least that was reached on the same figures, so that many small steps
do not add up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

import numpy as np

__all__ = [
    "FLOOR",
    "GROWTH",
    "Baseline",
    "Figure",
    "GroupErrors",
    "baseline_of",
    "by_name",
    "group_errors",
    "shipped_tables",
    "tightened",
    "unguarded",
    "worse",
]

GROWTH = 0.1
"""An error may grow by this share of itself."""
FLOOR = 0.002
"""And by this much more: 0.2 points."""
_P90 = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number and what the model says."""

    family: str
    group: str
    where: str
    """File and line."""
    what: str
    """The inputs in words."""
    metric: str
    unit: str
    """`s`, or what is counted a second."""
    measured: float
    predicted: float | None
    """None where the row could not be priced."""
    reason: str
    """Why it could not; blank where it was."""
    held_out: bool
    """Whether no fit has seen it."""
    unseen: float | None
    """Median error that the fit behind it reports of rows that it did not see."""
    low: float | None
    high: float | None
    """The estimate's own band, where it gives one."""
    fits: bool | None
    """What the memory ledger says of it; None where memory is not counted."""
    source: str

    @property
    def error(self) -> float | None:
        """predicted / measured - 1."""
        return None if self.predicted is None else self.predicted / self.measured - 1.0

    @property
    def inside(self) -> bool | None:
        """Whether the measured number lies in the band; None without a band."""
        if self.low is None or self.high is None:
            return None
        return self.low <= self.measured <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupErrors:
    """Relative errors of the figures of a name; None where none of them was priced."""

    name: str
    figures: int
    priced: int
    held_out: int
    mape: float | None
    held_mape: float | None
    """Of the held-out figures alone; None where none was priced."""
    median: float | None
    p90: float | None
    worst: float | None
    bias: float | None
    unseen: float | None
    """The largest median error that the fits behind the figures report of rows left out."""
    inside: float | None
    """Share of the figures with a band that lie inside it; None where none has one."""
    digest: str
    """Of the measured figures: errors are comparable where it is the same."""


Baseline = Mapping[str, Mapping[str, float | str]]
"""Group -> `mape`, `median`, `priced`, `digest`."""


def shipped_tables() -> list[Traversable]:
    """The measured figures that ship, one CSV a source, by name."""
    folder = resources.files("shardplan.costmodel") / "data" / "validation"
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".csv")]
    return sorted(found, key=lambda entry: entry.name)


def by_name(figures: Iterable[Figure], name: str) -> dict[str, list[Figure]]:
    """Figures under their `group` or `family`, in order of appearance."""
    found: dict[str, list[Figure]] = {}
    for one in figures:
        found.setdefault(getattr(one, name), []).append(one)
    return found


def group_errors(name: str, figures: Sequence[Figure]) -> GroupErrors:
    """Errors of one group's figures."""
    signed = np.asarray([one.error for one in figures if one.error is not None], dtype=np.float64)
    size = np.abs(signed)
    held = [abs(one.error) for one in figures if one.held_out and one.error is not None]
    inside = [one.inside for one in figures if one.inside is not None and one.error is not None]
    some = bool(size.size)
    return GroupErrors(
        name=name,
        figures=len(figures),
        priced=int(size.size),
        held_out=sum(one.held_out for one in figures),
        mape=float(size.mean()) if some else None,
        held_mape=float(np.mean(held)) if held else None,
        median=float(np.median(size)) if some else None,
        p90=float(np.quantile(size, _P90)) if some else None,
        worst=float(size.max()) if some else None,
        bias=float(np.median(signed)) if some else None,
        unseen=max((one.unseen for one in figures if one.unseen is not None), default=None),
        inside=float(np.mean(inside)) if inside else None,
        digest=_digest(figures),
    )


def _digest(figures: Sequence[Figure]) -> str:
    lines = sorted(f"{one.what} {one.metric} {one.measured:.9g}" for one in figures)
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=6).hexdigest()


def baseline_of(groups: Iterable[GroupErrors]) -> dict[str, dict[str, float | str]]:
    """The baseline that today's errors make."""
    return {
        one.name: {
            "priced": one.priced,
            "mape": round(one.mape, 6),
            "median": round(one.median, 6),
            "digest": one.digest,
        }
        for one in groups
        if one.mape is not None and one.median is not None
    }


def worse(baseline: Baseline, groups: Sequence[GroupErrors]) -> list[str]:
    """A line for each group that fell back: which, what it was, what it is."""
    found = []
    now = {one.name: one for one in groups}
    for name, was in baseline.items():
        one = now.get(name)
        if one is None:
            found.append(f"{name}: its {was['priced']} figures are gone")
        elif was["digest"] == one.digest:
            found += _grown(was, one)
    return found


def _grown(was: Mapping[str, float | str], now: GroupErrors) -> list[str]:
    if now.priced < int(was["priced"]):
        return [f"{now.name}: {was['priced']} figures were priced, {now.priced} are"]
    return [
        f"{now.name}: {what} was {float(was[what]):.2%}, is {value:.2%}"
        for what, value in (("mape", now.mape), ("median", now.median))
        if value is not None and value > float(was[what]) * (1.0 + GROWTH) + FLOOR
    ]


def unguarded(baseline: Baseline, groups: Sequence[GroupErrors]) -> list[str]:
    """Groups without a baseline of the same figures."""
    return [
        one.name
        for one in groups
        if one.priced and baseline.get(one.name, {}).get("digest") != one.digest
    ]


def tightened(
    baseline: Baseline, groups: Iterable[GroupErrors]
) -> dict[str, dict[str, float | str]]:
    """Today's baseline with each number that was lower before on the same figures kept."""
    found = baseline_of(groups)
    for name, numbers in found.items():
        was = baseline.get(name)
        if was is not None and was["digest"] == numbers["digest"]:
            for what in ("mape", "median"):
                numbers[what] = min(float(was[what]), float(numbers[what]))
    return found
