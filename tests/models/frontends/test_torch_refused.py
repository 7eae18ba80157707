"""What the PyTorch front end refuses, and what it follows of changes in place."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardplan
from shardplan.models.errors import InputError

torch = pytest.importorskip("torch")
from torch import nn

from shardplan.models.frontends.torch_model import read_torch


class Made(nn.Module):
    """A module that computes what a function says."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def read(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Any:
    """The graph of a function of random tensors."""
    return read_torch(Made(function), inputs=tuple(torch.randn(one) for one in shapes))


def computed(found: Any, *inputs: Any) -> Any:
    """The first result of the graph in normal form."""
    return torch.fx.GraphModule(nn.Module(), found.capture.graph)(*inputs)[0]


def _written_over(x: Any) -> Any:
    y = x.clone()
    y[:, 1:3] = 2.0 * y[:, 1:3]
    y.mul_(3.0)
    y[0].add_(1.0)
    return y


def _stale(x: Any) -> Any:
    y = x.clone()
    view = y[:, 1:3]
    y.mul_(2.0)
    return view + 1.0


def test_changes_in_place_become_new_tensors() -> None:
    found = read(_written_over, (4, 8))
    x = torch.randn(4, 8)
    torch.testing.assert_close(computed(found, x), _written_over(x))
    assert not [n for n in found.capture.graph.nodes if str(n.target).split(".")[1:2] == ["mul_"]]


def test_a_view_that_is_read_after_its_tensor_changed_is_refused() -> None:
    with pytest.raises(InputError, match="is changed while"):
        read(_stale, (4, 8))


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x: x[x > 0].sum(), "depend"),
        (lambda x: x * (1.0 if x.sum() > 0 else 2.0), r"exported by torch\.export"),
        (torch.linalg.inv, r"linalg_inv"),
        (lambda x: torch.fft.fft(x).abs(), r"fft"),
        (lambda x: torch.complex(x, x) @ torch.complex(x, x), "complex numbers"),
        (lambda x: torch.einsum("ii->i", x), "einsum"),
    ],
)
def test_what_has_no_rule_is_named(function: Callable[..., Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        read(function, (8, 8))


def test_another_graph_inside_is_refused() -> None:
    class Switched(nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.cond(x.sum() > 0, lambda y: y + 1.0, lambda y: y - 1.0, (x,))

    program = torch.export.export(Switched(), (torch.randn(4),), strict=False)
    with pytest.raises(InputError, match="runs another graph"):
        read_torch(program)


def test_dynamic_dims_take_the_sizes_that_are_given() -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(
        nn.Linear(8, 4), (torch.randn(6, 8),), dynamic_shapes=({0: rows},), strict=False
    )
    (symbol,) = program.range_constraints
    assert read_torch(program).graph.flop == 2.0 * 6 * 8 * 4
    assert read_torch(program, sizes={str(symbol): 32}).graph.flop == 2.0 * 32 * 8 * 4
    with pytest.raises(InputError, match="whole numbers"):
        read_torch(program, sizes={str(symbol): 0})
    with pytest.raises(InputError, match=rf"size of 'rows'.*symbols: {symbol}"):
        read_torch(program, sizes={"rows": 32})


def test_caches_are_states_that_are_given_back() -> None:
    class Cached(nn.Module):
        keys: Any

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", torch.zeros(1, 8, 4), persistent=False)

        def forward(self, x: Any) -> Any:
            self.keys[:, 2:3] = x
            return self.keys.sum(1)

    graph = read_torch(Cached(), inputs=(torch.randn(1, 1, 4),)).graph
    (state,) = (one for one in graph.tensors.values() if one.kind == "state")
    assert state.source == "keys"
    assert len(graph.outputs) == 2


@pytest.mark.parametrize("subject", [3, None, torch.zeros(2), nn.Linear, "model.pt2", "llama-65b"])
def test_what_is_no_model_is_refused(subject: Any) -> None:
    with pytest.raises(InputError):
        shardplan.load_graph(subject)


def test_files_that_are_no_exports_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.pt2"
    text.write_text("no archive", encoding="utf-8")
    archive = tmp_path / "archive.pt2"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "nothing")
    for path in (text, archive, tmp_path):
        with pytest.raises(InputError, match="file"):
            shardplan.load_model(path) if path != tmp_path else shardplan.load_graph(path)


def test_a_stack_whose_first_layers_do_not_fit_alone_is_captured_whole() -> None:
    """The head counts on all layers: folding is not forced on it."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
            self.head = nn.Linear(40, 4)

        def forward(self, x: Any) -> Any:
            return self.head(torch.cat([one(x) for one in self.layers], -1))

    graph = read_torch(Counting(), inputs=(torch.randn(2, 8),)).graph
    assert graph.parameters == 5 * 72 + 164


def test_an_operator_without_a_rule_is_named_with_its_line() -> None:
    """The node, the operator, and the line of the module's own code."""
    here = r"node=fft_fft, operator=aten::fft_fft, line=\S*test_torch_refused.py:\d+\)"
    with pytest.raises(InputError, match=here):
        read(lambda x: torch.fft.fft(x).real, (4, 8))


def test_a_decoder_that_no_preset_describes_is_pointed_to_its_graph() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)
    with pytest.raises(InputError, match=r"unknown architecture.*load_graph takes the module"):
        shardplan.load_model(transformers.GPT2LMHeadModel(config))
