"""How sure a price is: what its time rests on, and a band that holds nine of ten true times.

    T        = sum over sections s of T_s + host + launches
    basis    = time in sections of each kind over T; the kinds of host times are their facts'
    variance = sum over s of (common_s T_s)^2 + scatter_s^2 sum over kernels of t^2
               + (common T)^2 of the step itself + those of host times and launches
    band     = T exp(-+ z sigma),  sigma^2 = ln(1 + variance / T^2),  z: 1.645 for nine in ten

A section is one kernel's coefficients. Two parts of its relative error add up differently. What is
common to all its kernels (a rate that is fitted too high) does not average out over a step; what
scatters from shape to shape does, over the different kernels of a template (not over layers: they
repeat the same shape). Held-out tables give both together, p90 = 1.645 sigma. Fits leave little
bias on their own tables, but errors of neighbouring shapes go together and a step stays in one
neighbourhood, so the median error is taken as the common part and the rest of sigma as scatter:

    sigma = p90_error / 1.645    common = min(median_error, sigma)    scatter^2 = sigma^2 - common^2

Sections are independent of one another. One without held-out errors, and all that is not fitted,
takes the errors of `data/confidence.toml` for its kind; a derived section keeps its own beside
those. Left out: sections that share a table, lengths and rates that differ from those asked.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from shardplan.costmodel.basis import KINDS, row_section
from shardplan.costmodel.bulk import Call, Fleet
from shardplan.costmodel.calibration import Calibration, Section
from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Device, Fact
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.serving import Serving, ServingInput, replay
from shardplan.models.graph import Phase

__all__ = [
    "BASIS",
    "Cause",
    "Confidence",
    "Scale",
    "Sums",
    "Tally",
    "banded",
    "confidence",
    "fact_band",
    "fact_cause",
    "fact_kind",
    "level",
    "operator_confidence",
    "section_cause",
    "section_scale",
    "serving_confidence",
]

BASIS = tuple(f"basis_{kind}" for kind in KINDS)
_KIND_OF_FACT = {"datasheet": "derived"}
_P90 = NormalDist().inv_cdf(0.95)
"""90 % of |error| are within so many sigmas."""
_HOST, _LAUNCH = "host time", "kernel launches"
_STEP, _SERVING = "sum of kernels", "serving model"


class Scale(NamedTuple):
    """Standard deviations of a relative error."""

    common: float
    """Shared by all kernels of a section."""
    scatter: float
    """Of one shape, beside it."""

    @classmethod
    def of(cls, median: float, p90: float) -> Scale:
        """From the median and the 90th percentile of |error|."""
        sigma = p90 / _P90
        common = min(median, sigma)
        return cls(common, math.sqrt(sigma * sigma - common * common))

    def beside(self, other: Scale) -> Scale:
        """Two independent errors."""
        return Scale(*(math.hypot(a, b) for a, b in zip(self, other, strict=True)))


@functools.cache
def _data() -> Mapping[str, Any]:
    file = resources.files("shardplan.costmodel") / "data" / "confidence.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _given(*names: str) -> Scale:
    table: Any = functools.reduce(lambda found, name: found[name], names, _data())
    return Scale.of(table["median"], table["p90"])


def level() -> float:
    """Share of true times that a band is made to hold."""
    return float(_data()["level"])


def section_scale(section: Section) -> Scale:
    """Relative error of the kernels that a section prices."""
    known = math.isfinite(section.p90_error) and math.isfinite(section.median_error)
    own = Scale.of(section.median_error, section.p90_error) if known else None
    if section.kind in ("measured", "fitted"):
        return _given("sections", "few_rows") if own is None else own
    given = _given("sections", section.kind)
    return given if own is None else given.beside(own)


class Sums(NamedTuple):
    """Time in one section."""

    section: Section
    seconds: Array
    """`[points]`, over all kernels of a step."""
    squares: Array
    """Sum of the squares of each kernel's."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """Adds up the time of a fleet's points by section; a fleet's `watch`."""

    calibration: Calibration
    points: int
    weight: Array | float = 1.0
    """How often each point runs what is priced next."""
    sums: dict[str, Sums] = field(default_factory=dict)
    known: dict[tuple[Any, ...], Section] = field(default_factory=dict)

    @classmethod
    def of(cls, fleet: Fleet) -> Tally:
        """An empty tally."""
        return cls(calibration=fleet.models[0].machine.calibration, points=fleet.which.size)

    def __call__(self, phase: Phase, call: Call, seconds: Array) -> None:
        """Take note of the seconds `[kernels]` of one call."""
        sums = self._sums(self._section(phase, call))
        weighted = seconds if isinstance(self.weight, float) else seconds * self.weight[call.point]
        np.add.at(sums.seconds, call.point, weighted)
        np.add.at(sums.squares, call.point, weighted * weighted)

    def _section(self, phase: Phase, call: Call) -> Section:
        key = (id(call.kernels), call.dtypes, phase)
        if key not in self.known:
            weights, _, attention = call.dtypes
            row = call.kernels.row
            if row.group in ("attention", "draft_attention"):
                weights = "bf16"
            self.known[key] = row_section(self.calibration, row, weights, phase, attention)
        return self.known[key]

    def _sums(self, section: Section) -> Sums:
        if section.name not in self.sums:
            none = np.zeros((2, self.points))
            self.sums[section.name] = Sums(section, none[0], none[1])
        return self.sums[section.name]


class Cause(NamedTuple):
    """One independent source of error."""

    name: str
    kind: str
    source: str
    seconds: Array
    variance: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """Of each point `[points]`."""

    low: Array
    """Lower end of the band over the price."""
    high: Array
    basis: Mapping[str, Array]
    """Share of the time by kind; they sum to 1."""
    causes: tuple[Cause, ...]

    def columns(self, step_s: Array) -> dict[str, Array]:
        """The columns that `estimate` appends."""
        shares = {f"basis_{kind}": share for kind, share in self.basis.items()}
        return {"step_low_s": step_s * self.low, "step_high_s": step_s * self.high, **shares}

    def weakest(self, point: int = 0) -> tuple[Cause, float]:
        """What widens the band of a point most, of what it spends time in; its share of that.

        The sum of kernels and the serving model are in every price and no measurement of one
        machine would narrow them, so they are passed over.
        """
        timed = [cause for cause in self.causes if float(cause.seconds[point]) > 0.0]
        total = sum(float(cause.variance[point]) for cause in timed)
        first = max(timed, key=lambda cause: float(cause.variance[point]))
        return first, float(first.variance[point]) / total if total else 0.0


def fact_band(kind: str) -> tuple[float, float]:
    """(low, high) factor on what rests on a fact of a kind alone."""
    sigma = math.hypot(*_given("facts", kind))
    sure = banded((), {}, np.full(1, sigma * sigma))
    return float(sure.low[0]), float(sure.high[0])


def fact_kind(fact: Fact) -> str:
    """The kind of basis that a fact of a data file is."""
    return _KIND_OF_FACT.get(fact.kind, fact.kind)


def fact_cause(name: str, owner: EngineProfile | Device, key: str, seconds: Array) -> Cause:
    """The error of a time that a fact of an engine or device tells."""
    fact = owner.facts.get(key)
    if fact is None:
        fact = Fact(kind="assumed", source="")
    sigma = math.hypot(*_given("facts", fact.kind))
    return Cause(name, fact_kind(fact), fact.source, seconds, (sigma * seconds) ** 2)


def confidence(
    tally: Tally,
    fleet: Fleet,
    phase: Phase,
    total_s: Array,
    host_s: Array,
    *,
    serving: bool = False,
) -> Confidence:
    """The basis and the band of `total_s`, of which the engine's host takes `host_s`.

    `tally` has watched all of it. What is left after sections and host is kernel launches and gaps.
    In a pipeline stages wait for the slowest, and pieces of a prompt pass them side by side:
    there sections are stretched or shrunk together to what the host leaves.
    """
    engine, device = fleet.engine, fleet.models[0].machine.device
    counted = sum((one.seconds for one in tally.sums.values()), np.zeros(tally.points))
    piped, device_s = fleet.stages > 1.0, np.maximum(total_s - host_s, 0.0)
    grow = np.where(piped, device_s / np.maximum(counted, np.finfo(np.float64).tiny), 1.0)
    left = np.where(piped, 0.0, np.maximum(device_s - counted, 0.0))
    causes = [section_cause(one, grow) for one in tally.sums.values()]
    graph = engine.decode_graph if phase == "decode" else engine.prefill_graph
    key = "step_host_s" if phase == "decode" else "prefill_step_host_s"
    causes.append(fact_cause(_HOST, engine, key, host_s))
    owner, key = (engine, "launch_gap_s") if graph else (device, "host_launch_s")
    causes.append(fact_cause(_LAUNCH, owner, key, left))
    everything = sum((cause.seconds for cause in causes), np.zeros(tally.points))
    basis = {
        kind: sum((c.seconds for c in causes if c.kind == kind), np.zeros(tally.points))
        / everything
        for kind in KINDS
    }
    wide = _given("step")
    if serving:
        wide = wide.beside(_given("serving"))
    sigma = math.hypot(*wide)
    source = str(_data()["serving" if serving else "step"]["source"])
    nothing = np.zeros(tally.points)
    name = _SERVING if serving else _STEP
    causes.append(Cause(name, "measured", source, nothing, (sigma * total_s) ** 2))
    variance = sum((cause.variance for cause in causes), np.zeros(tally.points))
    return banded(tuple(causes), basis, variance / (total_s * total_s))


def section_cause(sums: Sums, grow: Array | float) -> Cause:
    """The error of a section's kernels, their time stretched by `grow`."""
    section = sums.section
    common, scatter = section_scale(section)
    seconds, squares = sums.seconds * grow, sums.squares * (grow * grow)
    variance = common * common * seconds * seconds + scatter * scatter * squares
    return Cause(section.name, section.kind, section.source, seconds, variance)


def banded(causes: tuple[Cause, ...], basis: Mapping[str, Array], variance: Array) -> Confidence:
    """The confidence of prices with these relative variances."""
    reach = NormalDist().inv_cdf(0.5 + level() / 2.0) * np.sqrt(np.log1p(variance))
    return Confidence(low=np.exp(-reach), high=np.exp(reach), basis=basis, causes=causes)


def operator_confidence(section: Section, seconds: Array) -> Confidence:
    """The confidence of one operator by itself: all of its section's error."""
    scale = section_scale(section)
    variance = np.full(seconds.shape, scale.common**2 + scale.scatter**2)
    basis = {kind: np.full(seconds.shape, float(kind == section.kind)) for kind in KINDS}
    cause = Cause(section.name, section.kind, section.source, seconds, variance * seconds**2)
    return banded((cause,), basis, variance)


def serving_confidence(fleet: Fleet, given: ServingInput, served: Serving) -> Confidence:
    """The confidence of an average step of a steady state, and with it of all that it serves.

    `given` are the slots, lengths and dtypes that `served` is the answer to.
    """
    tally = Tally.of(fleet)

    def weigh(often: Array) -> None:
        tally.weight = np.broadcast_to(often, (tally.points,))

    replay(fleet.watched(tally), given, served, weigh)
    step_s = served.compute_s + served.memory_s + served.collective_s + served.overhead_s
    host_s = served.pure_share * fleet.host_s("decode")
    host_s = host_s + served.mixed_share * fleet.host_s("prefill")
    return confidence(tally, fleet, "decode", step_s, host_s, serving=True)
