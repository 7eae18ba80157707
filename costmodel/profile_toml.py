"""Writing a device profile: the TOML that `--device` and `--cluster` accept.

    name, title, base, cluster       what it corrects and where it was measured
    engine_profile                   whose kernels were measured, where they are an engine's own
    [provenance]                     version, options, each file with its digest and rows
    [correction."<section>"]         `shardplan.costmodel.correction`, five digits

The same files, options and version give the same bytes: no date, no path, no host name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields

from shardplan.costmodel.correction import Correction
from shardplan.costmodel.datafile import is_file_name
from shardplan.costmodel.profiler_files.measurement import ReadFile
from shardplan.models.errors import InputError

__all__ = ["check_name", "profile_text"]

_HEADING = """\
# A device profile: corrections of a calibration by measurements of one machine.
# Written by `shardplan calibrate`; give it to --device, or to --cluster where it names one.
"""


def check_name(name: str) -> str:
    """The name of a profile, printable and not a file's; `InputError` otherwise."""
    if not name.strip() or not name.isprintable() or is_file_name(name):
        raise InputError("`name` is a word that names no file", got=f"name={name[:60]!r}")
    return name


def profile_text(
    *,
    name: str,
    title: str,
    base: str,
    cluster: str | None,
    version: str,
    options: Mapping[str, str],
    files: Sequence[ReadFile],
    corrections: Sequence[Correction],
    engine: str = "",
) -> str:
    """The profile as TOML."""
    lines = [f"name = {_text(name)}", f"title = {_text(title)}", f"base = {_text(base)}"]
    if cluster is not None:
        lines.append(f"cluster = {_text(cluster)}")
    if engine:
        lines.append(f"engine_profile = {_text(engine)}")
    lines += ["", "[provenance]", f"shardplan = {_text(version)}"]
    lines += [f"{key} = {_text(value)}" for key, value in options.items()]
    for file in files:
        used = sum(one.count for one in file.measurements)
        lines += ["", "[[provenance.files]]", f"file = {_text(file.file)}"]
        lines += [f"format = {_text(file.format)}", f"rows = {file.rows}", f"used = {used}"]
        lines.append(f"sha256 = {_text(file.sha256)}")
    lines += ["", "[correction]"]
    for one in sorted(corrections, key=lambda item: item.name):
        lines += ["", f"[correction.{_text(one.name)}]"]
        for item in fields(one):
            if item.name != "name":
                lines += _entry(item.name, getattr(one, item.name))
    return _HEADING + "\n".join(lines) + "\n"


def _entry(key: str, value: object) -> list[str]:
    if isinstance(value, str):
        return [f"{key} = {_text(value)}"]
    if isinstance(value, float):
        return [f"{key} = {float(f'{value:.5g}')!r}"] if math.isfinite(value) else []
    if isinstance(value, tuple):
        listed = ", ".join(repr(float(f"{one:.5g}")) for one in value)
        return [f"{key} = [{listed}]"]
    return [f"{key} = {value}"]


def _text(value: str) -> str:
    """A TOML string: what cannot be printed or encoded is replaced."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in value)
    return json.dumps(plain.encode("utf-8", "replace").decode("utf-8"), ensure_ascii=False)
