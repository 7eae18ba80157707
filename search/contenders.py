"""Contenders of a search: the best layouts and choices, priced again with cost groups scaled.

A contender is one layout with one choice. Its slots and step size are tuned again at every factor,
over all points of the search's own grid that a factor can make feasible: memory, context and the
room for a token of every slot do not depend on times, so points that break those are left out; so
are those that break a percentile or, at a rate, the TTFT with its queue at prices as they are.
At factors of one the numbers are the search's own, to the last bit (`costmodel.cost_groups`), and
limits and objective are told by the same code (`LayoutScorer.score`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardplan.costmodel.bulk import Dtypes, Fleet
from shardplan.costmodel.cost_groups import HOST, ScaledModel
from shardplan.costmodel.group_bands import group_bands
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.memo import Memo
from shardplan.costmodel.serving import serve
from shardplan.search.contender import Answers, Deployed, Tuned
from shardplan.search.evaluate import LIMITS, LayoutScorer, Question, Scores
from shardplan.search.kept import Kept, Outcome, first_of_each, keep_best
from shardplan.search.space import Space

__all__ = ["LayoutContender", "contenders_of"]

_BLOCK = 2**16
"""Prices made at once: arrays that stay in a core's cache."""
_STEP = ("compute_s", "memory_s", "collective_s", "overhead_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutContender:
    """One layout and choice, ready to be priced at other times of its cost groups."""

    kept: Kept
    """Its best strategy as the search found it."""
    scorer: LayoutScorer
    pricer: ScaledModel
    batch: Array
    """`[points]`, of less memory first."""
    chunk: Array
    space: Space

    @property
    def limits(self) -> tuple[str, ...]:
        """Names of limits."""
        return LIMITS

    @property
    def groups(self) -> set[str]:
        """Cost groups that it spends time in."""
        return {*self.pricer.within, HOST}

    def blocks(self, factors: Mapping[str, Array]) -> Iterator[Scores]:
        """Scores `[some factors, points]` at factors `[factors]`, a cache's worth at a time.

        Once, and of `[points]`, where it spends no time in any of the groups.
        """
        own = {name: one for name, one in factors.items() if name in self.groups}
        count = len(next(iter(own.values()))) if own else 1
        size = max(_BLOCK // max(self.batch.size, 1), 1)
        for start in range(0, count, size):
            some = {name: one[start : start + size, None] for name, one in own.items()}
            pricer = self.pricer.at(some)
            yield self.scorer.score(self.kept.choice, self.batch, self.chunk, pricer=pricer)

    def objectives(self, factors: Mapping[str, Array]) -> Array:
        """`[factors, points]`; minus infinity where a limit is broken."""
        found = [
            np.atleast_2d(np.where(one.feasible, one.columns["objective"], -np.inf))
            for one in self.blocks(factors)
        ]
        count = len(next(iter(factors.values())))
        return np.broadcast_to(np.concatenate(found), (count, self.batch.size))

    def tuned(self, factors: Mapping[str, Array]) -> Tuned:
        """Its best point at each of the factors `[factors]`."""
        return Tuned.of(self.objectives(factors))

    def own(self, factors: Mapping[str, Array]) -> Array:
        """Objective `[factors]` of the strategy that the search found, as it is."""
        return self.alone().objectives(factors)[:, 0]

    def answers(self, factors: Mapping[str, Array]) -> Answers:
        """Of the strategy that the search found; seconds of an average step."""
        blocks = list(self.alone().blocks(factors))
        every = [one.every() for one in blocks]
        return Answers(
            np.concatenate([one.limit[:, 0] for one in blocks]).astype(np.int64),
            sum(
                (np.concatenate([one[name][:, 0] for one in every]) for name in _STEP),
                np.zeros(()),
            ),
        )

    def deployed(self, point: int | None) -> Deployed:
        """A point as the plan writes it; None: the strategy that the search found."""
        kept = self.kept
        batch, chunk = kept.batch, kept.chunk
        if point is not None:
            batch, chunk = int(self.batch[point]), int(self.chunk[point])
        return Deployed(self.space.strategy(kept.parallel, kept.choice, batch, chunk))

    def bands(self) -> dict[str, tuple[float, float]]:
        """Of the strategy that the search found, the calibration's band of each cost group."""
        question, choice = self.scorer.question, self.kept.choice
        zero = np.zeros(1, dtype=np.int64)
        dtypes = Dtypes(choice.weight_dtype, choice.kv_dtype, choice.attention)
        fleet = Fleet.of([self.pricer.model], zero, [dtypes], zero)
        one = np.full(1, float(self.kept.batch)), np.full(1, float(self.kept.chunk))
        given = self.scorer.serving_input(choice, *one)
        return group_bands(fleet, question.cluster, given, serve(fleet, given))

    def without(self, points: Array) -> LayoutContender:
        """Without some of its points."""
        left = np.setdiff1d(np.arange(self.batch.size), points)
        return replace(self, batch=self.batch[left], chunk=self.chunk[left])

    def alone(self) -> LayoutContender:
        """The strategy that the search found, its slots and step size as they are."""
        one = np.array([float(self.kept.batch)]), np.array([float(self.kept.chunk)])
        return replace(self, batch=one[0], chunk=one[1])

    def at(self, point: int) -> Kept:
        """One of its points as a search remembers it, at the times as they are."""
        batch, chunk = self.batch[point : point + 1], self.chunk[point : point + 1]
        scores = self.scorer.score(self.kept.choice, batch, chunk)
        return keep_best(scores, self.kept.parallel, self.kept.choice, batch, chunk).one(0)


def contenders_of(question: Question, outcome: Outcome, most: int) -> list[LayoutContender]:
    """The best strategy of the outcome and those of up to `most` other layouts and choices."""
    memo: Memo = Memo()
    found: dict[object, Kept] = {}
    for one in first_of_each(outcome.kept):
        found.setdefault((replace(one.parallel, stage_layers=()), one.choice), one)
        if len(found) > most:
            break
    return [_contender(question, one, outcome, memo) for one in found.values()]


def _contender(question: Question, kept: Kept, outcome: Outcome, memo: Memo) -> LayoutContender:
    scorer, space = LayoutScorer(question, kept.parallel, memo), outcome.space
    batch, chunk = _points(scorer, kept, space.batches, space.chunks)
    batch, chunk = _without(batch, chunk, outcome.refused.get((kept.parallel, kept.choice)))
    model = scorer.model_for(kept.choice)
    return LayoutContender(
        kept=kept,
        scorer=scorer,
        pricer=ScaledModel.of(model, question.cluster),
        batch=batch,
        chunk=chunk,
        space=space,
    )


def _points(
    scorer: LayoutScorer, kept: Kept, batches: Sequence[int], chunks: Sequence[int]
) -> tuple[Array, Array]:
    """Grid points whose limits depend on time alone, of less memory first."""
    batch = np.array(batches, dtype=np.float64)[:, None]
    chunk = np.array(chunks, dtype=np.float64)[None, :]
    memory = scorer.memory(kept.choice, batch, chunk)
    fits = (memory <= scorer.ledger.capacity_bytes) & (chunk >= batch)
    slots, tokens = (np.broadcast_to(one, fits.shape)[fits] for one in (batch, chunk))
    order = np.argsort(np.broadcast_to(memory, fits.shape)[fits], kind="stable")
    return slots[order], tokens[order]


def _without(
    batch: Array, chunk: Array, refused: tuple[Array, Array] | None
) -> tuple[Array, Array]:
    """The points but those that a limit refuses which is dear to price, as prices are."""
    if refused is None:
        return batch, chunk
    known = set(zip(*(one.tolist() for one in refused), strict=True))
    left = np.array([one not in known for one in zip(batch.tolist(), chunk.tolist(), strict=True)])
    return batch[left], chunk[left]
