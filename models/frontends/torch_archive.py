"""A `.pt2` archive, looked at before torch opens it: what it holds is data, not a program to run.

`torch.export.load` would unpickle objects, load compiled libraries and evaluate texts that stand in
the archive (torch 2.14, torch/export/pt2_archive/_package.py, torch/_export/serde/serialize.py).
What `torch.export.save` writes of a module of plain tensors has none of it. Allowed are: members
stored as they are; payloads of tensors alone; operators of PyTorch's registry and of arithmetic;
symbols and arithmetic for the sizes of dims; names that are names.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any

__all__ = ["check_archive"]

MAX_GRAPH_BYTES = 256 * 2**20
"""Largest description of a graph that is read, bytes."""
MAX_MEMBERS = 1_000_000

_MEMBER = re.compile(
    r"[^/]+/(?:models/model\.json|archive_format|archive_version|byteorder|version"
    r"|\.data/(?:version|serialization_id)|data/sample_inputs/model\.pt|extra/.*"
    r"|data/weights/(?:weight_\d+|model_weights_config\.json)"
    r"|data/constants/(?:tensor_\d+|model_constants_config\.json))"
)
_PAYLOADS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_GRAPH = "models/model.json"
_TENSOR = re.compile(r"(?:weight|tensor)_\d+")
_OPERATOR = re.compile(
    r"torch\.ops\.(?!load|import)[a-z]\w*\.\w+(?:\.\w+)?|_operator\.[a-z]+_?"
    r"|math\.[a-z]+|torch\.sym_\w+|torch\._sym_\w+"
)
_NAME = re.compile(r"(?!\d)[\w.$]*")
_CALLS = {
    *("Abs", "Add", "CeilDiv", "CeilToInt", "CleanDiv", "Eq", "Equality"),
    *("FloatTrueDiv", "Float", "FloorDiv", "FloorToInt", "Ge", "GreaterThan", "Gt"),
    *("Identity", "Integer", "IntTrueDiv", "Le", "LessThan", "Lt", "Max", "Min", "Mod"),
    *("ModularIndexing", "Mul", "Ne", "Not", "Or", "And", "Piecewise", "Pow", "PowByNatural"),
    *("PythonMod", "Rational", "RoundToInt", "StrictGreaterThan", "StrictLessThan", "Symbol"),
    *("ToFloat", "TruncToFloat", "TruncToInt", "Unequality", "Where", "ceiling", "floor"),
}
_NODES = (
    *(ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.UnaryOp),
    ast.USub,
)
_POWER = re.compile(r"(?:Pow|PowByNatural)\((?!Symbol\([^()]*\), Integer\(-?[1-8]\)\))")
"""A power that is none of a symbol to a small number: sympy would work it out."""
_LONGEST = 2000
"""Characters of one expression."""


def check_archive(archive: zipfile.ZipFile) -> None:
    """`ValueError` with the member and the value that is more than data."""
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise ValueError(f"{len(members)} members")
    for one in members:
        if not _MEMBER.fullmatch(one.filename) or one.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"member {one.filename[:80]!r}")
    for one in members:
        inside = one.filename.partition("/")[2]
        if inside in _PAYLOADS:
            _check_payloads(_json(archive, one))
        elif inside == _GRAPH:
            _check_graph(_json(archive, one))


def _json(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    if member.file_size > MAX_GRAPH_BYTES:
        raise ValueError(f"member {member.filename[:80]!r} has {member.file_size} bytes")
    return json.loads(archive.read(member))


def _check_payloads(value: Any) -> None:
    """Every payload is a tensor's elements."""
    for one in value["config"].values():
        if one["use_pickle"] is not False or not _TENSOR.fullmatch(one["path_name"]):
            raise ValueError(f"payload {one['path_name'][:80]!r} is no plain tensor")


def _check_graph(value: Any) -> None:
    """What torch looks up, evaluates or writes into code is what it seems to be."""
    for key, text in _texts(value):
        if key in ("target", "as_operator") and not _OPERATOR.fullmatch(text):
            raise ValueError(f"operator {text[:80]!r}")
        if key in ("name", "as_name", "forward_arg_names") and not _NAME.fullmatch(text):
            raise ValueError(f"name {text[:80]!r}")
        if key == "expr_str":
            _check_expression(text)


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """(key, text) of every text, in lists under the list's key."""
    waiting = [("", value)]
    while waiting:
        key, one = waiting.pop()
        if isinstance(one, str):
            yield key, one
        elif isinstance(one, list):
            waiting.extend((key, item) for item in one)
        elif isinstance(one, dict):
            waiting.extend(one.items())


def _check_expression(text: str) -> None:
    """Calls of known functions on numbers, names and texts; sympy would evaluate anything."""
    if len(text) > _LONGEST or _POWER.search(text):
        raise ValueError(f"size {text[:80]!r}...")
    for node in ast.walk(ast.parse(text, mode="eval")):
        known = not isinstance(node, ast.Call) or (
            isinstance(node.func, ast.Name) and node.func.id in _CALLS
        )
        if not isinstance(node, _NODES) or not known:
            raise ValueError(f"size {text[:80]!r}")
