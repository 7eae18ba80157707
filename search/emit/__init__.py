"""From a plan to the files and commands of one engine or compiler.

A target is a function `(plan, **options) -> {file name: text or bytes}` that raises `InputError`
for a plan it cannot express. Some are ours; others register one in the entry-point group
`shardplan.emitters` (name = the target's name), which is read when a target is asked for. A
built-in name cannot be taken over. A file name may hold one folder (`shards/rank0.onnx`).

A target takes plans of deployments unless its function has the attribute `plans`, which names the
kinds that it takes: `deployment`, `operators` (`search.oplevel.plan`). One that has a parameter
`staging` is given an empty folder there, for files too large for memory, and may return their paths
in place of their content.

All files are built before the first is written; should a write fail, the files that this call
created are removed again. Left out: files of an earlier plan in a folder that `force`
writes over stay there; the README that each target writes lists its own.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from shardplan.models.atomic import write_atomically
from shardplan.models.errors import InputError, ShardplanError, UnknownNameError
from shardplan.search.emit.common import check_plan
from shardplan.search.emit.nearest import with_nearest
from shardplan.search.oplevel.plan import OperatorPlan
from shardplan.search.plan import OPERATORS, Plan
from shardplan.search.targets import (
    BUILT_IN,
    OF_GRAPHS,
    OURS,
    SERVING,
    registered,
    target_names,
)

__all__ = ["Emitter", "emit"]

Content = str | bytes | Path
Emitter = Callable[..., Mapping[str, Content]]

_STAGING = "staging"
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_FILE_NAME = re.compile(rf"(?:{_WORD}/)?{_WORD}")


def emit(
    plan: Plan | OperatorPlan,
    target: str,
    out: str | Path,
    *,
    force: bool = False,
    **options: object,
) -> list[Path]:
    """Write the files of `target` into the folder `out`; returns their paths, sorted.

    `out` is created when absent; a folder that holds anything needs `force`. `options` are the
    target's own keywords. Raises UnknownNameError for a target, InputError for an option that
    the target does not have, a plan it cannot express, or a folder that cannot be written.
    """
    emitter = _load(target)
    _check_kind(emitter, target, plan)
    if isinstance(plan, Plan):
        check_plan(plan)
    _check_options(emitter, target, options)
    if _STAGING not in inspect.signature(emitter).parameters:
        texts = _texts(emitter, target, plan, options)
        return _write(texts, Path(out), force=force)
    _check_folder(Path(out), force=force)
    with _staging(Path(out)) as folder:
        texts = _checked(emitter(plan, **{_STAGING: folder}, **options), target)
        return _write(texts, Path(out), force=force)


def _texts(
    emitter: Emitter, target: str, plan: Plan | OperatorPlan, options: Mapping[str, object]
) -> Mapping[str, Content]:
    """The checked files of a target; its refusal names the nearest strategy that it takes."""
    try:
        return _checked(emitter(plan, **options), target)
    except InputError as error:
        if target in SERVING and isinstance(plan, Plan):
            raise with_nearest(error, plan, emitter, options) from None
        raise


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """An empty folder on the disk of `out`, gone afterwards."""
    place = next(one for one in out.resolve().parents if one.exists())
    try:
        made = tempfile.TemporaryDirectory(dir=place, prefix=f".{out.name}.")
    except OSError as error:
        raise InputError("the folder cannot be written", got=f"{out}: {error.strerror}") from None
    with made as folder:
        yield Path(folder)


def _check_kind(emitter: Emitter, target: str, plan: Plan | OperatorPlan) -> None:
    """`InputError` for a plan of a kind that the target does not take."""
    kind = "deployment" if isinstance(plan, Plan) else plan.kind
    takes = getattr(emitter, "plans", ("deployment",))
    if kind not in takes:
        others = ", ".join(OF_GRAPHS) if kind == OPERATORS else ", ".join(BUILT_IN)
        raise InputError(
            f"target {target} takes plans of: {', '.join(takes)}",
            got=f"a plan of kind {kind}",
            hint=f"targets of such plans: {others}",
        )


def _load(target: str) -> Emitter:
    if target in OURS:
        module, _, attribute = OURS[target].partition(":")
        emitter: Emitter = getattr(importlib.import_module(module), attribute)
        return emitter
    others = registered()
    if target not in others:
        raise UnknownNameError("target", target[:100], target_names())
    try:
        loaded: Emitter = others[target].load()
    except ShardplanError:
        raise
    except Exception as error:
        raise InputError(
            "the target's package cannot be loaded",
            got=f"{target}: {type(error).__name__}: {error}",
            hint="reinstall the package that registers it",
        ) from error
    return loaded


def _check_options(emitter: Emitter, target: str, options: Mapping[str, object]) -> None:
    """`InputError` for a keyword that the target's function does not take."""
    parameters = list(inspect.signature(emitter).parameters.values())
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return
    known = [one.name for one in parameters[1:] if one.name != _STAGING]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InputError(
            f"target {target} has no such option",
            got=", ".join(unknown),
            hint="options: " + (", ".join(known) or "none"),
        )


def _checked(texts: Mapping[str, Content], target: str) -> dict[str, Content]:
    """The files, sorted by name; `InputError` for a name that could leave the folder."""
    wrong = [name for name in texts if not _FILE_NAME.fullmatch(name)]
    if wrong or not texts:
        raise InputError(
            "a target returns texts or bytes by plain file name",
            got=f"{target}: {wrong or 'no files'}",
            hint="this is a fault of the target's package",
        )
    return dict(sorted(texts.items()))


def _write(texts: Mapping[str, Content], out: Path, *, force: bool) -> list[Path]:
    paths = {name: out / name for name in texts}
    _check_folder(out, force=force)
    new = [path for path in paths.values() if not path.exists()]
    try:
        for name, path in paths.items():
            content = texts[name]
            if isinstance(content, Path):
                path.parent.mkdir(parents=True, exist_ok=True)
                content.replace(path)
            else:
                write_atomically(path, content)
            if name.endswith(".sh"):
                path.chmod(0o755)
    except (InputError, OSError, ValueError) as error:
        for path in new:
            with contextlib.suppress(OSError, ValueError):
                path.unlink(missing_ok=True)
        if isinstance(error, InputError):
            raise
        raise InputError("the folder cannot be written", got=f"{str(out)!r}: {error}") from None
    return list(paths.values())


def _check_folder(out: Path, *, force: bool) -> None:
    try:
        taken = out.is_dir() and any(out.iterdir())
        wrong = out.exists() and not out.is_dir()
    except (OSError, ValueError) as error:
        raise InputError("the folder cannot be read", got=f"{str(out)!r}: {error}") from None
    if wrong:
        raise InputError("the output is a folder", got=str(out), hint="name another one")
    if taken and not force:
        raise InputError(
            "the output folder must be empty",
            got=str(out),
            hint="name another one, or add --force (force=True) to write over its files",
        )
