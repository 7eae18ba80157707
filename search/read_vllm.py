"""`vllm serve` commands as configurations: of a command line, or of a script that holds some.

A script is read, never run: lines that a backslash joins, `export NAME=value` and `NAME=value`
before them, `${NAME:-default}` in them, and every `vllm serve ...` or `python -m
vllm.entrypoints.openai.api_server ...`. What a shell would compute (loops, conditions, command
substitution) is not followed; a value that hangs on it is not known.

Options, their short forms and the plugin's keys stand in `data/lint_vllm.toml` with their sources.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from shardplan.models.errors import InputError
from shardplan.search.configuration import Configuration, whole_number

__all__ = ["read_vllm"]

MAX_BYTES = 1 << 20
_MOST_LINES = 100
"""Lines that one quoted text spans at most."""
_ASSIGN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_NAME = r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+"
_VARIABLE = re.compile(rf"\$(?:\{{({_NAME})(?::?-([^}}]*))?\}}|({_NAME}))")
_OPTION = re.compile(r"-{1,2}[A-Za-z][A-Za-z0-9_-]*")
_SERVER = "vllm.entrypoints.openai.api_server"
_STOPS = {"&", "&&", "||", ";", "|"}


@functools.cache
def _facts() -> Mapping[str, Any]:
    text = resources.files("shardplan.search").joinpath("data/lint_vllm.toml").read_text("utf-8")
    return tomllib.loads(text)


def read_vllm(text: str, source: str, arguments: Sequence[str] = ()) -> list[Configuration]:
    """The configurations of all commands in a text; `InputError` where there is none.

    `arguments`: what the script is called with: $1, $2, ... Raises `InputError`, too, for an
    option whose value cannot be read.
    """
    if len(text.encode()) > MAX_BYTES:
        raise InputError("a script has at most 1 MiB", got=source)
    known = {str(place): one for place, one in enumerate(arguments, start=1)}
    found = [_configuration(words, source, own) for words, own in _commands(text, known)]
    if not found:
        raise InputError(
            "no `vllm serve` command was found",
            got=source,
            hint="give the command itself in quotes, or the script that holds it",
        )
    return list(dict.fromkeys(found))


def _commands(text: str, known: dict[str, str]) -> Iterator[tuple[list[str], dict[str, str]]]:
    """(words after `serve`, variables) of every command, variables put in."""
    for line in _lines(text):
        words = [_filled(word, known) for word in line]
        if words[:1] == ["export"]:
            words = words[1:]
        own = dict(known)
        while words and _ASSIGN.match(words[0]):
            name, _, value = words.pop(0).partition("=")
            own[name] = value
        if not words:
            known = own
        for served in _served(words):
            yield served, own


def _lines(text: str) -> Iterator[list[str]]:
    """Lines in words; one whose quote stays open goes on with the next."""
    held = ""
    for line in text.replace("\\\r\n", "\\\n").replace("\\\n", " ").splitlines():
        held = f"{held}\n{line}" if held else line
        try:
            words = _split(held)
        except ValueError:
            if held.count("\n") < _MOST_LINES:
                continue
            words = []
        held = ""
        yield words


def _split(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    return list(lexer)


def _filled(word: str, known: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return known.get(name, match[2] if match[2] is not None else match[0])

    return _VARIABLE.sub(value, word)


def _served(words: Sequence[str]) -> Iterator[list[str]]:
    """The arguments of each server that a line starts."""
    for place, word in enumerate(words):
        own = word.rpartition("/")[2] == "vllm" and words[place + 1 : place + 2] == ["serve"]
        if own or (word == _SERVER and words[place - 1 : place] == ["-m"]):
            rest = list(words[place + (2 if own else 1) :])
            ends = [at for at, one in enumerate(rest) if one in _STOPS]
            yield rest[: ends[0]] if ends else rest


def _options(words: Sequence[str]) -> tuple[str, dict[str, str]]:
    """(model, {option: value}); an option without a value has "true"."""
    short: Mapping[str, str] = _facts()["short"]
    model, found = "", {}
    place = 0
    while place < len(words):
        word, place = words[place], place + 1
        if not _OPTION.match(word):
            model = model or word
            continue
        name, given, value = word.partition("=")
        name = short.get(name, name).replace("_", "-")
        if not given:
            value = "true"
            takes = name not in _facts()["switches"] and not name.startswith("--no-")
            if takes and place < len(words) and not _OPTION.fullmatch(words[place]):
                value, place = words[place], place + 1
        found[name] = value
    return found.pop("--model", model), found


def _configuration(
    words: Sequence[str], source: str, environment: Mapping[str, str]
) -> Configuration:
    model, options = _options(words)
    told: dict[str, Any] = {}
    for option, name in _facts()["numbers"].items():
        if option in options:
            told[name] = whole_number(option, options.pop(option))
    if "--gpu-memory-utilization" in options:
        told["memory_fraction"] = _share(options.pop("--gpu-memory-utilization"))
    if options.pop("--enable-expert-parallel", "false") == "true":
        told |= {"experts_parallel": True, "exchange": _facts()["exchange"]["value"]}
    eager = options.pop("--enforce-eager", "false") == "true"
    told |= _types(options)
    told |= _extras(options)
    for variable, name in _facts()["environment"].items():
        told[name] = told.get(name, False) or environment.get(variable, "0") not in ("", "0")
    unknown = model.startswith("$") or not model
    return Configuration(
        source=source,
        engine_profile="vllm-ascend-eager" if eager else "vllm-ascend",
        model="" if unknown else model,
        unread=tuple(sorted(set(options) - set(_facts()["elsewhere"]))),
        **told,
    )


def _types(options: dict[str, str]) -> dict[str, Any]:
    """Types of weights and cache."""
    told: dict[str, Any] = {}
    scheme = options.pop("--quantization", None)
    if scheme is not None:
        told["quantized"] = scheme == "ascend"
        told["weight_dtype"] = _facts()["quantization"].get(scheme)
    word = options.pop("--dtype", "auto")
    if scheme is None and word in _facts()["dtypes"]:
        told["weight_dtype"] = _facts()["dtypes"][word]
    cache = options.pop("--kv-cache-dtype", "auto")
    if cache != "auto":
        told["kv_dtype"] = _facts()["caches"].get(cache, cache)
    return told


def _extras(options: dict[str, str]) -> dict[str, Any]:
    """What JSON options say: tokens predicted ahead, switches of the plugin, pools."""
    told: dict[str, Any] = {}
    ahead = _json(options, "--speculative-config")
    if "num_speculative_tokens" in ahead:
        told["mtp"] = whole_number("num_speculative_tokens", ahead["num_speculative_tokens"])
    more = _json(options, "--additional-config")
    keys = _facts()["additional_config"]
    told["sp"] = bool(more.get(keys["sequence_parallel"]))
    told["fused_collectives"] = bool(more.get(keys["fused_collectives"]))
    prefetch = more.get(keys["weight_prefetch"])
    told["weight_prefetch"] = bool(isinstance(prefetch, Mapping) and prefetch.get("enabled"))
    role = _json(options, "--kv-transfer-config").get("kv_role")
    told["role"] = _facts()["roles"].get(role, "mixed")
    return told


def _json(options: dict[str, str], name: str) -> Mapping[str, Any]:
    text = options.pop(name, "{}")
    try:
        value = json.loads(text)
    except ValueError:
        raise InputError(
            f"`{name}` is a JSON object", got=f"{name}={text[:60]!r}", hint="put it in quotes"
        ) from None
    if not isinstance(value, Mapping):
        raise InputError(f"`{name}` is a JSON object", got=f"{name}={text[:60]!r}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise InputError(
            "`--gpu-memory-utilization` is a share above 0, at most 1",
            got=text[:40],
            hint="try 0.9",
        )
    return value
