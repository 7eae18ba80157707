"""Faults that a proof on PyTorch graphs must catch, each planted in a split step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from shardplan.models.fx.collectives import GROUP_ARGUMENT, collective_of
from shardplan.models.fx.step import SplitStep
from shardplan.models.lockstep import Communication

__all__ = ["FAULTS"]


def _first(step: SplitStep, kind: str) -> Any:
    """The first collective of a kind, in the first stage that has one."""
    return next(
        node
        for stage in step.stages
        for node in stage.graph.nodes
        if collective_of(node).startswith(kind)
    )


def _dropped(step: SplitStep) -> SplitStep:
    """A sum is never taken."""
    node = _first(step, "all_reduce")
    (wait,) = node.users
    wait.replace_all_uses_with(node.args[0])
    node.graph.erase_node(wait)
    node.graph.erase_node(node)
    return step


def _wrong_axis(step: SplitStep) -> SplitStep:
    """A sum is taken over the data-parallel groups."""
    node = _first(step, "all_reduce")
    node.update_arg(GROUP_ARGUMENT["all_reduce"], "dp0")
    return step


def _wrong_dim(step: SplitStep) -> SplitStep:
    """Parts of the logits are interleaved instead of joined."""
    node = _first(step, "all_gather")
    (wait,) = node.users
    view = next(user for user in wait.users)
    order = next(user for user in view.users)
    places = list(order.args[1])
    places[-2], places[-1] = places[-1], places[-2]
    order.update_arg(1, places)
    return step


def _counted_twice(step: SplitStep) -> SplitStep:
    """A sum is taken of sums."""
    node = _first(step, "all_reduce")
    (wait,) = node.users
    graph = node.graph
    with graph.inserting_after(wait):
        again = graph.call_function(node.target, (wait, *node.args[1:]))
    with graph.inserting_after(again):
        last = graph.call_function(wait.target, (again,))
    wait.replace_all_uses_with(last)
    again.update_arg(0, wait)
    return step


def _swapped(step: SplitStep) -> SplitStep:
    """Two ranks load one another's part of a weight."""
    first = [dict(one) for one in step.weights[0]]
    name = next(one for one in first[0] if one.endswith("q_proj.weight"))
    first[0][name], first[1][name] = first[1][name], first[0][name]
    return replace(step, weights=(tuple(first), *step.weights[1:]))


class _Stale(SplitStep):
    """A step in which one rank's cache still holds an older entry."""

    __slots__ = ()

    def run(self, inputs: Any, log: list[Communication]) -> list[list[Any]]:
        given = [list(one) for one in inputs]
        if len(given) > 1:
            cache = given[1][0].clone()
            cache[:, :, -1] = cache[:, :, 0]
            given[1][0] = cache
        return super().run(given, log)


def _stale(step: SplitStep) -> SplitStep:
    names = ("program", "stages", "tensors", "weights", "inputs")
    return _Stale(**{name: getattr(step, name) for name in names})


FAULTS: Mapping[str, Callable[[SplitStep], SplitStep]] = {
    "a collective dropped": _dropped,
    "a wrong axis": _wrong_axis,
    "a wrong dim": _wrong_dim,
    "a double count": _counted_twice,
    "swapped ranks": _swapped,
    "a stale cache entry": _stale,
}
