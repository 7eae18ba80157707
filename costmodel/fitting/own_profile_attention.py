"""Attention of a profile: `attention.prefill` and `attention.decode` of one engine.

The formulas of `kernels.flash` first (`fitting.attention`), then a grid of ln(measured / formula)
over tasks (batch times query heads in prefill, batch times kv heads in decode) and context, smooth
where rows are few: it minimises

    sum rho(B g - ln(measured / formula)) + smooth^2 sum (knot - line through its neighbours)^2
        + ridge^2 sum g^2

with B the weights of bilinear interpolation, in logs, between the knots, and rho as in the fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from shardplan.costmodel.calibration import Calibration
from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.fitting.attention import DECODE, HEADS, PREFILL, Problem, fit
from shardplan.costmodel.fitting.attention_tables import Table
from shardplan.costmodel.fitting.common import (
    ErrorStats,
    FittedSection,
    error_stats,
    held_out,
    trial_section,
)
from shardplan.costmodel.fitting.own_profile_tables import Profile
from shardplan.costmodel.fitting.surface_fit import knot_weights
from shardplan.costmodel.kernels.attention import attention_decode, attention_prefill
from shardplan.costmodel.kernels.base import Array, Machine
from shardplan.costmodel.nearby import grid_name

__all__ = ["attention_sections"]

_SIZES = ("batch", "tokens", "heads", "kv_heads", "head_dim")
_BACKEND = "sdpa_cudnn"
_TASKS = {
    "prefill": (8, 16, 32, 64, 128, 256, 1024),
    "decode": (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
}
_CONTEXTS = {
    "prefill": (128, 256, 512, 1024, 2048, 4096, 16384),
    "decode": (128, 512, 1024, 2048, 4096, 16384),
}
_SMOOTH, _RIDGE, _SCALE = 0.3, 0.1, 0.03
_ROUNDS = 20
Point = tuple[float, ...]


def _time(machine: Machine, phase: str, rows: Array) -> Array:
    batch, tokens, heads, kv_heads, dim = rows.T
    if phase == "prefill":
        return attention_prefill(
            machine, batch, tokens, 0, heads, kv_heads, dim, kernel="flash", kv_dtype="bf16"
        ).total_s
    return attention_decode(
        machine, batch, tokens, heads, kv_heads, dim, kernel="flash", kv_dtype="bf16"
    ).total_s


def _prefill(machine: Machine, rows: Array) -> Array:
    return _time(machine, "prefill", rows)


def _decode(machine: Machine, rows: Array) -> Array:
    return _time(machine, "decode", rows)


def _bend(knots: tuple[int, ...], width: int, stride: int, count: int) -> list[Array]:
    """Rows that say how far a knot lies from the line of its neighbours along one axis."""
    rows = []
    logs = np.log(np.asarray(knots, dtype=np.float64))
    for at in range(1, len(knots) - 1):
        share = (logs[at] - logs[at - 1]) / (logs[at + 1] - logs[at - 1])
        for other in range(width):
            row = np.zeros(count)
            step = count // width if stride == 1 else 1
            place = at * stride + other * step
            row[place - stride] = 1.0 - share
            row[place + stride] = share
            row[place] = -1.0
            rows.append(row)
    return rows


def _grid(phase: str, rows: Array, logs: Array) -> dict[str, float]:
    """Knots of the correction that fit ln(measured / formula) of the rows."""
    tasks, contexts = _TASKS[phase], _CONTEXTS[phase]
    count = len(tasks) * len(contexts)
    lanes = rows[:, 0] * rows[:, 2 if phase == "prefill" else 3]
    sizes = (lanes, rows[:, 1], np.ones_like(lanes))
    weights = knot_weights(sizes, (tasks, contexts, (1,)))
    bend = [
        *_bend(tasks, len(contexts), len(contexts), count),
        *_bend(contexts, len(tasks), 1, count),
    ]
    prior = np.concatenate([_SMOOTH * np.stack(bend), _RIDGE * np.eye(count)])
    found = np.zeros(count)
    for _ in range(_ROUNDS):
        miss = logs - weights @ found
        soft = (1.0 + (miss / _SCALE) ** 2) ** -0.25
        left = np.concatenate([weights * soft[:, None], prior])
        right = np.concatenate([logs * soft, np.zeros(prior.shape[0])])
        found = np.linalg.lstsq(left, right, rcond=None)[0]
    names = [grid_name(task, context) for task in tasks for context in contexts]
    return dict(zip(names, found.tolist(), strict=True))


def _machine(device: str, name: str, coefficients: Mapping[str, float]) -> Machine:
    section = trial_section(name, coefficients)
    return Machine(load_device(device), Calibration(name="trial", sections={name: section}))


def _problem(phase: str, device: str, table: Table) -> Problem:
    prefill = phase == "prefill"
    fixed = {"tile_scale": 1.0, "e_d": 0.0} if prefill else {"compute_efficiency": 0.6}
    decode = {**DECODE, **HEADS, "hbm_shift": (1.0, 0.0, 4.0)}
    return Problem(
        section=f"attention.{phase}",
        device=device,
        table=table,
        call=_prefill if prefill else _decode,
        bounds=PREFILL if prefill else decode,
        fixed={"softmax_flop": 22.0, **fixed},
        scale=0.05,
        ridge=0.02,
    )


def attention_sections(
    profile: Profile, device: str, source: str
) -> tuple[list[FittedSection], list[tuple[str, ErrorStats]]]:
    """Both sections, fitted to four fifths of the shapes, and their errors on the others."""
    sections, errors = [], []
    for phase in ("prefill", "decode"):
        name = f"attention.{phase}"
        found = profile.of(name.replace(".", "_"), _BACKEND, _SIZES)
        rows, seconds = found[:, :-1], found[:, -1]
        own = f"{name} ({_BACKEND}) of {source}"
        held = held_out(rows.tolist())
        odd = np.zeros(int((~held).sum()), dtype=np.bool_)
        table = Table(rows=rows[~held], seconds=seconds[~held], odd=odd, source=own)
        formula = fit(_problem(phase, device, table)).section
        plain = _time(_machine(device, name, formula.coefficients), phase, rows)
        logs = np.log(seconds / plain)
        whole = {**formula.coefficients, **_grid(phase, rows[~held], logs[~held])}
        priced = _time(_machine(device, name, whole), phase, rows)
        stats = error_stats(priced[held], seconds[held])
        count = int((~held).sum())
        sections.append(replace(formula, coefficients=whole, rows_fitted=count, held=stats))
        errors.append((name, stats))
    return sections, errors
