"""Rows of phase op: one operator alone, as an isolated benchmark measures it.

    matmul             y[m, n] = x[m, k] @ w[k, n] in `dtype`; weights rotated through the cache
    attention_prefill  causal, `batch` sequences of `tokens` tokens, `heads`, `kv_heads` (0: heads)
    attention_decode   one token a sequence over `tokens` cached ones
    mla_prefill        DeepSeek's head parts: 128 without position, 64 rotary, 128 values
    mla_decode         absorbed: latents of 512 + 64 elements
    moe                gate and up, activation, down of `experts` / `ep` local experts of width
                       `ffn`, `tokens` * `topk` / `ep` routed rows on the rank
    collectives        `message_bytes` of the full (gathered or reduced) tensor over `ranks`
                       consecutive ranks, launched by the host as hccl_test and nccl-tests do; of
                       an all_to_all, the buffer that one rank sends, as those tools count it

Sizes are those of one rank. `dtype` is of weights and activations (matmul, moe), 16-bit by default;
the cache of attention takes `kv_dtype`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import numpy as np

from shardplan.costmodel.basis import op_section, weakest
from shardplan.costmodel.calibration import Section
from shardplan.costmodel.kernels.attention import attention_decode, attention_prefill
from shardplan.costmodel.kernels.base import Array, KernelTime, Machine
from shardplan.costmodel.kernels.collectives import CollectiveKind, collective
from shardplan.costmodel.kernels.matmul import matmul
from shardplan.costmodel.kernels.mla import mla_decode, mla_prefill
from shardplan.costmodel.kernels.moe import moe_block
from shardplan.costmodel.placement import group_tiers
from shardplan.models.errors import InputError
from shardplan.search.estimate_names import find_cluster, kv_dtype_for
from shardplan.search.estimate_points import Indices, Points

__all__ = ["COLLECTIVE_OPS", "OP_COLUMNS", "OP_GROUP", "price_ops"]

OP_GROUP = (
    "op",
    "cluster",
    "nodes",
    "device",
    "engine_profile",
    "dtype",
    "kv_dtype",
    "attention",
    "ranks",
)
"""What fixes the formula; every other column is an array."""

COLLECTIVE_OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
OP_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "matmul": ("m", "n", "k"),
    "attention_prefill": ("batch", "tokens", "heads", "kv_heads", "head_dim"),
    "attention_decode": ("batch", "tokens", "heads", "kv_heads", "head_dim"),
    "mla_prefill": ("batch", "tokens", "heads"),
    "mla_decode": ("batch", "tokens", "heads"),
    "moe": ("tokens", "hidden", "ffn", "experts", "topk", "ep"),
    **dict.fromkeys(COLLECTIVE_OPS, ("message_bytes",)),
}
"""Columns that enter each formula."""

MLA_NOPE, MLA_ROPE, MLA_VALUE, MLA_LATENT = 128, 64, 128, 512
"""DeepSeek-V2 and V3, Kimi K2 (their config.json: qk_nope_head_dim, qk_rope_head_dim, v_head_dim,
kv_lora_rank)."""

Sizes = Mapping[str, Array]
Choices = Mapping[str, Any]


def _kv_heads(given: Sizes) -> Array:
    heads, kv_heads = given["heads"], given["kv_heads"]
    return np.where(kv_heads > 0, kv_heads, heads)


def _matmul(machine: Machine, given: Sizes, chosen: Choices) -> KernelTime:
    return matmul(machine, given["m"], given["n"], given["k"], chosen["dtype"], weights="rotated")


def _attention_prefill(machine: Machine, given: Sizes, chosen: Choices) -> KernelTime:
    return attention_prefill(
        machine,
        given["batch"],
        given["tokens"],
        0.0,
        given["heads"],
        _kv_heads(given),
        given["head_dim"],
        kernel=chosen["attention"],
        kv_dtype=chosen["kv_dtype"],
    )


def _attention_decode(machine: Machine, given: Sizes, chosen: Choices) -> KernelTime:
    return attention_decode(
        machine,
        given["batch"],
        given["tokens"],
        given["heads"],
        _kv_heads(given),
        given["head_dim"],
        kernel=chosen["attention"],
        kv_dtype=chosen["kv_dtype"],
    )


def _mla_prefill(machine: Machine, given: Sizes, chosen: Choices) -> KernelTime:
    return mla_prefill(
        machine,
        given["batch"],
        given["tokens"],
        0.0,
        given["heads"],
        MLA_NOPE,
        MLA_ROPE,
        MLA_VALUE,
        kernel=chosen["attention"],
    )


def _mla_decode(machine: Machine, given: Sizes, chosen: Choices) -> KernelTime:
    return mla_decode(
        machine,
        given["batch"],
        given["tokens"],
        given["heads"],
        MLA_LATENT,
        MLA_ROPE,
        kernel=chosen["attention"],
        kv_dtype=chosen["kv_dtype"],
    )


def _moe(machine: Machine, given: Sizes, chosen: Choices) -> KernelTime:
    return moe_block(
        machine,
        given["tokens"],
        given["hidden"],
        given["ffn"],
        given["experts"],
        given["topk"],
        given["ep"],
        chosen["dtype"],
    )


_FORMULAS: Mapping[str, Callable[[Machine, Sizes, Choices], KernelTime]] = {
    "matmul": _matmul,
    "attention_prefill": _attention_prefill,
    "attention_decode": _attention_decode,
    "mla_prefill": _mla_prefill,
    "mla_decode": _mla_decode,
    "moe": _moe,
}


def _refuse_sizes(points: Points, op: str, rows: Indices) -> Indices:
    """Rows whose sizes are all there and legal; the others are refused."""
    for name in OP_COLUMNS[op]:
        missing = rows[np.isnan(points.floats(name, rows))]
        points.refuse(
            missing, InputError(f"`{name}` is needed for op {op}", got=f"{name} is empty")
        )
    rules: list[tuple[str, str, Callable[[Array, Array], Any]]] = []
    if op.startswith("attention"):
        rules.append(("heads", "kv_heads", lambda a, b: (b > 0) & (a % np.maximum(b, 1) != 0)))
    if op == "moe":
        rules.append(("experts", "ep", lambda a, b: a % b != 0))
        rules.append(("experts", "topk", lambda a, b: b > a))
    sentences = {
        "kv_heads": "`kv_heads` must divide `heads`",
        "ep": "`ep` must divide `experts`",
        "topk": "`topk` must not exceed `experts`",
    }
    for big, small, broken in rules:
        one, two = points.floats(big, rows), points.floats(small, rows)
        with np.errstate(invalid="ignore"):
            bad = rows[broken(one, two)]
        points.refuse(bad, InputError(sentences[small], hint="see this row's cells"))
    return np.asarray([row for row in rows.tolist() if row not in points.errors], dtype=np.int64)


def price_ops(points: Points, rows: Indices) -> tuple[Indices, KernelTime | None, Section]:
    """(rows priced, their times, the section behind them) of rows that agree in `OP_GROUP`.

    Raises the `InputError` of a name or dtype that does not resolve, for all of them.
    """
    first = int(rows[0])
    chosen = {name: points.cell(name, first) for name in OP_GROUP}
    op = str(chosen["op"])
    rows = _refuse_sizes(points, op, rows)
    if not len(rows):
        return rows, None, weakest(())
    ranks = chosen["ranks"]
    if op in COLLECTIVE_OPS and ranks is None:
        raise InputError(f"`ranks` is needed for op {op}", got="ranks is empty")
    cluster = find_cluster(
        chosen["cluster"],
        nodes=chosen["nodes"],
        device=chosen["device"],
        ranks=ranks if op in COLLECTIVE_OPS else 1,
    )
    machine = Machine.of(cluster.device, chosen["engine_profile"])
    chosen["dtype"] = chosen["dtype"] or "bf16"
    chosen["kv_dtype"] = kv_dtype_for(chosen["kv_dtype"], cluster.device)
    if chosen["attention"] == "auto":
        chosen["attention"] = "flash"
    given = {name: points.floats(name, rows) for name in OP_COLUMNS[op]}
    spans = group_tiers(cluster, group=ranks, stride=1) if op in COLLECTIVE_OPS else ()
    section = op_section(machine, op, chosen["dtype"], chosen["attention"], spans)
    if op not in COLLECTIVE_OPS:
        return rows, _FORMULAS[op](machine, given, chosen), section
    launch: Literal["graph", "host"] = "host"
    time = collective(
        cast("CollectiveKind", op),
        spans,
        given["message_bytes"] * (ranks if op == "all_to_all" else 1),
        machine.calibration,
        launch=launch,
    )
    return rows, time, section
