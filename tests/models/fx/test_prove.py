"""Level 2: Hugging Face classes split by plans compute what they compute whole."""

from __future__ import annotations

from typing import Any

import pytest
from tests.models.fx.faults_fx import FAULTS

from shardplan.models.catalog import load_model
from shardplan.models.errors import InputError, ProofError
from shardplan.models.parallel import Parallelism
from shardplan.models.shrink import Case, shrink

pytest.importorskip("torch")
pytest.importorskip("transformers")

from shardplan.models.fx.prove import library_case, prove_graphs, small_pair

PLANS: list[tuple[str, dict[str, Any]]] = [
    ("llama-2-13b", {"tp": 2, "pp": 2, "dp": 2}),
    ("llama-3.1-8b", {"tp": 16}),
    ("llama-2-13b", {"tp": 2, "dp": 2, "head_tp": 4, "embed_tp": 4, "ffn_tp": 4}),
    ("qwen2.5-14b", {"tp": 4, "sp": True}),
    ("qwen3-8b", {"tp": 2, "dp": 2, "pp": 2, "sp": True}),
    ("qwen3-30b-a3b", {"tp": 2, "dp": 2, "ep": 4}),
    ("mixtral-8x7b", {"tp": 4, "ep": 2, "sp": True}),
    ("mixtral-8x7b", {"tp": 2, "dp": 2, "ep": 4, "pp": 2, "exchange": "alltoall"}),
    ("deepseek-v2-lite", {"tp": 2, "dp": 2, "ep": 4, "exchange": "alltoall"}),
]


def _case(model: str, **sizes: Any) -> Case:
    return shrink(load_model(model), Parallelism(**sizes))


def _name(value: object) -> str:
    return " ".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "sizes"), PLANS, ids=_name)
def test_a_split_decoder_computes_what_the_library_computes(
    model: str, sizes: dict[str, Any]
) -> None:
    checks = prove_graphs(_case(model, **sizes))
    assert [check.detail for check in checks if not check.passed] == []
    assert len(checks) == 2


@pytest.mark.slow
def test_int8_weights_are_cut_with_their_scales() -> None:
    checks = prove_graphs(_case("llama-2-13b", tp=2, sp=True), quantized=True)
    assert [check.detail for check in checks if not check.passed] == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str) -> None:
    case = library_case(_case("llama-2-13b", tp=2, dp=2))
    pair = small_pair(case, 0, "float32", mutate=FAULTS[fault])

    def run() -> None:
        pair.step("prefill")
        pair.step("decode")

    with pytest.raises(ProofError):
        run()


@pytest.mark.parametrize(
    ("model", "sizes", "match"),
    [
        ("deepseek-v3", {"tp": 2}, "DeepseekV3ForCausalLM"),
        ("llama-2-13b", {"cp": 2}, "cp=2"),
    ],
)
def test_what_is_not_proven_on_graphs_is_refused(
    model: str, sizes: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        prove_graphs(_case(model, **sizes))
