"""What is fuzzed: every reader of a file or of words, and what the commands do with what it read.

A target reads one file. It returns, or raises an error of shardplan's own; anything else is a
finding (`judge`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import itertools
import shlex
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests.fuzz import seeds
from tests.search.shared_study import search_small

from shardplan.costmodel.catalog import cluster_summary, load_cluster
from shardplan.costmodel.devices import device_summary, load_device
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.profiler_files.measurement import ReadOptions
from shardplan.costmodel.simulate.describe import describe
from shardplan.costmodel.simulate.workload import requests
from shardplan.models.catalog import load_model, model_summary
from shardplan.models.errors import InputError
from shardplan.models.frontends.load import load_graph
from shardplan.search import workers
from shardplan.search.analyze import summarise, to_json
from shardplan.search.asked import Asked
from shardplan.search.calibrate import calibrate_device
from shardplan.search.cli_lint import read as read_configuration
from shardplan.search.emit import emit
from shardplan.search.estimate import price_columns
from shardplan.search.estimate_csv import priced_csv, read_points_csv
from shardplan.search.explain import explain
from shardplan.search.joined import draw_for
from shardplan.search.lint import lint
from shardplan.search.main import run
from shardplan.search.oplevel.plan import OperatorPlan
from shardplan.search.plan import Plan
from shardplan.search.predicted import predicted_steps
from shardplan.search.profiling.points import load_grid
from shardplan.search.profiling.table import read_rows
from shardplan.search.proof import verify_plan
from shardplan.search.report.page import page
from shardplan.search.request import resolve
from shardplan.search.runs import read_runs, side_by_side
from shardplan.search.simulate import simulate_plan
from shardplan.search.simulate_demand import read_demand
from shardplan.search.study import Place
from shardplan.search.targets import BUILT_IN
from shardplan.search.trace import write_trace
from shardplan.search.validate import to_json as validation_json
from shardplan.search.validate import validate

__all__ = ["TARGETS", "Target", "WrongEndError"]

_CLUSTER = "atlas-800t-a2"
_MODEL = "llama-3.1-8b"
_FEW = 20
"""Requests of a simulation, rows that are priced."""
_EXITS = (0, 2, 3)
_NUMBERS = itertools.count()


class WrongEndError(Exception):
    """A command line ended with an exit code that only a bug has."""


@dataclass(frozen=True, slots=True)
class Target:
    """A reader, how its files are made wrong, and how many of the inputs it gets."""

    name: str
    kind: str
    """Of its mutator."""
    suffix: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    share: float = 1.0
    """Of the inputs, relative to other targets: slow ones get fewer."""
    extra: str = ""
    """Package without which it is left out."""


def _one_of(path: Path, ways: int) -> int:
    """A number below `ways` that depends on what the file holds."""
    return zlib.crc32(path.read_bytes()) % ways


def _price(**cells: Any) -> None:
    """One step priced, as `estimate` does."""
    point = {"model": _MODEL, "cluster": _CLUSTER, "phase": "decode", "batch": 4, "tokens": 256}
    prices = price_columns({name: [value] for name, value in {**point, **cells}.items()}, 1)
    if prices.errors:
        raise prices.errors[0]


def _config(path: Path) -> None:
    model_summary(str(path))
    _price(model=str(path), phase=("prefill", "decode")[_one_of(path, 2)])


def _device(path: Path) -> None:
    device_summary(str(path))
    device = load_device(str(path))
    _price(device=str(path), cluster="hgx-h200" if device.vendor == "nvidia" else _CLUSTER)


def _cluster(path: Path) -> None:
    cluster_summary(str(path))
    load_cluster(str(path))
    _price(cluster=str(path), tp=2)


def _cluster_file(path: Path) -> None:
    load_cluster(str(path), device=(None, "910b2")[_one_of(path, 2)])
    _price(cluster=str(path), tp=2)


def _engine(path: Path) -> None:
    load_engine(str(path))
    _price(engine_profile=str(path), cluster=("hgx-h200", _CLUSTER)[_one_of(path, 2)])


def _workload(path: Path) -> None:
    if _one_of(path, 2):
        resolve(Asked(model=_MODEL, cluster=_CLUSTER, workload=str(path)))
        return
    _described(path)


def _described(path: Path) -> None:
    demand = read_demand(str(path), {"num_prompts": _FEW}, None).demand
    describe(requests(demand), demand, lambda _done: None)


def _profiler_file(path: Path) -> None:
    said = (ReadOptions(), ReadOptions(ranks=8, context=1024))[_one_of(path, 2)]
    calibrate_device([path], "910b2", options=said)


def _plan(path: Path) -> None:
    plan = Plan.load(path)
    plan.dumps()
    uses: tuple[Callable[[], object], ...] = (
        lambda: verify_plan(plan, level=0),
        lambda: explain(plan, shadows=False),
        lambda: page(plan, _trials()),
        lambda: _simulated(plan),
        lambda: write_trace(path.parent / "trace.json", plan, predicted_steps(plan)),
        *(functools.partial(_emitted, plan, name, path.parent) for name in BUILT_IN),
    )
    uses[_one_of(path, len(uses))]()


def _simulated(plan: Plan) -> None:
    simulate_plan(plan, read_demand(None, {"num_prompts": _FEW}, plan).demand)


def _emitted(plan: Plan, target: str, folder: Path) -> None:
    """Files go into a folder of their own, and nowhere else."""
    out = folder / "deploy"
    for path in emit(plan, target, out, force=True):
        if path.parent != out and out not in path.parents:
            raise WrongEndError(f"{path} lies outside")


@functools.cache
def _trials() -> Any:
    from tests.search.plan_factory import make_trials

    return make_trials().head(_FEW)


def _points(path: Path) -> None:
    table = read_points_csv(path)
    priced_csv(table, price_columns(table.columns, table.rows, refused=table.refused))


def _figures(path: Path) -> None:
    validation_json(validate(path))


def _analyzed(path: Path) -> None:
    from rich.console import Console

    from shardplan.search.analyze_tables import render_summary

    runs = read_runs([path])
    side_by_side(runs)
    summary = summarise(runs[0].frame)
    to_json(summary)
    render_summary(summary, Console(file=io.StringIO(), width=100))


def _storage(path: Path) -> None:
    """A study that a worker joins, or that a search goes on with.

    A copy of its own: a database is held open by what read the one before. Nobody works on what
    is running there, and that is waited for as briefly as it can be.
    """
    own = Path(shutil.copy(path, path.with_name(f"{next(_NUMBERS)}{path.suffix}")))
    address = f"{'journal:' if path.suffix == '.log' else 'sqlite:///'}{own}"
    with mock.patch.object(workers, "GRACE_S", 0.0):
        if _one_of(path, 2):
            draw_for(address, seeds.STUDY, most=1)
        else:
            search_small(Place(storage=address, name=seeds.STUDY, resume=True), 4)
    gc.collect()  # its connections


def _lint(path: Path) -> None:
    asked = Asked(model=_MODEL, cluster=_CLUSTER)
    for one in read_configuration(str(path), "a b"):
        lint(one, asked, best=False)


def _onnx(path: Path) -> None:
    if _one_of(path, 2):
        load_model(path)
    else:
        load_graph(path)


def _pt2(path: Path) -> None:
    load_graph(path)


def _grid(path: Path) -> None:
    load_grid(str(path))


def _command(path: Path) -> None:
    """A command line in a folder of its own, stdin closed; a bug is told by its exit code."""
    try:
        words = shlex.split(path.read_text(encoding="utf-8"))
    except ValueError:  # no command line of a shell
        return
    said = io.StringIO()
    with (
        contextlib.chdir(path.parent),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(said),
    ):
        code = run([word for word in words if "\0" not in word])
    if code not in _EXITS:
        raise WrongEndError(f"exit code {code}: {said.getvalue()[-600:]}")
    if code:
        raise InputError("refused", got=str(code))


_ALL = (
    Target("config.json", "json", ".json", seeds.configs, _config),
    Target("device", "toml", ".toml", seeds.devices, _device),
    Target("cluster", "toml", ".toml", seeds.clusters, _cluster),
    Target("engine", "toml", ".toml", seeds.engines, _engine),
    Target("workload", "toml", ".toml", seeds.workloads, _workload, 1.5),
    Target("calibration", "toml", ".toml", seeds.profiles, _device),
    Target("cluster file", "json", ".json", seeds.cluster_files, _cluster_file, 2),
    Target("trace csv", "csv", ".csv", seeds.traces, _described, 2),
    Target("trace jsonl", "jsonl", ".jsonl", seeds.mooncake, _described, 2),
    Target("trace gzip", "gzip", ".csv.gz", seeds.packed_traces, _described, 2),
    Target("profiler csv", "csv", ".csv", seeds.kernel_tables, _profiler_file),
    Target("profiler json", "json", ".json", seeds.communications, _profiler_file),
    Target("hccl log", "lines", ".log", seeds.logs, _profiler_file, 2),
    Target("profile grid", "toml", ".toml", seeds.grids, _grid),
    Target("profile csv", "csv", ".csv", seeds.measured, read_rows),
    Target("plan.json", "json", ".json", seeds.plans, _plan, 0.7),
    Target("operator plan", "json", ".json", seeds.operator_plans, OperatorPlan.load, 1.5),
    Target("points", "csv", ".csv", seeds.points, _points, 0.7),
    Target("validate", "csv", ".csv", seeds.figures, _figures, 0.5),
    Target("trials.csv", "csv", ".csv", seeds.trials, _analyzed, 0.4),
    Target(
        "trials.parquet",
        "parquet",
        ".parquet",
        seeds.parquet_trials,
        _analyzed,
        0.4,
        extra="pyarrow",
    ),
    Target("study journal", "jsonl", ".log", seeds.journals, _storage, 0.15),
    Target("study sqlite", "sqlite", ".db", seeds.databases, _storage, 0.15),
    Target("vllm script", "lines", ".sh", seeds.scripts, _lint, 1.5),
    Target("mindie", "json", ".json", seeds.mindie, _lint, 0.7),
    Target("onnx", "onnx", ".onnx", seeds.onnx_files, _onnx, 0.4, extra="onnx"),
    Target("pt2", "zip", ".pt2", seeds.exports, _pt2, 0.15, extra="torch"),
    Target("command line", "words", ".txt", seeds.commands, _command, 0.25),
)
TARGETS: Mapping[str, Target] = {one.name: one for one in _ALL}
