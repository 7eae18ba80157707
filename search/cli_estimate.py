"""`shardplan estimate`: the price of one given strategy, or of a table of them."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from shardplan.models.errors import InputError
from shardplan.search.cli_common import (
    MODULE_RANKS,
    Device,
    EngineProfile,
    Json,
    Nodes,
    OptionalCluster,
    OptionalModel,
    note,
    print_json,
    progress,
    stdout_console,
)

__all__ = ["estimate"]

Text = str | None


def _cell(name: str, text: str) -> Any:
    """An option that is read as the points column of its name."""
    return typer.Option(f"--{name.replace('_', '-')}", help=text)


def estimate(
    model: OptionalModel = None,
    cluster: OptionalCluster = None,
    nodes: Nodes = None,
    device: Device = None,
    engine_profile: EngineProfile = None,
    weight_dtype: Annotated[
        Text, _cell("weight_dtype", "bf16, w8a8, ..., by layers w8a8,experts=w4a8, or auto.")
    ] = None,
    kv_dtype: Annotated[Text, _cell("kv_dtype", "bf16 or int8.")] = None,
    attention: Annotated[Text, _cell("attention", "flash or naive.")] = None,
    tp: Annotated[Text, _cell("tp", "Tensor-parallel ranks.")] = None,
    pp: Annotated[Text, _cell("pp", "Pipeline stages.")] = None,
    dp: Annotated[Text, _cell("dp", "Data-parallel groups.")] = None,
    ep: Annotated[Text, _cell("ep", "Ranks that share the experts.")] = None,
    cp: Annotated[Text, _cell("cp", "Context-parallel ranks.")] = None,
    mtp: Annotated[Text, _cell("mtp", "Tokens predicted ahead in a decode step.")] = None,
    o_tp: Annotated[Text, _cell("o_tp", f"Attention output: {MODULE_RANKS}")] = None,
    ffn_tp: Annotated[Text, _cell("ffn_tp", f"Dense feed-forward: {MODULE_RANKS}")] = None,
    shared_tp: Annotated[Text, _cell("shared_tp", f"Shared experts: {MODULE_RANKS}")] = None,
    head_tp: Annotated[Text, _cell("head_tp", f"LM head: {MODULE_RANKS}")] = None,
    embed_tp: Annotated[Text, _cell("embed_tp", f"Embedding: {MODULE_RANKS}")] = None,
    weight_prefetch: Annotated[Text, _cell("weight_prefetch", "Into L2: off or on.")] = None,
    fused_collectives: Annotated[
        Text, _cell("fused_collectives", "Product and all_reduce in one kernel: off or on.")
    ] = None,
    phase: Annotated[Text, _cell("phase", "prefill, decode, serve or op.")] = None,
    batch: Annotated[Text, _cell("batch", "Sequences of one dp group.")] = None,
    tokens: Annotated[Text, _cell("tokens", "Prompt tokens, or KV length when decoding.")] = None,
    input_len: Annotated[Text, _cell("input_len", "serve: prompt tokens.")] = None,
    output_len: Annotated[Text, _cell("output_len", "serve: output tokens.")] = None,
    concurrency: Annotated[Text, _cell("concurrency", "serve: requests in flight.")] = None,
    request_rate: Annotated[Text, _cell("request_rate", "serve: requests a second.")] = None,
    num_prompts: Annotated[
        Text, _cell("num_prompts", "serve: prompts of the run; 10 for each in flight.")
    ] = None,
    prefix_hit: Annotated[Text, _cell("prefix_hit", "serve: share found in the cache.")] = None,
    mtp_acceptance: Annotated[
        Text, _cell("mtp_acceptance", "serve: share of tokens predicted ahead that is kept.")
    ] = None,
    max_num_seqs: Annotated[Text, _cell("max_num_seqs", "serve: slots of a dp group.")] = None,
    max_num_batched_tokens: Annotated[
        Text, _cell("max_num_batched_tokens", "serve: tokens of a step of a dp group.")
    ] = None,
    op: Annotated[Text, _cell("op", "op: matmul, attention_prefill, moe, all_reduce, ...")] = None,
    m: Annotated[Text, _cell("m", "op: rows.")] = None,
    n: Annotated[Text, _cell("n", "op: output features.")] = None,
    k: Annotated[Text, _cell("k", "op: input features.")] = None,
    dtype: Annotated[Text, _cell("dtype", "op: bf16, w8a8, ...")] = None,
    heads: Annotated[Text, _cell("heads", "op: query heads of the rank.")] = None,
    kv_heads: Annotated[Text, _cell("kv_heads", "op: kv heads of the rank, 0: heads.")] = None,
    head_dim: Annotated[Text, _cell("head_dim", "op: head size.")] = None,
    hidden: Annotated[Text, _cell("hidden", "op moe: hidden size.")] = None,
    ffn: Annotated[Text, _cell("ffn", "op moe: width of an expert.")] = None,
    experts: Annotated[Text, _cell("experts", "op moe: experts.")] = None,
    topk: Annotated[Text, _cell("topk", "op moe: experts a token.")] = None,
    ranks: Annotated[Text, _cell("ranks", "op collective: ranks.")] = None,
    message_bytes: Annotated[Text, _cell("message_bytes", "op collective: full tensor.")] = None,
    points: Annotated[Path | None, typer.Option("--points", help="CSV of points.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="CSV of answers, or .parquet.")] = None,
    json: Json = False,
) -> None:
    """Price one strategy, or every row of a CSV.

    Options are then defaults of its columns.
    """
    given = dict(locals())
    cells = {
        name: value
        for name, value in given.items()
        if value is not None and name not in ("points", "out", "json")
    }
    if points is not None:
        with _collector_paused():
            _many(points, out, cells, json)
    elif out is not None:
        raise InputError("`--out` goes with `--points`", got=f"out={out}", hint="or use --json")
    else:
        _one(cells, json)


def _one(cells: Mapping[str, Any], as_json: bool) -> None:
    from shardplan.search.estimate_detail import explain_one
    from shardplan.search.tables import print_estimate

    if not {"model", "op"} & set(cells):
        raise InputError(
            "a strategy needs a model", hint="give --model and --cluster, or --op, or --points"
        )
    found = explain_one(dict(cells))
    if as_json:
        print_json(found)
    else:
        print_estimate(found, stdout_console())


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """A big table is a million small objects and no cycles: collecting them takes a third of it.

    What is alive afterwards is left alone for good: the process ends here.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.freeze()
            gc.enable()


def _many(points: Path, out: Path | None, defaults: Mapping[str, Any], as_json: bool) -> None:
    from shardplan.search.estimate import price_columns
    from shardplan.search.estimate_csv import priced_csv, priced_rows, read_points_csv
    from shardplan.search.parquet_out import check_table_out, write_table

    if out is not None:
        check_table_out(out)
        if out.resolve() == points.resolve():
            raise InputError("`--out` must not be the points file", got=str(out))
    table = read_points_csv(points, defaults=tuple(defaults))
    for warning in table.warnings:
        note(f"warning: {warning}")
    done = 0
    with progress("pricing") as show:

        def step(rows: int) -> None:
            nonlocal done
            done += rows
            show(done, table.rows)

        prices = price_columns(
            table.columns, table.rows, defaults=defaults, refused=table.refused, progress=step
        )
    if prices.errors:
        row = min(prices.errors)
        note(
            f"note: {len(prices.errors)} of {table.rows} rows refused; "
            f"the first is row {row + 1}: {prices.errors[row]}"
        )
    if out is not None:
        write_table(out, priced_csv(table, prices))
    if as_json:
        print_json(priced_rows(table, prices))
    elif out is None:
        sys.stdout.write(priced_csv(table, prices))
    else:
        note(f"wrote {out}: {table.rows} rows")
