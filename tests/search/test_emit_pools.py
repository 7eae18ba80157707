"""Where instances of prefill and decode pools lie, and what no engine can start there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardplan.models.errors import InputError
from shardplan.search.emit import emit
from shardplan.search.plan import Plan

_PLAN = Path(__file__).parents[2] / "results/plans/deepseek-v3_cloudmatrix-384_disagg/plan.json"


def _plan(per_node: int, prefill: dict[str, Any], decode: dict[str, Any], **cluster: Any) -> Plan:
    """One instance a pool of these sizes, on nodes of `per_node`."""
    plan = Plan.load(_PLAN)
    pools = tuple(
        pool.model_copy(
            update={
                "instances": 1,
                "strategy": pool.strategy.model_copy(update={"stage_layers": (), **way}),
                "cluster": pool.cluster.model_copy(update={"ranks_per_node": per_node, **cluster}),
            }
        )
        for pool, way in zip(plan.pools, (prefill, decode), strict=True)
    )
    return plan.model_copy(update={"pools": pools})


@pytest.mark.parametrize("target", ["docker-compose", "k8s", "vllm-ascend"])
def test_a_copy_that_crosses_a_border_between_nodes_is_refused(tmp_path: Path, target: str) -> None:
    """24 ranks fill three nodes of 8, but their four copies of 6 do not."""
    prefill = {"tp": 2, "pp": 3, "dp": 4, "ep": 8, "stage_layers": (20, 21, 20)}
    decode = {"tp": 2, "pp": 1, "dp": 4, "ep": 8}
    with pytest.raises(InputError, match=r"group=6, ranks_per_node=8"):
        emit(_plan(8, prefill, decode), target, tmp_path / "out")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_int8_caches_are_not_handed_over(tmp_path: Path, role: str) -> None:
    """vllm-ascend ends with an error: the producer keeps its cache in 16 bit."""
    way: dict[str, Any] = {"tp": 2, "pp": 1, "dp": 4, "ep": 8, "kv_dtype": "bf16"}
    int8 = {**way, "kv_dtype": "int8"}
    plan = _plan(8, int8 if role == "prefill" else way, int8 if role == "decode" else way)
    with pytest.raises(InputError, match=f"{role} kv_dtype=int8"):
        emit(plan, "vllm-ascend", tmp_path / "out")


def test_310p_hands_no_cache_over(tmp_path: Path) -> None:
    """The plugin ends with an error there; a model without latent attention would be taken."""
    way: dict[str, Any] = {"tp": 2, "pp": 1, "dp": 1, "ep": 1, "weight_dtype": "bf16"}
    device = {"device": "310p3", "soc_versions": ("Ascend310P3",)}
    plan = _plan(8, way, way, **device)
    model = plan.model.model_copy(update={"architecture": "LlamaForCausalLM"})
    with pytest.raises(InputError, match="caches are handed over"):
        emit(plan.model_copy(update={"model": model}), "vllm-ascend", tmp_path / "out")
