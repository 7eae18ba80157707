"""Makes the tables of flags that the serving targets are checked against, from released wheels.

    python -m tests.search.engine_flags vllm vllm-0.23.0-....whl > search/data/vllm_flags.toml
    python -m tests.search.engine_flags sglang sglang-0.5.23-....whl > search/data/sglang_flags.toml

The wheel's sources are parsed, never imported: neither engine need be installed. A flag is the
literal first words of an `add_argument`, or the name of a field that the engine turns into one; a
switch takes no value (`store_true`, `BooleanOptionalAction`, a field of type bool).
Left out: choices and defaults, and flags that plugins add when they are loaded.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["Flags", "literal_flags", "sglang_fields", "toml_of", "vllm_engine", "vllm_fields"]

Flags = dict[str, bool]
"""Flag -> whether it is a switch."""

_SWITCHES = ("store_true", "BooleanOptionalAction", "DeprecatedStoreTrueAction")
_VLLM_BENCH = ("vllm/benchmarks/serve.py", "vllm/benchmarks/datasets/datasets.py")


def _calls(tree: ast.AST) -> Iterator[tuple[list[str], ast.Call]]:
    """(flags, call) of every `add_argument` whose flags are written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            words = [one.value for one in node.args if isinstance(one, ast.Constant)]
            flags = [word for word in words if isinstance(word, str) and word.startswith("--")]
            if flags:
                yield flags, node


def _action(keywords: list[ast.keyword]) -> str:
    """Name of an `action=`, "" where there is none."""
    for one in keywords:
        if one.arg == "action":
            named = one.value
            return str(getattr(named, "value", "") if isinstance(named, ast.Constant) else "") or (
                getattr(named, "attr", "") or getattr(named, "id", "")
            )
    return ""


def literal_flags(source: str) -> Flags:
    """Flags of `add_argument` calls that say themselves whether they are switches."""
    found = _calls(ast.parse(source))
    return {name: _action(call.keywords) in _SWITCHES for names, call in found for name in names}


def vllm_fields(source: str) -> dict[str, dict[str, bool]]:
    """Class -> field -> whether its type has bool, which vLLM makes a switch."""
    return {
        node.name: {
            one.target.id: _has_bool(one.annotation)
            for one in node.body
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        }
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    }


def _has_bool(annotation: ast.expr) -> bool:
    if isinstance(annotation, ast.BinOp):
        return _has_bool(annotation.left) or _has_bool(annotation.right)
    return isinstance(annotation, ast.Name) and annotation.id == "bool"


def vllm_engine(source: str, fields: Mapping[str, Mapping[str, bool]]) -> Flags:
    """Flags of `EngineArgs.add_cli_args`, which takes most kinds from `get_kwargs(Class)`."""
    tree = ast.parse(source)
    classes = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            call, target = node.value, node.targets[0]
            if getattr(call.func, "id", "") == "get_kwargs" and isinstance(target, ast.Name):
                classes[target.id] = getattr(call.args[0], "id", "")
    found: Flags = {}
    for names, call in _calls(tree):
        switch = _action(call.keywords) in _SWITCHES
        for one in (kind for word in call.keywords if word.arg is None for kind in ast.walk(word)):
            if isinstance(one, ast.Subscript):
                owner = classes.get(getattr(one.value, "id", ""), "")
                field = getattr(one.slice, "value", "")
                switch = switch or _field_kind(fields, owner, str(field))
        found |= dict.fromkeys(names, switch)
    return found


def _field_kind(fields: Mapping[str, Mapping[str, bool]], owner: str, field: str) -> bool:
    """Of a field of a class, or of the class that it inherits the field from."""
    own = fields.get(owner, {})
    if field in own:
        return own[field]
    return any(field in one and one[field] for one in fields.values())


def sglang_fields(source: str) -> Flags:
    """Flags of fields `name: A[type, help or Arg(...)]` of SGLang's namespaces."""
    found: Flags = {}
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.annotation, ast.Subscript)):
            continue
        words = node.annotation.slice
        if getattr(node.annotation.value, "id", "") != "A" or not isinstance(words, ast.Tuple):
            continue
        kind, meta = words.elts[0], words.elts[-1]
        told = {one.arg: one.value for one in getattr(meta, "keywords", [])}
        if getattr(told.get("no_cli"), "value", False):
            continue
        name = "--" + getattr(node.target, "id", "").replace("_", "-")
        names = [getattr(told.get("cli_name"), "value", name)]
        names += [getattr(one, "value", "") for one in getattr(told.get("aliases"), "elts", [])]
        action = _action(list(getattr(meta, "keywords", [])))
        switch = action in _SWITCHES if action else getattr(kind, "id", "") == "bool"
        found |= dict.fromkeys(names, switch)
    return found


def _frontend(fields: Mapping[str, Mapping[str, bool]]) -> Flags:
    """Flags of vLLM's front end: a field each."""
    both = {**fields["BaseFrontendArgs"], **fields["FrontendArgs"]}
    return {f"--{name.replace('_', '-')}": switch for name, switch in both.items()}


def _text(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(name).decode("utf-8")


def _vllm(wheel: zipfile.ZipFile) -> list[tuple[str, str, Flags]]:
    """(command, sources, flags) of a vLLM wheel."""
    configs = [one for one in wheel.namelist() if one.startswith("vllm/config/")]
    fields: dict[str, dict[str, bool]] = {}
    for name in configs:
        fields |= vllm_fields(_text(wheel, name))
    engine = vllm_engine(_text(wheel, "vllm/engine/arg_utils.py"), fields)
    front = _text(wheel, "vllm/entrypoints/openai/cli_args.py")
    bench: Flags = {}
    for name in _VLLM_BENCH:
        bench |= literal_flags(_text(wheel, name))
    return [
        ("serve", "vllm/engine/arg_utils.py and vllm/config", engine),
        (
            "serve",
            "vllm/entrypoints/openai/cli_args.py",
            {**_frontend(vllm_fields(front)), **literal_flags(front)},
        ),
        ("bench", " and ".join(_VLLM_BENCH), bench),
    ]


def _sglang(wheel: zipfile.ZipFile) -> list[tuple[str, str, Flags]]:
    """(command, sources, flags) of an SGLang wheel."""
    home = "sglang/srt/arg_groups/fields/"
    serve: Flags = {}
    for name in wheel.namelist():
        if name.startswith(home) and name.endswith(".py"):
            serve |= sglang_fields(_text(wheel, name))
    serve |= literal_flags(_text(wheel, "sglang/srt/server_args.py"))
    return [("serve", f"{home} and sglang/srt/server_args.py", serve)]


def toml_of(package: str, version: str, groups: list[tuple[str, str, Flags]]) -> str:
    """The table as `search/data` holds it."""
    lines = [
        f"# Made by `python -m tests.search.engine_flags {package} WHEEL`; not to be edited.",
        "",
        "[release]",
        f'{package} = "{version}"',
        f'source = "wheel of {package} {version} on the Python Package Index"',
    ]
    for command, source, flags in groups:
        lines += ["", "[[flags]]", f'command = "{command}"']
        lines.append(f'source = "{package} {version} {source}"')
        for key, kind in (("values", False), ("switches", True)):
            lines.append(f"{key} = [")
            lines += [f'  "{name}",' for name in sorted(flags) if flags[name] is kind]
            lines.append("]")
    return "\n".join(lines) + "\n"


def main(package: str, path: str) -> None:
    """Print the table of a wheel."""
    version = Path(path).name.split("-")[1]
    with zipfile.ZipFile(path) as wheel:
        groups = {"vllm": _vllm, "sglang": _sglang}[package](wheel)
    sys.stdout.write(toml_of(package, version, groups))


if __name__ == "__main__":
    main(*sys.argv[1:])
