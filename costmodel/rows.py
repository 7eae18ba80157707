"""A row of the op table: one kernel or collective of one rank, and what its kind moves.

Sizes are local; how the free dims (batch, tokens, context) enter is in `ways`, `group` and
`context`. `optable` makes rows, `rowfusion` joins and marks them, `formulas` and `overlap` price
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from shardplan.costmodel.placement import TierSpan
from shardplan.models.graph import WeightClass
from shardplan.models.weight_groups import WeightGroup

__all__ = [
    "NO_OVERLAP",
    "Group",
    "Overlap",
    "Placed",
    "Row",
    "pointwise_bytes",
    "pointwise_kernel",
]

Group = Literal["token", "attention", "logits", "draft_logits", "draft", "draft_attention"]

_POINTWISE_BYTES: Mapping[str, float] = {
    "add": 6.0,
    "bias": 6.0,
    "scale": 4.0,
    "sumsq": 2.0,
    "gate": 6.0,
    "swiglu": 6.0,
    "activation": 4.0,
    "rmsnorm": 4.0,
    "add_rmsnorm": 8.0,
    "rope": 4.0,
    "qk_norm_rope": 4.0,
    "mla_kv_norm_rope": 4.0,
    "kv_append": 4.0,
    "slice": 4.0,
    "embedding": 4.0,
    "topk_router": 6.0,
    "dispatch": 4.0,
    "combine": 4.0,
    "concat": 4.0,
    "context_merge": 5.0,
    "select": 4.0,
    "softmax_sample": 4.0,
}
"""Bytes that one element of the output (routed element for dispatch and combine) makes a kernel
move: 16-bit reads of its inputs and writes of its outputs. Of `context_merge`, one element of
its input: a 32-bit read, and at most half a 16-bit write (two parts or more make one)."""

_KIND_OF_POINTWISE: Mapping[str, str] = {
    "add": "add",
    "bias": "bias",
    "scale": "mul",
    "sumsq": "mul",
    "gate": "mul",
    "activation": "mul",
    "select": "slice",
    "dispatch": "slice",
    "combine": "add",
    "concat": "slice",
    "context_merge": "add",
}
"""Which fitted pointwise kernel stands for an operator that has none of its own."""


class Row(NamedTuple):
    """One kernel of one rank. Sizes are local; `ways` is how many ways the tokens are cut."""

    kind: str
    group: Group
    ways: int = 1
    n: float = 0.0
    """Matmul: output features. Collective: elements a token of the full tensor of its group."""
    k: float = 0.0
    width: float = 0.0
    """Pointwise: elements a token."""
    context: bool = False
    """The rows are the context's tokens, not the new ones (attention's rows only)."""
    weight_class: WeightClass = "none"
    weight_group: WeightGroup = "attention"
    """Of its weights, which may have a type of their own; of a norm, those of its readers."""
    experts: float = 0.0
    """Local experts of a grouped matmul."""
    spread: float = 1.0
    """Ranks that share the experts: above 1, the busiest has more rows than the mean."""
    share: float = 1.0
    """Routed rows a token on this rank."""
    heads: float = 0.0
    kv_heads: float = 0.0
    head_dim: float = 0.0
    value_dim: float = 0.0
    rope_dim: float = 0.0
    window: float = 0.0
    parts: float = 1.0
    """Attention: ranks that share the queries of a prompt or, in decode, the cache."""
    element_bytes: float = 2.0
    """Collective: bytes of one element."""
    settled: bool = False
    """Collective of logits: it waits for no rank that a step has not waited for anyway."""
    spans: tuple[TierSpan, ...] = ()
    fuse: str = ""
    quantized: bool = False
    """Matmul: the norm before it quantizes its input, where the weights' type asks for that."""
    behind: tuple[Row, ...] = ()
    """Matmul: kernels before it during which its weights are prefetched."""
    fused: Row | None = None
    """Matmul: the all_reduce of its result, in the same kernel."""

    @property
    def is_collective(self) -> bool:
        """Whether it crosses ranks."""
        return bool(self.spans)


class Placed(NamedTuple):
    """A row and the operators of the graph that it runs."""

    row: Row
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Switches of an engine: kernels that run beside one another, and how servers exchange."""

    weight_prefetch: bool = False
    fused_collectives: bool = False
    collectives: str = "auto"
    """Algorithm between servers (`kernels.algorithms`); auto: the library's own pick."""


NO_OVERLAP = Overlap()


def pointwise_bytes(row: Row) -> float:
    """Bytes moved an element."""
    return _POINTWISE_BYTES[row.kind]


def pointwise_kernel(row: Row) -> str:
    """The fitted kernel that stands for a pointwise row."""
    return _KIND_OF_POINTWISE.get(row.kind, row.kind)
