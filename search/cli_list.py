"""`shardplan devices | clusters | models`: what can be named, and where its numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from shardplan.search.cli_common import Json, print_json, stdout_console
from shardplan.search.completion import cluster_names_like, device_names_like, model_names_like

__all__ = ["clusters", "devices", "models"]

_HELP = "One of them, or a file, in full."
DeviceName = Annotated[str | None, typer.Argument(help=_HELP, autocompletion=device_names_like)]
ClusterName = Annotated[str | None, typer.Argument(help=_HELP, autocompletion=cluster_names_like)]
ModelName = Annotated[str | None, typer.Argument(help=_HELP, autocompletion=model_names_like)]


def devices(name: DeviceName = None, json: Json = False) -> None:
    """List the devices, or show one with the source of every number."""
    from shardplan.costmodel.catalog import device_names, device_summary
    from shardplan.search.tables import device_table

    _list(name, json, device_names(), device_summary, device_table)


def clusters(name: ClusterName = None, json: Json = False) -> None:
    """List the clusters, or show one with the source of every number."""
    from shardplan.costmodel.catalog import cluster_names, cluster_summary
    from shardplan.search.tables import cluster_table

    _list(name, json, cluster_names(), cluster_summary, cluster_table)


def models(name: ModelName = None, json: Json = False) -> None:
    """List the model presets, or show one."""
    from shardplan.models.catalog import model_names, model_summary
    from shardplan.search.tables import model_table

    _list(name, json, model_names(), model_summary, model_table)


def _list(
    name: str | None,
    as_json: bool,
    names: Sequence[str],
    summary: Callable[[str], Any],
    table: Callable[[Sequence[Mapping[str, Any]]], Any],
) -> None:
    found = [dict(summary(one)) for one in ([name] if name is not None else names)]
    if as_json:
        print_json(found[0] if name is not None else found)
        return
    from shardplan.search.tables import fact_table

    stdout_console().print(table(found) if name is None else fact_table(found[0]))
