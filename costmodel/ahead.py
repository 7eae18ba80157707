"""Rows of many layouts priced before the layouts are: one call of a formula for all of them.

Layouts with as many stages ask for their rows at the same steps. `price_ahead` goes through those
steps once for all of them, stacks what no layout has asked for yet (sizes and data-parallel groups
as arrays), and leaves the prices in the memo, where each layout finds them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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
    made: dict[tuple[int, ...], _Ahead] = {}
    for some in alike_.values():
        if len(some) > 1:
            models = tuple(model for model, _ in some)
            ahead = made.setdefault(tuple(map(id, models)), _Ahead(models))
            steady_steps(ahead, some[0][1])


class _Wanted(NamedTuple):
    """A row that no layout has asked for yet, and where its price is looked for."""

    number: int
    row: Row
    groups: int
    """Data-parallel groups of the layout."""
    known: dict[int, Array]


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A pricer that fills the memo of its models and says that nothing takes time."""

    models: tuple[StepModel, ...]
    rows: dict[Hashable, dict[tuple[int, tuple[str, ...]], dict[int, Row]]] = field(
        default_factory=dict, compare=False, repr=False
    )
    """What was found of them."""

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
            wanted = []
            for (dp, dtypes), rows in self._rows(group, own).items():
                known = self.memo.priced((dp, points.number, own.kinds_of(dtypes)))
                wanted += [
                    _Wanted(number, row, dp, known)
                    for number, row in rows.items()
                    if number not in known
                ]
            self._price(own, wanted)
        return [ZERO]

    def _rows(
        self, group: Group, load: Load
    ) -> Mapping[tuple[int, tuple[str, ...]], Mapping[int, Row]]:
        """Different rows of a group by number, of each (data-parallel groups, dtypes they read)."""
        key = (load.phase, group, is_mixed(load.weight_dtype))
        found = self.rows.get(key)
        if found is None:
            found = self.rows[key] = {}
            for model in self.models:
                table, dp = model.table(group, load), model.groups
                for places, _, dtypes in table.stacks:
                    own = found.setdefault((dp, dtypes), {})
                    own.update((table.numbers[place], table.rows[place]) for place in places)
        return found

    def _price(self, load: Load, wanted: Sequence[_Wanted]) -> None:
        """Price rows at once, into where they are known."""
        points = max(1, *load.shape)
        for places in alike((one.row for one in wanted), is_mixed(load.weight_dtype)):
            for start in range(0, len(places), max(_MOST // points, 1)):
                some = [wanted[at] for at in places[start : start + max(_MOST // points, 1)]]
                rows = stack([one.row for one in some])
                dp = np.asarray([float(one.groups) for one in some])[:, None]
                model = Stacked.like(self.models[0], dp)
                priced = model.price(rows.at(range(len(some)), 1), load)
                own = np.empty((len(some), PARTS, *load.shape))
                for part in range(PARTS):
                    own[:, part] = priced[part]
                for one, price in zip(some, own, strict=True):
                    one.known[one.number] = price
