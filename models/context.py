"""Attention over a context whose cache is split: partial results of its parts, and their merge.

In decode, W ranks hold S / W cached tokens each and all have the step's queries. Rank w attends
to its own part and gives, for every query and head, its normalised output and log-sum-exp:

    o_w = sum_s exp(x_s - l_w) v_s        l_w = log sum_s exp(x_s)        s in part w
    o   = sum_w exp(l_w - l) o_w          l   = log sum_w exp(l_w)

The graph says so: `attention_part` yields [B, T, heads, W, P] with P = value width + 1 (the output
and its log-sum-exp, 32-bit), W cut over the ranks; `attention` merges, contracting W. What lies
between is the one layout rule's all_gather over W. vllm-ascend's decode does the same
(`_process_attn_out_lse`, `_npu_attention_update` of its attention/context_parallel/common_cp.py).

Prefill needs no such graph: keys and values (or the latent) of all tokens, cached ones too, are
gathered to the queries of each rank, again by the layout rule.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from types import MappingProxyType

from shardplan.models.graph import Block, ModelGraph, Op

__all__ = ["PART", "in_parts"]

PART = "attention_part"
_PART_BYTES = 4.0


def _split(op: Op) -> tuple[Op, Op]:
    """An attention operator as one over a part of the context, and the merge of all parts."""
    kept = op.dims[:-1]
    part = replace(
        op,
        name=PART,
        dims=(*kept, "W", "P"),
        cut_as=(("W", "S"),),
        element_bytes=_PART_BYTES,
    )
    merge = Op(
        name=op.name,
        kind="context_merge",
        role="heads",
        inputs=(PART,),
        dims=op.dims,
        contract=("W",),
        whole=("W", op.dims[-1]),
    )
    return part, merge


def _block(block: Block) -> Block:
    nodes = {
        one.name: one
        for op in block.ops()
        for one in (_split(op) if op.kind in ("attention", "mla_absorbed") else (op,))
    }
    return Block(block.name, nodes, block.entry, block.exit, tuple(nodes))


@functools.lru_cache(maxsize=64)
def in_parts(graph: ModelGraph, parts: int) -> ModelGraph:
    """The same model in decode with contexts split over `parts` ranks.

    Unchanged otherwise, and where they are split already.
    """
    if parts == 1 or graph.phase != "decode" or graph.sizes.get("W") == parts:
        return graph
    width = graph.sizes["C"] if graph.spec.mla is not None else graph.sizes["D"]
    return replace(
        graph,
        sizes=MappingProxyType({**graph.sizes, "W": parts, "P": width + 1}),
        blocks=MappingProxyType({name: _block(one) for name, one in graph.blocks.items()}),
    )
