"""From a plan to the files and commands of one engine or compiler.

A target is a function `(plan, **options) -> {file name: text or bytes}` that raises `InputError`
for a plan it cannot express. Some are ours; others register one in the entry-point group
`shardplan.emitters` (name = the target's name), which is read when a target is asked for. A
built-in name cannot be taken over. A file name may hold one folder (`shards/rank0.onnx`).

All files are built in memory before the first is written; should a write fail, the files that
this call created are removed again. Left out: files of an earlier plan in a folder that `force`
writes over stay there; the README that each target writes lists its own.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from shardplan.models.errors import InputError, ShardplanError, UnknownNameError
from shardplan.search.emit.common import check_plan
from shardplan.search.plan import Plan, write_atomically

__all__ = ["BUILT_IN", "GROUP", "Emitter", "emit", "target_names"]

Emitter = Callable[..., Mapping[str, str | bytes]]

GROUP = "shardplan.emitters"
BUILT_IN: Mapping[str, str] = {
    "atc": "shardplan.search.emit.atc:files",
    "docker-compose": "shardplan.search.emit.compose:files",
    "jax": "shardplan.search.emit.jax_specs:files",
    "k8s": "shardplan.search.emit.k8s:files",
    "megatron": "shardplan.search.emit.megatron:files",
    "mindie": "shardplan.search.emit.mindie:files",
    "mindspore": "shardplan.search.emit.mindspore_strategy:files",
    "ray": "shardplan.search.emit.ray_serve:files",
    "sglang": "shardplan.search.emit.sglang:files",
    "torch": "shardplan.search.emit.torch_plan:files",
    "vllm-ascend": "shardplan.search.emit.vllm_ascend:files",
}
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_FILE_NAME = re.compile(rf"(?:{_WORD}/)?{_WORD}")


def target_names() -> tuple[str, ...]:
    """Names of all targets, sorted: ours and those of installed packages."""
    return tuple(sorted({*BUILT_IN, *_registered()}))


def emit(
    plan: Plan, target: str, out: str | Path, *, force: bool = False, **options: object
) -> list[Path]:
    """Write the files of `target` into the folder `out`; returns their paths, sorted.

    `out` is created when absent; a folder that holds anything needs `force`. `options` are the
    target's own keywords. Raises UnknownNameError for a target, InputError for an option that
    the target does not have, a plan it cannot express, or a folder that cannot be written.
    """
    emitter = _load(target)
    check_plan(plan)
    _check_options(emitter, target, options)
    texts = _checked(emitter(plan, **options), target)
    return _write(texts, Path(out), force=force)


def _registered() -> dict[str, EntryPoint]:
    """Targets of other packages by name."""
    found = entry_points(group=GROUP)
    return {point.name: point for point in found if point.name not in BUILT_IN}


def _load(target: str) -> Emitter:
    if target in BUILT_IN:
        module, _, attribute = BUILT_IN[target].partition(":")
        emitter: Emitter = getattr(importlib.import_module(module), attribute)
        return emitter
    others = _registered()
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
    known = [one.name for one in parameters[1:]]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InputError(
            f"target {target} has no such option",
            got=", ".join(unknown),
            hint="options: " + (", ".join(known) or "none"),
        )


def _checked(texts: Mapping[str, str | bytes], target: str) -> dict[str, str | bytes]:
    """The files, sorted by name; `InputError` for a name that could leave the folder."""
    wrong = [name for name in texts if not _FILE_NAME.fullmatch(name)]
    if wrong or not texts:
        raise InputError(
            "a target returns texts or bytes by plain file name",
            got=f"{target}: {wrong or 'no files'}",
            hint="this is a fault of the target's package",
        )
    return dict(sorted(texts.items()))


def _write(texts: Mapping[str, str | bytes], out: Path, *, force: bool) -> list[Path]:
    paths = {name: out / name for name in texts}
    _check_folder(out, force=force)
    new = [path for path in paths.values() if not path.exists()]
    try:
        for name, path in paths.items():
            write_atomically(path, texts[name])
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
            hint="name another one, or force writing over its files",
        )
