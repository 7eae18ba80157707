"""Captured graphs built by hand: an MLP, decoders like Llama and Mixtral; and their strategies.

Tensors are bfloat16; sizes are real where a test wants them real. A decoder is folded (one layer
that stands for all) or written out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from shardplan.models.opgraph import Access, Loop, Operator, OpGraph, Tensor

Loops = tuple[str, ...]


@dataclass(slots=True)
class Builder:
    """Adds operators one by one; loop sizes come from the shapes, of the smallest dim."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    operators: list[Operator] = field(default_factory=list)
    layer: int = -1

    def tensor(self, name: str, shape: Loops | tuple[int, ...], kind: str, dtype: str) -> str:
        """A tensor of any kind; its name."""
        sizes = tuple(int(size) for size in shape)
        self.tensors[name] = Tensor(name=name, shape=sizes, dtype=dtype, kind=kind)
        return name

    def param(self, name: str, *shape: int) -> str:
        """A parameter."""
        return self.tensor(name, shape, "parameter", "bfloat16")

    def op(
        self,
        name: str,
        kind: str,
        reads: Sequence[tuple[str, Loops]],
        shape: tuple[int, ...],
        loops: Loops,
        *,
        linear: Loops | tuple[int, ...] = (),
        whole: Loops = (),
        flop: float = 0.0,
        attrs: Mapping[str, float | str] | None = None,
        more: tuple[tuple[str, tuple[int, ...], Loops], ...] = (),
    ) -> str:
        """An operator with one result of its own name, and `more` of them; its name."""
        writes = [(name, loops)]
        self.tensor(name, shape, "result", "bfloat16")
        for other, size, run in more:
            writes.append((self.tensor(other, size, "result", "bfloat16"), run))
        sizes: dict[str, int] = {}
        for tensor, run in (*reads, *writes):
            for loop, extent in zip(run, self.tensors[tensor].shape, strict=True):
                if loop:
                    sizes[loop] = math.gcd(sizes.get(loop, 0), extent)
        self.operators.append(
            Operator(
                name=name,
                kind=kind,
                reads=tuple(Access(tensor=t, loops=run) for t, run in reads),
                writes=tuple(Access(tensor=t, loops=run) for t, run in writes),
                loops={n: Loop(size=size, whole=n in whole) for n, size in sizes.items()},
                linear=tuple(int(slot) for slot in linear),
                flop=flop,
                where=name,
                layer=self.layer,
                attrs=MappingProxyType(dict(attrs or {})),
            )
        )
        return name

    def linear(self, name: str, x: str, width: int) -> str:
        """y[b, t, n] = sum over k of x[b, t, k] w[n, k]"""
        *rows, k = self.tensors[x].shape
        weight = self.param(f"{name}.w", width, k)
        lead = ("b", "t", "s")[: len(rows)]
        flop = 2.0 * math.prod(rows) * k * width
        reads = [(x, (*lead, "k")), (weight, ("n", "k"))]
        return self.op(name, "matmul", reads, (*rows, width), (*lead, "n"), linear=(0,), flop=flop)

    def add(self, name: str, a: str, b: str) -> str:
        """a + b of one shape."""
        return self.like(name, "pointwise", [a, b], linear=(0, 1))

    def like(self, name: str, kind: str, reads: list[str], linear: tuple[int, ...] = ()) -> str:
        """Element by element."""
        shape = self.tensors[reads[0]].shape
        run = ("b", "t", "n", "m")[: len(shape)]
        return self.op(name, kind, [(one, run) for one in reads], shape, run, linear=linear)

    def norm(self, name: str, x: str) -> str:
        """Over the last dim, with a scale."""
        shape = self.tensors[x].shape
        run = (*("b", "t")[: len(shape) - 1], "n")
        scale = self.param(f"{name}.w", shape[-1])
        return self.op(name, "norm", [(x, run), (scale, ("n",))], shape, run, whole=("n",))

    def graph(self, name: str, outputs: tuple[str, ...], folded: int = 1) -> OpGraph:
        """The graph; `folded`: how many layers its one layer stands for."""
        layers = len({one.layer for one in self.operators} - {-1})
        return OpGraph(
            name=name,
            tensors=self.tensors,
            operators=tuple(self.operators),
            outputs=outputs,
            layers=layers,
            folded={0: folded} if folded > 1 else {},
            source="by hand",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a decoder; `context` beyond the new tokens makes it a step with a cache."""

    batch: int = 1
    tokens: int = 2048
    hidden: int = 8192
    heads: int = 64
    kv_heads: int = 8
    dim: int = 128
    ffn: int = 28672
    vocab: int = 128256
    layers: int = 80
    cached: int = 0
    experts: int = 0
    topk: int = 2


LLAMA_70B = Sizes()
DECODE_70B = Sizes(batch=64, tokens=1, cached=4096)
MIXTRAL = Sizes(hidden=4096, heads=32, ffn=14336, vocab=32000, layers=32, experts=8)


def mlp(rows: int, hidden: int, ffn: int) -> OpGraph:
    """up, activation, down, residual."""
    b = Builder()
    x = b.tensor("x", (1, rows, hidden), "input", "bfloat16")
    act = b.like("act", "pointwise", [b.linear("up", x, ffn)])
    return b.graph("mlp", (b.add("out", x, b.linear("down", act, hidden)),))


def decoder(sizes: Sizes, *, folded: bool = True) -> OpGraph:
    """Embedding, layers of attention and feed-forward network (or experts), norm, head."""
    b, s = Builder(), sizes
    ids = b.tensor("ids", (s.batch, s.tokens), "input", "int64")
    table = b.param("embed.w", s.vocab, s.hidden)
    run = [(table, ("v", "n")), (ids, ("b", "t"))]
    x = b.op("embed", "embedding", run, (s.batch, s.tokens, s.hidden), ("b", "t", "n"))
    b.tensor("rotary", (s.tokens, s.dim), "constant", "bfloat16")
    outputs: list[str] = []
    for layer in range(1 if folded else s.layers):
        b.layer = layer
        x = _layer(b, s, x, "" if folded else f"{layer}.", outputs)
    b.layer = -1
    x = b.norm("last_norm", x)
    if s.tokens > 1:
        whole: Loops = ("b", "", "n")
        x = b.op("last", "gather", [(x, whole)], (s.batch, 1, s.hidden), whole)
    outputs.append(b.linear("head", x, s.vocab))
    return b.graph("decoder", tuple(outputs), s.layers if folded else 1)


def _layer(b: Builder, s: Sizes, x: str, p: str, outputs: list[str]) -> str:
    y = b.norm(f"{p}norm1", x)
    q, k, v = (
        _heads(b, b.linear(f"{p}{name}", y, count * s.dim), count, s)
        for name, count in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads))
    )
    q, k = (_rotary(b, one) for one in (q, k))
    o = b.linear(f"{p}o", _attention(b, s, (q, k, v), p, outputs), s.hidden)
    x = b.add(f"{p}add1", x, o)
    y = b.norm(f"{p}norm2", x)
    done = _experts(b, s, y, p) if s.experts else _ffn(b, s, y, p)
    return b.add(f"{p}add2", x, done)


def _heads(b: Builder, x: str, count: int, s: Sizes) -> str:
    shape = (s.batch, s.tokens, count, s.dim)
    b.op(f"{x}.heads", "reshape", [(x, ("b", "t", "h"))], shape, ("b", "t", "h", ""), linear=(0,))
    op = b.operators[-1]
    b.operators[-1] = _sized(op, "h", count)
    return f"{x}.heads"


def _sized(op: Operator, loop: str, size: int) -> Operator:
    return replace(op, loops={**op.loops, loop: Loop(size=size)})


def _rotary(b: Builder, x: str) -> str:
    run = ("b", "t", "h", "")
    return b.op(
        f"{x}.rotary", "pointwise", [(x, run), ("rotary", ("t", ""))], b.tensors[x].shape, run
    )


def _attention(b: Builder, s: Sizes, qkv: tuple[str, str, str], p: str, outputs: list[str]) -> str:
    kept: Loops = ("b", "", "h", "")
    asked: Loops = ("b", "t", "h", "")
    reads = [(qkv[0], asked), (qkv[1], kept), (qkv[2], kept)]
    more: list[tuple[str, tuple[int, ...], Loops]] = []
    context = s.cached + s.tokens
    if s.cached:
        for name in ("keys", "values"):
            shape = (s.batch, s.cached, s.kv_heads, s.dim)
            reads.append((b.tensor(f"{p}{name}", shape, "state", "bfloat16"), kept))
            more.append((f"{p}{name}.grown", (s.batch, context, s.kv_heads, s.dim), kept))
        outputs += [name for name, _, _ in more]
    shape = (s.batch, s.tokens, s.heads, s.dim)
    b.op(
        f"{p}attention", "attention", reads, shape, asked, whole=("t",),
        flop=4.0 * s.batch * s.heads * s.tokens * context * s.dim,
        attrs={"heads": s.heads, "kv_heads": s.kv_heads, "head_dim": s.dim, "value_dim": s.dim,
               "context": context, "causal": 1},
        more=tuple(more),
    )  # fmt: skip
    merged = (s.batch, s.tokens, s.heads * s.dim)
    run = [(f"{p}attention", ("b", "t", "h", ""))]
    return b.op(f"{p}merged", "reshape", run, merged, ("b", "t", "h"), linear=(0,))


def _ffn(b: Builder, s: Sizes, y: str, p: str) -> str:
    gate, up = (b.linear(f"{p}{name}", y, s.ffn) for name in ("gate", "up"))
    return b.linear(f"{p}down", b.like(f"{p}act", "pointwise", [gate, up]), s.hidden)


def _experts(b: Builder, s: Sizes, y: str, p: str) -> str:
    """Routed rows gathered by expert, grouped products over E, the weighted sum of experts."""
    rows = max(s.batch * s.tokens * s.topk // s.experts, 1)
    scores = b.linear(f"{p}router", y, s.experts)
    run: Loops = ("b", "t", "e")
    gates = b.op(
        f"{p}gates", "softmax", [(scores, run)], b.tensors[scores].shape, run, whole=("e",)
    )
    sent: list[tuple[str, Loops]] = [(y, ("", "", "n")), (gates, ("", "", "e"))]
    x = b.op(f"{p}dispatch", "gather", sent, (s.experts, rows, s.hidden), ("e", "", "n"))
    gate, up = (_grouped(b, f"{p}{name}", x, s.ffn) for name in ("gate", "up"))
    act = b.op(
        f"{p}act", "pointwise", [(one, ("e", "c", "n")) for one in (gate, up)],
        (s.experts, rows, s.ffn), ("e", "c", "n"),
    )  # fmt: skip
    down = _grouped(b, f"{p}down", act, s.hidden)
    back: list[tuple[str, Loops]] = [(down, ("e", "", "n")), (gates, ("", "", "e"))]
    shape = (s.batch, s.tokens, s.hidden)
    return b.op(f"{p}combine", "scatter", back, shape, ("", "", "n"), linear=(0,))


def _grouped(b: Builder, name: str, x: str, width: int) -> str:
    experts, rows, k = b.tensors[x].shape
    weight = b.param(f"{name}.w", experts, width, k)
    reads: list[tuple[str, Loops]] = [(x, ("e", "c", "k")), (weight, ("e", "n", "k"))]
    shape = (experts, rows, width)
    flop = 2.0 * experts * rows * k * width
    return b.op(name, "matmul", reads, shape, ("e", "c", "n"), linear=(0,), flop=flop)


_COLUMNS = {"q": "n", "k": "n", "v": "n", "gate": "n", "up": "n", "act": "n", "head": "n"}
_ROWS = {"o": "k", "down": "k", "embed": "v"}
_EXPERTS = dict.fromkeys(("dispatch", "gate", "up", "act", "down", "combine"), "e")


def megatron(graph: OpGraph, axis: str, *, experts: bool = False) -> dict[str, dict[str, str]]:
    """Column and row parallel products, vocabulary parallel ends; experts by E where told."""
    known = {**_COLUMNS, **_ROWS, **(_EXPERTS if experts else {})}
    found = {}
    for op in graph.operators:
        name = op.name.split(".")[-1] if op.layer > 0 else op.name
        loop = known.get(op.name.removeprefix(f"{op.layer}."), "")
        if not loop and "h" in op.loops and op.layer >= 0 and name != "norm":
            loop = "h"
        if loop:
            found[op.name] = {axis: loop}
    return found


def data_parallel(graph: OpGraph, axis: str) -> dict[str, dict[str, str]]:
    """Sequences over an axis: every operator with a batch loop."""
    return {one.name: {axis: "b"} for one in graph.operators if "b" in one.loops}


def both(*strategies: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Strategies of different axes as one."""
    found: dict[str, dict[str, str]] = {}
    for strategy in strategies:
        for name, chosen in strategy.items():
            found.setdefault(name, {}).update(chosen)
    return found
