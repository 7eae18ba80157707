"""Multi-head latent attention (MLA): expanded prefill and absorbed decode.

Symbols as in `attention`, with N no-position and R rotary parts of a query or key head, V the
value head, C_kv the latent (`kv_lora_rank`), H the heads of one rank.

Prefill works on expanded heads: keys N + R wide and values V wide, one kv head a query head, the
rotary part shared. The flash formula of `attention` holds with d_qk = N + R and d_v = V:

    FLOP a score = 2 (N + R + V)

Decode is absorbed: the latent of a token, C_kv + R elements, is read once for all heads of the
rank and serves as key and as value:

    stream_bytes = B S (C_kv + R) b        tasks = B
    cube FLOP    = 2 B S max(H, 16) (2 C_kv + R)

so that tensor parallelism shrinks its arithmetic but not its traffic. Several new tokens of a
sequence share that read: H then stands for heads times new tokens. The rest (L2, efficiency,
floor) is `flash_decode` with the coefficients of `mla.decode`.

Naive prefill and decode are the kernels of eager attention on expanded heads. Left out: the
up-projections of the latent (they are matmuls of the graph), the reading of a paged prefix, and
the slower kernel that the measured stack takes for 128 heads with 8 or more sequences of 1024 or
more tokens (about 1.4 times the time given here).
"""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.kernels.attention import (
    AttentionKernel,
    check_kernel,
    kv_element_bytes,
    naive_attention,
)
from shardplan.costmodel.kernels.base import (
    ArrayLike,
    KernelTime,
    Machine,
    as_array,
    as_measured,
)
from shardplan.costmodel.kernels.flash import (
    ELEMENT_BYTES,
    FRACTAL,
    DecodeWork,
    PrefillWork,
    flash_decode,
    flash_prefill,
)

__all__ = ["mla_decode", "mla_prefill"]


def mla_prefill(
    machine: Machine,
    batch: ArrayLike,
    new_tokens: ArrayLike,
    prefix_tokens: ArrayLike,
    heads: ArrayLike,
    nope_dim: ArrayLike,
    rope_dim: ArrayLike,
    v_dim: ArrayLike,
    *,
    kernel: AttentionKernel,
) -> KernelTime:
    """Causal MLA over expanded heads: `[batch, new_tokens, heads, nope_dim + rope_dim]` queries.

    Sizes broadcast; `heads` are those of one rank. `InputError` for an unknown kernel;
    `CalibrationError` without coefficients.
    """
    check_kernel(kernel)
    work = PrefillWork(
        batch=as_array(batch),
        new_tokens=as_array(new_tokens),
        prefix_tokens=as_array(prefix_tokens),
        heads=as_array(heads),
        kv_heads=as_array(heads),
        qk_dim=as_array(nope_dim) + as_array(rope_dim),
        v_dim=as_array(v_dim),
        kv_bytes=ELEMENT_BYTES,
    )
    if kernel == "naive":
        return naive_attention(machine, work)
    time = flash_prefill(machine, machine.calibration.section("mla.prefill"), work)
    return as_measured(time, machine.calibration, "mla.prefill")


def mla_decode(
    machine: Machine,
    batch: ArrayLike,
    kv_tokens: ArrayLike,
    heads: ArrayLike,
    kv_lora_rank: ArrayLike,
    rope_dim: ArrayLike,
    *,
    new_tokens: ArrayLike = 1.0,
    kernel: AttentionKernel,
    kv_dtype: str,
) -> KernelTime:
    """New tokens of a sequence over `kv_tokens` latents of `kv_lora_rank + rope_dim` elements.

    `kv_tokens` are those that the last of `new_tokens` sees, itself with them. Sizes broadcast;
    `heads` are those of one rank. The naive kernel is eager attention in the latent space (queries
    absorbed, scores through HBM). `InputError` for an unknown kernel or `kv_dtype`;
    `CalibrationError` without coefficients.
    """
    check_kernel(kernel)
    kv_bytes = kv_element_bytes(kv_dtype)
    sequences, tokens, queries = as_array(batch), as_array(kv_tokens), as_array(heads)
    rank, rope, new = as_array(kv_lora_rank), as_array(rope_dim), as_array(new_tokens)
    if kernel == "naive":
        naive = PrefillWork(
            batch=sequences,
            new_tokens=new,
            prefix_tokens=np.maximum(tokens - new, 0.0),
            heads=queries,
            kv_heads=np.ones_like(queries),
            qk_dim=rank + rope,
            v_dim=rank,
            kv_bytes=kv_bytes,
        )
        return naive_attention(machine, naive)
    elements, rows = sequences * tokens * (rank + rope), queries * new
    work = DecodeWork(
        batch=sequences,
        tasks=sequences,
        stream_bytes=elements * kv_bytes,
        elements=elements if kv_bytes < ELEMENT_BYTES else np.zeros_like(elements),
        cube_flop=2.0 * sequences * tokens * np.maximum(rows, FRACTAL) * (2.0 * rank + rope),
        scores=sequences * rows * tokens,
        group=rows,
        streams_per_token=np.ones_like(queries),
        kv_tokens=tokens,
    )
    time = flash_decode(machine, machine.calibration.section("mla.decode"), work)
    return as_measured(time, machine.calibration, "mla.decode")
