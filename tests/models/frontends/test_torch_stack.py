"""Stacks of layers: which are of one kind, how many are captured, what the last stand for."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from shardplan.models.frontends.torch_model import read_torch
from shardplan.models.frontends.torch_stack import find_stack
from shardplan.models.opdescribe import describe


class Layer(nn.Module):
    """A residual product; its number and what it is called are attributes."""

    def __init__(self, number: int, width: int, window: int | None) -> None:
        super().__init__()
        self.layer_idx, self.window = number, window
        self.up, self.down = nn.Linear(8, width, bias=False), nn.Linear(width, 8, bias=False)

    def forward(self, x: Any) -> Any:
        y = self.up(x)
        return x + self.down(y if self.window is None else y[:, : self.window].tanh().repeat(1, 2))


class Model(nn.Module):
    """Layers of these (width, window)."""

    def __init__(self, *kinds: tuple[int, int | None]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i, *kind) for i, kind in enumerate(kinds))

    def forward(self, x: Any) -> Any:
        for one in self.layers:
            x = one(x)
        return x


WIDE, NARROW, SHORT = (16, None), (12, None), (16, 8)


@pytest.mark.parametrize(
    ("kinds", "kept", "folded"),
    [
        ([WIDE] * 6, 2, {1: 5}),
        ([NARROW, *[WIDE] * 5], 3, {0: 1, 2: 4}),
        ([WIDE, SHORT] * 3, 4, {2: 2, 3: 2}),
        ([WIDE, WIDE, SHORT] * 2, 6, None),
        ([WIDE, WIDE], 2, None),
    ],
)
def test_layers_are_kept_until_each_kind_was_met_twice(
    kinds: list[Any], kept: int, folded: dict[int, int] | None
) -> None:
    module = Model(*kinds)
    stack = find_stack(module)
    inputs = (torch.randn(2, 8),)
    short = describe(read_torch(module, inputs=inputs).graph)
    full = describe(read_torch(module, inputs=inputs, folded=False).graph)
    assert (short.parameters, short.flop, short.layers) == (full.parameters, full.flop, full.layers)
    assert len(module.layers) == len(kinds)
    if folded is None:
        assert stack is None
    else:
        assert stack is not None
        assert (stack.kept, dict(stack.folded())) == (kept, folded)
