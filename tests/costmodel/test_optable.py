"""Rows of the op table: sizes worked by hand, and what an engine fuses."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from tests.costmodel.priced import CASES, CLUSTER, PHASES, load

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.engines import FUSIONS, load_engine
from shardplan.costmodel.optable import Row, block_rows, pointwise_bytes
from shardplan.models.graph import Phase

PLAIN = replace(load_engine("vllm-ascend"), fused=())


def rows(name: str, phase: Phase, block: str, *fused: str) -> tuple[Row, ...]:
    """A template of one of the cases, under an engine with these fusions."""
    graph = load(name).graphs[phase]
    cluster = load_cluster(CLUSTER, cards=graph.parallel.ranks)
    return block_rows(graph, graph.blocks[block], cluster, replace(PLAIN, fused=fused))


def products(found: tuple[Row, ...]) -> list[tuple[float, float]]:
    """(n, k) of the matrix products, sorted."""
    return sorted((row.n, row.k) for row in found if row.kind == "matmul")


def test_a_llama_layer_of_one_of_eight_ranks_by_hand() -> None:
    """4 of 32 heads, 1 of 8 kv heads of 128; 1792 of 14336 FFN columns."""
    apart = rows("dense tp8", "prefill", "dense")
    attention = [(128, 4096), (128, 4096), (512, 4096), (4096, 512)]
    assert products(apart) == sorted(
        [*attention, (1792, 4096), (1792, 4096), (4096, 1792)],
    )
    fused = rows("dense tp8", "prefill", "dense", "qkv", "gate_up")
    assert products(fused) == sorted([(768, 4096), (4096, 512), (3584, 4096), (4096, 1792)])
    (attend,) = (row for row in fused if row.kind == "attention")
    assert (attend.heads, attend.kv_heads, attend.head_dim) == (4, 1, 128)


def test_heads_beyond_the_kv_heads_share_one() -> None:
    """32 heads and 4 kv heads over 16 ranks: two query heads and one kv head a rank."""
    (attend,) = (r for r in rows("tp beyond kv heads", "decode", "moe") if r.kind == "attention")
    assert (attend.heads, attend.kv_heads) == (2, 1)


def test_latent_attention_reads_one_stream_of_576_when_decoding() -> None:
    (up,) = (r for r in rows("mla tp8", "prefill", "moe") if r.kind == "mla_attention")
    assert (up.heads, up.head_dim, up.rope_dim, up.value_dim) == (16, 128, 64, 128)
    (absorbed,) = (r for r in rows("mla tp8", "decode", "moe") if r.kind == "mla_absorbed")
    assert (absorbed.heads, absorbed.head_dim, absorbed.rope_dim) == (16, 512, 64)


def test_a_rank_of_sixteen_computes_its_sixteen_experts() -> None:
    """deepseek-v3: 256 experts, 8 a token: half a routed row a token here, tokens of all groups."""
    found = rows("mla dp16 ep16 a2a", "decode", "moe", "gate_up")
    grouped = [(r.experts, r.share, r.n, r.k) for r in found if r.kind == "grouped_matmul"]
    assert sorted(grouped) == [(16, 0.5, 4096, 7168), (16, 0.5, 7168, 2048)]


def test_a_fusion_replaces_the_kernels_it_names() -> None:
    """qwen3-32b: two norms, two residual adds, query and key norms, two rotary embeddings."""
    apart = Counter(row.kind for row in rows("qk norm tp4", "prefill", "dense"))
    norms = Counter(row.kind for row in rows("qk norm tp4", "prefill", "dense", "add_rmsnorm"))
    heads = Counter(row.kind for row in rows("qk norm tp4", "prefill", "dense", "qk_norm_rope"))
    assert (apart["rmsnorm"], apart["add"], apart["rope"]) == (4, 2, 1)
    assert (norms["add_rmsnorm"], norms["rmsnorm"], norms["add"]) == (2, 2, 0)
    assert (heads["qk_norm_rope"], heads["rmsnorm"], heads["rope"]) == (1, 2, 0)


def test_an_activation_apart_from_its_product_is_two_kernels() -> None:
    """qwen3-32b, 6400 of 25600 columns: one reads and writes, the other reads two and writes."""
    found = {row.kind: row for row in rows("qk norm tp4", "decode", "dense")}
    assert "swiglu" not in found
    assert found["activation"].width == found["gate"].width == 6400
    assert pointwise_bytes(found["activation"]) + pointwise_bytes(found["gate"]) == 10
    fused = {row.kind: row for row in rows("qk norm tp4", "decode", "dense", "swiglu")}
    assert {"activation", "gate"}.isdisjoint(fused)
    assert fused["swiglu"].width == 6400


@pytest.mark.parametrize("phase", PHASES)
def test_the_key_of_mla_is_one_kernel_where_it_is_fused(phase: Phase) -> None:
    """A latent norm of 512, a rotary key of 64 and two cache writes; the queries rotate alone."""
    apart = Counter(row.kind for row in rows("mla tp8", phase, "moe"))
    found = rows("mla tp8", phase, "moe", "mla_kv_norm_rope")
    fused = Counter(row.kind for row in found)
    assert (apart["rope"], apart["kv_append"], apart["mla_kv_norm_rope"]) == (1, 2, 0)
    assert (fused["rope"], fused["kv_append"], fused["mla_kv_norm_rope"]) == (1, 0, 1)
    assert fused["rmsnorm"] == apart["rmsnorm"] - 1
    widths = {row.kind: row.width for row in found}
    assert (widths["mla_kv_norm_rope"], widths["rope"]) == (512 + 64, 16 * 64)


def test_a_norm_quantizes_what_only_linear_layers_read() -> None:
    """Dense: both norms. With experts: the one before attention; the router reads the other."""
    dense = rows("qk norm tp4", "decode", "dense", "qkv", "gate_up", "add_rmsnorm", "norm_quant")
    norms = [row.weight_class for row in dense if row.kind == "add_rmsnorm"]
    assert norms == ["linear", "linear"]
    fed = {(row.n, row.k): row.quantized for row in dense if row.kind == "matmul"}
    assert fed == {
        (2560, 5120): True,
        (5120, 2048): False,
        (12800, 5120): True,
        (5120, 6400): False,
    }
    for fused, narrow in (("act_quant", (5120, 6400)), ("attention_quant", (5120, 2048))):
        found = rows("qk norm tp4", "decode", "dense", "qkv", "gate_up", "swiglu", fused)
        assert [(r.n, r.k) for r in found if r.quantized] == [narrow]
    moe = rows("moe tp4 ep4", "decode", "moe", "add_rmsnorm", "norm_quant")
    assert [r.weight_class for r in moe if r.kind == "add_rmsnorm"] == ["linear", "none"]
    apart = rows("qk norm tp4", "decode", "dense", "qkv", "gate_up", "add_rmsnorm")
    assert not any(row.quantized or (row.weight_class == "linear" and not row.k) for row in apart)


@pytest.mark.parametrize("phase", PHASES)
def test_caches_are_written_by_one_kernel_or_by_what_prepares_attention(phase: Phase) -> None:
    """qwen3-32b norms its keys before they rotate, which llama-3.1-8b does not."""

    def kinds(name: str, *fused: str) -> Counter[str]:
        return Counter(row.kind for row in rows(name, phase, "dense", *fused))

    for name in ("dense tp8", "qk norm tp4"):
        assert kinds(name)["kv_append"] == 2
        assert kinds(name, "cache_write")["kv_append"] == 1
        assert kinds(name, "attention_rope", "cache_write")["kv_append"] == 0
    assert kinds("dense tp8", "attention_rope")["rope"] == 0
    both = kinds("qk norm tp4", "attention_rope", "qk_norm_rope")
    assert (both["qk_norm_rope"], both["kv_append"]) == (1, 0)
    widths = [
        sum(row.width for row in rows("dense tp8", phase, "dense", *fused) if "kv" in row.kind)
        for fused in ((), ("cache_write",))
    ]
    assert widths[0] == widths[1]


def test_an_all_reduce_runs_the_norm_after_it_when_decoding() -> None:
    """Two sums and two norms of a layer; on one rank there is no sum to run them."""
    fused = ("add_rmsnorm", "all_reduce_norm")
    for name, phase, left in (
        ("dense tp8", "decode", 0),
        ("dense tp8", "prefill", 2),
        ("dense tp1", "decode", 2),
    ):
        found = rows(name, phase, "dense", *fused)  # type: ignore[arg-type]  # both are phases
        assert sum(row.kind == "add_rmsnorm" for row in found) == left, (name, phase)
        sums = sum(row.kind == "all_reduce" for row in found)
        assert sums == (0 if name == "dense tp1" else 2)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_changes_the_rows_of_some_model(fusion: str) -> None:
    """Beside the others, but for the cache writes that `attention_rope` runs in any case."""
    others = [one for one in FUSIONS if one != fusion]
    if fusion == "cache_write":
        others.remove("attention_rope")
    assert any(
        rows(name, phase, block, *others) != rows(name, phase, block, *others, fusion)
        for name in ("qk norm tp4", "mla tp8")
        for phase in PHASES
        for block in load(name).model.rows[phase]
    )


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", CASES)
def test_fusing_keeps_every_flop_and_never_adds_a_kernel(name: str, phase: Phase) -> None:
    def flop(found: tuple[Row, ...]) -> float:
        return sum(r.n * r.k * max(r.experts, 1.0) for r in found if r.k)

    for block in load(name).model.rows[phase]:
        apart, fused = rows(name, phase, block), rows(name, phase, block, *FUSIONS)
        assert flop(fused) == flop(apart)
        layer = block.endswith(("dense", "moe"))
        assert len(fused) < len(apart) if layer else len(fused) == len(apart)


def test_logits_of_every_sequence_are_sampled_where_the_engine_samples() -> None:
    """Nor are they gathered elsewhere."""
    kinds = [row.kind for row in rows("dense tp8", "decode", "head")]
    assert kinds[-1] == "softmax_sample"
    graph = load("dense tp8").graphs["decode"]
    silent = replace(PLAIN, sampling=False)
    cluster = load_cluster(CLUSTER, cards=8)
    assert [r.kind for r in block_rows(graph, graph.blocks["head"], cluster, silent)] == kinds[:-2]
