"""The calls that are timed: tensors on the device and the operator that an engine would run.

Inputs are random, never zeros (zeros draw less power and run faster). What a model touches once a
step is rotated: weights of `matmul` and `moe` and the cache of `attention_decode` and `kv_append`
lie as often in memory as it takes to exceed three last-level caches, so that each call finds its
own cold.
Activations stay the same from call to call, as they are warm from the kernel before.

    backend      operator                      where
    linear       torch.nn.functional.linear    everywhere
    int_mm       torch._int_mm                 cuda, cpu; 17 rows or more on cuda
    sdpa         scaled_dot_product_attention  everywhere; on cuda the kernel is named:
                 sdpa_cudnn (what PyTorch picks on Hopper), sdpa_flash (its FlashAttention-2)
    grouped_mm   torch grouped_mm              cuda, where PyTorch has it
    expert_loop  one linear an active expert   elsewhere
    torch        a sequence of torch calls     everywhere
    inductor     the same through torch.compile, one kernel; refused where it does not compile
    torch_npu    its fused operators           npu

Tensors: x[m, k], w[n, k]; q[batch, tokens, heads, head_dim] and k, v[batch, tokens, kv_heads,
head_dim], seen as [batch, heads, tokens, head_dim]; expert weights w[experts, n, k].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from shardplan.search.profiling.backend import Target
from shardplan.search.profiling.points import CACHE_POSITIONS, Point
from shardplan.search.profiling.timing import Call

__all__ = ["build_calls", "rotations"]

_CACHES = 3.0
_MOST_ROTATIONS = 256
_MEMORY_SHARE = 0.5
_EPSILON = 1e-5
_INT8_LOW, _INT8_HIGH = -127, 128
_SDPA_KERNELS = {"sdpa_flash": "FLASH_ATTENTION", "sdpa_cudnn": "CUDNN_ATTENTION"}


def rotations(target: Target, point: Point) -> int:
    """How many copies of the weights or the cache are used in turn."""
    stored = point.stored_bytes()
    if not stored:
        return 1
    room = max(1, int(_MEMORY_SHARE * target.memory_bytes / max(point.tensor_bytes(), 1.0)))
    wanted = math.ceil(_CACHES * target.cache_bytes / stored) + 1
    return min(wanted, room, _MOST_ROTATIONS)


def build_calls(target: Target, point: Point) -> list[Call]:
    """Calls that do the work of `point`, each on its own weights or cache.

    Raises `RuntimeError` (torch's own) where the device does not have the operator or the memory.
    """
    return _BUILDERS[point.op](target, point)


def _random(target: Target, point: Point, *shape: int, scale: float = 1.0) -> Any:
    torch = target.torch
    if point.dtype == "int8":
        span = (_INT8_LOW, _INT8_HIGH)
        return torch.randint(*span, shape, dtype=torch.int8, device=target.place)
    made = torch.randn(shape, dtype=target.dtype(point.dtype), device=target.place)
    return made.mul_(scale)


def _compiled(target: Target, work: Callable[..., Any]) -> Callable[..., Any]:
    """`work` through torch.compile for the very shapes it is first called with."""
    compiler = target.torch.compiler
    compiler.reset()
    made: Callable[..., Any] = target.torch.compile(work, dynamic=False, fullgraph=True)
    return made


def _matmul(target: Target, point: Point) -> list[Call]:
    x = _random(target, point, point.m, point.k)
    pool = _random(target, point, rotations(target, point), point.n, point.k, scale=0.02)
    if point.backend == "int_mm":
        return [functools.partial(target.torch._int_mm, x, w.t()) for w in pool]
    if point.backend == "torch_npu":
        return [_npu_int8(target, point, x, w) for w in pool]
    linear = target.torch.nn.functional.linear
    return [functools.partial(linear, x, w) for w in pool]


def _npu_int8(target: Target, point: Point, x: Any, w: Any) -> Call:
    """The int8 product of torch_npu with its scales, to bf16."""
    import torch_npu

    torch = target.torch
    column = torch.ones(point.n, dtype=torch.float32, device=target.place)
    row = torch.ones(point.m, dtype=torch.float32, device=target.place)
    multiply = torch_npu.npu_quant_matmul
    return functools.partial(
        multiply, x, w.t(), column, pertoken_scale=row, output_dtype=torch.bfloat16
    )


def _sdpa(target: Target, point: Point, *, causal: bool) -> Callable[..., Any]:
    """Attention of [batch, tokens, heads, head_dim] tensors."""
    torch = target.torch
    grouped = point.heads != point.kv_heads
    attend = torch.nn.functional.scaled_dot_product_attention

    def run(q: Any, k: Any, v: Any) -> Any:
        views = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return attend(*views, is_causal=causal, enable_gqa=grouped)

    if point.backend not in _SDPA_KERNELS:
        return run
    kernel = getattr(torch.nn.attention.SDPBackend, _SDPA_KERNELS[point.backend])

    def run_named(q: Any, k: Any, v: Any) -> Any:
        with torch.nn.attention.sdpa_kernel(kernel):
            return run(q, k, v)

    return run_named


def _attention(target: Target, point: Point) -> list[Call]:
    prefill = point.op == "attention_prefill"
    queries = point.tokens if prefill else 1
    q = _random(target, point, point.batch, queries, point.heads, point.head_dim)
    attend = _sdpa(target, point, causal=prefill)
    shape = (point.batch, point.tokens, point.kv_heads, point.head_dim)
    pool = _random(target, point, rotations(target, point), 2, *shape)
    return [functools.partial(attend, q, cache[0], cache[1]) for cache in pool]


def _routing(target: Target, point: Point) -> Any:
    """Rows of each expert: every token in `topk` distinct experts, uniformly."""
    torch = target.torch
    noise = torch.rand(point.tokens, point.experts, device=target.place)
    chosen = noise.topk(point.topk, dim=1).indices.flatten()
    return torch.bincount(chosen, minlength=point.experts)


def _swiglu_rows(target: Target) -> Callable[[Any], Any]:
    silu = target.torch.nn.functional.silu

    def run(x: Any) -> Any:
        gate, up = x.chunk(2, dim=-1)
        return silu(gate) * up

    return run


def _moe(target: Target, point: Point) -> list[Call]:
    rows = point.tokens * point.topk
    x = _random(target, point, rows, point.hidden)
    copies = rotations(target, point)
    first = _random(target, point, copies, point.experts, 2 * point.ffn, point.hidden, scale=0.02)
    second = _random(target, point, copies, point.experts, point.hidden, point.ffn, scale=0.02)
    make = {"grouped_mm": _grouped, "torch_npu": _grouped_npu}.get(point.backend, _loop)
    block = make(target)
    return [
        functools.partial(block, x, first[at], second[at], *_groups(target, point))
        for at in range(copies)
    ]


def _groups(target: Target, point: Point) -> tuple[Any]:
    """What tells the block which rows belong to which expert."""
    counts = _routing(target, point)
    if point.backend == "expert_loop":
        return (tuple(counts.tolist()),)
    ends = counts.cumsum(0)
    return (ends if point.backend == "torch_npu" else ends.to(target.torch.int32),)


def _grouped(target: Target) -> Callable[..., Any]:
    torch = target.torch
    functional = torch.nn.functional
    multiply = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    act = _compiled(target, _swiglu_rows(target))

    def run(x: Any, first: Any, second: Any, ends: Any) -> Any:
        wide = multiply(x, first.transpose(-2, -1), offs=ends)
        return multiply(act(wide), second.transpose(-2, -1), offs=ends)

    return run


def _grouped_npu(_target: Target) -> Callable[..., Any]:
    import torch_npu

    same = {"split_item": 2, "group_list_type": 0, "group_type": 0}

    def product(x: Any, weight: Any, ends: Any) -> Any:
        arguments = {"x": [x], "weight": [weight.transpose(-2, -1)], "group_list": ends}
        return torch_npu.npu_grouped_matmul(**arguments, **same)[0]

    def run(x: Any, first: Any, second: Any, ends: Any) -> Any:
        return product(torch_npu.npu_swiglu(product(x, first, ends)), second, ends)

    return run


def _loop(target: Target) -> Callable[..., Any]:
    linear = target.torch.nn.functional.linear
    act = _swiglu_rows(target)

    def run(x: Any, first: Any, second: Any, counts: tuple[int, ...]) -> Any:
        parts = x.split(list(counts))
        return [
            linear(act(linear(part, first[at])), second[at])
            for at, part in enumerate(parts)
            if counts[at]
        ]

    return run


def _pointwise(target: Target, point: Point, work: Callable[..., Any], *inputs: Any) -> list[Call]:
    chosen = _compiled(target, work) if point.backend == "inductor" else work
    return [functools.partial(chosen, *inputs)]


def _add_rmsnorm(target: Target, point: Point) -> list[Call]:
    shape = (point.tokens, point.hidden)
    x, residual = _random(target, point, *shape), _random(target, point, *shape)
    weight = _random(target, point, point.hidden)
    if point.backend == "torch_npu":
        import torch_npu

        fused = torch_npu.npu_add_rms_norm
        return [functools.partial(fused, x, residual, weight, _EPSILON)]
    norm = target.torch.nn.functional.rms_norm

    def run(x: Any, residual: Any, weight: Any) -> Any:
        total = x + residual
        return norm(total, (point.hidden,), weight, _EPSILON), total

    return _pointwise(target, point, run, x, residual, weight)


def _rope(target: Target, point: Point) -> list[Call]:
    cat, norm = target.torch.cat, target.torch.nn.functional.rms_norm
    size, weight = (point.head_dim,), _random(target, point, point.head_dim)
    q = _random(target, point, point.tokens, point.heads, point.head_dim)
    k = _random(target, point, point.tokens, point.kv_heads, point.head_dim)
    cos = _random(target, point, point.tokens, 1, point.head_dim)
    sin = _random(target, point, point.tokens, 1, point.head_dim)

    def turn(x: Any, cos: Any, sin: Any) -> Any:
        low, high = x.chunk(2, dim=-1)
        return x * cos + cat((-high, low), dim=-1) * sin

    def run(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return turn(q, cos, sin), turn(k, cos, sin)

    def run_normed(q: Any, k: Any, cos: Any, sin: Any, weight: Any) -> Any:
        return run(norm(q, size, weight, _EPSILON), norm(k, size, weight, _EPSILON), cos, sin)

    if point.op == "qk_norm_rope":
        return _pointwise(target, point, run_normed, q, k, cos, sin, weight)
    return _pointwise(target, point, run, q, k, cos, sin)


def _kv_append(target: Target, point: Point) -> list[Call]:
    new = _random(target, point, point.batch, point.tokens, point.kv_heads, point.head_dim)
    positions = max(point.tokens, CACHE_POSITIONS)
    shape = (point.batch, point.kv_heads, positions, point.head_dim)
    pool = _random(target, point, rotations(target, point), *shape)
    places = (cache[:, :, positions - point.tokens :] for cache in pool)
    return [functools.partial(place.copy_, new.transpose(1, 2)) for place in places]


def _swiglu(target: Target, point: Point) -> list[Call]:
    x = _random(target, point, point.tokens, 2 * point.ffn)
    if point.backend == "torch_npu":
        import torch_npu

        return [functools.partial(torch_npu.npu_swiglu, x)]
    return _pointwise(target, point, _swiglu_rows(target), x)


def _order(target: Target, chosen: Any, experts: int) -> tuple[Any, Any]:
    """Positions of the routed rows by expert, and where each expert's rows end."""
    torch = target.torch
    flat = chosen.flatten()
    counts = torch.zeros(experts, dtype=torch.int32, device=target.place)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    return flat.argsort(), counts.cumsum(0, dtype=torch.int32)


def _topk_router(target: Target, point: Point) -> list[Call]:
    x = _random(target, point, point.tokens, point.experts)

    def run() -> Any:
        scores, chosen = x.softmax(-1).topk(point.topk, dim=-1)
        return scores / scores.sum(-1, keepdim=True), _order(target, chosen, point.experts)

    return [run]


def _dispatch(target: Target, point: Point) -> list[Call]:
    x = _random(target, point, point.tokens, point.hidden)
    order = target.torch.randperm(point.tokens * point.topk, device=target.place)
    return [lambda: x[order // point.topk]]


def _combine(target: Target, point: Point) -> list[Call]:
    rows = point.tokens * point.topk
    done = _random(target, point, rows, point.hidden)
    scores = _random(target, point, point.tokens, point.topk)
    order = target.torch.randperm(rows, device=target.place)

    def run() -> Any:
        back = target.torch.empty_like(done)
        back[order] = done
        return (back.view(point.tokens, point.topk, -1) * scores[..., None]).sum(1)

    return [run]


def _copy(target: Target, point: Point) -> list[Call]:
    source = _random(target, point, point.message_bytes // 2)
    return [functools.partial(target.torch.empty_like(source).copy_, source)]


_BUILDERS: Mapping[str, Callable[[Target, Point], list[Call]]] = {
    "matmul": _matmul,
    "attention_prefill": _attention,
    "attention_decode": _attention,
    "moe": _moe,
    "add_rmsnorm": _add_rmsnorm,
    "rope": _rope,
    "qk_norm_rope": _rope,
    "kv_append": _kv_append,
    "swiglu": _swiglu,
    "topk_router": _topk_router,
    "dispatch": _dispatch,
    "combine": _combine,
    "copy": _copy,
}
