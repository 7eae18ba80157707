"""Faults planted in a plan or in the machine that runs it: the proof catches every one.

Each fault is first seen to do something (nodes changed, or the wrong line ran), so that none
passes for caught because it was never reached; the same case without it passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
from tests.models.faults import EXECUTORS, Edit, Fault, edited
from tests.models.faults_context import CONTEXT_EXECUTORS
from tests.models.strategies import tiny, tiny_moe

from shardplan.models.apply import ShardedGraph, ShardedOp
from shardplan.models.parallel import Parallelism
from shardplan.models.redistribute import PARTIAL
from shardplan.models.shrink import Case
from shardplan.models.verify import Check, prove_case

CASES = {
    "tp": Case(spec=tiny(o_bias=True), parallel=Parallelism(tp=2, dp=2), batch=4, tokens=4),
    "sp": Case(spec=tiny(), parallel=Parallelism(tp=2, sp=True), batch=4, tokens=4),
    "pp": Case(spec=tiny(layers=3), parallel=Parallelism(dp=2, pp=3), batch=4, tokens=4),
    "kv": Case(spec=tiny(heads=8), parallel=Parallelism(tp=4), batch=4, tokens=4),
    "norm": Case(
        spec=tiny(qk_norm="full", sandwich_norms=True),
        parallel=Parallelism(tp=2),
        batch=4,
        tokens=4,
    ),
    "ep": Case(spec=tiny_moe(), parallel=Parallelism(tp=2, ep=2), batch=4, tokens=4),
    "a2a": Case(
        spec=tiny_moe(),
        parallel=Parallelism(tp=2, dp=2, ep=4, exchange="alltoall"),
        batch=8,
        tokens=4,
    ),
    "cp": Case(spec=tiny(), parallel=Parallelism(cp=2, dp=2), batch=4, tokens=4),
    "cp ep": Case(spec=tiny_moe(), parallel=Parallelism(tp=2, cp=2, ep=4), batch=4, tokens=4),
    "modules": Case(
        spec=tiny(kv_heads=4),
        parallel=Parallelism(dp=4, o_tp=2, ffn_tp=4, head_tp=4, embed_tp=2),
        batch=4,
        tokens=4,
    ),
}
DIFFERS = "differs from the unsharded run"
MISFIT = "cannot run on the shards"
UNEQUAL = "replicas of the output disagree"


@pytest.mark.parametrize("quantized", [False, True], ids=["float64", "int8"])
@pytest.mark.parametrize("name", CASES)
def test_without_a_fault_every_case_passes(name: str, quantized: bool) -> None:
    checks = prove_case(CASES[name], quantized=quantized)
    assert [check for check in checks if not check.passed] == []


def _failed(checks: list[Check]) -> list[str]:
    """What the checks that failed say."""
    return [check.detail for check in checks if not check.passed]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change of the applied graph, the case that holds it, and what the proof says."""

    case: str
    edit: Edit
    says: str = DIFFERS


def _dropped(kind: str) -> Edit:
    return lambda node: () if node.kind == kind else (node,)


def _twice(kind: str) -> Edit:
    def edit(node: ShardedOp) -> Iterable[ShardedOp]:
        if node.kind != kind:
            return (node,)
        again = replace(node, name=node.name + " again", inputs=(node.name,), before=node.layout)
        return (node, again)

    return edit


def _over(axes: tuple[str, ...]) -> Edit:
    return lambda node: (replace(node, axes=axes) if node.kind == "all_reduce" else node,)


def _weight_layout(names: tuple[str, ...], layout: tuple[tuple[str, str], ...]) -> Edit:
    return lambda node: (replace(node, weight_layout=layout) if node.name in names else node,)


def _renamed(name: str, dims: dict[str, str]) -> Edit:
    """The weight and output of one operator cut on other dims."""

    def edit(node: ShardedOp) -> Iterable[ShardedOp]:
        if node.name != name:
            return (node,)
        cut = tuple((axis, dims.get(dim, dim)) for axis, dim in node.weight_layout)
        return (replace(node, weight_layout=cut),)

    return edit


def _late_reduce(name: str) -> Edit:
    """The operator `name` works on partial sums; the all_reduce follows it instead."""
    late: list[ShardedOp] = []

    def edit(node: ShardedOp) -> Iterable[ShardedOp]:
        if node.kind == "all_reduce" and node.name.startswith("o>"):
            late[:] = [node]
            return ()
        if node.name == name and late:
            lies = {**dict(node.layout), **dict.fromkeys(late[0].axes, PARTIAL)}
            passed = replace(node, layout=tuple(lies.items()))
            reduce = replace(late[0], name=f"{name}>late", inputs=(name,), before=passed.layout)
            return (passed, reduce)
        return (node,)

    return edit


MUTANTS = {
    "all_reduce dropped": Mutant("tp", _dropped("all_reduce"), f"{DIFFERS}|{UNEQUAL}"),
    "all_gather of logits dropped": Mutant("ep", _dropped("all_gather"), "lies as its reader"),
    "all_gather of tokens dropped": Mutant("sp", _dropped("all_gather"), f"{MISFIT}|{DIFFERS}"),
    "reduce_scatter dropped": Mutant("sp", _dropped("reduce_scatter"), MISFIT),
    "all_to_all dropped": Mutant("a2a", _dropped("all_to_all")),
    "all_reduce made twice": Mutant("tp", _twice("all_reduce")),
    "all_reduce over the wrong axis": Mutant("tp", _over(("dp0",)), f"{DIFFERS}|{UNEQUAL}"),
    "all_reduce over all ranks": Mutant("tp", _over(("dp0", "tp0"))),
    "all_reduce over a part of the group": Mutant("kv", _over(("tp0",)), f"{DIFFERS}|{UNEQUAL}"),
    "sum of squares not reduced": Mutant(
        "norm",
        lambda node: () if node.name.startswith("q_norm_stat>") else (node,),
    ),
    "partial sum fed to a norm": Mutant("norm", _late_reduce("norm1_post")),
    "residual added on every rank before the sum": Mutant("tp", _late_reduce("add1")),
    "bias added on every rank before the sum": Mutant("tp", _late_reduce("o_bias")),
    "weight cut on the wrong dim": Mutant("tp", _renamed("q", {"K": "G"}), f"{DIFFERS}|{MISFIT}"),
    "weight not cut": Mutant("tp", _weight_layout(("gate",), ()), f"{DIFFERS}|{MISFIT}"),
    "queries beside the wrong kv head": Mutant("kv", _weight_layout(("k", "v"), (("tp1", "K"),))),
    "query heads cut by the wrong axes": Mutant(
        "kv", _weight_layout(("q",), (("tp0", "G"), ("tp1", "K")))
    ),
    "keys of other ranks not gathered": Mutant(
        "cp", lambda node: () if node.name.startswith(("k_cache>", "v_cache>")) else (node,), MISFIT
    ),
    "partial results of a context not gathered": Mutant(
        "cp",
        lambda node: () if node.name.startswith("attention_part>") else (node,),
        f"{DIFFERS}|{UNEQUAL}",
    ),
    "merge left out": Mutant(
        "cp", lambda node: () if node.kind == "context_merge" else (node,), f"{DIFFERS}|{MISFIT}"
    ),
    "keys gathered over the data-parallel ranks": Mutant(
        "cp",
        lambda node: (
            (replace(node, axes=("dp0",)),) if node.name.startswith("k_cache>") else (node,)
        ),
        f"{DIFFERS}|{MISFIT}|{UNEQUAL}",
    ),
    "experts of a context's ranks not summed": Mutant(
        "cp ep",
        lambda node: (
            (replace(node, axes=("tp0",)),)
            if node.kind == "all_reduce" and node.name.startswith("combine>")
            else (node,)
        ),
        f"{DIFFERS}|{UNEQUAL}|{MISFIT}",
    ),
    "module reduced over the wrong groups": Mutant(
        "modules",
        lambda node: (
            (replace(node, axes=("dp1",)),) if node.name.startswith("o>reduce_scatter") else (node,)
        ),
        f"{DIFFERS}|{UNEQUAL}|{MISFIT}",
    ),
    "module's sum dropped": Mutant(
        "modules",
        lambda node: () if node.name.startswith("down>") else (node,),
        f"{DIFFERS}|{UNEQUAL}|{MISFIT}",
    ),
    "module's tokens not gathered": Mutant(
        "modules", lambda node: () if node.name.startswith("norm2>") else (node,), "must divide"
    ),
    "heads not exchanged for tokens": Mutant(
        "modules",
        lambda node: () if node.name.startswith("attention>") else (node,),
        f"{DIFFERS}|{MISFIT}",
    ),
    "logits of another group": Mutant(
        "modules",
        lambda node: (
            (replace(node, kind="all_gather", layout=()),)
            if node.kind == "all_to_all" and node.name.startswith("lm_head>")
            else (node,)
        ),
        "lies as its reader|wrong shape|collectives differ",
    ),
    "expert gates not sliced": Mutant(
        "ep", lambda node: () if node.name.startswith("topk>slice") else (node,), MISFIT
    ),
    "experts of the wrong dim": Mutant(
        "ep", _weight_layout(("e_down",), (("tp0", "I"),)), f"{DIFFERS}|{MISFIT}"
    ),
}


def test_a_second_copy_of_weights_for_decode_is_caught() -> None:
    """Decode cuts the feed-forward width in another order: right numbers, twice the memory."""
    names = ("gate", "up", "down")
    edit = _weight_layout(names, (("tp1", "F"), ("tp0", "F")))

    def mutate(graph: ShardedGraph) -> ShardedGraph:
        return edited(graph, edit)[0] if graph.model.phase == "decode" else graph

    failed = _failed(prove_case(CASES["kv"], mutate=mutate))
    assert failed == ["one copy of a weight serves both phases (dense.gate)"]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_in_the_plan_is_caught(name: str) -> None:
    mutant, changed = MUTANTS[name], 0

    def mutate(graph: ShardedGraph) -> ShardedGraph:
        nonlocal changed
        wrong, count = edited(graph, mutant.edit)
        changed += count
        return wrong

    failed = _failed(prove_case(CASES[mutant.case], mutate=mutate))
    assert changed > 0
    assert any(re.search(mutant.says, detail) for detail in failed), failed


RUNS = {
    "ranks swapped in a gather": ("tp", DIFFERS),
    "minor axis outside the major one": ("kv", DIFFERS),
    "slice of the rank beside": ("ep", DIFFERS),
    "gather made twice": ("tp", "collectives differ from the prediction"),
    "weight shard of the rank beside": ("tp", DIFFERS),
    "weight shard of the first rank": ("tp", "an element lies on the wrong number of ranks"),
    "whole weight kept beside the shard": ("tp", "weights are held as accounted"),
    "int8 scale of the rank beside": ("tp", DIFFERS),
    "int8 scale not cut": ("tp", DIFFERS),
    "int8 scale cut wrong": ("tp", DIFFERS),
    "cache append dropped": ("tp", DIFFERS),
    "cache entry stale": ("tp", DIFFERS),
    "cache entry on the wrong rank": ("cp", DIFFERS),
    "new entries all on one rank": ("cp", "the cache is held as accounted"),
    "empty slots attended to": ("cp", DIFFERS),
    "parts of a context averaged": ("cp", DIFFERS),
    "one part for the whole context": ("cp", DIFFERS),
    "positions of the rank beside": ("cp", DIFFERS),
    "cache kept twice": ("tp", "the cache is held as accounted"),
    "position offset ignored": ("tp", DIFFERS),
    "vocabulary offset missing": ("tp", DIFFERS),
    "reset forgets nothing": ("tp", DIFFERS),
    "reset forgets the keys only": ("tp", MISFIT),
    "send dropped": ("pp", "a stage received nothing"),
    "send from the wrong stage": ("pp", DIFFERS),
    "send to the rank beside": ("pp", DIFFERS),
}


MACHINES: dict[str, type[Fault]] = {**EXECUTORS, **CONTEXT_EXECUTORS}


def test_every_faulty_machine_is_tried() -> None:
    assert RUNS.keys() == MACHINES.keys()


@pytest.mark.parametrize("name", RUNS)
def test_a_fault_of_the_machine_is_caught(name: str) -> None:
    executor, (case, says) = MACHINES[name], RUNS[name]
    executor.hits = 0
    failed = _failed(prove_case(CASES[case], quantized="int8" in name, executor=executor))
    assert executor.hits > 0
    assert any(re.search(says, detail) for detail in failed), failed
