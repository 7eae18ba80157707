"""Networks of dense layers as text, and plans of operators as a table.

input 2048 4096     rows and width, whole numbers or names
dense 16384         a product with a weight
relu
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shardplan.models.errors import InputError
from shardplan.models.opgraph import Access, Loop, Operator, OpGraph, Tensor
from shardplan.search.oplevel.plan import OperatorPlan


def read(path: Path, sizes: Mapping[str, int]) -> OpGraph:
    """The front end: files that end in `.layers`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError("a .layers file is text", got=f"file={path}, {error}") from None
    words = [line.split() for line in lines if line.strip()]
    if not words or words[0][0] != "input" or len(words[0]) != 3:
        raise InputError("a .layers file starts with `input ROWS WIDTH`", got=f"file={path}")
    rows, width = (_size(word, sizes, path) for word in words[0][1:])
    tensors = {"x": Tensor(name="x", shape=(rows, width), dtype="bfloat16", kind="input")}
    operators: list[Operator] = []
    reads: tuple[Access, ...]
    linear: tuple[int, ...]
    last = "x"
    for number, (kind, *rest) in enumerate(words[1:]):
        name = f"{kind}{number}"
        if kind == "dense" and len(rest) == 1:
            wide, width = width, _size(rest[0], sizes, path)
            shape = (width, wide)
            tensors[f"{name}.w"] = Tensor(
                name=f"{name}.w", shape=shape, dtype="bfloat16", kind="parameter"
            )
            reads = (
                Access(tensor=last, loops=("m", "k")),
                Access(tensor=f"{name}.w", loops=("n", "k")),
            )
            loops = {"m": Loop(size=rows), "n": Loop(size=width), "k": Loop(size=wide)}
            linear, flop, what = (0,), 2.0 * rows * width * wide, "matmul"
        elif kind == "relu" and not rest:
            reads = (Access(tensor=last, loops=("m", "n")),)
            loops = {"m": Loop(size=rows), "n": Loop(size=width)}
            linear, flop, what = (), 0.0, "pointwise"
        else:
            raise InputError(
                "a layer is `dense WIDTH` or `relu`", got=f"file={path}, line {number + 2}: {kind}"
            )
        tensors[name] = Tensor(name=name, shape=(rows, width), dtype="bfloat16", kind="result")
        operators.append(
            Operator(
                name=name,
                kind=what,
                reads=reads,
                writes=(Access(tensor=name, loops=("m", "n")),),
                loops=loops,
                linear=linear,
                flop=flop,
                where=f"line {number + 2}",
            )
        )
        last = name
    return OpGraph(
        name=path.stem,
        tensors=tensors,
        operators=tuple(operators),
        outputs=(last,),
        source=str(path),
    )


def _size(word: str, sizes: Mapping[str, int], path: Path) -> int:
    size = int(word) if word.isdigit() else sizes.get(word, 0)
    if size < 1:
        raise InputError(
            "a size is a whole number, or a name that is given one",
            got=f"file={path}, size={word!r}",
            hint=f"give --sizes {word}=...",
        )
    return size


def files(plan: OperatorPlan, *, separator: str = ",") -> Mapping[str, str]:
    """The emitter: one line an operator."""
    rows = [("operator", "times", "split")]
    for one in plan.operators:
        split = " ".join(f"{axis}:{loop}" for axis, loop in one.split.items())
        rows.append((one.name, str(one.times), split or "whole"))
    return {"splits.csv": "".join(separator.join(row) + "\n" for row in rows)}


files.plans = ("operators",)  # type: ignore[attr-defined]  # it takes no plans of deployments
