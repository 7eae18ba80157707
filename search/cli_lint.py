"""`shardplan lint`: a serving configuration that a human wrote, judged."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardplan.models.errors import InputError
from shardplan.search.cli_common import (
    Cluster,
    Device,
    EngineProfile,
    Json,
    Nodes,
    OptionalModel,
    number,
    print_json,
    stdout_console,
    whole,
)

if TYPE_CHECKING:
    from shardplan.search.configuration import Configuration
    from shardplan.search.plan import Plan

__all__ = ["lint"]

MAX_BYTES = 1 << 20
_BROKEN = 3


def lint(
    config: Annotated[
        str,
        typer.Argument(
            help="A script with vllm serve commands, a MindIE config.json, a plan.json, or a "
            "command in quotes."
        ),
    ],
    cluster: Cluster,
    model: OptionalModel = None,
    nodes: Nodes = None,
    device: Device = None,
    arguments: Annotated[
        str, typer.Option("--arguments", help="What the script is called with: its $1, $2, ...")
    ] = "",
    weight_dtype: Annotated[
        str, typer.Option("--weight-dtype", help="Of the checkpoint, where its name does not say.")
    ] = "auto",
    kv_dtype: Annotated[str, typer.Option("--kv-dtype", help="auto, bf16 or int8.")] = "auto",
    engine_profile: EngineProfile = None,
    input_len: Annotated[int | None, whole("--input-len", "Prompt tokens.")] = None,
    output_len: Annotated[int | None, whole("--output-len", "Output tokens.")] = None,
    concurrency: Annotated[int | None, whole("--concurrency", "Requests in flight.")] = None,
    rate: Annotated[float | None, number("--rate", "Requests a second.")] = None,
    ttft_ms: Annotated[float | None, number("--ttft-ms", "Most mean time to first token.")] = None,
    tpot_ms: Annotated[
        float | None, number("--tpot-ms", "Most mean time per output token.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best/--no-best", help="Search the best plan to compare with.")
    ] = True,
    json: Json = False,
) -> None:
    """Say what is wrong with a configuration, and what is better.

    Exits with 3 where it cannot run as it stands.
    """
    from shardplan.search.asked import Asked
    from shardplan.search.lint import lint as judge

    asked = Asked(
        model=model or "",
        cluster=cluster,
        nodes=nodes,
        device=device,
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
        engine_profile=engine_profile,
        input_len=input_len,
        output_len=output_len,
        concurrency=concurrency,
        rate=rate,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
    )
    reports = [judge(one, asked, best=best) for one in read(config, arguments)]
    if json:
        whole_: Any = [one.model_dump(mode="json") for one in reports]
        print_json(whole_[0] if len(whole_) == 1 else whole_)
    else:
        from shardplan.search.tables_lint import print_lint

        for report in reports:
            print_lint(report, stdout_console())
    if not all(one.runs for one in reports):
        raise typer.Exit(_BROKEN)


def read(config: str, arguments: str) -> list[Configuration]:
    """The configurations that an argument names or is; `InputError` for what none can be read."""
    found = plan_or_configurations(config, arguments)
    if isinstance(found, list):
        return found
    from shardplan.search.lint_case import of_plan

    return of_plan(found, Path(config).name)


def plan_or_configurations(config: str, arguments: str) -> Plan | list[Configuration]:
    """The same, a plan.json as the plan that it holds."""
    path = Path(config)
    if "vllm" in config and any(space in config for space in " \n\t"):
        text, source = config, "the command"
    elif path.is_file():
        if path.stat().st_size > MAX_BYTES:
            raise InputError("a configuration has at most 1 MiB", got=config)
        text, source = path.read_text(encoding="utf-8", errors="replace"), path.name
    else:
        raise InputError(
            "the configuration is a file, or a `vllm serve` command in quotes",
            got=config[:120],
            hint="check the path",
        )
    if not text.lstrip().startswith("{"):
        from shardplan.search.read_vllm import read_vllm

        return read_vllm(text, source, shlex.split(arguments))
    if '"shardplan_version"' in text:
        from shardplan.search.plan import Plan

        return Plan.load(path)
    from shardplan.search.read_mindie import read_mindie

    return [read_mindie(text, source)]
