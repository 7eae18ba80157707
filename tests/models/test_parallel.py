"""Meshes and stages by hand, and what is said of a split that does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models.strategies import models, parallelisms, tiny, tiny_mla, tiny_moe

from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.errors import LayoutError
from shardplan.models.modules import MODULES, module_ranks
from shardplan.models.parallel import (
    Parallelism,
    assignment,
    balanced_stages,
    check_pipeline,
    make_mesh,
    roles_of,
)
from shardplan.models.ranks import extents
from shardplan.models.spec import ModelSpec

WIDE = tiny(heads=16, kv_heads=4, ffn=48)


def test_tensor_parallelism_within_the_kv_heads_is_one_axis() -> None:
    mesh = make_mesh(WIDE, Parallelism(tp=4, dp=3))
    assert (mesh.axes, mesh.shape) == (("dp0", "tp0"), (3, 4))
    assert mesh.groups["kv"] == mesh.groups["tp"] == ("tp0",)
    assert mesh.groups["q"] == ()
    assert (mesh.ranks, mesh.size(("tp0",)), mesh.size(("dp0", "tp0"))) == (12, 4, 12)


def test_beyond_the_kv_heads_the_rest_splits_queries() -> None:
    """16 ranks on 4 kv heads: 4 ways of K, 4 ways of G, neighbours share a kv head."""
    mesh = make_mesh(WIDE, Parallelism(tp=16))
    assert (mesh.axes, mesh.shape) == (("tp0", "tp1"), (4, 4))
    assert (mesh.groups["kv"], mesh.groups["q"]) == (("tp0",), ("tp1",))


def test_experts_over_groups_take_data_parallel_ranks_first() -> None:
    """ep=8 of tp=2 dp=8: 4 of the dp ranks share experts, 2 replicas of them."""
    mesh = make_mesh(tiny_moe(experts=8), Parallelism(tp=2, dp=8, ep=8))
    assert (mesh.axes, mesh.shape) == (("dp0", "dp1", "tp0"), (2, 4, 2))
    assert mesh.groups["ep"] == ("dp1", "tp0")
    assert mesh.groups["tpf"] == ()


def test_experts_over_a_part_of_tp_leave_the_rest_to_their_width() -> None:
    mesh = make_mesh(tiny_moe(), Parallelism(tp=4, ep=2))
    assert (mesh.axes, mesh.shape) == (("tp0", "tp2"), (2, 2))
    assert (mesh.groups["ep"], mesh.groups["tpf"]) == (("tp0",), ("tp2",))


def test_contexts_lie_between_data_and_tensor_ranks() -> None:
    """ep=4 of tp=2 cp=4: two of the context's ranks share experts, before any other dp group."""
    par = Parallelism(tp=2, cp=4, dp=3, ep=4)
    mesh = make_mesh(tiny_moe(experts=8), par)
    assert (mesh.axes, mesh.shape) == (("dp0", "cp0", "cp1", "tp0"), (3, 2, 2, 2))
    assert mesh.groups["ep"] == ("cp1", "tp0")
    assert extents(mesh, par, mesh.groups["cp"]) == ((4, 2),)
    assert extents(mesh, par, mesh.groups["dp"]) == ((3, 8),)


def test_experts_over_whole_contexts_take_data_parallel_ranks() -> None:
    mesh = make_mesh(tiny_moe(experts=16), Parallelism(tp=2, cp=2, dp=4, ep=8))
    assert (mesh.axes, mesh.shape) == (("dp0", "dp1", "cp1", "tp0"), (2, 2, 2, 2))
    assert mesh.groups["ep"] == ("dp1", "cp1", "tp0")


def test_modules_over_data_parallel_groups_nest_by_hand() -> None:
    """16 groups of one rank: experts over 16, head over 8, output projection over 2."""
    spec = replace(tiny_moe(experts=16), vocab=64)
    mesh = make_mesh(spec, Parallelism(dp=16, ep=16, head_tp=8, o_tp=2))
    assert (mesh.axes, mesh.shape) == (("dp1", "dp2", "dp3"), (2, 4, 2))
    assert mesh.groups["ep"] == ("dp1", "dp2", "dp3")
    assert mesh.groups["head"] == ("dp2", "dp3")
    assert mesh.groups["o"] == mesh.groups["oK"] == ("dp3",)
    assert mesh.groups["embed"] == ()


def test_the_strategy_of_an_operator_is_axis_to_dim() -> None:
    par = Parallelism(tp=8, dp=2)
    mesh = make_mesh(WIDE, par)
    ops = {op.name: op for op in build_graph(WIDE, "decode").blocks["dense"].ops()}
    found = {
        name: assignment(ops[name], mesh, roles_of(par, "decode"), "decode")
        for name in ("q", "k", "o", "norm1")
    }
    assert found == {
        "q": {"dp0": "B", "tp0": "K", "tp1": "G"},
        "k": {"dp0": "B", "tp0": "K"},
        "o": {"dp0": "B", "tp0": "K", "tp1": "G"},
        "norm1": {"dp0": "B"},
    }


@pytest.mark.parametrize(
    ("layers", "pp", "stages"),
    [
        (8, 4, (2, 2, 2, 2)),
        (10, 4, (2, 3, 3, 2)),
        (11, 4, (3, 3, 3, 2)),
        (7, 2, (4, 3)),
        (5, 1, (5,)),
    ],
)
def test_the_ends_of_a_pipeline_take_the_remainder_last(
    layers: int, pp: int, stages: tuple[int, ...]
) -> None:
    """They also hold the embedding and the LM head."""
    assert balanced_stages(tiny(layers=layers), Parallelism(pp=pp)) == stages


def test_given_stages_stand() -> None:
    par = Parallelism(pp=2, stage_layers=(1, 3))
    check_pipeline(tiny(layers=4), par)
    assert balanced_stages(tiny(layers=4), par) == (1, 3)


def test_a_strategy_has_a_short_name_and_a_count_of_ranks() -> None:
    par = Parallelism(tp=4, pp=2, dp=8, ep=32, sp=True, exchange="alltoall")
    assert par.ranks == 64
    assert par.describe() == "tp4 pp2 dp8 ep32 sp a2a"


@pytest.mark.parametrize(
    ("spec", "par", "says"),
    [
        (tiny(), Parallelism(tp=0), "an axis size is 1 or more (tp=0)"),
        (
            WIDE,
            Parallelism(tp=6),
            "tp must divide num_attention_heads (tp=6, heads=16); try 1, 2, 4, 8, 16",
        ),
        (
            tiny(vocab=15),
            Parallelism(tp=2),
            "tp must divide vocab_size (tp=2, vocab_size=15); try 1, 3, 5, 15",
        ),
        (
            tiny(ffn=9),
            Parallelism(tp=2),
            "tp must divide intermediate_size (tp=2, intermediate_size=9); try 1, 3, 9",
        ),
        (
            tiny(),
            Parallelism(dp=2, ep=2),
            "expert parallelism needs a model with experts (ep=2, model=tiny); use ep=1",
        ),
        (
            tiny_moe(),
            Parallelism(dp=3, ep=3),
            "ep must divide the number of experts (ep=3, experts=4); try 1, 2, 4",
        ),
        (
            tiny_moe(experts=8),
            Parallelism(tp=2, dp=2, ep=8),
            "ep above tp takes whole tp groups of a stage: tp divides ep and ep divides tp*dp "
            "(ep=8, tp=2, dp=2); try ep=2 or ep=4",
        ),
        (
            tiny_moe(experts=6),
            Parallelism(tp=4, ep=3),
            "ep up to tp must divide tp (ep=3, tp=4); try 1, 2, 4",
        ),
        (
            tiny_moe(ffn=3),
            Parallelism(tp=2),
            "tp/ep must divide the expert width (tp/ep=2, expert width=3); try 1, 3",
        ),
        (
            tiny_moe(shared_ffn=5),
            Parallelism(tp=2),
            "tp must divide the shared experts' width (tp=2, shared width=5); try 1, 5",
        ),
        (
            tiny(sliding_window=3, sliding_layers=1),
            Parallelism(cp=2),
            "context parallelism needs layers that see the whole context "
            "(cp=2, layers with a sliding window: 1); use cp=1",
        ),
        (
            tiny_moe(),
            Parallelism(cp=4, dp=2, ep=2, tp=2, o_tp=3),
            "o_tp is 0 (as tp), 1 (whole on every rank) or tp times a divisor of dp "
            "(o_tp=3, tp=2, dp=2); try 0, 1 or 4",
        ),
        (
            tiny(vocab=32),
            Parallelism(cp=2, dp=2, head_tp=2),
            "a module over several data-parallel groups needs contexts that are not split "
            "(head_tp=2, tp=1, cp=2); use cp=1 or head_tp=0",
        ),
        (
            tiny_moe(experts=8),
            Parallelism(cp=4, tp=2, dp=2, ep=8, sp=True, exchange="alltoall"),
            "tokens split over tp (sp) are not also split over cp to be sent to experts "
            "(ep=8, tp=2, cp=4, sp, exchange=alltoall); gather them (exchange allgather), "
            "leave sp off, or use an ep of at most tp",
        ),
        (
            tiny_moe(experts=12),
            Parallelism(cp=2, dp=4, ep=3),
            "ep above tp is tp times a divisor of cp, or tp*cp times a divisor of dp "
            "(ep=3, tp=1, cp=2, dp=4); try ep=1, ep=2 or ep=8",
        ),
        (
            tiny(),
            Parallelism(dp=2, shared_tp=2),
            "shared_tp needs a model that has such a module (shared_tp=2, model=tiny); "
            "use shared_tp=0",
        ),
        (
            tiny(ffn=9),
            Parallelism(dp=2, ffn_tp=2),
            "ffn_tp must divide intermediate_size (ffn_tp=2, tp=1, intermediate_size=9); "
            "use ffn_tp=0",
        ),
        (
            tiny(tied_embeddings=True),
            Parallelism(dp=2, head_tp=2),
            "the LM head and the embedding share one table, so they are split alike "
            "(head_tp=2, embed_tp=0, tp=1); use the same number for both",
        ),
        (
            tiny(vocab=48),
            Parallelism(dp=6, head_tp=2, ffn_tp=3),
            "data-parallel groups that share modules or experts nest: each number of them divides "
            "the next larger one (groups that share: 2, 3; dp=6, tp=1, ep=1, ffn_tp=3, head_tp=2); "
            "use the same number for both, or one that divides the other",
        ),
        (
            tiny(),
            Parallelism(pp=3),
            "a pipeline stage holds at least one layer (pp=3, layers=2); try pp of at most 2",
        ),
        (
            tiny(),
            Parallelism(pp=2, stage_layers=(2, 1)),
            "stage_layers holds one positive count a stage and sums to the layers "
            "(stage_layers=(2, 1), pp=2, layers=2)",
        ),
    ],
    ids=lambda value: value.describe() if isinstance(value, Parallelism) else None,
)
def test_what_is_said_of_a_split_that_does_not_fit(
    spec: ModelSpec, par: Parallelism, says: str
) -> None:
    """The rule, the values, what to try."""
    with pytest.raises(LayoutError) as caught:
        apply(build_graph(spec, "prefill"), par)
    assert str(caught.value) == says


def test_kv_heads_and_experts_must_cut_tp_at_nested_places() -> None:
    """6 ranks: 2 ways of K leave threes, 3 ways of E leave twos; neither nests in the other."""
    spec = replace(tiny_moe(experts=6, ffn=12), heads=12, vocab=48)
    with pytest.raises(LayoutError, match=r"\(tp=6, kv split=2, expert split=3\); try an ep"):
        make_mesh(spec, Parallelism(tp=6, ep=3))


def test_latent_attention_splits_all_its_heads() -> None:
    assert make_mesh(tiny_mla(), Parallelism(tp=4)).groups["kv"] == ("tp0",)


@given(st.data())
def test_a_mesh_holds_each_rank_once(data: st.DataObject) -> None:
    """Sub-axes multiply to dp*cp*tp, and the groups of an axis are its sub-axes in order."""
    spec = data.draw(models())
    par = data.draw(parallelisms(spec))
    try:
        mesh = make_mesh(spec, par)
    except LayoutError:
        return
    groups = mesh.groups
    assert mesh.ranks == par.tp * par.dp * par.cp
    assert [mesh.size(groups[name]) for name in ("tp", "dp", "cp")] == [par.tp, par.dp, par.cp]
    assert groups["dp"] + groups["cp"] + groups["tp"] == mesh.axes
    assert groups["kv"] + groups["q"] == groups["tp"] == groups["tpe"] + groups["tpf"]
    assert mesh.size(groups["ep"]) == par.ep
    for module in MODULES:
        assert mesh.size(groups[module]) == module_ranks(par, module)
