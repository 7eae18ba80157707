"""Loops of the ONNX operators that compute: products, pointwise, norms, reductions, attention.

Each rule reads the operator's definition (onnx.ai/onnx/operators) and writes which loop each dim of
each tensor runs over. FLOP are those of matrix products, 2 a multiply-add; pointwise work has none.
"""

from __future__ import annotations

import math

from shardplan.models.frontends.drafts import contracted, product
from shardplan.models.frontends.loops import Draft, Loops, aligned, names
from shardplan.models.frontends.onnx_node import Rule, View, follow

__all__ = ["COMPUTE"]


def matmul(view: View) -> Draft:
    """y[.., m, n] = sum over k of a[.., m, k] b[.., k, n]; 1-D inputs lack m or n."""
    a, b = view.shape(0), view.shape(1)
    if not a or not b:
        raise view.error("a matrix product has inputs of at least one dim")
    return product(a, b, view.out())


def gemm(view: View) -> Draft:
    """y[m, n] = alpha sum over k of a b + beta c. With c, k stays whole: it is added once."""
    rows: Loops = ("k", "m") if view.attrs.get("transA") else ("m", "k")
    inner: Loops = ("n", "k") if view.attrs.get("transB") else ("k", "n")
    out = view.out()
    reads = {0: rows, 1: inner}
    if view.has(2):
        reads[2] = aligned(view.shape(2), out, ("m", "n"))
    k = view.shape(0)[rows.index("k")]
    return Draft(
        kind="matmul",
        reads=reads,
        writes=[("m", "n")],
        sizes={"m": out[0], "n": out[1], "k": k},
        whole=frozenset("k" if view.has(2) else ""),
        linear=() if view.has(2) else (0,),
        flop=2.0 * math.prod(out) * k,
    )


def einsum(view: View) -> Draft:
    """The equation's own letters."""
    equation = view.attrs["equation"].decode().replace(" ", "")
    terms, arrow, result = equation.partition("->")
    ins = terms.split(",")
    repeated = any(len(set(one)) < len(one) for one in [*ins, result])
    if not arrow or "." in equation or repeated:
        raise view.error("an einsum names its output and each dim once, without an ellipsis")
    return contracted(ins, result, [view.shape(slot) for slot in range(len(ins))])


def conv(view: View) -> Draft:
    """y[b, n, ..] = sum over k and the window of x[b, k, ..] w[n, k, ..]: space stays whole."""
    x, w, out = view.shape(0), view.shape(1), view.out()
    grouped = int(view.attrs.get("group", 1)) > 1
    space = ("",) * (len(x) - 2)
    k, n = ("", "") if grouped else ("k", "n")
    reads = {0: ("b", k, *space), 1: (n, k, *space)}
    if view.has(2):
        reads[2] = (n,)
    return Draft(
        kind="conv",
        reads=reads,
        writes=[("b", n, *space)],
        sizes={"b": x[0], "k": w[1], "n": w[0]},
        whole=frozenset("k" if view.has(2) else ""),
        linear=() if view.has(2) else (0,),
        flop=2.0 * math.prod(out) * math.prod(w[1:]),
    )


def pointwise(view: View) -> Draft:
    """Element by element, inputs broadcast to the output."""
    out = view.out()
    loops = names(len(out))
    slots = [slot for slot in range(len(view.node.input)) if view.has(slot)]
    return Draft(
        kind="pointwise",
        reads={slot: aligned(view.shape(slot), out, loops) for slot in slots},
        writes=[loops],
        sizes=dict(zip(loops, out, strict=True)),
        linear=_linear(view, slots),
    )


def _linear(view: View, slots: list[int]) -> tuple[int, ...]:
    """Sums pass partial sums in all inputs at once, products in one of them."""
    if view.op in ("Add", "Sub", "Sum", "Neg", "Identity"):
        return tuple(slots)
    if view.op == "Mul":
        return (1,) if view.fixed(0) else (0,)
    return (0,) if view.op == "Div" else ()


def unary(view: View) -> Draft:
    """Element by element in the first input; others are scalars and constants."""
    draft = follow(view, "pointwise")
    draft.linear = (0,) if view.op in ("Neg", "Identity") else ()
    rest = {
        slot: ("",) * len(view.shape(slot))
        for slot in range(1, len(view.node.input))
        if view.has(slot)
    }
    draft.reads |= rest
    return draft


def softmax(view: View) -> Draft:
    """The summed dim stays whole."""
    draft = follow(view, "softmax")
    draft.whole = frozenset({f"d{view.axis(len(view.shape(0)), -1)}"})
    return draft


def norm(view: View) -> Draft:
    """Dims from `axis` on are normalised and stay whole; scale and bias run along them."""
    shape = view.shape(0)
    axis = view.axis(len(shape), -1)
    loops = names(len(shape))
    draft = follow(view, "norm")
    draft.whole = frozenset(loops[axis:])
    for slot in (1, 2):
        if view.has(slot):
            draft.reads[slot] = aligned(view.shape(slot), shape, loops)
    kept = (*loops[:axis], *("",) * (len(shape) - axis))
    draft.writes += [kept for name in view.node.output[1:] if name]
    return draft


def reduction(view: View) -> Draft:
    """A sum leaves partial sums; means and extremes keep the reduced dims whole."""
    shape = view.shape(0)
    axes = view.axes(1, len(shape))
    if not axes:
        axes = () if view.attrs.get("noop_with_empty_axes") else tuple(range(len(shape)))
    loops = names(len(shape))
    kept = [n for index, n in enumerate(loops) if index not in axes]
    if view.attrs.get("keepdims", 1):
        kept = [n if index not in axes else "" for index, n in enumerate(loops)]
    summed = view.op == "ReduceSum"
    return Draft(
        kind="reduce",
        reads={0: loops},
        writes=[tuple(kept)],
        sizes=dict(zip(loops, shape, strict=True)),
        whole=frozenset() if summed else frozenset(loops[index] for index in axes),
        linear=(0,) if view.op in ("ReduceSum", "ReduceMean") else (),
    )


def attention(view: View) -> Draft:
    """Opset 23: batch and kv heads are loops; queries of one kv head stay together.

    Inputs of rank 4 are [batch, heads, tokens, head dim], of rank 3 [batch, tokens, heads * dim].
    Caches (slots 4 and 5) and what is given of them (outputs 1 and 2) have rank 4.
    One query before a longer context is a decode step, causal without a mask.
    """
    q, k, v = view.shape(0), view.shape(1), view.shape(2)
    flat = len(q) == 3
    heads, kv = (view.attrs.get("q_num_heads", 0), view.attrs.get("kv_num_heads", 0))
    heads, kv = (heads, kv) if flat else (q[1], k[1])
    if len(q) != len(k) or not kv or not heads or heads % kv:
        raise view.error("the number of kv heads divides the number of heads")
    dim, values = (q[2] // heads, v[2] // kv) if flat else (q[3], v[3])
    context = k[-2] + (view.shape(4)[2] if view.has(4) else 0)
    cache: Loops = ("b", "h", "", "")
    kept: Loops = ("b", "", "h") if flat else cache
    asked: Loops = ("b", "t", "h") if flat else ("b", "h", "t", "")
    reads = {0: asked, 1: kept, 2: kept} | {s: cache for s in (4, 5) if view.has(s)}
    if view.has(3):
        reads[3] = aligned(view.shape(3), (q[0], heads, q[-2], context), ("b", "h", "t", ""))
    given = [cache, cache, ("b", "h", "t", "")]
    outputs = list(view.node.output[1:])
    causal = int(view.attrs.get("is_causal", 0) or 1 == q[-2] < context)
    return Draft(
        kind="attention",
        reads=reads,
        writes=[asked, *(one for one, name in zip(given, outputs, strict=False) if name)],
        sizes={"b": q[0], "h": kv, "t": q[-2]},
        whole=frozenset("t" if causal else ""),
        flop=2.0 * q[0] * heads * q[-2] * context * (dim + values),
        attrs=head_attrs(heads, kv, dim, values, context, causal),
    )


def head_attrs(
    heads: int, kv_heads: int, dim: int, values: int, context: int, causal: int
) -> dict[str, float | str]:
    """What an attention operator says of its sizes: heads, elements, tokens of context."""
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": dim,
        "value_dim": values,
        "context": context,
        "causal": causal,
    }


_BINARY = """Add Sub Mul Div Pow Mod Min Max Sum Mean And Or Xor Equal Greater Less GreaterOrEqual
LessOrEqual Where PRelu BitwiseAnd BitwiseOr BitwiseXor BitShift"""
_UNARY = """Neg Abs Sqrt Reciprocal Exp Log Erf Sigmoid Tanh Relu Gelu Cast Sin Cos Not Identity
Floor Ceil Round Sign Clip LeakyRelu Elu Selu Celu HardSigmoid HardSwish Softplus Softsign Mish
Swish IsNaN IsInf ThresholdedRelu Dropout BitwiseNot Tan Atan Sinh Cosh"""

COMPUTE: dict[str, Rule] = {
    "MatMul": matmul,
    "Gemm": gemm,
    "Einsum": einsum,
    "Conv": conv,
    "Softmax": softmax,
    "LogSoftmax": softmax,
    "LayerNormalization": norm,
    "RMSNormalization": norm,
    "SimplifiedLayerNormalization": norm,
    "Attention": attention,
    **dict.fromkeys(
        (
            "ReduceMean",
            "ReduceSum",
            "ReduceMax",
            "ReduceMin",
            "ReduceL2",
            "ReduceSumSquare",
            "ReduceProd",
        ),
        reduction,
    ),
    **dict.fromkeys(_BINARY.split(), pointwise),
    **dict.fromkeys(_UNARY.split(), unary),
}
