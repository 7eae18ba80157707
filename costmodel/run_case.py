"""What a benchmark run is asked of, in arrays; rows of it, and the steady state at other slots."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from shardplan.costmodel.bulk import Fleet, Indices
from shardplan.costmodel.forward import Pricer
from shardplan.costmodel.kernels.base import Array, ArrayLike, as_array
from shardplan.costmodel.serving import Serving, ServingInput, serve, steady

__all__ = ["Bools", "Case", "at_slots", "filled", "rate_at", "some_rows"]

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Arrays `[rows]` that every formula below needs."""

    given: ServingInput
    prompts: Array
    """Of one dp group; infinity for a steady state."""
    rate: Array
    """Offered to one dp group, requests a second; infinity for closed loop."""
    prompt: Array
    steps: Array
    """Decode steps of a request."""
    allowed: Array
    """Slots that the engine would run if memory held them."""
    left: Array
    """Share of the dp groups that serve."""


def at_slots(model: Pricer, given: ServingInput, slots: Array) -> Serving:
    """The steady state with other slots in use; requests beyond `given.batch` keep waiting."""
    return serve(model, replace(given, batch=slots, in_flight=None))


def rate_at(model: Pricer, given: ServingInput, slots: Array) -> Array:
    """Requests a second of `at_slots`, which is less work."""
    state = steady(model, replace(given, batch=slots, in_flight=None))
    return state.timed.requests_per_s


def some_rows(model: Pricer, case: Case, rows: Indices) -> tuple[Pricer, Case]:
    """The rows alone, of the model too where it is a fleet of points."""
    shape = case.prompts.shape

    def taken(values: ArrayLike) -> Array:
        return np.broadcast_to(as_array(values), shape)[rows]

    given, in_flight = case.given, case.given.in_flight
    few = replace(
        given,
        batch=taken(given.batch),
        chunk=taken(given.chunk),
        input_len=taken(given.input_len),
        output_len=taken(given.output_len),
        prefix_hit=taken(given.prefix_hit),
        in_flight=None if in_flight is None else taken(in_flight),
        mtp=taken(given.mtp),
        acceptance=taken(given.acceptance),
    )
    own = Case(
        given=few,
        prompts=case.prompts[rows],
        rate=case.rate[rows],
        prompt=taken(case.prompt),
        steps=taken(case.steps),
        allowed=taken(case.allowed),
        left=taken(case.left),
    )
    return (model.take(rows) if isinstance(model, Fleet) else model), own


def filled(served: Serving, shape: tuple[int, ...]) -> Serving:
    """Every array in the shape of the rows."""
    return Serving(
        **{one.name: np.broadcast_to(getattr(served, one.name), shape) for one in fields(Serving)}
    )
