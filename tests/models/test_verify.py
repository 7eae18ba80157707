"""The proof of a plan: what it covers, what it says, and that every legal plan passes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.faults import edited
from tests.models.strategies import models, parallelisms, tiny

from shardplan.models.apply import ShardedGraph, ShardedOp, apply
from shardplan.models.build import build_graph
from shardplan.models.catalog import load_model
from shardplan.models.errors import LayoutError
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism, make_mesh
from shardplan.models.shrink import Case, shrink
from shardplan.models.spec import ModelSpec
from shardplan.models.verify import check_static, prove, prove_case

PHASES: tuple[Phase, ...] = ("prefill", "decode")
PLANS = [
    ("llama-3.1-8b", Parallelism(tp=4)),
    ("llama-3.1-70b", Parallelism(tp=16)),
    ("llama-3.1-405b", Parallelism(tp=8, pp=4, sp=True)),
    ("qwen2.5-72b", Parallelism(tp=8, pp=3, stage_layers=(26, 28, 26))),
    ("qwen3-32b", Parallelism(tp=4, dp=4)),
    ("qwen3-235b-a22b", Parallelism(tp=8, dp=4, ep=32)),
    ("mixtral-8x7b", Parallelism(tp=8, ep=4, sp=True)),
    ("deepseek-v2-lite", Parallelism(tp=2, dp=2, ep=4)),
    ("deepseek-v3", Parallelism(tp=4, dp=8, pp=2, ep=32, exchange="alltoall")),
    ("deepseek-r1", Parallelism(dp=256, ep=256, exchange="alltoall")),
    ("glm-4.5", Parallelism(tp=8, dp=2, ep=16, sp=True, exchange="alltoall")),
    ("kimi-k2", Parallelism(tp=16, dp=2, ep=32)),
    ("minimax-m2.5", Parallelism(tp=8, ep=8)),
    ("pangu-pro-moe", Parallelism(tp=4, dp=2, ep=8)),
    ("llama-3.1-70b", Parallelism(tp=8, cp=4, pp=2, sp=True)),
    ("qwen3-235b-a22b", Parallelism(tp=4, cp=4, dp=2, ep=16, exchange="alltoall")),
    ("deepseek-v3", Parallelism(tp=2, cp=8, dp=4, ep=64)),
    (
        "deepseek-r1",
        Parallelism(dp=256, ep=256, exchange="alltoall", o_tp=8, ffn_tp=8, head_tp=16, embed_tp=4),
    ),
    ("glm-4.5", Parallelism(tp=8, dp=2, ep=16, sp=True, shared_tp=1, head_tp=16, o_tp=1)),
]


@pytest.mark.parametrize(("name", "par"), PLANS, ids=lambda v: v if isinstance(v, str) else None)
def test_typical_plans_of_real_models_are_proven(name: str, par: Parallelism) -> None:
    """Shows its time under `pytest -s`."""
    proof = prove(load_model(name), par)
    print(f"{name} {par.describe()}: {proof.wall_s:.2f} s")
    assert [check for check in proof.checks if not check.passed] == []
    assert proof.passed
    assert (proof.model, proof.strategy) == (name, par.describe())


def test_a_proof_names_what_it_checked() -> None:
    proof = prove(tiny(), Parallelism(tp=2))
    assert [(check.level, check.name) for check in proof.checks] == [
        (0, "prefill: dims divide"),
        (0, "prefill: weights owned"),
        (0, "prefill: blocks joined"),
        (0, "decode: dims divide"),
        (0, "decode: weights owned"),
        (0, "decode: blocks joined"),
        (1, "float64: prefill, decode, reset"),
        (1, "elements on the right ranks"),
        (1, "prefill: blocks joined"),
        (1, "decode: blocks joined"),
        (1, "int8 weights: prefill, decode, reset"),
    ]


def test_level_nought_computes_nothing() -> None:
    assert {check.level for check in prove(tiny(), Parallelism(tp=2), level=0).checks} == {0}


def test_the_same_plan_gives_the_same_proof() -> None:
    one, two = (prove(tiny(), Parallelism(tp=2, pp=2), seed=5) for _ in range(2))
    assert one.checks == two.checks


def test_a_plan_that_does_not_fit_the_model_is_no_proof() -> None:
    with pytest.raises(LayoutError, match="tp must divide"):
        prove(tiny(), Parallelism(tp=3))


def failed_static(graph: ShardedGraph) -> list[str]:
    """Details of the static checks that fail."""
    return [check.detail for check in check_static((graph,)) if not check.passed]


def with_node(graph: ShardedGraph, name: str, **changes: object) -> ShardedGraph:
    """The graph with one operator changed."""

    def edit(node: ShardedOp) -> tuple[ShardedOp]:
        return (replace(node, **changes) if node.name == name else node,)  # type: ignore[arg-type]

    wrong, changed = edited(graph, edit)
    assert changed == 1
    return wrong


def test_static_checks_find_a_dim_that_does_not_divide() -> None:
    """kv heads: 2, cut 4 ways."""
    graph = apply(build_graph(tiny(heads=8), "prefill"), Parallelism(tp=4))
    assert failed_static(graph) == []
    wrong = with_node(graph, "k", weight_layout=(("tp0", "K"), ("tp1", "K")))
    assert failed_static(wrong)[0] == "a cut dim must divide (k.K: 2 / 4)"


def test_static_checks_find_a_weight_that_no_rank_holds_whole() -> None:
    graph = apply(build_graph(tiny(), "prefill"), Parallelism(tp=2))
    wrong = with_node(graph, "gate", weight_layout=(("tp0", "X"),))
    assert failed_static(wrong) == [
        "each weight element is held by ranks / ways ranks (dense.gate: 96 * 2 != 96)"
    ]


def test_static_checks_find_blocks_that_do_not_join() -> None:
    graph = apply(build_graph(tiny(), "prefill"), Parallelism(dp=2, pp=2))
    wrong = with_node(graph, "add2", layout=())
    assert failed_static(wrong) == [
        "a block's output lies as its reader expects (dense to send: () for (('dp0', 'B'),))"
    ]


@pytest.mark.parametrize(("name", "par"), PLANS, ids=lambda v: v if isinstance(v, str) else None)
def test_the_small_case_keeps_what_a_plan_can_get_wrong(name: str, par: Parallelism) -> None:
    spec = load_model(name)
    case = shrink(spec, par)
    real, small = make_mesh(spec, par), make_mesh(case.spec, case.parallel)
    assert small.axes == real.axes
    assert small.groups == real.groups
    assert small.size(small.groups["tp"]) == par.tp
    assert case.parallel.pp == par.pp == len(case.parallel.stage_layers)
    kept = {kind.removeprefix("sliding_") for kind in build_graph(case.spec, "decode").layers}
    assert kept == set(build_graph(spec, "decode").layers)
    for group in ("kv", "q", "tpe", "tpf", "o+", "ffn+", "head+"):
        assert small.size(small.groups[group]) == real.size(real.groups[group])


def refusal(spec: ModelSpec, par: Parallelism) -> LayoutError | None:
    """Why the strategy cannot be laid on the model, if it cannot."""
    try:
        for phase in PHASES:
            apply(build_graph(spec, phase), par)
    except LayoutError as error:
        return error
    return None


@given(st.data())
@settings(max_examples=80)
def test_every_legal_strategy_is_proven(data: st.DataObject) -> None:
    """Any model under any split: refused with a reason, or right to the last collective.

    Proven on the drawn sizes themselves, and on the small case that a real model would get.
    """
    spec = data.draw(models())
    par = data.draw(parallelisms(spec))
    refused = refusal(spec, par)
    if refused is not None:
        assert refused.rule
        assert refused.got
        return
    cuts_tokens = par.sp or (par.ep > 1 and par.exchange == "alltoall")
    ways = par.tp if cuts_tokens else 1
    batch, tokens = 2 * par.dp * ways * par.cp, 2 * ways * par.cp
    drawn = Case(spec=spec, parallel=par, batch=batch, tokens=tokens)
    for case in (drawn, shrink(spec, par)):
        checks = prove_case(case) + prove_case(case, quantized=True)
        assert [check for check in checks if not check.passed] == []
