"""Models by name or by file: `load_model("qwen3-32b")`, `load_model("path/to/config.json")`.

An ONNX file (extra `onnx`) and an export of PyTorch (extra `torch`) are read where the causal
decoder in them is recognised; a model of transformers by its configuration.

A preset is a Hugging Face `config.json` under `presets/`, cut down to the keys that matter;
`presets/sources.toml` says where each comes from and what its publisher says of its size.
A name is looked up as a preset, then as a Hugging Face repository that a preset stands for,
then as a path. Files are read whole only up to MAX_CONFIG_BYTES.
"""

from __future__ import annotations

import json
import os
import stat
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Never, TypedDict

from shardplan.models.config import spec_from_config
from shardplan.models.counts import active_parameter_count, kv_bytes_per_token, parameter_count
from shardplan.models.errors import InputError, UnknownNameError, did_you_mean, printable
from shardplan.models.frontends.registry import has_reader, read_registered
from shardplan.models.spec import ModelSpec

__all__ = [
    "MAX_CONFIG_BYTES",
    "ModelSummary",
    "load_model",
    "model_names",
    "model_summary",
    "preset_sources",
    "read_config",
]

_GRAPH_FILES = (".pt", ".om", ".air", ".mindir", ".safetensors", ".gguf")
MAX_CONFIG_BYTES = 16 * 2**20
"""Largest configuration file that is read, bytes (published ones stay below 100 KB)."""

_PAIR = 2
"""A class and its config."""

_PRESETS = Path(__file__).parent / "presets"


class ModelSummary(TypedDict):
    """One line of the `models` listing: counts in elements, the cache in bytes (2 an element)."""

    name: str
    parameters: int
    active_parameters: int
    kv_bytes_per_token: int
    source: str
    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    experts: int
    dtype: str


@cache
def model_names() -> tuple[str, ...]:
    """Names of the presets, sorted."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.json")))


@cache
def preset_sources() -> Mapping[str, Mapping[str, Any]]:
    """Where each preset comes from: its table of `presets/sources.toml`."""
    sources: Mapping[str, Mapping[str, Any]] = tomllib.loads(
        (_PRESETS / "sources.toml").read_text(encoding="utf-8")
    )
    return sources


def load_model(
    model: Any, config: Any = None, *, inputs: tuple[Any, ...] | None = None
) -> ModelSpec:
    """The model of a preset, of a `config.json` or a folder that holds one, of an ONNX or `.pt2`
    file, of a PyTorch module, export, or transformers class with its `config`, or of a file of a
    registered front end (docs/plugins.md).

    A string is first a preset name (or the Hugging Face repository of a preset), then a path;
    a path object is always a path; a pair is a class and its config. A module without a Hugging
    Face configuration is captured on `inputs` and recognised in its graph. Raises InputError for
    what cannot be read or breaks a rule, UnknownNameError for a name that is neither.
    """
    name_or_path, config = (
        model if isinstance(model, tuple) and len(model) == _PAIR else (model, config)
    )
    if not isinstance(name_or_path, (str, os.PathLike)):
        from shardplan.models.frontends.torch_model import spec_of

        return spec_of(name_or_path, config, inputs=inputs)
    if isinstance(name_or_path, str):
        preset = _preset_of(name_or_path)
        if preset is not None:
            return _load_preset(preset)
    path = Path(name_or_path)
    if path.suffix == ".onnx":
        from shardplan.models.frontends.onnx_model import spec_from_onnx

        return spec_from_onnx(path)
    if path.suffix == ".pt2":
        from shardplan.models.frontends.torch_model import spec_of

        return spec_of(path)
    if has_reader(path):
        found = read_registered(path)
        if isinstance(found, ModelSpec):
            return found
        from shardplan.models.frontends.decoder import decoder_of

        return decoder_of(found)
    if path.suffix in _GRAPH_FILES:
        raise InputError(
            "a model is a preset, a Hugging Face config.json, an ONNX or a .pt2 file",
            got=_printable(path),
            hint="graph files of this kind are not read; give the config.json beside it",
        )
    if isinstance(name_or_path, str) and not _looks_like_path(name_or_path):
        raise UnknownNameError("model", name_or_path[:100], model_names())
    file = _config_file(path)
    config = read_config(file)
    folder = Path(os.path.abspath(file)).parent  # links kept: caches link into hashed names
    name = Path(folder.name if file.name == "config.json" and folder.name else file.stem)
    shown = printable(str(name)).replace("\n", " ")
    return spec_from_config(config, name=shown, source=_printable(file))


def model_summary(name: str) -> ModelSummary:
    """What the `models` command lists of one preset (or of any name `load_model` takes)."""
    spec = load_model(name)
    return ModelSummary(
        name=spec.name,
        parameters=parameter_count(spec),
        active_parameters=active_parameter_count(spec),
        kv_bytes_per_token=kv_bytes_per_token(spec),
        source=spec.source,
        architecture=spec.architecture,
        layers=spec.layers,
        hidden=spec.hidden,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        experts=0 if spec.moe is None else spec.moe.experts,
        dtype=spec.dtype,
    )


def read_config(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file.

    Raises InputError (file, rule, where) for anything else: no regular file, larger than
    MAX_CONFIG_BYTES, unreadable, empty, not UTF-8, not JSON, nested too deeply, not an object.
    """
    text = _read_text(path)
    file = _printable(path)
    if not text.strip():
        raise InputError("the file is empty", got=f"file={file}", hint="give a config.json")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise InputError(
            f"not valid JSON: {error.msg}",
            got=f"file={file}, line={error.lineno}, column={error.colno}",
            hint="give the model's config.json",
        ) from None
    except RecursionError:
        raise InputError(
            "the JSON is nested too deeply", got=f"file={file}", hint="give a config.json"
        ) from None
    except ValueError as error:
        raise InputError(
            "the JSON holds a number that cannot be used",
            got=f"file={file}, value={str(error)[:100]}",
            hint="write finite numbers of at most a few digits",
        ) from None
    if not isinstance(value, dict):
        raise InputError(
            "a model configuration must be a JSON object",
            got=f"file={file}, found a {type(value).__name__}",
            hint="give the model's config.json",
        )
    return value


def _preset_of(name: str) -> str | None:
    """The preset that a name or a Hugging Face repository stands for, in any case."""
    wanted = name.lower()
    if wanted in model_names():
        return wanted
    for preset, entry in preset_sources().items():
        if wanted in (repository.lower() for repository in entry["repositories"]):
            return preset
    return None


def _load_preset(name: str) -> ModelSpec:
    config = json.loads((_PRESETS / f"{name}.json").read_text(encoding="utf-8"))
    return spec_from_config(config, name=name, source=preset_sources()[name]["source"])


def _looks_like_path(name: str) -> bool:
    return os.sep in name or name.endswith(".json") or name in (".", "..") or _exists(Path(name))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _config_file(path: Path) -> Path:
    """The file itself, or the `config.json` of a folder."""
    if path.name and not _is_folder(path):
        return path
    file = path / "config.json"
    if not _exists(file):
        raise InputError(
            "the folder holds no config.json",
            got=f"folder={_printable(path)}",
            hint="give a folder of a Hugging Face checkpoint or a config.json",
        )
    return file


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _read_text(path: Path) -> str:
    """The text of a regular file of at most MAX_CONFIG_BYTES, in UTF-8."""
    file = _printable(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError("not a regular file", got=f"file={file}", hint="give a config.json")
        if found.st_size > MAX_CONFIG_BYTES:
            raise InputError(
                f"a model configuration must be at most {MAX_CONFIG_BYTES} bytes",
                got=f"file={file}, bytes={found.st_size}",
                hint="give the config.json, not the weights",
            )
        with path.open("rb") as stream:
            data = stream.read(MAX_CONFIG_BYTES + 1)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            "the file is not UTF-8 text",
            got=f"file={file}, byte={error.start}",
            hint="give a config.json",
        ) from None
    except FileNotFoundError:
        raise InputError(
            "no such file or model name",
            got=f"file={file}",
            hint=f"check the path; {did_you_mean(path.name, model_names())}",
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"the file cannot be read: {reason}", got=f"file={file}", hint="check the path"
        ) from None


def _refuse_constant(name: str) -> Never:
    raise ValueError(name)


def _printable(path: Path) -> str:
    """A path as text that any terminal can print."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")
