"""What the commands share: options, strict JSON, consoles, progress on stderr.

With `--json` stdout holds JSON alone; tables go there otherwise. Notes, warnings and progress go to
stderr. Rich is imported only when something is printed with it, so that `--help` stays instant.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardplan.models.errors import InputError, printable
from shardplan.search.completion import (
    cluster_names_like,
    device_names_like,
    engine_names_like,
    model_names_like,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "MODULE_RANKS",
    "Cluster",
    "Device",
    "EngineProfile",
    "Force",
    "Json",
    "Model",
    "Nodes",
    "OptionalCluster",
    "OptionalModel",
    "check_file_out",
    "note",
    "number",
    "print_json",
    "progress",
    "stdout_console",
    "whole",
]

WIDTH = 100
MODULE_RANKS = "0 as tp, 1 whole, or tp times dp groups."
_MAX_SHOWN = 60


def _refuse(name: str, what: str, text: str) -> InputError:
    return InputError(f"`{name}` is a {what}", got=f"{name} {text[:_MAX_SHOWN]!r}")


def whole(name: str, text: str) -> Any:
    """An option that takes a whole number, in words of ours whatever the version of typer."""

    def read(value: object) -> int:
        try:
            if "_" in str(value):
                raise ValueError
            return int(str(value))
        except ValueError:
            raise _refuse(name, "whole number", str(value)) from None

    return typer.Option(name, help=text, parser=read, metavar="N")


def number(name: str, text: str) -> Any:
    """An option that takes a number."""

    def read(value: object) -> float:
        try:
            if "_" in str(value):
                raise ValueError
            return float(str(value))
        except ValueError:
            raise _refuse(name, "number", str(value)) from None

    return typer.Option(name, help=text, parser=read, metavar="X")


_model = typer.Option(
    "--model", help="Preset, config.json, ONNX or .pt2 file.", autocompletion=model_names_like
)
_cluster = typer.Option(
    "--cluster",
    help="Cluster name, TOML file, or cluster JSON of CANN.",
    autocompletion=cluster_names_like,
)
Model = Annotated[str, _model]
OptionalModel = Annotated[str | None, _model]
Cluster = Annotated[str, _cluster]
OptionalCluster = Annotated[str | None, _cluster]
Nodes = Annotated[int | None, whole("--nodes", "Nodes of the cluster.")]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Device in place of the cluster's own.",
        autocompletion=device_names_like,
    ),
]
EngineProfile = Annotated[
    str | None,
    typer.Option(
        "--engine-profile",
        help="Serving engine, such as vllm-ascend or mindie.",
        autocompletion=engine_names_like,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what --out holds.")]


def strict(value: Any) -> Any:
    """The value with what JSON cannot hold (NaN, infinities) as null, tuples as lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [strict(item) for item in value]
    return value


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    sys.stdout.write(json.dumps(strict(value), indent=2, allow_nan=False, default=str) + "\n")


def stdout_console() -> Console:
    """A console on stdout: as wide as the terminal, at most 120; 100 where there is none."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    width = min(console.width, 120) if console.is_terminal else WIDTH
    return Console(highlight=False, width=width)


def note(text: str) -> None:
    """One line on stderr; what would steer a terminal is shown as text."""
    sys.stderr.write(printable(text) + "\n")


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) that draws a bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def check_file_out(path: Path) -> None:
    """`InputError` unless the file can be written; nothing is left behind."""
    if path.is_dir():
        raise InputError("`--out` is a file here", got=f"{path} is a folder")
    place = next(p for p in path.resolve().parents if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(
            "`--out` cannot be written", got=f"{path}: {error.strerror}", hint=f"check {place}"
        ) from None
