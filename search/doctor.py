"""Whether this installation is whole: what it needs, what it may have, what it finds outside.

| part         | looked at                                                          | if not well |
|--------------|--------------------------------------------------------------------|-------------|
| python       | the interpreter against `requires-python`                          | broken      |
| package      | each dependency: its version within the bounds, and that it loads  | broken      |
| entry point  | each target of `emit` and the compiler backend: that it loads      | broken      |
| data         | every preset, device, cluster, engine, calibration and rule: read  | broken      |
| extra        | the packages of each extra, likewise                               | absent      |
| plug-in      | targets and front ends that other packages register                | warning     |
| place        | the working and the temporary folder: that a file can be written   | warning     |
| tool         | programs of others on the path (`data/doctor.toml`)                | absent      |

Bounds are those of the installed metadata. Nothing heavy, and nothing that may be missing, is
imported before it is looked at: that is what this is for. What fails here is a finding, not a bug.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import platform
import shutil
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from shardplan.search.targets import OURS, registered

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["Check", "State", "examine", "is_whole", "told_of"]

State = Literal["ok", "absent", "warning", "broken"]
T = TypeVar("T")
_NAME = "shardplan"
_MOST_SHOWN = 200
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    part: str
    name: str
    state: State
    found: str
    """Version, number or path; empty where there is nothing."""
    needed: str = ""
    """Bounds of the version."""
    says: str = ""
    """What is wrong and what to do about it, or what the thing is good for."""


def examine() -> list[Check]:
    """Everything that was looked at, in the order of the table above."""
    try:
        own = metadata.distribution(_NAME)
    except metadata.PackageNotFoundError:
        return [_not_installed(), *_beside()]
    return [_python(own), _itself(own), *_packages(own), *_beside(own)]


def is_whole(checks: Iterable[Check]) -> bool:
    """Whether nothing that is needed is broken."""
    return all(check.state != "broken" for check in checks)


def _beside(own: metadata.Distribution | None = None) -> Iterator[Check]:
    """All but the interpreter and the dependencies."""
    yield from _entry_points()
    yield from _data_files()
    yield from _extras(own) if own is not None else ()
    yield from _plug_ins()
    yield from _places()
    yield from _tools()


def _not_installed() -> Check:
    hint = "bounds of its dependencies are not known: pip install . where pyproject.toml lies"
    return Check(part="package", name=_NAME, state="broken", found="not installed", says=hint)


def _python(own: metadata.Distribution) -> Check:
    found, needed = platform.python_version(), own.metadata["Requires-Python"] or ""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # said where packaging stands among the dependencies
        return Check(part="python", name="python", state="ok", found=found, needed=needed)
    fits = SpecifierSet(needed).contains(found, prereleases=True)
    state: State = "ok" if fits else "broken"
    return Check(part="python", name="python", state=state, found=found, needed=needed)


def _itself(own: metadata.Distribution) -> Check:
    """A warning where the code that runs is not that of the metadata, as in a source tree."""
    import shardplan

    here = Path(shardplan.__file__).resolve()
    installed = Path(str(own.locate_file("shardplan/__init__.py"))).resolve()
    apart = own.version != shardplan.__version__ or (installed.exists() and installed != here)
    return Check(
        part="package",
        name=_NAME,
        state="warning" if apart else "ok",
        found=own.version,
        says=f"{here.parent} runs, {installed.parent} is installed" if apart else "",
    )


def _requirements(own: metadata.Distribution, extra: str = "") -> list[Requirement]:
    """What the metadata asks for by itself, or more than that with an extra."""
    from packaging.requirements import Requirement

    every = [Requirement(line) for line in own.requires or ()]
    if not extra:
        return [one for one in every if _applies(one, "")]
    return [one for one in every if _applies(one, extra) and not _applies(one, "")]


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _packages(own: metadata.Distribution) -> Iterator[Check]:
    try:
        needed = _requirements(own)
    except ImportError as error:
        says = f"versions cannot be compared: {error}; pip install packaging"
        yield Check(part="package", name="packaging", state="broken", found="", says=says)
        return
    for one in needed:
        fault = _fault(one) or _import_fault(one.name)
        yield Check(
            part="package",
            name=one.name,
            state="broken" if fault else "ok",
            found=_version(one.name),
            needed=str(one.specifier),
            says=f"{fault}; pip install '{one}'" if fault else "",
        )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _fault(one: Requirement) -> str:
    """What is wrong with the installed version; empty if nothing."""
    version = _version(one.name)
    if not version:
        return "not installed"
    return "" if one.specifier.contains(version, prereleases=True) else "another version is needed"


def _import_fault(module: str) -> str:
    return _tried(functools.partial(importlib.import_module, module))[1]


def _tried(action: Callable[[], T]) -> tuple[T | None, str]:
    """What an action gives, and why it fails, if so. What it prints and warns of is kept quiet."""
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            return action(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"[:_MOST_SHOWN]


def _entry_points() -> Iterator[Check]:
    own = {f"target {name}": value for name, value in OURS.items()}
    own["compiler backend"] = "shardplan.search.compiler:backend"
    for name, value in own.items():
        point = metadata.EntryPoint(name=name, value=value, group=_NAME)
        fault = _tried(point.load)[1]
        state: State = "broken" if fault else "ok"
        yield Check(part="entry point", name=name, state=state, found=value, says=fault)


def _plug_ins() -> Iterator[Check]:
    from shardplan.models.frontends.registry import registered as front_ends

    others = {f"target {name}": point for name, point in registered().items()}
    others |= {f"front end {name}": point for name, point in front_ends().items()}
    for name, point in sorted(others.items()):
        fault = _tried(point.load)[1]
        state: State = "warning" if fault else "ok"
        says = f"{fault}; reinstall the package that registers it" if fault else ""
        yield Check(part="plug-in", name=name, state=state, found=point.value, says=says)


def _data_files() -> Iterator[Check]:
    for name, read in _READERS.items():
        count, fault = _tried(read)
        state: State = "broken" if fault else "ok"
        says = f"{fault}; install shardplan again" if fault else ""
        yield Check(part="data", name=name, state=state, found=str(count or ""), says=says)


def _models() -> int:
    from shardplan.models.catalog import load_model, model_names

    return len([load_model(name) for name in model_names()])


def _devices() -> int:
    from shardplan.costmodel.catalog import device_names, load_device

    return len([load_device(name) for name in device_names()])


def _clusters() -> int:
    from shardplan.costmodel.catalog import cluster_names, load_cluster

    return len([load_cluster(name) for name in cluster_names()])


def _engines() -> int:
    from shardplan.costmodel.engines import engine_names, load_engine

    return len([load_engine(name) for name in engine_names()])


def _calibrations() -> int:
    from shardplan.costmodel.calibration import (
        calibration_engines,
        calibration_names,
        load_calibration,
    )

    every = [
        load_calibration(name, engine)
        for name in calibration_names()
        for engine in ("", *calibration_engines(name))
    ]
    return len(every)


def _rules() -> int:
    from shardplan.search.rulebook import rules

    return len(rules())


_READERS: Mapping[str, Callable[[], int]] = {
    "models": _models,
    "devices": _devices,
    "clusters": _clusters,
    "engine profiles": _engines,
    "calibrations": _calibrations,
    "rules": _rules,
}


def told_of(kind: str) -> dict[str, dict[str, Any]]:
    """Entries of `data/doctor.toml` of a kind, by name."""
    text = (resources.files("shardplan.search") / "data" / "doctor.toml").read_text("utf-8")
    entries: dict[str, dict[str, Any]] = tomllib.loads(text)[kind]
    return entries


def _extras(own: metadata.Distribution) -> Iterator[Check]:
    for name, told in told_of("extras").items():
        try:
            needed = _requirements(own, name)
        except ImportError:  # said where packaging stands among the dependencies
            return
        yield _extra(name, needed, told)


def _extra(name: str, needed: list[Requirement], told: Mapping[str, Any]) -> Check:
    """Absent where a package of it does not fit, a warning where one does not load."""
    lacking = [one.name for one in needed if _fault(one)]
    here = [f"{one.name} {_version(one.name)}" for one in needed if one.name not in lacking]
    loads = [one for one in told["imports"] if _version(one)]
    unwell = [f"{one}: {fault}" for one in loads if (fault := _import_fault(one))]
    found = _named(here)
    if here and lacking:
        found += f", without {_named(lacking)}"
    hint = f"; pip install 'shardplan[{name}]'" if lacking or unwell else ""
    return Check(
        part="extra",
        name=name,
        state="warning" if unwell else "absent" if lacking else "ok",
        found=found,
        says=("; ".join(unwell) or told["gives"]) + hint,
    )


def _named(words: list[str]) -> str:
    return ", ".join(words) if len(words) <= _MOST_NAMED else f"{len(words)} packages"


def _places() -> Iterator[Check]:
    for name, place in (("working folder", Path.cwd), ("temporary folder", _temporary)):
        found, fault = _tried(functools.partial(_writable, place))
        state: State = "warning" if fault else "ok"
        says = f"{fault}; name another with --out" if fault else ""
        yield Check(part="place", name=name, state=state, found=str(found or ""), says=says)


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


def _writable(place: Callable[[], Path]) -> Path:
    """The folder, once a file could be written there."""
    folder = place()
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"shardplan")
    return folder


def _tools() -> Iterator[Check]:
    for name, told in told_of("tools").items():
        path = shutil.which(name)
        state: State = "absent" if path is None else "ok"
        yield Check(part="tool", name=name, state=state, found=path or "", says=told["gives"])
