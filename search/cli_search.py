"""`shardplan search`: the best plan for a model on a cluster, with its proof."""

from __future__ import annotations

import re
from json import loads
from pathlib import Path
from typing import Annotated, Any

import typer

from shardplan.models.errors import InputError
from shardplan.search.cli_common import (
    Cluster,
    Device,
    EngineProfile,
    Force,
    Json,
    Model,
    Nodes,
    note,
    number,
    print_json,
    progress,
    stdout_console,
    whole,
)
from shardplan.search.completion import cluster_names_like, device_names_like

__all__ = ["search"]

_RUNS = Path("results") / "runs"
_SPLIT = {"operators": False, "mesh": "auto", "stages": 1, "sizes": None, "memory_gib": None}
"""Options of an operator-level search, and what they are where none is given."""
_MOST_ALTERNATIVES = 1000


def search(
    model: Model,
    cluster: Cluster,
    nodes: Nodes = None,
    cards: Annotated[int | None, whole("--cards", "Cards to use.")] = None,
    device: Device = None,
    input_len: Annotated[int | None, whole("--input-len", "Prompt tokens.")] = None,
    output_len: Annotated[int | None, whole("--output-len", "Output tokens.")] = None,
    concurrency: Annotated[int | None, whole("--concurrency", "Requests in flight.")] = None,
    rate: Annotated[float | None, number("--rate", "Requests a second.")] = None,
    workload: Annotated[
        str | None, typer.Option("--workload", help="TOML file with the above and limits.")
    ] = None,
    ttft_ms: Annotated[float | None, number("--ttft-ms", "Most mean time to first token.")] = None,
    tpot_ms: Annotated[
        float | None, number("--tpot-ms", "Most mean time per output token.")
    ] = None,
    ttft_p99_ms: Annotated[
        float | None, number("--ttft-p99-ms", "Most of its 99th percentile.")
    ] = None,
    tpot_p99_ms: Annotated[
        float | None, number("--tpot-p99-ms", "Most of its 99th percentile.")
    ] = None,
    objective: Annotated[
        str, typer.Option("--objective", help="throughput, latency, cards or cost.")
    ] = "throughput",
    weight_dtype: Annotated[
        str,
        typer.Option(
            "--weight-dtype",
            help="auto (the checkpoint's), bf16, w8a8, ...; by layers: w8a8,experts=w4a8; "
            "several to search: 'w8a16|w8a8'.",
        ),
    ] = "auto",
    kv_dtype: Annotated[str, typer.Option("--kv-dtype", help="auto, bf16 or int8.")] = "auto",
    attention: Annotated[str, typer.Option("--attention", help="auto, flash or naive.")] = "auto",
    engine: Annotated[
        str, typer.Option("--engine", help="auto, exact, tpe, nsga2, nsga3, cmaes, gp or random.")
    ] = "auto",
    trials: Annotated[int | None, whole("--trials", "Of a sampling engine; 200.")] = None,
    storage: Annotated[
        str | None, typer.Option("--storage", help="Optuna storage URL of a sampling engine.")
    ] = None,
    study: Annotated[
        str | None, typer.Option("--study", help="Name of the study in the storage.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the study; --trials counts all of it.")
    ] = False,
    seed_trials: Annotated[
        int | None, whole("--seed-trials", "First trials, from a coarse exact pass; 8.")
    ] = None,
    time_limit: Annotated[
        float | None,
        number("--time-limit", "Seconds; then the best so far with its gap (exact engine)."),
    ] = None,
    seed: Annotated[int, whole("--seed", "Of a sampling engine.")] = 0,
    engine_profile: EngineProfile = None,
    weight_prefetch: Annotated[
        str | None,
        typer.Option("--weight-prefetch", help="Into L2: off, on or auto; the engine's own."),
    ] = None,
    fused_collectives: Annotated[
        str | None,
        typer.Option(
            "--fused-collectives",
            "--fused-comm",
            help="Product and all_reduce in one kernel: off, on or auto; the engine's own.",
        ),
    ] = None,
    serving: Annotated[
        str,
        typer.Option(
            "--serving", help="agg, disagg (pools for prefill and decode) or auto: the better."
        ),
    ] = "agg",
    prefill_cluster: Annotated[
        str | None,
        typer.Option(
            "--prefill-cluster",
            help="Prefill instances run there.",
            autocompletion=cluster_names_like,
        ),
    ] = None,
    prefill_nodes: Annotated[int | None, whole("--prefill-nodes", "Nodes of it.")] = None,
    prefill_cards: Annotated[int | None, whole("--prefill-cards", "Cards of it.")] = None,
    prefill_device: Annotated[
        str | None,
        typer.Option(
            "--prefill-device", help="Replaces its device.", autocompletion=device_names_like
        ),
    ] = None,
    cp: Annotated[
        str,
        typer.Option("--cp", help="Ranks that share a context: off, auto (any number) or one."),
    ] = "off",
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", help="Sizes that an axis may have: tp=4,8 or pp=1 or sp=off; may be repeated."
        ),
    ] = None,
    module_tp: Annotated[
        str,
        typer.Option("--module-tp", help="Modules over other ranks than tp: off or auto."),
    ] = "off",
    mtp: Annotated[
        str, typer.Option("--mtp", help="Tokens predicted ahead: off, auto or a number.")
    ] = "off",
    mtp_acceptance: Annotated[
        float | None, number("--mtp-acceptance", "Share of them that is kept; the model's.")
    ] = None,
    collectives: Annotated[
        str,
        typer.Option(
            "--collectives",
            help="Algorithm between nodes: auto (the library's), all (searched), ring, NHR, ...",
        ),
    ] = "auto",
    robust: Annotated[
        bool,
        typer.Option("--robust", help="Least worst-case regret under the calibration's bands."),
    ] = False,
    operators: Annotated[
        bool,
        typer.Option(
            "--operators", help="Split each operator of the graph of an ONNX or .pt2 file."
        ),
    ] = False,
    mesh: Annotated[
        str, typer.Option("--mesh", help="Of an operator-level search: auto, 8, 2x4, or x=2,y=4.")
    ] = "auto",
    stages: Annotated[int, whole("--stages", "Pipeline stages of such a search.")] = 1,
    sizes: Annotated[
        list[str] | None,
        typer.Option("--sizes", help="NAME=N,... of symbolic dims of the graph; may be repeated."),
    ] = None,
    memory_gib: Annotated[
        float | None, number("--memory-gib", "Of a rank, in place of what its card leaves.")
    ] = None,
    refine_simulated: Annotated[
        int | None,
        whole("--refine-simulated", "Best strategies to simulate, to choose among them."),
    ] = None,
    card_price: Annotated[
        float | None, number("--card-price", "Of an hour of a card; or its power in kW.")
    ] = None,
    prefill_card_price: Annotated[
        float | None, number("--prefill-card-price", "The same of --prefill-cluster.")
    ] = None,
    spare: Annotated[
        int | None, whole("--spare", "Cards or nodes that may be lost with --rate still served.")
    ] = None,
    spare_unit: Annotated[
        str, typer.Option("--spare-unit", help="What --spare counts: card or node.")
    ] = "card",
    losses: Annotated[
        bool, typer.Option("--losses", help="What is left when a card or a node is lost.")
    ] = False,
    auto_batching: Annotated[
        bool,
        typer.Option("--auto-batching", help="Graph sizes, and what the step sizes gain."),
    ] = False,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Workload TOML or trace that they are made for."),
    ] = None,
    graph_mib: Annotated[
        float | None, number("--graph-mib", "Memory of a graph; the engine's.")
    ] = None,
    max_graphs: Annotated[int | None, whole("--max-graphs", "Graphs of a phase at most.")] = None,
    top: Annotated[int, whole("--top", "Alternatives to keep.")] = 5,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="What each feature buys, in place of a plan.")
    ] = False,
    explain_space: Annotated[
        bool,
        typer.Option("--explain-space", help="What each legality rule removes, without a search."),
    ] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", help="NAME=1,2,4 or a:b:step of an option; may be repeated."),
    ] = None,
    jobs: Annotated[int | None, whole("--jobs", "Processes of a sweep; all cores.")] = None,
    plans: Annotated[
        bool | None,
        typer.Option("--plans/--no-plans", help="Keep each plan.json of a sweep; up to 64."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for plan.json, trials.csv, report.html.")
    ] = None,
    parquet: Annotated[
        bool, typer.Option("--parquet", help="Each table as Parquet too (extra parquet).")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Find, price and prove the best plan for a model on a cluster.

    A graph that is no causal decoder is split operator by operator.
    """
    asked = dict(locals())
    if not 0 <= top <= _MOST_ALTERNATIVES:
        raise InputError(f"`--top` is from 0 to {_MOST_ALTERNATIVES}", got=f"top={top}")
    own = ("out", "parquet", "force", "json", "ablation", "explain_space", "sweep", "jobs", "plans")
    for name in own:
        del asked[name]
    split = {name: asked.pop(name) for name in _SPLIT}
    if explain_space or sweep or ablation:
        _refuse_split(split)
    if parquet:
        from shardplan.search.parquet_out import require_pyarrow

        require_pyarrow("--parquet", "--ablation" * ablation or "--explain-space" * explain_space)
    if explain_space:
        _explain_space(asked, json)
        return
    if sweep:
        files: dict[str, Any] = {"plans": plans, "parquet": parquet, "force": force}
        _sweep(asked, sweep, out, jobs=jobs, as_json=json, **files)
        return
    if ablation:
        _ablation(asked, out, json)
        return
    folder, overwrite = _folder(asked, out, force)
    from shardplan.search.api import SearchResult
    from shardplan.search.ask import search as run

    with progress("searching") as show:
        result = run(**asked, **_split(split), progress=show)
    names = () if prefill_cluster or prefill_device else ("model", "cluster", "device")
    files = {name: asked[name] for name in names}
    _write(result, folder, overwrite, named=out is not None, parquet=parquet, files=files)
    if json:
        print_json(loads(result.plan.dumps()))
    elif isinstance(result, SearchResult):
        from shardplan.search.tables_plan import print_plan

        print_plan(result.plan, folder, result.timing, stdout_console())
    else:
        from shardplan.search.tables_operators import print_operators

        print_operators(result.plan, folder, result.timing, stdout_console())


def _refuse_split(split: dict[str, Any]) -> None:
    """`InputError` for options of an operator-level search where there is none."""
    given = [name for name, value in split.items() if value != _SPLIT[name] and value != []]
    if given:
        raise InputError(
            "--sweep, --ablation and --explain-space are of deployments",
            got="--" + given[0].replace("_", "-"),
            hint="leave one of them out",
        )


def _split(split: dict[str, Any]) -> dict[str, Any]:
    """Options of an operator-level search that were given, as `shardplan.search` takes them."""
    found = {name: split[name] for name in ("operators", "stages")}
    if split["mesh"] != "auto" or split["sizes"]:
        from shardplan.search.oplevel.words import mesh_shape_of, sizes_of

        found["mesh"] = mesh_shape_of(split["mesh"])
        found["sizes"] = sizes_of(split["sizes"] or ()) or None
    if split["memory_gib"] is not None:
        found["memory_bytes"] = split["memory_gib"] * 2.0**30
    return found


def _explain_space(asked: dict[str, Any], as_json: bool) -> None:
    from shardplan.search.explain_space import explain_space
    from shardplan.search.request import Asked
    from shardplan.search.tables_space import print_space

    apart = ("top", "storage", "study", "resume")
    question = {name: value for name, value in asked.items() if name not in apart}
    found = explain_space(Asked(**question))
    if as_json and len(found) == 1:
        print_json(found[0].to_json())
    elif as_json:
        print_json(dict(zip(("agg", "disagg"), (one.to_json() for one in found), strict=True)))
    else:
        for one in found:
            print_space(one, stdout_console())


def _slug(text: str) -> str:
    """A folder name from a model or cluster; paths keep their last part."""
    last = Path(text).stem if "/" in text else text
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.")[:60] or "run"


def _folder(asked: dict[str, Any], out: Path | None, force: bool) -> tuple[Path, bool]:
    """(folder of the results, whether to overwrite); a folder that was named is checked first."""
    from shardplan.search.output import check_out

    if out is not None:
        check_out(out, force=force)
        return out, force
    words = [_slug(asked["model"]), _slug(asked["cluster"])]
    words += [str(asked["cards"])] if asked["cards"] is not None else []
    return _RUNS / "-".join(words), True


def _write(
    result: Any, folder: Path, overwrite: bool, *, named: bool, parquet: bool, files: dict[str, Any]
) -> None:
    """Write the files; a default folder that cannot be written is said, not fatal."""
    from shardplan.search.api import SearchResult

    try:
        if isinstance(result, SearchResult):
            from shardplan.search.output import write_result

            written = write_result(result, folder, force=overwrite, **files)
        else:
            from shardplan.search.oplevel.ask import write_operators

            written = write_operators(result, folder, force=overwrite)
        if parquet:
            from shardplan.search.parquet_out import write_beside

            write_beside(written)
    except (InputError, OSError) as error:
        if named:
            raise
        note(f"note: results were not written: {error}")


def _sweep(
    asked: dict[str, Any], sweep: list[str], out: Path | None, *, force: bool, **how: Any
) -> None:
    from shardplan.search.cli_sweep import sweep_command

    named = "-".join([_slug(asked["model"]), _slug(asked["cluster"]), "sweep"])
    sweep_command(asked, sweep, out or _RUNS / named, force=force or out is None, **how)


def _ablation(asked: dict[str, Any], out: Path | None, as_json: bool) -> None:
    from shardplan.search.ablation import run_ablation
    from shardplan.search.tables_plan import print_ablation

    names = ("nodes", "cards", "device", "input_len", "output_len", "engine_profile")
    given = {name: asked[name] for name in names if asked[name] is not None}
    if out is not None:
        from shardplan.search.cli_common import check_file_out

        check_file_out(out)
    found = run_ablation(asked["model"], asked["cluster"], **given)
    if out is not None:
        import json

        from shardplan.models.atomic import write_atomically
        from shardplan.search.cli_common import strict

        write_atomically(out, json.dumps(strict(found.to_json()), indent=2) + "\n")
        note(f"wrote {out}")
    if as_json:
        print_json(found.to_json())
    else:
        print_ablation(found, stdout_console())
