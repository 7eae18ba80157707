"""Legality rules: one subject that breaks each and one that keeps it; legal means applicable."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.strategies import models, parallelisms
from tests.search.legality_cases import (
    A2,
    FORMATS,
    FUSED,
    LAYOUTS,
    PAIRS,
    PREFETCH,
    SWITCHES,
    VLLM,
    P,
    subject,
)
from tests.search.oracle import dense, sparse, specs

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import engine_names, load_engine
from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.errors import LayoutError
from shardplan.models.modules import MODULES
from shardplan.models.parallel import Parallelism, make_mesh
from shardplan.models.spec import ModelSpec
from shardplan.search.families import family_names
from shardplan.search.legal_choice import FORMAT_RULES, SWITCH_RULES
from shardplan.search.legal_layout import LAYOUT_RULES
from shardplan.search.legal_pair import PAIR_RULES
from shardplan.search.legality import (
    RULES,
    broken_rules,
    first_broken_format_rule,
    first_broken_pair_rule,
    first_broken_rule,
    first_broken_switch_rule,
    unsupported_switch,
)
from shardplan.search.rulebook import Subject, rules


def test_every_rule_has_a_sentence_a_predicate_and_a_case_here() -> None:
    tables = (RULES, FORMAT_RULES, SWITCH_RULES, PAIR_RULES)
    assert sum(map(len, tables)) == len(rules()) >= 40
    assert set(rules()) == {name for table in tables for name in table}
    assert set(RULES) == set(LAYOUTS)
    assert set(FORMAT_RULES) == set(FORMATS)
    assert set(SWITCH_RULES) == set(SWITCHES)
    assert set(PAIR_RULES) == set(PAIRS)


def test_every_rule_says_whom_it_binds_and_whence_it_comes() -> None:
    families = {*family_names(), "ascend", "nvidia"}
    for rule in rules().values():
        assert rule.sentence.strip()
        assert len(rule.source) > 10
        assert rule.devices == "all" or set(rule.devices) <= families, rule.id
        assert rule.engines == "all" or set(rule.engines) <= set(engine_names()), rule.id


def test_numbers_of_a_sentence_are_those_that_the_rule_compares_with() -> None:
    """Lists end in ranges of words, so each single number must be found in the sentence."""
    for rule in rules().values():
        for number in (one for one in rule.values.values() if isinstance(one, int)):
            assert re.search(rf"\b{number}\b", rule.sentence), rule.id


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_rule_names_what_breaks_it_and_lets_the_rest_pass(name: str) -> None:
    case = LAYOUTS[name]
    assert broken_rules(case.broken) == (name,)
    assert first_broken_rule(case.broken) == name
    assert broken_rules(case.kept) == ()
    assert first_broken_rule(case.kept) is None


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_rule_on_types_names_what_breaks_it_and_lets_the_rest_pass(name: str) -> None:
    case = FORMATS[name]
    assert first_broken_format_rule(case.broken) == name
    assert first_broken_format_rule(case.kept) is None


@pytest.mark.parametrize("name", sorted(SWITCHES))
def test_a_rule_on_a_switch_names_what_breaks_it_and_lets_the_rest_pass(name: str) -> None:
    case = SWITCHES[name]
    assert first_broken_switch_rule(case.broken) == name
    assert first_broken_switch_rule(case.kept) is None


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_a_rule_on_pools_names_what_breaks_it_and_lets_the_rest_pass(name: str) -> None:
    broken, kept = PAIRS[name]
    assert first_broken_pair_rule(*broken) == name
    assert first_broken_pair_rule(*kept) is None


def test_a_rule_binds_only_its_own_devices_and_engines() -> None:
    """ep 2 within tp 4 and dp 2 is nothing to vLLM alone; 310P has no experts under vLLM alone."""
    layout = P(tp=4, dp=2, ep=2)
    assert first_broken_rule(subject(sparse(), engine=VLLM, parallel=layout)) == "ep-engine"
    assert first_broken_rule(subject(sparse(), parallel=layout)) is None
    on_310p: dict[str, Any] = {
        "spec": sparse(),
        "cluster": "atlas-300i-duo",
        "parallel": P(tp=2, ep=2),
    }
    assert first_broken_rule(subject(engine=VLLM, **on_310p)) == "ep-310p"
    assert first_broken_rule(subject(**on_310p)) is None
    assert first_broken_rule(subject(sparse(), A2, engine=VLLM, parallel=P(tp=2, ep=2))) is None


def test_no_rule_binds_where_no_switch_is_on() -> None:
    off = subject(cluster="hgx-h200", engine="vllm")
    assert first_broken_switch_rule(off) is None


def test_what_no_layout_can_change_is_known_before_any_is_drawn() -> None:
    """tp 1 is a matter of the layout, a device or a dtype without the kernel is not."""
    cluster, engine = load_cluster("atlas-800t-a2"), load_engine("vllm-ascend")
    assert unsupported_switch(dense(), cluster, engine, FUSED, "bf16") is None
    assert unsupported_switch(dense(), cluster, engine, FUSED, "w8a16") == "fused-engine"
    other = load_cluster("hgx-h200")
    assert unsupported_switch(dense(), other, load_engine("vllm"), PREFETCH, "bf16") == (
        "prefetch-device"
    )


def test_experts_ask_for_a_model_that_has_some() -> None:
    assert first_broken_rule(subject(parallel=P(dp=2, ep=2))) == "ep-experts"


def test_tensor_parallelism_crosses_nodes_where_no_roce_joins_them() -> None:
    """A supernode's switch joins its nodes; RoCE rules out the same group on Atlas 800T A2."""
    broken = LAYOUTS["tp-tier"].broken
    joined = replace(broken, cluster=load_cluster("cloudmatrix-384", cards=16))
    assert first_broken_rule(joined) is None


def _applies(spec: ModelSpec, par: Parallelism) -> bool:
    try:
        make_mesh(spec, par)
        for phase in ("prefill", "decode"):
            apply(build_graph(spec, phase), par)
    except LayoutError:
        return False
    return True


_AS_TP: dict[str, Any] = {f"{module}_tp": 0 for module in MODULES}


@settings(max_examples=150)
@given(specs() | models(), st.data())
def test_legal_means_applicable(spec: ModelSpec, data: st.DataObject) -> None:
    """A layout that passes the rules can be applied; one that a model rule refuses cannot be."""
    par = replace(data.draw(parallelisms(spec)), stage_layers=(), cp=1, **_AS_TP)
    subject = Subject(
        spec=spec,
        cluster=load_cluster("cloudmatrix-384"),
        engine=load_engine("torch-graph"),
        parallel=par,
    )
    known = rules()
    graph = [
        rule
        for rule in broken_rules(subject)
        if rule in LAYOUT_RULES and known[rule].devices == known[rule].engines == "all"
    ]
    if graph in ([], ["sp-tp"]):  # applying that changes nothing, so the graph allows it
        assert _applies(spec, par)
    else:
        assert not _applies(spec, par)
