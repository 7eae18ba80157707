"""Tokens predicted ahead: the layer that a model ships for it, its cache, and its proof."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.faults import Edit, Fault, rebuilt
from tests.models.strategies import models, parallelisms, tiny, tiny_mla, tiny_moe

from shardplan.models.apply import ShardedGraph, ShardedOp, Stage, apply
from shardplan.models.build import build_graph
from shardplan.models.catalog import load_model
from shardplan.models.counts import parameter_count
from shardplan.models.errors import LayoutError
from shardplan.models.lockstep import LockStep
from shardplan.models.parallel import Parallelism
from shardplan.models.shrink import Case
from shardplan.models.spec import ModelSpec
from shardplan.models.verify import Check, prove, prove_case
from shardplan.models.weights import Array, random_weights

SHIPS = ("deepseek-v3", "glm-4.5")
WAYS = (
    Parallelism(tp=4),
    Parallelism(tp=2, dp=4, ep=8, sp=True),
    Parallelism(tp=2, dp=2, ep=4, exchange="alltoall"),
    Parallelism(tp=2, pp=3),
)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("way", WAYS, ids=Parallelism.describe)
@pytest.mark.parametrize("name", SHIPS)
def test_a_cut_model_predicts_what_the_whole_one_does(
    name: str, way: Parallelism, depth: int
) -> None:
    """Prompt, 1 + k verified tokens and k drafts a decode step, reset, second request."""
    proof = prove(load_model(name), replace(way, mtp=depth))
    assert [check for check in proof.checks if not check.passed] == []
    assert sum("prediction layer joined" in check.name for check in proof.checks) == 4


@settings(max_examples=10)
@given(st.data())
def test_any_model_that_ships_a_layer_can_be_cut(data: st.DataObject) -> None:
    spec = replace(data.draw(models()), mtp_layers=1)
    par = replace(data.draw(parallelisms(spec)), mtp=data.draw(st.integers(1, 3)))
    try:
        apply(build_graph(spec, "decode", mtp=True), par)
    except LayoutError:
        return
    case = Case(spec=spec, parallel=par, batch=par.dp * par.tp, tokens=2 * par.tp)
    assert [check for check in prove_case(case) if not check.passed] == []


def test_what_the_layer_adds_is_what_deepseek_publishes() -> None:
    """11.5e9 parameters of its own; embedding and head, 0.9e9 each, are the model's."""
    spec = load_model("deepseek-v3")
    plain, ahead = build_graph(spec, "prefill"), build_graph(spec, "prefill", mtp=True)
    assert plain.parameters() == parameter_count(spec)
    own = ahead.parameters() - plain.parameters()
    assert own == pytest.approx(11.5e9, rel=0.01)
    assert spec.vocab * spec.hidden == pytest.approx(0.9e9, rel=0.05)
    per_layer = plain.kv_elements_per_token() // spec.layers
    assert ahead.kv_elements_per_token() == plain.kv_elements_per_token() + per_layer


def test_nothing_is_predicted_unless_asked() -> None:
    spec = load_model("deepseek-v3")
    assert not build_graph(spec, "decode").predicts
    graph = apply(build_graph(spec, "decode"), Parallelism(tp=8))
    assert "mtp" not in {name for stage in graph.stages for name in stage.counts}


def test_the_layer_reads_what_the_last_one_gives_not_the_logits() -> None:
    whole = build_graph(tiny(mtp_layers=1), "decode", mtp=True).unfolded()
    assert list(whole.predecessors("mtp.2/x")) == ["dense.1/add2"]
    assert list(whole.predecessors("mtp_head/x")) == ["mtp.2/add2"]
    assert list(whole.predecessors("head/x")) == ["dense.1/add2"]


def test_the_layer_stands_on_the_last_stage_and_drafts_k_times() -> None:
    spec = load_model("glm-4.5")
    for phase, again in (("prefill", 0), ("decode", 2)):
        graph = apply(build_graph(spec, phase, mtp=True), Parallelism(pp=2, mtp=3))  # type: ignore[arg-type]  # phases
        first, last = graph.stages
        assert "mtp" not in first.counts
        assert (last.counts["mtp"], last.counts["mtp_head"]) == (1, 1)
        assert graph.runs(last).get("draft", 0) == again


def test_a_model_without_the_layer_is_refused() -> None:
    with pytest.raises(LayoutError, match="ships a prediction layer"):
        build_graph(tiny(), "decode", mtp=True)
    with pytest.raises(LayoutError, match="layer that a model ships"):
        apply(build_graph(tiny(), "decode"), Parallelism(mtp=1))
    with pytest.raises(LayoutError, match="holds the prediction layer"):
        apply(build_graph(tiny(mtp_layers=1), "decode"), Parallelism(mtp=1))


def _alone(spec: ModelSpec, depth: int = 1) -> LockStep:
    graphs = [build_graph(spec, "prefill", mtp=True), build_graph(spec, "decode", mtp=True)]
    cut = [apply(graph, Parallelism(mtp=depth)) for graph in graphs]
    return LockStep(cut[0], cut[1], random_weights(graphs[0], 5))


@pytest.mark.parametrize(
    "spec", [tiny(mtp_layers=1), tiny_mla(mtp_layers=1)], ids=["gqa", "latent"]
)
def test_a_draft_after_decoding_is_that_of_the_whole_prompt(spec: ModelSpec) -> None:
    """The layer's cache holds what a prompt would have put there: same tokens, same logits."""
    ids = np.random.default_rng(3).integers(0, spec.vocab, size=(2, 9))
    whole = _alone(spec)
    whole.ahead = ids[:, 8:]
    want = whole.prefill(ids[:, :8])
    steps = _alone(spec)
    for first, last in ((0, 4), (4, 6), (6, 8)):
        steps.ahead = ids[:, last : last + 1]
        call = steps.decode if first else steps.prefill
        got = call(ids[:, first:last])
    assert np.abs(got[:, -2:] - want).max() < 1e-12


def test_a_second_draft_reads_the_first_ones_hidden_state() -> None:
    """Its logits differ from those of the same token after a step, and no cache entry stays."""
    spec = tiny(mtp_layers=1)
    run, ids = _alone(spec, 2), np.arange(6).reshape(1, 6)
    run.ahead = np.asarray([[7, 9]])
    run.prefill(ids)
    run.ahead = np.asarray([[3, 5]])
    logits = run.decode(np.asarray([[7, 9, 1]]))
    assert logits.shape == (1, 3 + 2, spec.vocab)
    graph = run.decode_graph
    assert run.cached_elements(graph.stages[0]) == 9 * graph.model.kv_elements_per_token()


CUT = {
    "tp": Case(spec=tiny(mtp_layers=1), parallel=Parallelism(tp=2, mtp=2), batch=4, tokens=4),
    "ep": Case(
        spec=replace(tiny_moe(), mtp_layers=1),
        parallel=Parallelism(tp=2, dp=2, ep=4, exchange="alltoall", mtp=2),
        batch=8,
        tokens=4,
    ),
}


def _dropped(kind: str, after: str = "") -> Edit:
    def edit(node: ShardedOp) -> Iterable[ShardedOp]:
        return () if node.kind == kind and node.name.startswith(after) else (node,)

    return edit


MUTANTS: dict[str, tuple[str, str, Edit]] = {
    "sum of its embedding dropped": ("tp", "mtp", _dropped("all_reduce", "embedding")),
    "sum of its attention dropped": ("tp", "mtp", _dropped("all_reduce", "o>")),
    "gather of its logits dropped": ("tp", "mtp_head", _dropped("all_gather")),
    "its experts' exchange dropped": ("ep", "mtp", _dropped("all_to_all")),
    "its inputs swapped": (
        "tp",
        "mtp",
        lambda node: (
            (replace(node, inputs=node.inputs[::-1]),) if node.kind == "concat" else (node,)
        ),
    ),
}


def _failed(checks: list[Check]) -> list[str]:
    return [check.detail for check in checks if not check.passed]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_in_the_layer_is_caught(name: str) -> None:
    which, block, edit = MUTANTS[name]
    assert _failed(prove_case(CUT[which])) == []
    changes = 0

    def mutate(graph: ShardedGraph) -> ShardedGraph:
        nonlocal changes
        wrong, changed = rebuilt(graph.blocks[block], edit)
        changes += changed
        return replace(graph, blocks=MappingProxyType({**graph.blocks, block: wrong}))

    assert _failed(prove_case(CUT[which], mutate=mutate))
    assert changes


class _Stale(Fault):
    """What later drafts cached is read again in the next step."""

    def _forget(self, kept: Any) -> None:
        self.hit()


class _NotFilled(Fault):
    """The layer does not see the prompt: its cache holds nothing of it."""

    def _draft(
        self, graph: ShardedGraph, stage: Stage, ids: np.ndarray, hidden: Array, past: int
    ) -> list[Array]:
        logits = LockStep._draft(self, graph, stage, ids, hidden, past)
        if graph.model.phase == "prefill":
            self.hit()
            for key in [key for key in self._cache if key[0] == stage.last]:
                self._cache[key] = self._cache[key] * 0.0
        return logits


class _NotShifted(Fault):
    """A hidden state meets the token it was made from, not the one after it."""

    def _draft(
        self, graph: ShardedGraph, stage: Stage, ids: np.ndarray, hidden: Array, past: int
    ) -> list[Array]:
        self.hit()
        shifted = np.concatenate([ids[:, :1], ids[:, :-1]], axis=1)
        return LockStep._draft(self, graph, stage, shifted, hidden, past)


@pytest.mark.parametrize("executor", [_Stale, _NotFilled, _NotShifted])
def test_a_faulty_machine_is_caught(executor: type[Fault]) -> None:
    executor.hits = 0
    assert _failed(prove_case(CUT["tp"], executor=executor))
    assert executor.hits
