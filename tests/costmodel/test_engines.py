"""Engine profiles: what ships, what sets them apart, what a bad file says."""

from __future__ import annotations

import dataclasses
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.engines import (
    FUSIONS,
    EngineProfile,
    engine_from_table,
    engine_names,
    load_engine,
)
from shardplan.costmodel.errors import DataFileError
from shardplan.models.errors import UnknownNameError

ENGINES = resources.files("shardplan.costmodel") / "data" / "engines"


def text(name: str) -> str:
    return (ENGINES / f"{name}.toml").read_text(encoding="utf-8")


def table(name: str) -> dict[str, Any]:
    return tomllib.loads(text(name))


def test_the_promised_profiles_ship() -> None:
    assert set(engine_names()) == {
        *("vllm-ascend", "vllm-ascend-eager", "mindie", "torch-graph", "vllm", "trtllm"),
    }


@pytest.mark.parametrize("name", engine_names())
def test_every_field_has_a_fact(name: str) -> None:
    """Switches that a file may leave out aside: those have none of them then."""
    engine = load_engine(name)
    fields = dataclasses.fields(EngineProfile)
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    assert needed - {"name", "title", "facts"} <= set(engine.facts)
    for field in fields:
        if field.default is not dataclasses.MISSING and field.name not in engine.facts:
            assert getattr(engine, field.name) == field.default
    assert engine.name == name
    assert set(engine.fused) <= set(FUSIONS)


def test_eager_mode_differs_from_graph_mode_as_the_flag_says() -> None:
    graph, eager = load_engine("vllm-ascend"), load_engine("VLLM-Ascend-Eager")
    assert graph.decode_graph
    assert not eager.prefill_graph
    assert not eager.decode_graph
    assert set(eager.fused) < set(graph.fused)
    assert eager.launch_gap_s > graph.launch_gap_s
    assert (graph.max_num_batched_tokens, graph.max_num_seqs) == (2048, 256)


def test_a_step_waits_for_its_last_rank_where_every_rank_is_a_process() -> None:
    """7.9 of 10.5 ms of collectives in the measured decode step on 16 dies are waiting."""
    engine = load_engine("vllm-ascend")
    assert engine.skew_s("decode", 1) == 0.0
    assert engine.skew_s("decode", 16) == pytest.approx(7.9e-3, rel=0.01)
    assert engine.skew_s("decode", 4) == pytest.approx(engine.skew_s("decode", 16) / 5)
    assert engine.skew_s("prefill", 16) > engine.skew_s("decode", 16)
    assert load_engine("torch-graph").skew_s("decode", 16) == 0.0


def test_mindie_keeps_a_fifth_of_the_memory_back_and_runs_prompts_first() -> None:
    engine = load_engine("mindie")
    assert engine.memory_fraction == 0.8
    assert engine.prefill_first
    assert not engine.chunked_prefill
    assert engine.kv_block_tokens == 128
    assert engine.communicator_bytes == 2 * 200 * 2**20


def test_the_measured_graph_step_has_no_host_time_and_no_sampling() -> None:
    engine = load_engine("torch-graph")
    assert (engine.step_host_s, engine.prefill_step_host_s) == (0, 0)
    assert 0 < engine.launch_gap_s < 1e-6
    assert engine.prefill_graph
    assert engine.decode_graph
    assert not engine.sampling


def test_a_users_file_stands_in_for_a_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text("vllm").replace('name = "vllm"', 'name = "mine"'), encoding="utf-8")
    assert load_engine(file).name == "mine"
    assert load_engine(str(file)).step_host_s == pytest.approx(7e-4)


def test_an_unknown_profile_gets_the_closest_one() -> None:
    with pytest.raises(UnknownNameError, match=r"profile .*did you mean vllm-ascend"):
        load_engine("vllm-ascen")


@pytest.mark.parametrize(
    ("key", "field", "value", "said"),
    [
        ("fused", "value", ["qkv", "swigloo"], "must be one of qkv"),
        ("memory_fraction", "value", 1.2, "between 0.05 and 1"),
        ("decode_graph", "value", 1, "`decode_graph` is true or false"),
        ("kv_block_tokens", "value", 0, "between 1 and"),
        ("step_host_us", "value", -1, "between 0 and"),
        ("step_host_us", "source", "", "not blank"),
    ],
)
def test_a_profile_that_breaks_a_rule_is_refused(
    key: str, field: str, value: object, said: str
) -> None:
    engine = table("vllm-ascend")
    engine[key][field] = value
    with pytest.raises(DataFileError, match=said):
        engine_from_table(engine, "x.toml")


def result_or_refusal(engine: dict[str, Any]) -> EngineProfile | str:
    """The profile, or the text of its refusal; any other exception is a bug and passes."""
    try:
        return engine_from_table(engine, "fuzz.toml")
    except DataFileError as error:
        return str(error)


JUNK = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@given(data=st.data(), junk=JUNK | st.lists(JUNK, max_size=3))
def test_any_mutation_loads_or_is_refused_in_words(data: st.DataObject, junk: object) -> None:
    engine = table("vllm-ascend")
    key = data.draw(st.sampled_from(sorted(engine)))
    if isinstance(engine[key], dict) and data.draw(st.booleans()):
        engine[key][data.draw(st.sampled_from(["value", "kind", "source", "x"]))] = junk
    else:
        engine[key] = junk
    outcome = result_or_refusal(engine)
    assert isinstance(outcome, EngineProfile) or "fuzz.toml" in outcome
