"""One profile: the points that are left, measured one after another into the CSV.

A point that the device refuses (no such kernel, not enough memory) is left out and said; so is a
rate that cannot be. Both are tried again by the next run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shardplan.models.errors import InputError, ShardplanError
from shardplan.search.profiling.backend import Target, open_target
from shardplan.search.profiling.collectives import World, join, local_rank, world_size
from shardplan.search.profiling.operators import build_calls, rotations
from shardplan.search.profiling.plan import chosen_ops, collective_points, operator_points
from shardplan.search.profiling.points import Point, load_grid
from shardplan.search.profiling.rates import (
    ceiling_of,
    cold_bytes,
    heats,
    impossible,
)
from shardplan.search.profiling.table import Row, Table
from shardplan.search.profiling.timing import Timing, measure

__all__ = ["Report", "Show", "left_to_do", "profile", "profile_operators"]

Show = Callable[[int, int], None]
"""Draws progress: (points done, points in all)."""
_SHOWN = 160


@dataclass(slots=True, kw_only=True)
class Report:
    """What a run did."""

    target: Target
    rows: list[Row] = field(default_factory=list)
    """All rows of the CSV, those of earlier runs too."""
    measured: int = 0
    kept: int = 0
    """Points that the CSV already held."""
    failed: dict[str, list[str]] = field(default_factory=dict)
    """Operator and backend -> what the device said, one entry a point."""
    refused: list[str] = field(default_factory=list)
    """Rates that cannot be."""
    leader: bool = True
    """Whether this process is the one that writes and prints."""

    def fail(self, point: Point, error: Exception) -> None:
        """Note a point that the device did not run."""
        text = " ".join(str(error).split())[:_SHOWN] or type(error).__name__
        self.failed.setdefault(f"{point.op} ({point.dtype}, {point.backend})", []).append(text)

    def take(self, point: Point, timing: Timing, table: Table, cold: float) -> None:
        """Write a row, unless its rate cannot be."""
        reason = impossible(point, timing, ceiling_of(self.target.name), cold)
        if reason:
            self.refused.append(f"{point.op} {point.dtype}: {reason}")
            return
        target = self.target
        table.add(
            Row(
                point=point,
                median_s=timing.median_s,
                min_s=timing.min_s,
                repeats=timing.repeats,
                device_name=target.name,
                driver=target.driver,
                torch_version=target.version,
            )
        )
        self.measured += 1


def left_to_do(points: Iterable[Point], rows: Iterable[Row]) -> list[Point]:
    """Points that are missing, those that heat the device after all others."""
    done = {row.point for row in rows}
    return sorted((point for point in dict.fromkeys(points) if point not in done), key=heats)


def profile_operators(target: Target, points: Sequence[Point], out: Path, show: Show) -> Report:
    """Measure the operators of `points` that `out` does not hold."""
    report = Report(target=target)
    with Table(out, target.name) as table:
        left = left_to_do(points, table.rows)
        report.kept = len(dict.fromkeys(points)) - len(left)
        with target.torch.inference_mode():
            for done, point in enumerate(left):
                show(done, len(left))
                try:
                    calls = build_calls(target, point)
                    timing = measure(target, calls, point.mode, hot=heats(point))
                except (RuntimeError, ImportError) as error:
                    report.fail(point, error)
                    continue
                cold = cold_bytes(point, target.cache_bytes, rotations(target, point))
                report.take(point, timing, table, cold)
        show(len(left), len(left))
        report.rows = list(table.rows)
    return report


def _opened(world: World, out: Path) -> Table | None:
    """The CSV on rank 0, None elsewhere; the same error everywhere if it does not open."""
    table, problem = None, None
    if world.rank == 0:
        try:
            table = Table(out, world.target.name)
        except ShardplanError as error:
            problem = (error.rule, error.got, error.hint)
    problem = world.share(problem)
    if problem is not None:
        raise InputError(problem[0], got=problem[1], hint=problem[2])
    return table


def _profile_collectives(world: World, points: Sequence[Point], out: Path, show: Show) -> Report:
    report = Report(target=world.target, leader=world.rank == 0)
    table = _opened(world, out)
    left = world.share(left_to_do(points, table.rows) if table else None)
    report.kept = len(points) - len(left)
    for done, point in enumerate(left):
        if table:
            show(done, len(left))
        try:
            timing = world.measure(point)
        except RuntimeError as error:
            report.fail(point, error)
            continue
        if table:
            report.take(point, timing, table, 0.0)
    if table:
        show(len(left), len(left))
        report.rows = list(table.rows)
        table.close()
    return report


def profile(kind: str, out: Path, grid: str, ops: str | None, show: Show) -> Report:
    """Measure a grid on a device of this machine into a CSV.

    kind: npu, cuda or cpu. grid: tiny, full or a TOML file. ops: comma-separated names, by default
    all operators, or under torchrun all collectives. Raises `InputError`.
    """
    world = world_size()
    names = chosen_ops(ops, world)
    points = [point for point in load_grid(grid) if point.op in names]
    if not points:
        raise InputError("the grid has nothing of these operators", got=f"{grid}: {ops}")
    target = open_target(kind, local_rank())
    if world == 1:
        return profile_operators(target, operator_points(target, points, names), out, show)
    ranks = join(target)
    try:
        chosen = collective_points(target, points, names, ranks.size, ranks.backend)
        return _profile_collectives(ranks, chosen, out, show)
    finally:
        ranks.leave()
