"""Which options of a pool no other can stand in for.

An option may be left out where another one may take its place in every deployment:
  - its cards divide those of the first by a whole number m, and m of it stand in for one;
  - it has every legal partner that the first has;
  - of m of it, prompts or requests a second are no fewer, and every time and every byte that a
    deployment's formulas take (busy, service and bytes sent a rank of prefill; step, all
    later steps, bytes and bytes received a rank of decode) is no more.
The rate of a deployment does not fall and TTFT, TPOT and latency do not rise when any of these
improves (`shardplan.costmodel.disagg`), and cards stay the same: objective and limits are kept.

One case is apart. With C requests in flight and a limit L on TTFT, a faster step sends requests
back to the prompt queue sooner, so TTFT can rise: a slower step may meet L where a faster one does
not. With a limit on the 99th percentile of TTFT a faster prefill instance may do the same.
Such options are then left out only where a bound says that they cannot reach the best found
(`worth_another_look`). With N cards, p the most prompts and q the requests a second and card, n
steps of t seconds after the first:

    rate <= N / (1/p + 1/q)    rate <= C / (service + t + n t)    rate >= C / (L + n t)
    cards >= rate (1/p + 1/q)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.kernels.base import Array
from shardplan.search.disagg_combine import Combination
from shardplan.search.disagg_options import Options
from shardplan.search.disagg_question import DisaggQuestion

__all__ = ["COSTS", "Partners", "beaten", "undominated", "worth_another_look"]

_BLOCK = 256
_SLACK = 1.0 + 1e-6
"""Bounds are wide by this, so that rounding rules nothing out."""

COSTS: Mapping[str, tuple[str, ...]] = {
    "prefill": ("slow_s", "busy_s", "one_s", "service_s", "alone_s", "sent", "sent_all"),
    "decode": ("slow_s", "step_s", "later_s", "bytes", "received"),
}
"""What is better the less it is, by role; slow_s: cards over requests a second."""


@dataclass(frozen=True, slots=True)
class Partners:
    """Who may serve with whom: `kinds` of a pool's layouts, and `[kinds, kinds of the others]`."""

    kinds: NDArray[np.int64]
    table: NDArray[np.bool_]
    slots: bool = False
    """Whether slots count beside what they serve: requests must find one free."""

    def of(self, options: Options) -> NDArray[np.int64]:
        """Kind of each option."""
        return self.kinds[options.columns["layout"].astype(np.int64)]


def undominated(options: Options, role: str, partners: Partners) -> NDArray[np.int64]:
    """Indices of options that no other may take the place of."""
    costs, cards = _costs(options, role, partners), _cards(options)
    kind, wider = partners.of(options), _wider(partners.table)
    kept: list[NDArray[np.int64]] = []
    for size in np.unique(cards):
        own = np.flatnonzero(cards == size)
        kept.append(own[_first(costs[own], cards[own], kind[own], wider)])
    index = np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64)
    return np.sort(index[_first(costs[index], cards[index], kind[index], wider)])


def beaten(by: Options, ones: Options, role: str, partners: Partners) -> NDArray[np.bool_]:
    """Which of `ones` some of `by` may take the place of."""
    if not by.size or not ones.size:
        return np.zeros(ones.size, dtype=bool)
    costs_of = functools.partial(_costs, role=role, partners=partners)
    costs, cards, kinds = (
        np.concatenate([of(by), of(ones)]) for of in (costs_of, _cards, partners.of)
    )
    first, wider = np.arange(by.size), _wider(partners.table)
    found = [
        _beaten(costs, cards, kinds, wider, first, part).any(axis=0)
        for part in np.array_split(by.size + np.arange(ones.size), -(-ones.size // _BLOCK))
    ]
    return np.concatenate(found)


def _costs(options: Options, role: str, partners: Partners) -> Array:
    """What is better the less it is, `[options, costs]`; cards a slot where slots count."""
    columns = options.columns
    found = [columns[name] for name in COSTS[role]]
    if partners.slots and role == "decode":
        found.append(columns["slow_s"] / (columns["step_s"] + columns["later_s"]))
    return np.stack(found, axis=1)


def _cards(options: Options) -> NDArray[np.int64]:
    return options.columns["cards"].astype(np.int64)


def _wider(partners: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`[kinds, kinds]`: whether the first has every partner of the second."""
    return np.asarray((partners[:, None, :] >= partners[None, :, :]).all(axis=2))


def worth_another_look(
    question: DisaggQuestion, tables: tuple[Options, Options], role: str, best: Combination | None
) -> NDArray[np.bool_]:
    """Options of a role that may be in a deployment as good as `best`, by the bounds above.

    Of prefill only where the 99th percentile of TTFT is limited, which may rise with a faster one.
    """
    demand, first = question.demand, role == "prefill"
    own = tables[0 if first else 1]
    limit_s = demand.mean_ttft_s
    if demand.in_flight is None or limit_s is None or (first and demand.ttft_p99_s is None):
        return np.zeros(own.size, dtype=bool)
    prefill, decode = (
        one.columns if mine else _least(one, other)
        for one, mine, other in zip(tables, (first, not first), ("prefill", "decode"), strict=True)
    )
    each = prefill["slow_s"], decode["slow_s"]
    if question.shared:
        most = question.cards / (each[0] + each[1])
    else:
        most = np.minimum(question.prefill.cards / each[0], question.decode.cards / each[1])
    later = decode["later_s"]
    alone = prefill["alone_s"] + later + decode["step_s"]
    most = np.minimum(most, demand.in_flight / alone) * _SLACK
    asked = question.decode.workload.request_rate or 0.0
    longest = tables[1].columns["later_s"].max() if first else later
    need = np.maximum(asked, demand.in_flight / (limit_s + longest))
    able = np.broadcast_to(most >= need, own.columns["cards"].shape)
    if best is None or not best.feasible:
        return able
    if question.objective == "cards":
        return np.asarray(able & (need * question.spent(*each) <= best.columns["spent"] * _SLACK))
    return np.asarray(able & (most >= best.columns["requests_per_s"]))


def _least(options: Options, role: str) -> dict[str, Array]:
    """The least of each cost that a bound takes."""
    names = ("slow_s", "alone_s") if role == "prefill" else ("slow_s", "step_s", "later_s")
    return {name: np.asarray(options.columns[name].min()) for name in names}


def _first(
    costs: Array, cards: NDArray[np.int64], kind: NDArray[np.int64], wider: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Indices that none before them beats, by all costs in turn: one that beats comes before."""
    order = np.lexsort(costs.T[::-1])
    kept = np.zeros(0, dtype=np.int64)
    for start in range(0, order.size, _BLOCK):
        block = order[start : start + _BLOCK]
        block = block[~_beaten(costs, cards, kind, wider, kept, block).any(axis=0)]
        inside = np.tril(_beaten(costs, cards, kind, wider, block, block).T, -1)
        kept = np.concatenate([kept, block[~inside.any(axis=1)]])
    return kept


def _beaten(
    costs: Array,
    cards: NDArray[np.int64],
    kind: NDArray[np.int64],
    wider: NDArray[np.bool_],
    by: NDArray[np.int64],
    ones: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Whether each of `by` may take the place of each of `ones`; `[by, ones]`."""
    mask = wider[kind[by][:, None], kind[ones][None, :]]
    mask = mask & (cards[ones][None, :] % cards[by][:, None] == 0)
    for column in costs.T:
        mask &= column[by][:, None] <= column[ones][None, :]
    return np.asarray(mask)
