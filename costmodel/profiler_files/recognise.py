"""One profiled kernel as an operator that is priced, or the reason why it is none.

Attention, by the shapes of query, key and value (first three operands):

    query             key                      is
    B,N,T,D           B,K,S,D or B,T,N,D ...   prefill of T = S tokens; decode where T = 1
    T,N,D (packed)    T,K,D                    prefill of T / context sequences (`--context`)
    B,N,D or B,N,1,D  blocks,size,width        decode over a paged cache of `--context` tokens
    B,N,1,512         blocks,1,size,512        MLA, absorbed, likewise

What the shapes leave open (lengths of packed sequences, tokens in a paged cache, which of two
equal dims is which) is asked for, not guessed. A quantized product dequantizes to 16 bits; its
last operand is a scale a row where the input was quantized a token at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from shardplan.costmodel.optable import Row, pointwise_bytes
from shardplan.costmodel.profiler_files.measurement import ReadOptions
from shardplan.costmodel.profiler_files.names import (
    POINTWISE_BYTES,
    KernelName,
    streaming_bytes,
)
from shardplan.costmodel.profiler_files.shapes import (
    Shape,
    grouped_product_of,
    operand,
    product_of,
)

__all__ = ["Found", "bytes_per_element", "recognise"]

Found = tuple[str, str, tuple[tuple[str, float], ...]]
"""op, dtype, sizes."""
_LATENT = 512
_BATCHED = 4
_PACKED = 3
_QUANT_OPERANDS = 4
_SIXTEEN_BIT = ("bf16", "fp16")
NO_CONTEXT = "the sequence lengths are not in the shapes (give --context)"
UNEVEN = "packed sequences do not divide into --context tokens each"
NO_SHAPE = "the operand shapes do not make this operator for certain"
NO_DTYPE = "an element type that is not priced"


def bytes_per_element(kind: str) -> float:
    """Bytes moved for an element of a streaming kernel, as steps price it."""
    if kind in POINTWISE_BYTES:
        return pointwise_bytes(Row(kind=kind, group="token"))
    return streaming_bytes(kind)


def recognise(
    name: KernelName,
    shapes: Sequence[Shape],
    dtypes: Sequence[str | None],
    output: Shape | None,
    options: ReadOptions,
) -> Found | str:
    """The operator, or why it is not used. `dtypes` are those of the operands."""
    first = dtypes[0] if dtypes else None
    if name.op == "matmul":
        return _matmul(shapes, first, output)
    if name.op == "quantized_matmul":
        return _quantized(shapes, dtypes, output)
    if name.op == "grouped_matmul":
        return _grouped(shapes, dtypes, output)
    if name.op == "attention":
        return _attention(shapes, first, options)
    return _streaming(name, operand(shapes, 0))


def _matmul(shapes: Sequence[Shape], dtype: str | None, output: Shape | None) -> Found | str:
    if dtype not in _SIXTEEN_BIT:
        return NO_DTYPE
    found = product_of(operand(shapes, 0), operand(shapes, 1), output)
    if found is None:
        return NO_SHAPE
    return "matmul", dtype, _sizes(m=found.m, n=found.n, k=found.k)


def _quantized(
    shapes: Sequence[Shape], dtypes: Sequence[str | None], output: Shape | None
) -> Found | str:
    if not dtypes or dtypes[0] != "int8":
        return NO_DTYPE
    wide = len(dtypes) > 1 and dtypes[1] == "int4"
    found = product_of(operand(shapes, 0), operand(shapes, 1), output)
    if found is None:
        return NO_SHAPE
    last = next((shape for shape in reversed(shapes) if shape), ())
    by_token = len(shapes) >= _QUANT_OPERANDS and last == (found.m,) and found.m != found.n
    dtype = "w4a8" if wide else "w8a8" if by_token else "w8a8_static"
    return "matmul", dtype, _sizes(m=found.m, n=found.n, k=found.k)


def _grouped(
    shapes: Sequence[Shape], dtypes: Sequence[str | None], output: Shape | None
) -> Found | str:
    first = dtypes[0] if dtypes else None
    if first not in (*_SIXTEEN_BIT, "int8"):
        return NO_DTYPE
    found = grouped_product_of(operand(shapes, 0), operand(shapes, 1), output)
    if found is None:
        return NO_SHAPE
    dtype = "w8a8" if first == "int8" else str(first)
    sizes = _sizes(rows=found.m, groups=found.groups, n=found.n, k=found.k)
    return "grouped_matmul", dtype, sizes


def _attention(shapes: Sequence[Shape], dtype: str | None, options: ReadOptions) -> Found | str:
    query, key = operand(shapes, 0), operand(shapes, 1)
    if dtype not in _SIXTEEN_BIT:
        return NO_DTYPE
    if 0 in query or 0 in key:
        return NO_SHAPE
    if len(query) == _BATCHED and len(key) == _BATCHED:
        return _batched(query, key, dtype, options)
    if len(query) == _PACKED and len(key) == _PACKED:
        return _packed(query, key, dtype, options)
    return NO_SHAPE


def _batched(query: Shape, key: Shape, dtype: str, options: ReadOptions) -> Found | str:
    """Four dims each: sequences apart, or one token each over a paged cache."""
    batch, one, two, dim = query
    if dim == _LATENT and key[-1] == _LATENT and key[1] == 1 and 1 in (one, two):
        if options.context is None:
            return NO_CONTEXT
        heads = max(one, two)
        return "mla_decode", dtype, _sizes(batch=batch, tokens=options.context, heads=heads)
    if key[0] != batch or key[-1] != dim:
        return NO_SHAPE
    heads_first = key[2] >= two and one % key[1] == 0 and (key[2] == two or two == 1)
    tokens_first = key[1] >= one and two % key[2] == 0 and (key[1] == one or one == 1)
    if heads_first == tokens_first:
        return NO_SHAPE
    new, heads = (two, one) if heads_first else (one, two)
    tokens, kv_heads = (key[2], key[1]) if heads_first else (key[1], key[2])
    op = "attention_decode" if new == 1 else "attention_prefill"
    return op, dtype, _attention_sizes(batch, tokens, heads, kv_heads, dim)


def _packed(query: Shape, key: Shape, dtype: str, options: ReadOptions) -> Found | str:
    """Three dims: packed prompts, or one token a sequence over a paged cache."""
    tokens, heads, dim = query
    if key[0] == tokens and key[2] == dim and heads % key[1] == 0:
        each = options.context
        if each is None:
            return NO_CONTEXT
        if tokens % each:
            return UNEVEN
        sizes = _attention_sizes(tokens // each, each, heads, key[1], dim)
        return "attention_prefill", dtype, sizes
    if key[2] % dim or heads % (key[2] // dim):
        return NO_SHAPE
    if options.context is None:
        return NO_CONTEXT
    sizes = _attention_sizes(tokens, options.context, heads, key[2] // dim, dim)
    return "attention_decode", dtype, sizes


def _attention_sizes(
    batch: int, tokens: int, heads: int, kv_heads: int, dim: int
) -> tuple[tuple[str, float], ...]:
    return _sizes(batch=batch, tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=dim)


def _streaming(name: KernelName, first: Shape) -> Found | str:
    if not first or 0 in first:
        return NO_SHAPE
    width = first[-1]
    rows = math.prod(first[:-1])
    sizes = _sizes(rows=rows, width=width, elements=rows * width * name.elements)
    return name.op, "bf16", sizes


def _sizes(**sizes: float) -> tuple[tuple[str, float], ...]:
    return tuple((name, float(size)) for name, size in sizes.items())
