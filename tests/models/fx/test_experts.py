"""Routed experts: the two operators, and rows sent between ranks."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from shardplan.models.fx.experts import (  # noqa: E402
    combined,
    expert_rows,
    experts,
    gates,
    route,
    row_sizes,
    rows_of,
)


def _layer() -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(0)
    shapes = ((2, 3, 8), (4, 5, 8), (4, 5, 8), (4, 8, 5))
    x, gate, up, down = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return x, gate, up, down


def _dense(x: Any, weights: Any, gate: Any, up: Any, down: Any) -> Any:
    """Every expert on every token."""
    inner = torch.einsum("bth,eih->btei", x, gate)
    inner = torch.nn.functional.silu(inner) * torch.einsum("bth,eih->btei", x, up)
    return torch.einsum("btei,ehi,bte->bth", inner, down, weights)


def test_gates_keep_the_chosen_and_may_sum_to_one() -> None:
    scores = torch.tensor([[[1.0, 3.0, 2.0, 0.0]]])
    found = gates(scores, 2, True, 2.0, False)
    assert found[0, 0, [0, 3]].tolist() == [0.0, 0.0]
    assert float(found.sum()) == pytest.approx(2.0)
    plain = gates(scores, 2, False, 1.0, True)
    assert plain[0, 0, 1] == pytest.approx(torch.sigmoid(torch.tensor(3.0)).item())


def test_experts_compute_the_rows_that_are_chosen() -> None:
    x, gate, up, down = _layer()
    weights = gates(torch.randn(2, 3, 4, dtype=torch.float64), 2, True, 1.0, False)
    found = experts(x, weights, gate, up, down)
    assert torch.allclose(found, _dense(x, weights, gate, up, down))


def test_rows_come_back_to_their_tokens() -> None:
    """One rank with all experts: sent to itself."""
    x, gate, up, down = _layer()
    weights = gates(torch.randn(2, 3, 4, dtype=torch.float64), 2, True, 1.0, False)
    token, weight, counts, sizes = route(weights, 2)
    assert sum(sizes) == len(token) == 2 * 3 * 2
    assert row_sizes(counts, 2) == sizes
    rows = expert_rows(rows_of(x, token), counts, 1, gate, up, down)
    found = combined(x, rows, token, weight)
    assert torch.allclose(found, _dense(x, weights, gate, up, down))
