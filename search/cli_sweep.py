"""`shardplan search --sweep`: one search a combination, a table and pictures of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from shardplan.models.errors import InfeasibleError, InputError
from shardplan.search.cli_common import note, print_json, progress, stdout_console

__all__ = ["PLANS_KEPT", "sweep_command"]

PLANS_KEPT = 64
"""Combinations up to which every plan.json is kept unless said otherwise."""
_MOST_JOBS = 256


def sweep_command(
    base: dict[str, Any],
    texts: list[str],
    folder: Path,
    *,
    jobs: int | None,
    plans: bool | None,
    parquet: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Search every combination, write the table, plans and pictures into `folder`, and print it.

    `base`: arguments of `shardplan.search`. `KeyboardInterrupt` is raised again once what was
    finished is written.
    """
    from shardplan.search.output import check_out
    from shardplan.search.parquet_out import write_beside
    from shardplan.search.sweep import run_sweep
    from shardplan.search.sweep_out import print_sweep, sweep_json, write_sweep
    from shardplan.search.sweep_values import parse_axes

    axes = parse_axes(texts)
    workers = _workers(jobs)
    check_out(folder, force=force)
    count = 1
    for axis in axes:
        count *= len(axis.values)
    kept = count <= PLANS_KEPT if plans is None else plans
    sizes = " x ".join(f"{len(axis.values)} {axis.option}" for axis in axes)
    note(f"{count} combinations ({sizes}), {min(workers, count)} at a time")
    with progress("sweeping") as show:
        found = run_sweep(
            base, axes, jobs=workers, plans=folder / "plans" if kept else None, progress=show
        )
    write_sweep(found, folder / "sweep.csv")
    beside = write_beside([folder / "sweep.csv"]) if parquet else []
    for path in (folder / "sweep.csv", *beside):
        note(f"wrote {path}")
    if not kept and plans is None:
        note(f"plans of more than {PLANS_KEPT} combinations are kept with --plans")
    _draw(found, base, folder)
    _compare(found, base, texts, folder, as_json=as_json)
    if as_json:
        print_json(sweep_json(found))
    else:
        print_sweep(found, stdout_console())
    if found.interrupted:
        raise KeyboardInterrupt
    _check_any(found.rows)


def _workers(jobs: int | None) -> int:
    if jobs is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if not 1 <= jobs <= _MOST_JOBS:
        raise InputError(f"`--jobs` is from 1 to {_MOST_JOBS}", got=f"jobs={jobs}")
    return jobs


def _draw(found: Any, base: dict[str, Any], folder: Path) -> None:
    """Pictures are an extra: without matplotlib the table stands alone."""
    from shardplan.search.sweep_out import value_words
    from shardplan.search.sweep_plots import draw_sweep

    try:
        swept = {axis.name for axis in found.axes}
        parts = [value_words(base[name]) for name in ("model", "cluster") if name not in swept]
        objective = str(base.get("objective") or "throughput")
        paths, notes = draw_sweep(found, objective, folder, title=" on ".join(parts))
    except InputError as error:
        note(f"note: no plots were drawn: {error}")
        return
    for text in (*notes, *(f"wrote {path}" for path in paths)):
        note(text)


def _compare(
    found: Any, base: dict[str, Any], texts: list[str], folder: Path, *, as_json: bool
) -> None:
    """Where both ways of serving were swept: which of them pays, as a page and a picture."""
    from shardplan.models.atomic import write_atomically
    from shardplan.search.crossover import crossover_of, print_crossover, to_markdown
    from shardplan.search.crossover_plot import draw_crossover

    both = crossover_of(found, str(base.get("objective") or "throughput"))
    if both is None:
        return
    write_atomically(folder / "crossover.md", to_markdown(both, _title(base, texts)))
    note(f"wrote {folder / 'crossover.md'}")
    try:
        draw_crossover(both, folder / "crossover")
    except InputError:  # said of the other pictures
        pass
    else:
        note(f"wrote {folder / 'crossover.svg'}")
    if not as_json:
        print_crossover(both, stdout_console())


def _title(base: dict[str, Any], texts: list[str]) -> str:
    """The question that all combinations have in common."""
    from shardplan.search.sweep_out import value_words

    names = ("nodes", "cards", "prefill_cluster", "input_len", "output_len", "concurrency", "rate")
    swept = {text.partition("=")[0].strip().removeprefix("--").replace("-", "_") for text in texts}
    words = [f"{value_words(base['model'])} on {value_words(base['cluster'])}"]
    words += [
        f"{name.replace('_', '-')} {value_words(base[name])}"
        for name in (*names, "ttft_ms", "tpot_ms")
        if name not in swept and base[name] is not None
    ]
    return ", ".join(words)


def _check_any(rows: Any) -> None:
    """A sweep without a single plan is no answer: exit 3, or 2 where all were bad questions."""
    if any(row["status"] == "ok" for row in rows):
        return
    infeasible = any(row["status"] == "infeasible" for row in rows)
    raise (InfeasibleError if infeasible else InputError)(
        "no combination of the sweep has a plan", got=f"the first: {rows[0]['message']}"
    )
