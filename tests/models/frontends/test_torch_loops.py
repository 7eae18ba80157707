"""What the loops of every operator promise, tried on numbers, operator by operator.

a kept loop        halves of the inputs along it give the halves of the outputs
a contracted loop  the outputs of both halves, the other half of the inputs zero, add up
a linear read      the outputs of two parts of it add up
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import pytest

from shardplan.models.opgraph import Access, Operator

torch = pytest.importorskip("torch")
from tests.models.frontends.torch_modules import Decoder, Encoder, VitBlock
from torch import nn

from shardplan.models.frontends.torch_graph import TorchGraph
from shardplan.models.frontends.torch_model import read_torch

IDS = torch.arange(16).reshape(2, 8)


def _repeated(x: Any, shape: list[int]) -> Any:
    before = (1,) * (len(shape) - x.ndim) + tuple(x.shape)
    return x.repeat([after // size for after, size in zip(shape, before, strict=True)])


SIZED = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), torch.reshape),
    "expand": torch.broadcast_to,
    "repeat": _repeated,
}
"""Operators that are told the shape of their result, on the shape of a part."""


class Operators(nn.Module):
    """Operators that no model of the other cases has, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 8))
        self.table = nn.Parameter(torch.randn(8, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Any, ids: Any) -> Any:
        y = torch.einsum("bth,enh->betn", x, self.weight)  # 2 4 8 6
        y = torch.baddbmm(y[:, 0], y[:, 1], y[:, 2, :6, :].softmax(-1))  # 2 8 6
        z = torch.stack((y.flip(1), y.roll(1, 2))).unbind(0)
        y = torch.cat(z, 0) + y.repeat(2, 1, 1).tril()  # 4 8 6
        picked = torch.gather(y, 1, ids[:, :, None].repeat(2, 1, 6))
        y = picked + nn.functional.one_hot(ids, 6).repeat_interleave(2, dim=0)
        y = torch.where(y > 0, y, y.amax(-1, keepdim=True)) + torch.nn.functional.pad(
            y, (0, 0, 1, 0)
        )[:, :8].movedim(0, 1).permute(1, 0, 2)
        y = y.masked_fill(y > 2, 0.5).index_select(2, ids[0] % 6)  # 4 8 8
        w = torch.addmm(self.bias, y[0], self.table).clamp(min=-1)
        w -= 0.5
        w[:, 1:3] = 2.0 * w[:, 1:3]
        c = torch.view_as_complex(w.reshape(8, 3, 2)) * torch.polar(w[:, :3].abs(), w[:, 3:])
        w = torch.view_as_real(c).flatten(1)
        low, high = w.chunk(2, -1)
        best = torch.topk(w, 2).values.sum(-1, keepdim=True)
        return low * high + best + w.cumsum(0).std(0)[:3] + nn.functional.rms_norm(low, (3,))


def numbers(module: Any, inputs: tuple[Any, ...] | None, **more: Any) -> Any:
    """(graph, {node name: its value}) of a module with real weights."""
    found = read_torch(module.eval(), inputs=inputs, **more)
    program = found.capture.program
    signature = program.graph_signature
    values = dict(program.state_dict) | dict(program.constants)
    sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    sources |= signature.inputs_to_lifted_tensor_constants
    given = {name: values[source] for name, source in sources.items()}
    ids = torch.randint(0, 90, (1, more.get("tokens", 8)))
    given |= dict(zip(signature.user_inputs, inputs or (ids,), strict=True))
    known: dict[str, Any] = {}
    with torch.no_grad():
        for node in found.capture.graph.nodes:
            if node.op == "placeholder":
                known[node.name] = given[node.name].detach()
            elif node.op == "call_function":
                args, kwargs = arguments(node, known)
                known[node.name] = node.target(*args, **kwargs)
    return found, known


def arguments(node: Any, known: dict[str, Any]) -> tuple[Any, Any]:
    """Arguments of a node with values in place of nodes."""
    filled = torch.fx.node.map_arg((node.args, node.kwargs), lambda one: known[one.name])
    args, kwargs = filled
    return args, {n: "cpu" if isinstance(v, torch.device) else v for n, v in kwargs.items()}


class Trial:
    """One operator of a graph on other values of what it reads."""

    def __init__(self, found: TorchGraph, known: dict[str, Any], op: Operator) -> None:
        self.node, self.known, self.op = found.nodes[op.name], known, op
        order: list[Any] = []
        torch.fx.node.map_arg((self.node.args, self.node.kwargs), order.append)
        self.order = [one for one in order if isinstance(known[one.name], torch.Tensor)]

    def values(self) -> list[Any]:
        """What it reads."""
        return [self.known[one.name] for one in self.order]

    def run(self, values: list[Any], shape: list[int] | None = None) -> list[Any]:
        """Its results on these values, of the given shape where the operator is told it."""
        left = iter(values)
        slots = {id(one) for one in self.order}

        def fill(one: Any) -> Any:
            return next(left) if id(one) in slots else self.known[one.name]

        args, kwargs = torch.fx.node.map_arg((self.node.args, self.node.kwargs), fill)
        kwargs = {n: "cpu" if isinstance(v, torch.device) else v for n, v in kwargs.items()}
        kind = str(self.op.attrs["torch"])
        if shape is not None and kind in SIZED:
            return [SIZED[kind](values[0], shape)]
        result = self.node.target(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            return [result]
        users = [user for user in self.node.users if user.target is operator.getitem]
        taken = {user.name: result[user.args[1]] for user in users}
        return [taken[one.tensor] for one in self.op.writes]


def half(value: Any, access: Access, loop: str, which: int) -> Any:
    for dim, name in enumerate(access.loops):
        if name == loop:
            value = value.chunk(2, dim)[which]
    return value


def zeroed(value: Any, access: Access, loop: str, which: int) -> Any:
    for dim, name in enumerate(access.loops):
        if name == loop:
            parts = list(value.chunk(2, dim))
            parts[1 - which] = torch.zeros_like(parts[1 - which])
            value = torch.cat(parts, dim)
    return value


def promises(found: TorchGraph, known: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(what is promised, what came of it, what should) of each operator."""
    for op in found.graph.operators:
        trial = Trial(found, known, op)
        values = trial.values()
        whole = trial.run(values)
        for name, loop in op.loops.items():
            if loop.whole or loop.size % 2 or op.kind == "constant":
                continue
            pairs = list(zip(values, op.reads, strict=True))
            if name in op.contracted:
                parts = [trial.run([zeroed(v, a, name, i) for v, a in pairs]) for i in (0, 1)]
                for got, want in zip(zip(*parts, strict=True), whole, strict=True):
                    yield f"{op.name} sums {name}", sum(got), want
                continue
            for i in (0, 1):
                wanted = [half(v, a, name, i) for v, a in zip(whole, op.writes, strict=True)]
                cut = [half(v, a, name, i) for v, a in pairs]
                shape = list(wanted[0].shape)
                for got, want in zip(trial.run(cut, shape), wanted, strict=True):
                    yield f"{op.name} split over {name}", got, want
        if op.linear:
            parts = []
            for share in (0.25, 0.75):
                shared = [v * share if i in op.linear else v for i, v in enumerate(values)]
                parts.append(trial.run(shared))
            for got, want in zip(zip(*parts, strict=True), whole, strict=True):
                if want.is_floating_point() or want.is_complex():
                    yield f"{op.name} passes parts", sum(got), want


def check(found: TorchGraph, known: dict[str, Any]) -> None:
    tried = 0
    for what, got, want in promises(found, known):
        tried += 1
        same = torch.testing.assert_close
        options: dict[str, Any] = {"check_dtype": False, "equal_nan": True}  # of what is not filled
        same(got, want, rtol=1e-4, atol=1e-4, msg=lambda said, w=what: f"{w}: {said}", **options)
    assert tried > len(found.graph.operators)


MODULES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "decoder": (Decoder, (IDS,)),
    "encoder": (Encoder, (IDS, IDS % 8)),
    "vit": (VitBlock, (torch.randn(2, 3, 16, 16),)),
    "operators": (Operators, (torch.randn(2, 8, 8), IDS % 4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_the_loops_of_a_modules_operators_hold(name: str) -> None:
    torch.manual_seed(0)
    made, inputs = MODULES[name]
    check(*numbers(made(), inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-moe", "deepseek-v2-lite", "deepseek-v3"])
def test_the_loops_of_a_models_operators_hold(name: str) -> None:
    pytest.importorskip("transformers")
    from tests.models.frontends.hf_cases import CASES

    torch.manual_seed(0)
    model_class, config = CASES[name]
    check(*numbers(model_class(config), None, tokens=8))


def test_a_wrong_loop_does_not_hold() -> None:
    """The trial itself: a softmax is no loop over what it sums."""
    from dataclasses import replace

    from shardplan.models.opgraph import Loop

    class Soft(nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.softmax(x, -1)

    found, known = numbers(Soft(), (torch.randn(4, 8),))
    (op,) = found.graph.operators
    loops = {name: Loop(size=loop.size) for name, loop in op.loops.items()}
    wrong = replace(found.graph, operators=(replace(op, loops=loops),))
    with pytest.raises(AssertionError, match="softmax split over d1"):
        check(TorchGraph(wrong, found.capture), known)
