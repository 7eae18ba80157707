"""From profiler files to a device profile, and from one end-to-end number to a first correction.

    files  -> measured operators -> priced -> plausible? -> one correction a calibration section
    anchor -> one factor for every section without a correction of its own, such that the step of
              the anchor costs what was measured; host time and launch gaps stay what they are

The factor is found by the secant rule: a step is a sum of kernels, nearly linear in it.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardplan.costmodel.calibration import calibration_engines
from shardplan.costmodel.catalog import cluster_names, load_cluster, load_device
from shardplan.costmodel.correct import FamilyFit, correct
from shardplan.costmodel.correction import ALL, MAX_FACTOR, Correction
from shardplan.costmodel.datafile import is_file_name
from shardplan.costmodel.hardware import Cluster, Device
from shardplan.costmodel.price_measured import COLLECTIVES, check_plausible, price_measured
from shardplan.costmodel.profile_toml import check_name, profile_text
from shardplan.costmodel.profiler_files.measurement import ReadFile, ReadOptions, Skipped
from shardplan.costmodel.profiler_files.read import read_profiles
from shardplan.models.errors import InputError

__all__ = ["Anchor", "Calibrated", "calibrate_device", "parse_anchor"]

_ANCHOR_KEYS = (
    "model",
    "cluster",
    "nodes",
    "engine_profile",
    "weight_dtype",
    "kv_dtype",
    "attention",
    "tp",
    "pp",
    "dp",
    "ep",
    "cp",
    "phase",
    "batch",
    "tokens",
)
_NEEDED = ("model", "cluster", "phase", "batch", "tokens", "step_ms")
_STEPS = 20
_CLOSE = 1e-4
_NOTHING_SAID = ReadOptions()
_MILLI = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """One measured step: the point as `estimate` takes it, and its seconds."""

    point: Mapping[str, str]
    step_s: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What a calibration found, and the profile that holds it."""

    name: str
    device: Device
    cluster: str | None
    files: tuple[ReadFile, ...]
    skipped: tuple[Skipped, ...]
    """Of all files, and what the device or its calibration does not price."""
    fits: tuple[FamilyFit, ...]
    anchor: Correction | None
    anchor_before_s: float
    """The anchor's step as priced without the anchor; nan without one."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """All of a profile but its corrections and the name of its base."""

    name: str
    device: Device
    cluster: str | None
    engine: str
    files: tuple[ReadFile, ...]
    options: ReadOptions
    anchor: Anchor | None

    def text(self, corrections: Sequence[Correction], base: str) -> str:
        """The profile as TOML."""
        from shardplan import __version__

        given = {"ranks": self.options.ranks, "context": self.options.context}
        told = {key: str(value) for key, value in given.items() if value is not None}
        if self.anchor is not None:
            told["anchor"] = self.anchor.text
        return profile_text(
            name=self.name,
            title=f"{self.device.title}, corrected by measurements",
            base=base,
            cluster=self.cluster,
            engine=self.engine,
            version=__version__,
            options=told,
            files=self.files,
            corrections=corrections,
        )


def parse_anchor(text: str) -> Anchor:
    """Read `model=..,cluster=..,tp=..,phase=decode,batch=..,tokens=..,step_ms=..`."""
    cells: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value or key in cells or key not in (*_ANCHOR_KEYS, "step_ms"):
            raise InputError(
                "an anchor is key=value pairs joined by commas, each key once",
                got=f"{part.strip()[:60]!r}",
                hint="keys: " + ", ".join((*_ANCHOR_KEYS, "step_ms")),
            )
        cells[key] = value
    missing = [key for key in _NEEDED if key not in cells]
    if missing:
        raise InputError("an anchor lacks keys", got=", ".join(missing))
    if cells["phase"] not in ("prefill", "decode"):
        raise InputError("an anchor's phase is prefill or decode", got=f"phase={cells['phase']}")
    try:
        step_s = float(cells.pop("step_ms")) * _MILLI
    except ValueError:
        step_s = math.nan
    if not 0.0 < step_s < math.inf:
        raise InputError("`step_ms` must be a number above 0", got=text[-60:])
    return Anchor(point=cells, step_s=step_s, text=text)


def calibrate_device(
    paths: Sequence[Path],
    device: str,
    *,
    cluster: str | None = None,
    engine_profile: str | None = None,
    name: str | None = None,
    options: ReadOptions = _NOTHING_SAID,
    anchor: Anchor | None = None,
    folder: Path | None = None,
) -> Calibrated:
    """Read, fit and write up; nothing is stored. Raises the error of the first bad input.

    A device from a file is named in the profile by its path from `folder`. Measurements are
    taken for kernels of `engine_profile`, by default the first that the device runs.
    """
    if not paths and anchor is None:
        raise InputError("files or an anchor are needed", hint="give FILE... or --anchor")
    found = _uncorrected(device)
    own = check_name(name or f"{found.name}-calibrated")
    where = cluster or (anchor.point["cluster"] if anchor else _home(found))
    files = read_profiles(paths, options)
    engine = _own_kernels(engine_profile, found)
    fits, skipped = _fit_files(files, found, _fabric(where, found, files), engine)
    kept = [fit.correction for fit in fits if fit.correction is not None]
    draft = _Draft(
        name=own,
        device=found,
        cluster=None if where is None or is_file_name(where) else where,
        engine=engine,
        files=files,
        options=options,
        anchor=anchor,
    )
    base = str(Path(device).resolve()) if is_file_name(device) else found.name
    whole, before_s = (None, math.nan) if anchor is None else _solve(anchor, kept, draft, base)
    every = kept if whole is None else [*kept, whole]
    return Calibrated(
        name=own,
        device=found,
        cluster=draft.cluster,
        files=files,
        skipped=skipped,
        fits=tuple(fits),
        anchor=whole,
        anchor_before_s=before_s,
        text=draft.text(every, _from(folder, base) if is_file_name(device) else base),
    )


def _uncorrected(device: str) -> Device:
    found = load_device(device)
    if found.corrections:
        raise InputError("a profile is made from a device", got=f"{device} is a profile itself")
    return found


def _own_kernels(engine_profile: str | None, device: Device) -> str:
    """The engine profile where the calibration knows kernels of its own; "" elsewhere."""
    from shardplan.search.estimate_names import find_engine

    engine = find_engine(engine_profile or "", device).name
    return engine if engine in calibration_engines(device.calibration) else ""


def _from(folder: Path | None, path: str) -> str:
    """The path as seen from a folder, with a separator so that it reads as a file's."""
    return path if folder is None else os.path.join(".", os.path.relpath(path, folder.resolve()))


def _home(device: Device) -> str | None:
    """The first shipped cluster of this device; None where there is none."""
    names = cluster_names()
    return next((name for name in names if load_cluster(name).device.name == device.name), None)


def _fabric(where: str | None, device: Device, files: Sequence[ReadFile]) -> Cluster | None:
    """The cluster with the device, and as many nodes as the collectives' ranks need."""
    if where is None:
        return None
    measured = (one for file in files for one in file.measurements)
    ranks = [int(one.size("ranks")) for one in measured if one.op in COLLECTIVES]
    return load_cluster(where, device=device, cards=max(ranks, default=None))


def _fit_files(
    files: Sequence[ReadFile], device: Device, cluster: Cluster | None, engine: str
) -> tuple[list[FamilyFit], tuple[Skipped, ...]]:
    measured = [one for file in files for one in file.measurements]
    skipped = [one for file in files for one in file.skipped]
    if files and not measured:
        said = "; ".join(f"{one.kernel}: {one.reason}" for one in skipped[:3])
        raise InputError("the files hold no kernel that can be used", got=said)
    priced, refused = price_measured(device, cluster, measured, engine)
    check_plausible(device, priced)
    for reason, ones in refused.items():
        for kernel in sorted({one.kernel for one in ones}):
            count = sum(one.count for one in ones if one.kernel == kernel)
            skipped.append(Skipped(kernel=kernel, reason=reason, count=count))
    return correct(priced), tuple(skipped)


def _solve(
    anchor: Anchor, kept: Sequence[Correction], draft: _Draft, base: str
) -> tuple[Correction, float]:
    """The factor of all other sections that makes the anchor's step what was measured."""
    with tempfile.TemporaryDirectory() as folder:

        def priced(number: int, factor: float) -> dict[str, Any]:
            from shardplan.search.estimate_detail import explain_one

            path = Path(folder) / f"trial-{number}.toml"
            trial = [*kept, _whole(factor, anchor, math.nan)]
            path.write_text(draft.text(trial, base), encoding="utf-8")
            return explain_one({**anchor.point, "device": str(path)})

        plain = priced(0, 1.0)
        start_s, host_s = float(plain["step_s"]), float(plain["host_s"])
        if anchor.step_s <= host_s:
            raise _unreachable(anchor, start_s, f"{host_s * 1e3:.4g} ms of it is host time")
        last, last_s = 1.0, start_s
        factor = (anchor.step_s - host_s) / (start_s - host_s)
        for number in range(1, _STEPS):
            if not 1.0 / MAX_FACTOR < factor < MAX_FACTOR:
                raise _unreachable(anchor, start_s, f"a factor of {factor:.3g} would be needed")
            now_s = float(priced(number, factor)["step_s"])
            if abs(now_s / anchor.step_s - 1.0) < _CLOSE:
                return _whole(factor, anchor, start_s), start_s
            if now_s == last_s:
                break
            last, last_s, factor = (
                factor,
                now_s,
                factor + (anchor.step_s - now_s) * (factor - last) / (now_s - last_s),
            )
    raise _unreachable(anchor, start_s, "other kernels or the host set the time")


def _whole(factor: float, anchor: Anchor, before_s: float) -> Correction:
    error = abs(before_s / anchor.step_s - 1.0)
    return Correction(
        name=ALL,
        floor_factor=factor,
        knots_s=(1.0,),
        factors=(factor,),
        kind="derived",
        source=f"one end-to-end number, spread over every kernel alike: {anchor.text}",
        rows_fitted=1,
        rows_held_out=0,
        median_error_before=error,
        p90_error_before=math.nan,
        median_error=math.nan,
        p90_error=math.nan,
    )


def _unreachable(anchor: Anchor, start_s: float, why: str) -> InputError:
    return InputError(
        f"the anchor must be reachable by one factor within {MAX_FACTOR:g}",
        got=f"step_ms={anchor.step_s * 1e3:.4g}, priced {start_s * 1e3:.4g} ms; {why}",
        hint="check the unit, the strategy and the engine profile",
    )
