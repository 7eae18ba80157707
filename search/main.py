"""The command line: `shardplan COMMAND ...`.

Exit codes: 0 done, 1 a bug, a failed proof or a broken installation, 2 bad input, 3 nothing
feasible, 130 interrupted. An error is one line on stderr (`error: rule (values); what to try`);
with `--json` the same stands on stdout as {"error": {code, rule, got, hint, message}}. Only a bug
shows a traceback: a short one, the whole with SHARDPLAN_DEBUG=1.

Everything heavy is imported inside the commands, so that `shardplan --help` stays instant.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
import traceback
from typing import Annotated

import typer

from shardplan.models.errors import InputError, ShardplanError, UnknownNameError
from shardplan.search.cli_analyze import analyze
from shardplan.search.cli_calibrate import calibrate
from shardplan.search.cli_common import note, print_json
from shardplan.search.cli_doctor import doctor
from shardplan.search.cli_estimate import estimate
from shardplan.search.cli_lint import lint
from shardplan.search.cli_list import clusters, devices, models
from shardplan.search.cli_plan import emit, explain, verify
from shardplan.search.cli_profile import profile
from shardplan.search.cli_search import search
from shardplan.search.cli_simulate import simulate
from shardplan.search.cli_trace import trace
from shardplan.search.cli_validate import validate
from shardplan.search.cli_worker import worker
from shardplan.search.completion import InstallCompletion, ShowCompletion, prepare, without_shell

__all__ = ["app_of", "main", "run"]

_GUIDE = """\
shardplan finds and proves the best way to deploy a large language model on an Ascend cluster.

  1. what there is    shardplan models        (likewise: clusters, devices)
  2. the best plan    shardplan search --model llama-3.1-8b --cluster atlas-800t-a2 --out plan
  3. start scripts    shardplan emit plan/plan.json --target vllm-ascend --out deploy

Read on: `shardplan --help` (all commands), `shardplan search --help` (what you may ask and limit),
plan/report.html (why the plan is as it is). `shardplan doctor` checks this installation;
`shardplan --install-completion` lets Tab complete commands, options and names."""

_ClickError = typer.BadParameter.__mro__[2]
"""Bases of a usage error: Click's or, in newer versions of typer, those of typer's own copy."""

_BUG_FRAMES = 4
_OBJECTS_A_COLLECTION = 200_000
"""New objects after which cycles are looked for."""

_MALLOPT = ((-1, 1 << 28), (-3, 1 << 25))
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h, in bytes: free memory that is kept, and arrays
that come from it (the largest size that glibc takes)."""

_COMMANDS = (
    search,
    worker,
    estimate,
    simulate,
    verify,
    emit,
    explain,
    trace,
    lint,
    analyze,
    calibrate,
    profile,
    validate,
    devices,
    clusters,
    models,
    doctor,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from shardplan import __version__

        typer.echo(f"shardplan {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    install_completion: InstallCompletion = False,
    show_completion: ShowCompletion = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(_GUIDE)


def app_of(name: str = "") -> typer.Typer:
    """The whole command line, or what runs the command of that name: the others take time."""
    app = typer.Typer(
        name="shardplan",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        help="Finds and proves the best way to deploy a large language model on an Ascend cluster.",
    )
    app.callback(invoke_without_command=True)(_root)
    for command in [one for one in _COMMANDS if one.__name__ == name] or _COMMANDS:
        app.command()(command)
    return app


def main() -> None:
    """Run the command line and exit with its code."""
    _settle_process()
    if sys.argv[1:2] == [search.__name__]:
        _keep_freed_memory()
    code = run(sys.argv[1:])
    gc.freeze()  # or the interpreter looks for cycles among all of them before it ends
    sys.exit(code)


def _settle_process() -> None:
    """Switch off, in a process of our own, what a short search does not need.

    Collections: most objects of a search live to its end. Plugins of pydantic: it would read the
    metadata of every installed package to find them, and none is of use here. Threads of linear
    algebra: a search multiplies no matrices, and a process of one thread can be forked (`aside`).
    """
    gc.set_threshold(_OBJECTS_A_COLLECTION)
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _keep_freed_memory() -> None:
    """Let glibc keep what arrays free for the next ones: by default it hands much of it back.

    A search makes arrays of some hundred KB one after another, each of which would fault its pages
    in again. Elsewhere nothing happens.
    """
    if sys.platform == "linux":
        import ctypes

        library = ctypes.CDLL(None)
        for option, size_bytes in _MALLOPT if hasattr(library, "mallopt") else ():
            library.mallopt(option, size_bytes)


def run(arguments: list[str]) -> int:
    """Run one command line; its exit code."""
    as_json = "--json" in arguments
    try:
        prepare()
        arguments, shell = without_shell(arguments)
        app = app_of(_command(arguments))
        code = app(args=arguments, prog_name="shardplan", standalone_mode=False, obj=shell)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except ShardplanError as error:
        return _tell(error, as_json)
    except (KeyboardInterrupt, typer.Abort):
        note("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except typer.Exit as done:
        return done.exit_code
    except Exception as error:
        if isinstance(error, _ClickError):
            return _tell_usage(error, as_json)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return _tell(_too_long(error), as_json)
        return _tell_bug(error, as_json)


def _too_long(error: OSError) -> InputError:
    """A name that no file can have, wherever it was looked for."""
    return InputError(
        "a file's name is no longer than the system takes",
        got=str(error.filename)[:100],
        hint="check the argument",
    )


def _command(arguments: list[str]) -> str:
    """The command that is asked for, "" for none; `UnknownNameError` where there is none such."""
    first = arguments[0] if arguments else ""
    known = [one.__name__ for one in _COMMANDS]
    if first and not first.startswith("-") and first not in known:
        raise UnknownNameError("command", first[:100], known)
    return first


def _report(code: str, rule: str, got: str, hint: str, message: str, as_json: bool) -> None:
    note(f"error: {message}")
    if as_json:
        fields = {"code": code, "rule": rule, "got": got, "hint": hint, "message": message}
        print_json({"error": fields})


def _tell(error: ShardplanError, as_json: bool) -> int:
    message = " ".join(str(error).split())
    _report(error.code, error.rule, error.got, error.hint, message, as_json)
    return error.exit_code


def _tell_usage(error: Exception, as_json: bool) -> int:
    """What is wrong with the command line itself."""
    message = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
    context = getattr(error, "ctx", None)
    hint = f"see `{context.command_path} --help`" if context is not None else ""
    _report("usage", message, "", hint, f"{message} {hint}".strip(), as_json)
    return 2


def _tell_bug(error: Exception, as_json: bool) -> int:
    """A traceback for us, as short as it can be unless SHARDPLAN_DEBUG asks for all of it."""
    if os.environ.get("SHARDPLAN_DEBUG"):
        traceback.print_exception(error)
    else:
        for frame in traceback.extract_tb(error.__traceback__)[-_BUG_FRAMES:]:
            note(f"  {os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}")
    hint = "set SHARDPLAN_DEBUG=1 for the whole traceback and report it"
    text = f"{type(error).__name__}: {error}"
    _report("bug", "this is a bug", text, hint, f"this is a bug: {text}; {hint}", as_json)
    return 1
