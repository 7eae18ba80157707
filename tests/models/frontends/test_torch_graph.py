"""PyTorch modules and exports read as captured graphs: counts, layers, normal form, refusals."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from tests.models.frontends.torch_modules import Decoder, Encoder, VitBlock
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shardplan.models.errors import InputError
from shardplan.models.frontends.torch_model import read_torch
from shardplan.models.opdescribe import describe

IDS = torch.arange(16).reshape(2, 8)


class Mlp(nn.Module):
    """Two linear layers with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Any) -> Any:
        return self.down(torch.relu(self.up(x)))


CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "decoder": (Decoder, (IDS,)),
    "mlp": (Mlp, (torch.randn(4, 16),)),
    "encoder": (Encoder, (IDS, IDS % 8)),
    "vit": (VitBlock, (torch.randn(2, 3, 16, 16),)),
}


def run(graph: Any, program: Any, inputs: tuple[Any, ...]) -> Any:
    """What a graph in normal form computes: its first output."""
    signature = program.graph_signature
    given = dict(zip(signature.user_inputs, inputs, strict=True))
    for names in (signature.inputs_to_parameters, signature.inputs_to_buffers):
        for name, source in names.items():
            loose = program.constants
            given[name] = program.state_dict.get(source, loose.get(source))
    for name, source in signature.inputs_to_lifted_tensor_constants.items():
        given[name] = program.constants[source]
    module = torch.fx.GraphModule(nn.Module(), graph)
    order = [node.name for node in graph.nodes if node.op == "placeholder"]
    return module(*(given[name] for name in order))[0]


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_flop_are_those_that_torch_counts(name: str) -> None:
    made, inputs = CASES[name]
    module = made().eval()
    found = describe(read_torch(module, inputs=inputs).graph)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(*inputs)  # the kernels of other backends are not counted on a CPU
    assert found.parameters == sum(one.numel() for one in module.parameters())
    assert found.flop == counter.get_total_flops()


@pytest.mark.parametrize("name", CASES)
def test_the_normal_form_computes_what_the_module_computes(name: str) -> None:
    torch.manual_seed(0)
    made, inputs = CASES[name]
    module = made().double().eval()
    doubles = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    found = read_torch(module, inputs=doubles, folded=False)
    got = run(found.capture.graph, found.capture.program, doubles)
    with torch.no_grad():
        torch.testing.assert_close(got, module(*doubles), rtol=1e-12, atol=1e-12)


def test_operators_are_called_as_their_nodes_and_know_their_module() -> None:
    found = read_torch(Decoder(), inputs=(IDS,))
    assert all(one.name in found.nodes for one in found.graph.operators)
    (query,) = (one for one in found.graph.operators if one.where == "layers.1.self_attn.q_proj")
    assert (query.kind, query.layer, query.contracted) == ("matmul", 1, ("k",))


def test_a_linear_layer_with_a_bias_may_be_split_along_its_sum() -> None:
    """The bias is added once, behind the partial sums."""
    graph = read_torch(Mlp(), inputs=(torch.randn(4, 16),)).graph
    kinds = [(one.kind, one.linear) for one in graph.operators]
    assert kinds == [
        ("matmul", (0,)),
        ("pointwise", (0, 1)),
        ("pointwise", ()),
        ("matmul", (0,)),
        ("pointwise", (0, 1)),
    ]


def test_repeated_kv_heads_are_read_by_attention_before_they_are_repeated() -> None:
    graph = read_torch(Decoder(heads=8, kv=2), inputs=(IDS,)).graph
    one = next(graph.of_kind("attention"))
    assert one.loops["h"].size == 2
    assert (one.attrs["heads"], one.attrs["kv_heads"], one.attrs["causal"]) == (8, 2, 1)
    assert graph.tensors[one.inputs[1]].shape[1] == 2


def test_an_operator_without_a_rule_is_refused_with_its_place() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.forward = torch.linalg.inv

        def forward(self, x: Any) -> Any:
            return self.inner(x)

    with pytest.raises(InputError, match=r"linalg_inv.*module=inner"):
        read_torch(Odd(), inputs=(torch.randn(4, 4),))


def test_a_module_needs_inputs() -> None:
    with pytest.raises(InputError, match="example inputs"):
        read_torch(Mlp())
