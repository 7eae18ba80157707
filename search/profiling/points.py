"""What is measured: one `Point` a CSV row, expanded from a grid file.

A grid is a TOML file of tables, one list of entries an operator:

    [[matmul]]
    dtype = ["bf16"]              # every combination of the lists is one point
    m = [1, 16]
    shapes = ["n", "k"]           # sizes that go together ...
    shape = [[512, 1024]]         # ... one list a combination
    limit_flop = 1e13             # points above are left out
    limit_bytes = 1e10            # the same for the bytes of their tensors
    source = "..."                # where the sizes come from, and how (`kind`)
    kind = "derived"

Column names are those of phase op of `shardplan estimate`, so that a CSV can be priced as it is:

    matmul             y[m, n] = x[m, k] @ w[n, k]^T; int8: the bare product with int32 sums,
                       without the pass that quantizes the input (w8a8 of `estimate` has it)
    attention_prefill  causal, `batch` sequences of `tokens`
    attention_decode   one query a sequence over `tokens` dense cached positions
    moe                gate and up, SwiGLU, down; each token in `topk` distinct experts, uniformly
    add_rmsnorm        residual sum and RMSNorm of x[tokens, hidden]
    rope               rotation of q[tokens, heads, head_dim] and k[tokens, kv_heads, head_dim]
    qk_norm_rope       the same after an RMSNorm of each head of q and k
    kv_append          keys [batch, tokens, kv_heads, head_dim] of `tokens` new positions into a
                       cache [batch, kv_heads, positions, head_dim]; the values are a second call
    swiglu             silu(x[:, :ffn]) * x[:, ffn:] of x[tokens, 2 ffn]
    topk_router        softmax, top-k, weights to a sum of 1, order of the rows by expert, of
                       x[tokens, experts]
    dispatch           the rows of x[tokens, hidden] in that order, `topk` a token
    combine            those rows back in the order of the tokens, and their weighted sum
    copy               `message_bytes` read and as many written, device memory to device memory
    collectives        `message_bytes` of the full tensor, as `kernels.collectives` counts it
"""

from __future__ import annotations

import itertools
import math
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from shardplan.models.errors import InputError, UnknownNameError

__all__ = [
    "CACHE_POSITIONS",
    "COLLECTIVES",
    "GRIDS",
    "OPERATORS",
    "SIZES",
    "Point",
    "element_bytes",
    "load_grid",
    "sizes_of",
]

GRIDS = ("tiny", "full")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
_ATTENTION = ("batch", "tokens", "heads", "kv_heads", "head_dim")
_SIZES_OF: Mapping[str, tuple[str, ...]] = {
    "matmul": ("m", "n", "k"),
    "attention_prefill": _ATTENTION,
    "attention_decode": _ATTENTION,
    "moe": ("tokens", "hidden", "ffn", "experts", "topk"),
    "add_rmsnorm": ("tokens", "hidden"),
    "rope": ("tokens", "heads", "kv_heads", "head_dim"),
    "qk_norm_rope": ("tokens", "heads", "kv_heads", "head_dim"),
    "kv_append": ("batch", "tokens", "kv_heads", "head_dim"),
    "swiglu": ("tokens", "ffn"),
    "topk_router": ("tokens", "experts", "topk"),
    "dispatch": ("tokens", "hidden", "topk"),
    "combine": ("tokens", "hidden", "topk"),
    "copy": ("message_bytes",),
    **dict.fromkeys(COLLECTIVES, ("message_bytes",)),
}
CACHE_POSITIONS = 1024
"""Positions that a cache has at least where keys are written into it."""
OPERATORS = tuple(name for name in _SIZES_OF if name not in COLLECTIVES)
_MOST_SIZE = 2**40
_MOST_POINTS = 100_000
_ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "int8": 1}
_OTHER_KEYS = {"dtype", "backend", "shapes", "shape", "limit_flop", "limit_bytes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One thing to measure; a size that the operator does not have is 0."""

    op: str
    dtype: str
    m: int = 0
    n: int = 0
    k: int = 0
    batch: int = 0
    tokens: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    hidden: int = 0
    ffn: int = 0
    experts: int = 0
    topk: int = 0
    ranks: int = 0
    message_bytes: int = 0
    mode: str = ""
    """graph (captured once and replayed) or eager (launched by the host)."""
    backend: str = ""
    """What runs it: linear, int_mm, sdpa, sdpa_cudnn, sdpa_flash, grouped_mm, expert_loop, torch,
    inductor, nccl, hccl, gloo."""

    def flop(self) -> float:
        """Multiplications and additions of the matrix products; 0 where there are none."""
        if self.op == "matmul":
            return 2.0 * self.m * self.n * self.k
        if self.op == "attention_prefill":
            pairs = self.batch * self.heads * self.tokens * (self.tokens + 1) / 2
            return 4.0 * pairs * self.head_dim
        if self.op == "attention_decode":
            return 4.0 * self.batch * self.heads * self.tokens * self.head_dim
        return 6.0 * self.tokens * self.topk * self.hidden * self.ffn if self.op == "moe" else 0.0

    def stored_bytes(self) -> float:
        """Bytes of weights or cache: what successive calls take from different places."""
        size = element_bytes(self.dtype)
        if self.op == "matmul":
            return float(self.n * self.k * size)
        if self.op == "moe":
            return 3.0 * self.experts * self.hidden * self.ffn * size
        if self.op == "attention_decode":
            return 2.0 * self.batch * self.tokens * self.kv_heads * self.head_dim * size
        if self.op == "kv_append":
            positions = max(self.tokens, CACHE_POSITIONS)
            return float(self.batch * positions * self.kv_heads * self.head_dim * size)
        return 0.0

    def tensor_bytes(self) -> float:
        """Bytes of all tensors of one call, roughly: whether it fits the memory."""
        size = element_bytes(self.dtype)
        wide = self.m * (self.n * 4 + self.k * size) + 3 * self.message_bytes
        heads = self.heads + self.kv_heads
        rows = max(self.batch, 1) * self.tokens * max(self.topk, 1)
        if self.op == "attention_decode":
            rows = self.batch
        if self.op == "topk_router":
            return float(2 * self.tokens * self.experts * size + 16 * rows)
        per_row = 2 * heads * self.head_dim + 4 * self.hidden + 4 * self.ffn
        return self.stored_bytes() + wide + rows * per_row * size


SIZES = tuple(f.name for f in fields(Point) if f.name not in ("op", "dtype", "mode", "backend"))
"""Size columns, in the order of the CSV."""


def element_bytes(dtype: str) -> int:
    """Bytes of one element."""
    try:
        return _ELEMENT_BYTES[dtype]
    except KeyError:
        raise UnknownNameError("dtype to measure", dtype, _ELEMENT_BYTES) from None


def sizes_of(op: str) -> tuple[str, ...]:
    """Names of the sizes that an operator has; `UnknownNameError` for a stranger."""
    try:
        return _SIZES_OF[op]
    except KeyError:
        raise UnknownNameError("operator to measure", op, _SIZES_OF) from None


def _grid_text(name: str) -> str:
    if name in GRIDS:
        file = resources.files("shardplan.search.profiling").joinpath(f"grid_{name}.toml")
        return file.read_text(encoding="utf-8")
    path = Path(name)
    if path.suffix != ".toml":
        raise UnknownNameError("grid", name, GRIDS)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the grid file cannot be read", got=f"{name}: {error}") from None


def load_grid(name: str) -> tuple[Point, ...]:
    """Points of a shipped grid (`tiny`, `full`) or of a TOML file, in its order, each once.

    `mode`, `backend` (but where the grid names one) and `ranks` are still open. `InputError` where
    the file breaks a rule.
    """
    try:
        table = tomllib.loads(_grid_text(name))
    except (ValueError, RecursionError) as error:  # not TOML, a number too long, nested too deep
        raise InputError("a grid is a TOML file", got=f"{name}: {error}") from None
    found: dict[Point, None] = {}
    for op, entries in table.items():
        known = sizes_of(op)
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise InputError(
                "a grid holds lists of tables", got=f"{op} in {name}", hint=f"[[{op}]]"
            )
        for entry in entries:
            found.update(dict.fromkeys(_expand(op, entry, known)))
    return tuple(found)


def _list(where: str, value: Any, kind: type) -> list[Any]:
    good = isinstance(value, list) and all(type(item) is kind for item in value) and value
    if not good or (kind is int and not 1 <= min(value) <= max(value) <= _MOST_SIZE):
        what = f"whole numbers above 0, at most {_MOST_SIZE}" if kind is int else "names"
        raise InputError(
            f"a grid's `{where.rsplit('.', maxsplit=1)[-1]}` is a list of {what}", got=f"in {where}"
        )
    return list(value)


def _expand(op: str, entry: Mapping[str, Any], known: tuple[str, ...]) -> Iterator[Point]:
    """Every combination of one entry that lies within its limits."""
    joint = _list(f"{op}.shapes", entry["shapes"], str) if "shapes" in entry else []
    single = [name for name in known if name not in joint]
    strangers = set(entry) - set(single) - _OTHER_KEYS - {"source", "kind"}
    for name in sorted(strangers | (set(joint) - set(known))):
        raise UnknownNameError(f"key of [[{op}]]", name, {*known, *_OTHER_KEYS})
    missing = [name for name in ("dtype", "source", *single) if name not in entry]
    if missing or bool(joint) != ("shape" in entry):
        lacking = ", ".join(missing) or "shapes and shape belong together"
        raise InputError(f"[[{op}]] of a grid lacks a key", got=lacking)
    shapes = entry["shape"] if joint else [[]]
    if not isinstance(shapes, list):
        raise InputError(f"`shape` of [[{op}]] is a list of lists", got=f"{shapes!r}"[:80])
    rows = [_list(f"{op}.shape", row, int) for row in shapes] if joint else [[]]
    if any(len(row) != len(joint) for row in rows):
        raise InputError(f"each `shape` of [[{op}]] has the sizes of `shapes`", got=f"{joint}")
    lists = [_list(f"{op}.{name}", entry[name], int) for name in single]
    dtypes = _list(f"{op}.dtype", entry["dtype"], str)
    backends = _list(f"{op}.backend", entry.get("backend", [""]), str)
    count = math.prod(map(len, (dtypes, backends, rows, *lists)))
    if count > _MOST_POINTS:
        raise InputError(
            f"an entry of a grid stands for at most {_MOST_POINTS} points", got=f"[[{op}]]: {count}"
        )
    for dtype, backend, row, *sizes in itertools.product(dtypes, backends, rows, *lists):
        values = dict(zip([*joint, *single], [*row, *sizes], strict=True))
        point = replace(Point(op=op, dtype=dtype, backend=backend), **values)
        if _within(point, entry):
            yield point


def _limit(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise InputError(f"a grid's `{name}` is a number above 0", got=f"{value!r}")
    return float(min(value, sys.float_info.max))


def _within(point: Point, entry: Mapping[str, Any]) -> bool:
    most_flop, most_bytes = (
        _limit(name, entry.get(name, float("inf"))) for name in ("limit_flop", "limit_bytes")
    )
    return point.flop() <= most_flop and point.tensor_bytes() <= most_bytes
