"""Rows of many layouts priced before the layouts are: one call of a formula for all of them.

Layouts with as many stages ask for their rows at the same steps. `price_ahead` goes through those
steps once for all of them, stacks what no layout has asked for yet (sizes and data-parallel groups
as arrays), and leaves the prices in the memo, where each layout finds them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.kernels.base import Array
from shardplan.costmodel.load import PARTS, ZERO, Load, Parts
from shardplan.costmodel.memo import Memo
from shardplan.costmodel.optable import Group
from shardplan.costmodel.row_stacks import alike, stack
from shardplan.costmodel.rows import Row
from shardplan.costmodel.serving import ServingInput, steady_steps
from shardplan.costmodel.step import Stacked, StepModel
from shardplan.costmodel.weight_types import is_mixed
from shardplan.models.graph import Phase

__all__ = ["price_ahead"]

_MOST = 1 << 13
"""Prices of a call at most, so that intermediate arrays stay in the processor's cache."""


def price_ahead(asked: Iterable[tuple[StepModel, ServingInput]]) -> None:
    """Price the rows of steady states that will be asked for, of models that share their memo."""
    alike_: dict[Hashable, list[tuple[StepModel, ServingInput]]] = {}
    for model, given in asked:
        kinds = given.weight_dtype, given.kv_dtype, given.attention
        key = (given.key, kinds, model.stages, model.context_ranks, id(model.engine))
        if given.key is not None:
            alike_.setdefault(key, []).append((model, given))
    for some in alike_.values():
        if len(some) > 1:
            steady_steps(_Ahead(tuple(model for model, _ in some)), some[0][1])


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A pricer that fills the memo of its models and says that nothing takes time."""

    models: tuple[StepModel, ...]

    @property
    def memo(self) -> Memo:
        """The memory of all models."""
        return self.models[0].memo

    @property
    def engine(self) -> EngineProfile:
        """The engine of all models."""
        return self.models[0].engine

    @property
    def groups(self) -> int:
        """Of the first model: no step depends on it."""
        return self.models[0].groups

    @property
    def locked(self) -> int:
        """Of the first model: no step depends on it."""
        return self.models[0].locked

    @property
    def context_ranks(self) -> int:
        """Ranks that share a context, in all models."""
        return self.models[0].context_ranks

    @property
    def stages(self) -> int:
        """Pipeline stages of all models."""
        return self.models[0].stages

    def step_s(self, stages: list[Parts], phase: Phase) -> list[Array]:
        """Seconds of each stage."""
        return self.models[0].step_s(stages, phase)

    def host_s(self, phase: Phase) -> float:
        """Host time of a step."""
        return self.models[0].host_s(phase)

    def parts(self, group: Group, load: Load) -> list[Parts]:
        """Price what the memo lacks of the rows of one group under a load."""
        if load.remembered:
            own, points = load.at_points(self.memo)
            prices = self.memo.prices
            wanted: dict[Hashable, tuple[Row, int]] = {}
            for model in self.models:
                table, dp = model.table(group, own), model.groups
                for number, row in zip(table.numbers, table.rows, strict=True):
                    key = (number, dp, points.number, own.kinds)
                    if key not in prices:
                        wanted[key] = row, dp
            self._price(own, list(wanted), list(wanted.values()))
        return [ZERO]

    def _price(
        self, load: Load, keys: Sequence[Hashable], wanted: Sequence[tuple[Row, int]]
    ) -> None:
        """Price rows `[n]` of layouts of so many data-parallel groups at once."""
        points = max(1, *load.shape)
        for places in alike((row for row, _ in wanted), is_mixed(load.weight_dtype)):
            for start in range(0, len(places), max(_MOST // points, 1)):
                some = places[start : start + max(_MOST // points, 1)]
                rows = stack([wanted[place][0] for place in some])
                dp = np.asarray([float(wanted[place][1]) for place in some])[:, None]
                model = Stacked.like(self.models[0], dp)
                priced = model.price(rows.at(range(len(some)), 1), load)
                own = np.empty((len(some), PARTS, *load.shape))
                for part in range(PARTS):
                    own[:, part] = priced[part]
                for place, price in zip(some, own, strict=True):
                    self.memo.prices[keys[place]] = price
