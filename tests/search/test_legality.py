"""Legality rules: one layout that breaks each and one that keeps it; legal means applicable."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.strategies import models, parallelisms
from tests.search.oracle import dense, sparse, specs

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import load_engine
from shardplan.costmodel.optable import Overlap
from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.errors import LayoutError
from shardplan.models.modules import MODULES
from shardplan.models.parallel import Parallelism, make_mesh
from shardplan.models.spec import ModelSpec
from shardplan.search.legality import (
    RULES,
    SWITCH_RULES,
    Subject,
    first_broken_rule,
    first_broken_switch_rule,
    rules,
    unsupported_switch,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Where a rule decides: `broken` breaks it and it alone, `kept` keeps them all."""

    broken: Parallelism
    kept: Parallelism
    spec: ModelSpec = field(default_factory=dense)
    engine: str = "torch-graph"
    nodes: int = 1


PAIRS = {
    "tp-heads": Pair(broken=Parallelism(tp=3), kept=Parallelism(tp=8)),
    "tp-vocabulary": Pair(spec=dense(vocab=1002), broken=Parallelism(tp=4), kept=Parallelism(tp=2)),
    "pp-layers": Pair(broken=Parallelism(pp=5), kept=Parallelism(pp=4)),
    "sp-tp": Pair(broken=Parallelism(sp=True), kept=Parallelism(tp=2, sp=True)),
    "ep-experts": Pair(
        spec=sparse(experts=6), broken=Parallelism(dp=4, ep=4), kept=Parallelism(dp=4, ep=2)
    ),
    "ep-shape": Pair(
        spec=sparse(), broken=Parallelism(dp=2, ep=4), kept=Parallelism(tp=2, dp=2, ep=4)
    ),
    "tp-width": Pair(spec=dense(ffn=516), broken=Parallelism(tp=8), kept=Parallelism(tp=4)),
    "ep-engine": Pair(
        spec=sparse(),
        engine="vllm-ascend",
        broken=Parallelism(tp=2, dp=2, ep=2),
        kept=Parallelism(tp=2, dp=2, ep=4),
    ),
    "pp-engine": Pair(engine="mindie", broken=Parallelism(pp=2), kept=Parallelism(tp=2)),
    "tp-tier": Pair(
        spec=dense(heads=16, kv_heads=16),
        nodes=2,
        broken=Parallelism(tp=16),
        kept=Parallelism(tp=8, dp=2),
    ),
}


def _subject(pair: Pair, par: Parallelism) -> Subject:
    return Subject(
        spec=pair.spec,
        cluster=load_cluster("atlas-800t-a2", nodes=pair.nodes),
        engine=load_engine(pair.engine),
        parallel=par,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Switched:
    """Where a rule on a switch decides: `broken` breaks it and no rule before it."""

    broken: dict[str, Any]
    kept: dict[str, Any]


FUSED, PREFETCH = Overlap(fused_collectives=True), Overlap(weight_prefetch=True)
SWITCHED = {
    "fused-device": Switched(
        broken={"overlap": FUSED, "cluster": "atlas-800i-a3"}, kept={"overlap": FUSED}
    ),
    "fused-engine": Switched(
        broken={"overlap": FUSED, "weight_dtype": "w8a8"}, kept={"overlap": FUSED}
    ),
    "fused-group": Switched(
        broken={"overlap": FUSED, "parallel": Parallelism(tp=1, dp=4)},
        kept={"overlap": FUSED, "parallel": Parallelism(tp=8)},
    ),
    "fused-sp": Switched(
        broken={"overlap": FUSED, "parallel": Parallelism(tp=4, sp=True)},
        kept={"overlap": PREFETCH, "parallel": Parallelism(tp=4, sp=True)},
    ),
    "prefetch-device": Switched(
        broken={"overlap": PREFETCH, "cluster": "atlas-300i-duo"},
        kept={"overlap": PREFETCH, "parallel": Parallelism(tp=4, sp=True)},
    ),
    "prefetch-engine": Switched(
        broken={"overlap": PREFETCH, "engine": "mindie"},
        kept={"overlap": PREFETCH, "spec": sparse(), "cluster": "atlas-800i-a3"},
    ),
    "prefetch-sp": Switched(
        broken={"overlap": PREFETCH, "parallel": Parallelism(tp=4)},
        kept={"overlap": replace(PREFETCH, fused_collectives=True)},
    ),
}


def _switched(
    overlap: Overlap,
    cluster: str = "atlas-800t-a2",
    engine: str = "vllm-ascend",
    spec: ModelSpec | None = None,
    parallel: Parallelism = Parallelism(tp=4),  # noqa: B008  # frozen
    weight_dtype: str = "bf16",
) -> Subject:
    return Subject(
        spec=spec or dense(),
        cluster=load_cluster(cluster),
        engine=load_engine(engine),
        parallel=parallel,
        overlap=overlap,
        weight_dtype=weight_dtype,
    )


def test_every_rule_has_a_sentence_a_predicate_and_a_case_here() -> None:
    assert set(rules()) == {*RULES, *SWITCH_RULES} == {*PAIRS, *SWITCHED}
    for rule in rules().values():
        assert rule.sentence.strip()
        assert rule.source.strip()
        assert rule.scope.strip()


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_a_rule_names_what_breaks_it_and_lets_the_rest_pass(name: str) -> None:
    pair = PAIRS[name]
    assert first_broken_rule(_subject(pair, pair.broken)) == name
    assert first_broken_rule(_subject(pair, pair.kept)) is None


@pytest.mark.parametrize("name", sorted(SWITCHED))
def test_a_rule_on_a_switch_names_what_breaks_it_and_lets_the_rest_pass(name: str) -> None:
    case = SWITCHED[name]
    assert first_broken_switch_rule(_switched(**case.broken)) == name
    assert first_broken_switch_rule(_switched(**case.kept)) is None


def test_no_rule_binds_where_no_switch_is_on() -> None:
    off = _switched(Overlap(), cluster="hgx-h200", engine="vllm", parallel=Parallelism())
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
    pair = Pair(broken=Parallelism(dp=2, ep=2), kept=Parallelism(dp=2))
    assert first_broken_rule(_subject(pair, pair.broken)) == "ep-experts"


def test_tensor_parallelism_crosses_nodes_where_no_roce_joins_them() -> None:
    """A supernode's switch joins its nodes; RoCE rules out the same group on Atlas 800T A2."""
    pair = PAIRS["tp-tier"]
    subject = replace(
        _subject(pair, pair.broken), cluster=load_cluster("cloudmatrix-384", cards=16)
    )
    assert first_broken_rule(subject) is None


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
    rule = first_broken_rule(subject)
    if rule is None:
        assert _applies(spec, par)
    elif rule != "sp-tp":  # applying it changes nothing, so the graph allows it
        assert not _applies(spec, par)
