"""What every fit shares: reading tables, keeping rows back, robust fitting, errors, TOML.

A row is held out when the hash of its shape falls in the first `HELD_OUT` part of the hash
range: the same rows whatever their order, and all repeats of a shape on the same side. Fits
minimise the soft absolute error of log(time), so that 5 us and 5 ms count alike and a few
odd rows cannot pull the curve: `sum rho(ln(model / measured))`, with rho quadratic below
`scale` and linear above.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.calibration import Kind, Section
from shardplan.costmodel.kernels.base import Array
from shardplan.models.errors import InputError

__all__ = [
    "HELD_OUT",
    "ErrorStats",
    "FittedSection",
    "cross_validated",
    "error_stats",
    "held_out",
    "markdown_errors",
    "read_rows",
    "robust_fit",
    "trial_section",
    "write_sections",
]

HELD_OUT = 0.2
"""Share of the shapes kept out of a fit."""
_MAX_STEPS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorStats:
    """Relative errors |model / measured - 1| of `rows` rows; nan where there are none."""

    rows: int
    median: float
    p90: float
    worst: float
    bias: float
    """Median of model / measured - 1, with its sign."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedSection:
    """One TOML section to write: `[name]` with provenance, errors and coefficients."""

    name: str
    kind: Kind
    source: str
    coefficients: Mapping[str, float]
    rows_fitted: int = 0
    held: ErrorStats | None = None
    fit_errors: ErrorStats | None = None
    """Errors on the fitted rows, written where there are none held out."""


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a `.csv` or `.csv.gz` file with a header line; `InputError` if it is not there."""
    if not path.is_file():
        raise InputError("a measured table is missing", got=str(path), hint="check DATA_DIR")
    opener: Callable[..., Iterable[str]] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as handle:  # type: ignore[attr-defined]
        yield from csv.DictReader(handle)


def held_out(shapes: Iterable[Sequence[object]], fraction: float = HELD_OUT) -> NDArray[np.bool_]:
    """Which rows to keep out of a fit, by a hash of each row's shape: bool `[rows]`."""
    limit = int(fraction * 2**32)
    marks = [
        int.from_bytes(hashlib.blake2b(repr(tuple(shape)).encode(), digest_size=4).digest(), "big")
        < limit
        for shape in shapes
    ]
    return np.asarray(marks, dtype=np.bool_)


def cross_validated(
    shapes: Sequence[Sequence[object]],
    measured_s: Array,
    predict: Callable[[NDArray[np.bool_]], Array],
    *,
    seeds: Sequence[int] = (0,),
    folds: int = 5,
) -> ErrorStats:
    """Errors of every row under a fit that did not see it, pooled over each seed's folds.

    `predict(left_out)` fits the other rows and gives the seconds `[rows left out]`. Repeats of a
    shape are left out together.
    """
    model, measured = [], []
    for seed in seeds:
        marks = [
            hashlib.blake2b(repr((seed, *shape)).encode(), digest_size=4).digest()
            for shape in shapes
        ]
        fold = np.asarray([int.from_bytes(mark, "big") % folds for mark in marks])
        for one in range(folds):
            left_out = np.asarray(fold == one, dtype=np.bool_)
            model.append(predict(left_out))
            measured.append(measured_s[left_out])
    return replace(
        error_stats(np.concatenate(model), np.concatenate(measured)), rows=measured_s.size
    )


def error_stats(model_s: Array, measured_s: Array) -> ErrorStats:
    """Relative errors of predicted times `[rows]` against measured ones `[rows]`."""
    if measured_s.size == 0:
        nan = math.nan
        return ErrorStats(rows=0, median=nan, p90=nan, worst=nan, bias=nan)
    signed = model_s / measured_s - 1.0
    size = np.abs(signed)
    return ErrorStats(
        rows=int(size.size),
        median=float(np.median(size)),
        p90=float(np.quantile(size, 0.9)),
        worst=float(size.max()),
        bias=float(np.median(signed)),
    )


def robust_fit(
    model: Callable[[Array], Array],
    measured_s: Array,
    start: Array,
    lower: Array,
    upper: Array,
    *,
    scale: float = 0.05,
    ridge: Array | None = None,
    penalty: Callable[[Array], Array] | None = None,
) -> Array:
    """Coefficients in [lower, upper] that minimise the soft absolute error of log(time).

    `model(coefficients)` gives times `[rows]`; `ridge` (one weight a coefficient) pulls each
    towards its start, which keeps surface terms that the rows do not fix near zero;
    `penalty(coefficients)` gives further residuals that should vanish.
    """
    from scipy.optimize import least_squares

    target = np.log(measured_s)

    def residual(point: Array) -> Array:
        terms = [np.asarray(np.log(model(point)) - target, dtype=np.float64)]
        if ridge is not None:
            terms.append(ridge * (point - start))
        if penalty is not None:
            terms.append(penalty(point))
        return np.concatenate(terms)

    span = np.maximum(np.abs(start), 0.1 * (upper - lower))
    found = least_squares(
        residual,
        start,
        bounds=(lower, upper),
        loss="soft_l1",
        f_scale=scale,
        x_scale=span,
        max_nfev=_MAX_STEPS,
    )
    return np.asarray(found.x, dtype=np.float64)


def _number(value: float) -> str:
    text = f"{float(f'{value:.5g}')!r}"
    return text if any(mark in text for mark in ".en") else text + ".0"


def trial_section(name: str, coefficients: Mapping[str, float]) -> Section:
    """A section with coefficients that are being tried, without provenance."""
    return Section(
        name=name,
        kind="fitted",
        source="",
        rows_fitted=0,
        rows_held_out=0,
        median_error=0.0,
        p90_error=0.0,
        coefficients=coefficients,
    )


def write_sections(path: Path, heading: str, sections: Sequence[FittedSection]) -> None:
    """Write sections as TOML, five significant digits, in the given order."""
    lines = [f"# {line}" for line in heading.splitlines()]
    for section in sections:
        source = section.source.replace("\\", "\\\\").replace('"', '\\"')
        lines += ["", f"[{section.name}]", f'kind = "{section.kind}"', f'source = "{source}"']
        lines.append(f"rows_fitted = {section.rows_fitted}")
        if section.held is not None and section.held.rows:
            lines.append(f"rows_held_out = {section.held.rows}")
            lines.append(f"median_error = {_number(section.held.median)}")
            lines.append(f"p90_error = {_number(section.held.p90)}")
        elif section.fit_errors is not None:
            lines.append(f"median_error = {_number(section.fit_errors.median)}")
            lines.append(f"p90_error = {_number(section.fit_errors.p90)}")
        lines += ["", f"[{section.name}.coefficients]"]
        lines += [f"{key} = {_number(value)}" for key, value in section.coefficients.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def markdown_errors(rows: Sequence[tuple[str, ErrorStats]]) -> str:
    """A Markdown table of errors in percent, one named line each."""
    lines = ["| rows | count | median | p90 | worst | bias |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {stats.rows} | {stats.median:.1%} | {stats.p90:.1%} | {stats.worst:.1%} "
        f"| {stats.bias:+.1%} |"
        for name, stats in rows
    ]
    return "\n".join(lines) + "\n"
