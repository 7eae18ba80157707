"""Points of many layouts priced together equal the step model of each of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.costmodel.priced import CASES, PHASES, Priced, load, price

from shardplan.costmodel.bulk import Dtypes, Fleet, Indices
from shardplan.costmodel.bulk_memory import FleetMemory
from shardplan.costmodel.forward import forward_loads
from shardplan.costmodel.kernels.base import Array, as_array
from shardplan.costmodel.run_out import run_out
from shardplan.costmodel.serving import ServingInput
from shardplan.costmodel.steps import step_seconds
from shardplan.models.catalog import load_model
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism

CHOICES = (
    Dtypes("bf16", "bf16", "flash"),
    Dtypes("w8a8", "int8", "flash"),
    Dtypes("w8a16", "bf16", "naive"),
)
ENGINES = ("vllm-ascend", "vllm-ascend-eager", "mindie")


def cases(engine: str) -> list[Priced]:
    """Every way of splitting of `CASES` under one engine."""
    return [load(name, engine=engine) for name in CASES]


def fleet_of(layouts: Sequence[Priced], which: Indices, choice: Indices) -> Fleet:
    """The fleet of these points."""
    return Fleet.of([one.model for one in layouts], which, CHOICES, choice)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("phase", PHASES)
def test_a_pass_costs_what_its_step_model_says(engine: str, phase: Phase) -> None:
    """Seconds, each part and each stage, for every layout, dtype and kernel at random loads."""
    layouts = cases(engine)
    draw = np.random.default_rng(7)
    points = 3 * len(layouts) * len(CHOICES)
    which, choice = np.divmod(np.arange(points), 3 * len(CHOICES))
    choice = choice % len(CHOICES)
    batch, tokens = draw.integers(1, 200, points) * 1.0, draw.integers(1, 9000, points) * 1.0
    new = tokens if phase == "prefill" else np.ones(points)
    loads: dict[str, Any] = {"batch": batch, "new": new, "prefix": tokens - new}
    fleet = fleet_of(layouts, which, choice)
    total, stages = step_seconds(fleet, phase, **loads, **CHOICES[0]._asdict())
    for point in range(points):
        own = {name: values[point] for name, values in loads.items()}
        model = layouts[which[point]].model
        want, parts = step_seconds(model, phase, **own, **CHOICES[choice[point]]._asdict())
        assert total[point] == pytest.approx(float(want), rel=1e-12)
        for found, one in zip(stages, parts, strict=False):
            for name in ("compute_s", "memory_s", "collective_s", "overhead_s"):
                here = getattr(found, name)[point]
                assert here == pytest.approx(float(getattr(one, name)), rel=1e-12, abs=1e-18)
        beyond = stages[len(parts) :]
        assert all(one.total_s[point] == 0.0 for one in beyond)


def test_some_points_of_a_fleet_cost_what_they_did_in_it() -> None:
    layouts = cases("vllm-ascend")
    which = np.arange(len(layouts))
    fleet = fleet_of(layouts, which, which % len(CHOICES))
    some = np.asarray([1, 4, 5, 11])
    batch = np.exp2(which % 7)
    whole, _ = step_seconds(
        fleet, "decode", batch=batch, new=1.0, prefix=999.0, **CHOICES[0]._asdict()
    )
    part, _ = step_seconds(
        fleet.take(some), "decode", batch=batch[some], new=1.0, prefix=999.0, **CHOICES[0]._asdict()
    )
    np.testing.assert_allclose(part, whole[some], rtol=1e-12)


@pytest.mark.parametrize("engine", ["vllm-ascend", "mindie"])
def test_a_benchmark_runs_as_on_its_own_step_model(engine: str) -> None:
    """Closed loops, offered rates and steady states, chunks and slots, in one fleet.

    Slots for a rate are found to a part in a thousand: rounding may end that search elsewhere.
    """
    layouts = cases(engine)
    which = np.arange(len(layouts))
    choice = which % len(CHOICES)
    slots = np.exp2(which % 8)
    chunk = np.where(which % 2, 2048.0, 8192.0)
    rate = np.where(which % 3 == 0, 0.7, np.inf)
    prompts = np.where(which % 4 == 0, np.inf, 300.0 + which)
    prompt, output = as_array(100 * (1 + which)), as_array(1 + 37 * (which % 5))
    fleet = fleet_of(layouts, which, choice)
    together = run_out(
        fleet,
        ServingInput(
            batch=slots, chunk=chunk, in_flight=2.0 * slots, input_len=prompt, output_len=output
        ),
        request_rate=rate,
        num_prompts=prompts,
    )
    for point, layout in enumerate(layouts):
        one = slice(point, point + 1)
        alone = run_out(
            layout.model,
            ServingInput(
                batch=slots[one],
                chunk=chunk[one],
                in_flight=2.0 * slots[one],
                input_len=prompt[one],
                output_len=output[one],
                **CHOICES[choice[point]]._asdict(),
            ),
            request_rate=rate[one],
            num_prompts=prompts[one],
        )
        for name in ("slots", "ttft_mean_s", "ttft_p99_s", "tpot_p99_s", "output_tokens_per_s"):
            assert getattr(together, name)[point] == pytest.approx(
                float(getattr(alone, name)[0]), rel=1e-3 if np.isfinite(rate[point]) else 1e-9
            ), name


@settings(max_examples=10)
@given(batch=st.integers(1, 300), step=st.integers(1, 20000), context=st.integers(1, 50000))
def test_memory_is_that_of_each_ledger(batch: int, step: int, context: int) -> None:
    """The fullest stage of every layout, dtype and kernel."""
    layouts = cases("vllm-ascend")
    which, choice = np.divmod(np.arange(len(layouts) * len(CHOICES)), len(CHOICES))
    machine = layouts[0].model.machine
    memory = FleetMemory.of([one.ledger for one in layouts], machine, which, CHOICES, choice)

    def full(value: float) -> Array:
        return np.full(which.size, float(value))

    found = memory.fullest_bytes(batch=full(batch), step_tokens=full(step), context=full(context))
    slots = memory.slots(chunk=full(step), context=full(context))
    for point in range(which.size):
        ledger = layouts[which[point]].ledger
        held = {"machine": machine, "tokens": step, "context": context}
        stages = ledger.stages(batch=batch, **CHOICES[choice[point]]._asdict(), **held)
        want = max(float(one.total_bytes) for one in stages)
        assert found[point] == pytest.approx(want, rel=1e-12)
        block = float(ledger.engine.kv_block_tokens * ledger.graph.parallel.cp)
        empty = ledger.stages(batch=0, **CHOICES[choice[point]]._asdict(), **held)
        fit = [
            (ledger.capacity_bytes - float(one.total_bytes))
            // (-(-context // block) * block * ledger.kv_bytes_per_token(stage, kv_dtype))
            for one, stage in zip(empty, ledger.graph.stages, strict=True)
            for kv_dtype in (CHOICES[choice[point]].kv_dtype,)
        ]
        assert slots[point] == min(fit)


def test_a_tied_head_is_held_once_where_the_embedding_is() -> None:
    """One stage holds both, two hold one each."""
    spec = load_model("qwen3-0.6b")
    layouts = [price(spec, Parallelism(pp=pp)) for pp in (1, 2)]
    which = np.arange(2)
    choice = np.zeros(2, dtype=np.int64)
    memory = FleetMemory.of(
        [one.ledger for one in layouts], layouts[0].model.machine, which, CHOICES, choice
    )
    for point, layout in enumerate(layouts):
        fixed = layout.ledger.communicators * layout.ledger.engine.communicator_bytes
        fixed += layout.ledger.engine.reserve_bytes
        for index, stage in enumerate(layout.model.graphs["decode"].stages):
            want = layout.ledger.weights_bytes(stage, "bf16") + fixed
            assert memory.weights[point, 0, index] == pytest.approx(want, rel=1e-15)


def test_loads_of_one_number_serve_all_points() -> None:
    """A load that is common to all points is priced as one of each."""
    layouts = cases("vllm-ascend")[:4]
    which = np.arange(4)
    fleet = fleet_of(layouts, which, which % 2)
    loads = forward_loads(
        "decode", fleet.engine, batch=8.0, new=1.0, prefix=511.0, **CHOICES[0]._asdict()
    )
    for group, load_ in loads.items():
        for point, layout in enumerate(layouts):
            own = forward_loads(
                "decode",
                fleet.engine,
                batch=8.0,
                new=1.0,
                prefix=511.0,
                **CHOICES[point % 2]._asdict(),
            )
            want = sum(float(one.total_s) for one in layout.model.parts(group, own[group]))
            found = sum(float(one.total_s[point]) for one in fleet.parts(group, load_))
            assert found == pytest.approx(want, rel=1e-12)
