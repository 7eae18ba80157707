"""Completion in bash, zsh and fish: the names that Tab offers, and the scripts that ask for them.

A shell runs the command again at each Tab, so what is offered is read from the names of files and
of entry points alone, and nothing heavy is imported but what typer itself does. A word that begins
no name is left to the shell, which completes files: a model, device or cluster may be one. The
scripts are typer's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from shardplan.models.errors import InputError

__all__ = [
    "SHELLS",
    "InstallCompletion",
    "ShowCompletion",
    "cluster_names_like",
    "device_names_like",
    "engine_names_like",
    "model_names_like",
    "prepare",
    "target_names_like",
    "without_shell",
]

SHELLS = ("bash", "zsh", "fish")
_ASKING = "_SHARDPLAN_COMPLETE"
"""Variable by which a shell asks for completions, as typer names it after the program."""
_FIRST_TAB = """
# zsh loads this file at the first Tab: that one is answered, too.
[[ $zsh_eval_context[-1] == loadautofunc ]] && _shardplan_completion "$@"
"""
_OPTIONS = ("--install-completion", "--show-completion")


def model_names_like(incomplete: str) -> list[str]:
    """Presets that begin so."""
    from shardplan.models.catalog import model_names

    return _like(incomplete, model_names())


def cluster_names_like(incomplete: str) -> list[str]:
    """Shipped clusters that begin so."""
    return _shipped(incomplete, "clusters")


def device_names_like(incomplete: str) -> list[str]:
    """Shipped devices that begin so."""
    return _shipped(incomplete, "devices")


def engine_names_like(incomplete: str) -> list[str]:
    """Engine profiles that begin so."""
    return _shipped(incomplete, "engines")


def target_names_like(incomplete: str) -> list[str]:
    """Targets of `emit` that begin so, those of other packages too."""
    from shardplan.search.targets import target_names

    return _like(incomplete, target_names())


def _shipped(incomplete: str, folder: str) -> list[str]:
    from shardplan.costmodel.datafile import shipped_names

    return _like(incomplete, shipped_names(folder))


def _like(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def prepare() -> None:
    """Teach the command line its shells, where one of them is asking."""
    if _ASKING in os.environ:
        from typer.completion import get_completion_inspect_parameters

        get_completion_inspect_parameters()  # registers them; what it returns is not needed


def without_shell(arguments: Sequence[str]) -> tuple[list[str], str]:
    """The arguments without the shell of a completion option, and that shell: else the user's own.

    An option that may have a value is none that click knows, and one that has a value makes typer
    load pydantic for every page of help: so it is a flag, and the shell comes beside it.
    """
    if not arguments or arguments[0] not in _OPTIONS:
        return list(arguments), ""
    option, *others = arguments
    if others and not others[0].startswith("-"):
        return [option, *others[1:]], others[0]
    return [option, *others], Path(os.environ.get("SHELL", "")).name


def _checked(shell: str, option: str) -> str:
    if shell not in SHELLS:
        raise InputError(
            f"completion is for {', '.join(SHELLS)}",
            got=f"shell={shell[:60]!r}",
            hint=f"name one: `shardplan {option} bash`",
        )
    return shell


def _show(context: typer.Context, parameter: typer.CallbackParam, wanted: bool) -> None:
    """Print the script of the shell that the context holds, and end."""
    if not wanted or context.resilient_parsing:
        return
    from typer.completion import show_callback

    shell = _checked(context.obj or "", "--show-completion")
    try:
        show_callback(context, parameter, shell)
    except SystemExit as done:
        raise typer.Exit from done


def _install(context: typer.Context, parameter: typer.CallbackParam, wanted: bool) -> None:
    """Write the script of that shell where the shell reads it, and end."""
    if not wanted or context.resilient_parsing:
        return
    from typer.completion import install_callback

    shell = _checked(context.obj or "", "--install-completion")
    try:
        install_callback(context, parameter, shell)
    except SystemExit as done:
        if shell == "zsh":
            with (Path.home() / ".zfunc" / "_shardplan").open("a", encoding="utf-8") as file:
                file.write(_FIRST_TAB)
        raise typer.Exit from done
    except OSError as error:
        raise InputError(
            "the completion script cannot be written",
            got=f"{error.filename}: {error.strerror}",
            hint=f"put it into place by hand: `shardplan --show-completion {shell}`",
        ) from None


InstallCompletion = Annotated[
    bool,
    typer.Option(
        "--install-completion",
        callback=_install,
        is_eager=True,
        help="Let Tab complete names in bash, zsh or fish: name one, or yours is taken.",
    ),
]
ShowCompletion = Annotated[
    bool,
    typer.Option(
        "--show-completion",
        callback=_show,
        is_eager=True,
        help="Print the script that does so.",
    ),
]
