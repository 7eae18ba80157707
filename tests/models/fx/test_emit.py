"""Exports of small modules split operator by operator, and cut into stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from shardplan.models.errors import InputError, LayoutError, ProofError
from shardplan.models.lockstep import Communication
from shardplan.models.opgraph import Layout, OpGraph, check_graph
from shardplan.models.opshard import Strategy, place
from shardplan.models.parallel import Mesh
from shardplan.models.redistribute import PARTIAL

torch = pytest.importorskip("torch")

from shardplan.models.fx.emit import emit  # noqa: E402
from shardplan.models.fx.loops import opgraph_of  # noqa: E402
from shardplan.models.fx.modules import cut, rank_module  # noqa: E402
from shardplan.models.fx.stages import cut_stages  # noqa: E402
from shardplan.models.fx.step import Exported, exported_of, split_step, whole_value  # noqa: E402

_MESH = Mesh(("x", "y"), (2, 2), {})


def _network() -> Any:
    """Embedding, two products with biases, a norm and a residual sum; double precision."""
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.table = torch.nn.Embedding(16, 8)
    module.up, module.down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

    def forward(ids: Any) -> Any:
        x = module.table(ids)
        y = torch.nn.functional.rms_norm(x, (8,))
        scale = torch.arange(ids.shape[1], dtype=torch.float64).unsqueeze(1)
        return x + module.down(torch.relu(module.up(y))) * scale.cos()

    module.forward = forward
    return module.double().eval()


def _exported(module: Any, *inputs: Any) -> tuple[Exported, OpGraph]:
    with torch.no_grad():
        exported = exported_of(torch.export.export(module, inputs, strict=False))
    graph = opgraph_of(exported)
    check_graph(graph)
    return exported, graph


def _names(graph: OpGraph) -> tuple[str, str, str]:
    (table,) = graph.of_kind("embedding")
    up, down = graph.of_kind("matmul")
    return table.name, up.name, down.name


def _run(
    strategy: Strategy, inputs: Mapping[str, Layout], outputs: Layout
) -> tuple[list[Communication], float]:
    """(what crossed ranks, largest difference from the module) of a strategy on the network."""
    module, ids = _network(), torch.randint(0, 16, (4, 6))
    exported, graph = _exported(module, ids)
    table, up, down = _names(graph)
    named = {"table": table, "up": up, "down": down}
    strategy = {named[name]: chosen for name, chosen in strategy.items()}
    ends = dict.fromkeys(graph.outputs, outputs)
    program = place(graph, strategy, _MESH, inputs=inputs, outputs=ends)
    step = split_step(exported, program, (1,))
    log: list[Communication] = []
    (out,) = step.run([step.parts(0, ids)], log)
    value = whole_value(out, program.outputs[0][1], _MESH)
    with torch.no_grad():
        return log, float((value - module(ids)).abs().max())


@pytest.mark.parametrize(
    ("strategy", "inputs", "outputs", "kinds"),
    [
        ({}, {}, {}, []),
        ({"up": {"x": "n"}, "down": {"x": "h"}}, {}, {}, ["all_reduce"]),
        ({"table": {"x": "v", "y": "v"}}, {}, {}, ["all_reduce"]),
        ({"table": {"x": "v"}}, {}, {"x": 1}, ["all_reduce"]),
        ({"up": {"x": "n", "y": "n"}}, {}, {}, ["all_gather"]),
        (
            {"down": {"x": "n", "y": "h"}},
            {"ids": {"x": 0}},
            {},
            ["all_gather", "all_reduce", "all_to_all", "all_gather"],
        ),
        ({}, {"ids": {"x": 0, "y": 1}}, {"x": 0, "y": 1}, []),
    ],
)
def test_a_split_network_gives_what_the_network_gives(
    strategy: Strategy, inputs: Mapping[str, Layout], outputs: Layout, kinds: list[str]
) -> None:
    log, error = _run(strategy, inputs, outputs)
    assert error < 1e-12
    assert [one.kind for one in log] == kinds


def test_a_bias_is_added_once_to_partial_sums() -> None:
    exported, graph = _exported(_network(), torch.zeros(4, 6, dtype=torch.int64))
    _, _, down = _names(graph)
    program = place(graph, {down: {"x": "h"}}, _MESH)
    held = {one.source: one for one in emit(exported, program).held.values()}
    assert held["down.bias"].lies == (("x", PARTIAL),)
    bias = exported.tensors["down.bias"]
    assert torch.equal(cut(bias, held["down.bias"].lies, _MESH, 0), bias)
    assert not cut(bias, held["down.bias"].lies, _MESH, 2).any()


def test_a_rank_s_module_takes_what_the_module_takes() -> None:
    module, ids = _network(), torch.randint(0, 16, (4, 6))
    exported, graph = _exported(module, ids)
    alone = Mesh((), (), {})
    made = emit(exported, place(graph, {}, alone))
    whole = rank_module(made.graph, made.held, exported.tensors, alone, 0, device="cpu")
    with torch.no_grad():
        assert torch.equal(whole(ids), module(ids))
    assert set(whole.state_dict()) == set(module.state_dict())


def test_a_module_that_writes_to_its_buffers_is_refused() -> None:
    module = torch.nn.Module()
    module.register_buffer("seen", torch.zeros(4))

    def forward(x: Any) -> Any:
        module.seen.add_(x)
        return x + module.seen

    module.forward = forward
    exported = torch.export.export(module, (torch.ones(4),), strict=False)
    found = exported_of(exported.run_decompositions())
    with pytest.raises(InputError, match="seen"):
        emit(found, place(opgraph_of(found), {}, Mesh((), (), {})))


def test_an_operator_that_is_not_known_is_computed_whole() -> None:
    module = torch.nn.Module()
    module.forward = lambda x: torch.fft.fft(x).real + x
    exported, graph = _exported(module, torch.rand(4, 6).double())
    strange = next(one for one in graph.operators if one.refused)
    program = place(graph, {}, _MESH, inputs={"x": {"x": 0}})
    step = split_step(exported, program, (1,))
    log: list[Communication] = []
    value = torch.rand(4, 6).double()
    (out,) = step.run([step.parts(0, value)], log)
    assert {one.kind for one in log} == {"all_gather"}
    assert torch.allclose(out[0], module(value))
    with pytest.raises(LayoutError, match=strange.name):
        place(graph, {strange.name: {"x": "d0"}}, _MESH)


def test_stages_hand_on_what_later_ones_read_and_clone_what_comes_from_inputs() -> None:
    module, ids = _network(), torch.randint(0, 16, (4, 6))
    exported, graph = _exported(module, ids)
    _, _, down = _names(graph)
    place_of_down = [one.name for one in graph.operators].index(down)
    layered = tuple(
        replace(one, layer=int(i >= place_of_down)) for i, one in enumerate(graph.operators)
    )
    program = place(replace(graph, operators=layered), {}, Mesh((), (), {}))
    stages = cut_stages(emit(exported, program), (1, 1))
    assert [len(one.wires_out) for one in stages] == [2, 0]
    assert stages[1].wires_in == stages[0].wires_out
    assert [set(one.held) for one in stages] == [
        {"table.weight", "up.weight", "up.bias"},
        {"down.weight", "down.bias"},
    ]
    step = split_step(exported, program, (1, 1))
    log: list[Communication] = []
    (out,) = step.run([[ids]], log)
    with torch.no_grad():
        assert torch.equal(out[0], module(ids))
    assert [one.kind for one in log] == ["send", "send"]


def test_replicas_that_differ_are_caught() -> None:
    with pytest.raises(ProofError, match="replicas"):
        whole_value([torch.ones(2), torch.zeros(2)], (), Mesh(("x",), (2,), {}))
