"""Routed experts as two operators of PyTorch, and their exchange over ranks.

    gates   [b, t, e] of scores [b, t, e]: the weight of each expert for a token, 0 where not chosen
    experts y[b, t, h] = sum over e of gates[b, t, e] ffn_e(x[b, t, h])

Both keep batch and tokens apart, where a library's own code flattens them, so that every loop
(tokens, experts, width) is one that an axis may split: experts over ranks hold `e` in parts and
leave partial sums. Only chosen rows are computed.

Where tokens are sent to the ranks that hold their experts, `Dispatch` puts in place of `experts`:
rows sorted by expert -> counts exchanged -> rows exchanged -> experts -> rows back -> weighted
sum. The counts (one integer an expert and rank) are bookkeeping, marked `counts` in the node's
meta, which no price includes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from shardplan.models.fx.collectives import Builder, group_name

__all__ = ["dispatched", "experts", "gates"]


@torch.library.custom_op("shardplan::gates", mutates_args=())
def gates(scores: Tensor, topk: int, normalise: bool, scale: float, sigmoid: bool) -> Tensor:
    """Weights of the chosen experts, zeros elsewhere: [batch, tokens, experts] like the scores."""
    wide = scores.double() if scores.dtype == torch.float64 else scores.float()
    share = wide.sigmoid() if sigmoid else wide.softmax(-1)
    value, index = share.topk(topk, -1)
    if normalise:
        value = value / value.sum(-1, keepdim=True)
    return torch.zeros_like(share).scatter(-1, index, value * scale).to(scores.dtype)


@gates.register_fake
def _(scores: Tensor, topk: int, normalise: bool, scale: float, sigmoid: bool) -> Tensor:
    return torch.empty_like(scores)


@torch.library.custom_op("shardplan::experts", mutates_args=())
def experts(x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x [batch, tokens, hidden], weights [batch, tokens, experts], gate and up [experts, width,
    hidden], down [experts, hidden, width]; the sum over the experts, like x."""
    out = torch.zeros_like(x)
    for number in range(gate.shape[0]):
        at = weights[..., number].nonzero(as_tuple=True)
        y = _feed_forward(x[at], gate[number], up[number], down[number])
        out[at] += y * weights[..., number][at].unsqueeze(-1)
    return out


@experts.register_fake
def _(x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(x)


def _feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def route(weights: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """(token of each row, its weight, rows of each expert, rows for each rank), sorted by expert.

    `weights` [batch, tokens, experts] are a rank's own tokens'; experts lie on ranks in blocks.
    """
    expert, token = weights.flatten(0, 1).t().nonzero(as_tuple=True)
    counts = torch.bincount(expert, minlength=weights.shape[-1])
    return (
        token,
        weights.flatten(0, 1)[token, expert],
        counts,
        row_sizes(counts, ranks),
    )


def row_sizes(counts: Tensor, ranks: int) -> list[int]:
    """Rows for, or from, each rank."""
    return [int(one) for one in counts.view(ranks, -1).sum(1).tolist()]


def rows_of(x: Tensor, token: Tensor) -> Tensor:
    """Rows to send: [rows, hidden]."""
    return x.flatten(0, 1)[token]


def expert_rows(
    rows: Tensor, counts: Tensor, ranks: int, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """A rank's experts on the rows that it was sent, by sender and then by expert."""
    owner = torch.arange(gate.shape[0], device=rows.device).repeat(ranks)
    owner = owner.repeat_interleave(counts)
    out = torch.zeros_like(rows)
    for number in range(gate.shape[0]):
        at = (owner == number).nonzero(as_tuple=True)
        out[at] = _feed_forward(rows[at], gate[number], up[number], down[number])
    return out


def combined(x: Tensor, rows: Tensor, token: Tensor, weight: Tensor) -> Tensor:
    """The weighted sum of what came back, for each token; like x."""
    out = torch.zeros_like(x).flatten(0, 1)
    return out.index_add(0, token, rows * weight.unsqueeze(-1)).view_as(x)


def dispatched(build: Builder, values: Sequence[Any], axes: tuple[str, ...]) -> Any:
    """Nodes that stand for `experts` on `values` (its arguments) with rows sent over `axes`."""
    x, weights, gate, up, down = values
    ranks, group = build.mesh.size(axes), group_name(axes)
    routed = build.call(route, weights, ranks)
    token, weight, counts, sent = (build.call(operator.getitem, routed, i) for i in range(4))
    even = build.call(even_sizes, counts, ranks)
    theirs = build.crossed("all_to_all_single", counts, even, even, group)
    theirs.args[0].meta["counts"] = True
    received = build.call(row_sizes, theirs, ranks)
    rows = build.call(rows_of, x, token)
    rows = build.crossed("all_to_all_single", rows, received, sent, group)
    rows = build.call(expert_rows, rows, theirs, ranks, gate, up, down)
    rows = build.crossed("all_to_all_single", rows, sent, received, group)
    return build.call(combined, x, rows, token, weight)


def even_sizes(counts: Tensor, ranks: int) -> list[int]:
    """Equal parts of the counts of all experts, one for each rank."""
    return [counts.shape[0] // ranks] * ranks
