"""ONNX files read as captured graphs: counts, layers, attention, what is recognised."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardplan.models.build import build_graph
from shardplan.models.catalog import load_model
from shardplan.models.counts import kv_bytes_per_token, parameter_count
from shardplan.models.errors import InputError
from shardplan.models.opdescribe import describe
from shardplan.models.spec import ModelSpec

pytest.importorskip("onnx")
from onnx import helper
from tests.models.frontends import onnx_cases as cases

from shardplan.models.frontends.onnx_graph import read_onnx

CONFIG = {
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def config(folder: Path, architecture: str, **changed: Any) -> ModelSpec:
    """What the config front end says of the same sizes."""
    kind = architecture.removesuffix("ForCausalLM").lower()
    text = json.dumps(CONFIG | {"architectures": [architecture], "model_type": kind} | changed)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return load_model(folder / "config.json")


def flop(spec: ModelSpec, batch: int, tokens: int) -> float:
    """Products of one prefill in the config front end's graph, logits of every token, 2 a
    multiply-add."""
    graph = build_graph(spec, "prefill")
    free = {"B": batch, "T": tokens, "S": tokens, "L": tokens}
    total = 0.0
    for block, _ in graph.sequence():
        for op in graph.blocks[block].ops():
            dims = tuple(free.get(d) or graph.sizes[d] for d in (*op.dims, *op.contract))
            if op.kind == "attention":
                total += 4.0 * graph.size(op.dims, free) * tokens
            elif op.kind == "matmul":
                product = 1
                for size in dims:
                    product *= size
                total += 2.0 * product
    return total


SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}, {}),
    "llama, tied": ("LlamaForCausalLM", {"tied": True}, {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", {"bias": True}, {}),
    "llama, kv heads equal heads, 3 layers": (
        "LlamaForCausalLM",
        {"kv": 8, "layers": 3},
        {"num_key_value_heads": 8, "num_hidden_layers": 3},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_an_exported_decoder_and_its_config_agree(name: str, tmp_path: Path) -> None:
    """Parameters, FLOP, layers, cache, and every size that a search takes."""
    architecture, sizes, changed = SAME[name]
    file = cases.decoder(tmp_path / "model.onnx", **sizes)
    wanted = config(tmp_path, architecture, **changed)
    found = describe(read_onnx(file).graph)
    assert found.parameters == parameter_count(wanted)
    assert found.flop == flop(wanted, batch=2, tokens=8)
    assert found.layers == found.attentions == wanted.layers
    assert found.kv_elements_per_token * 2 == kv_bytes_per_token(wanted)
    spec = load_model(str(file))
    for field in (
        "hidden",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "ffn",
        "vocab",
        "dtype",
        "tied_embeddings",
        "qkv_bias",
        "o_bias",
        "mlp_bias",
        "qk_norm",
        "architecture",
    ):
        assert getattr(spec, field) == getattr(wanted, field), field


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"opset_version": 23},
        {"dynamo": False, "opset_version": 17, "external_data": True},
        "dynamic",
    ],
    ids=["attention operator", "TorchScript exporter", "symbolic dims"],
)
def test_other_exports_of_a_decoder_say_the_same(options: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if options == "dynamic":
        dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
        options = {"dynamic_shapes": (dims,)}
    plain = load_model(cases.decoder(tmp_path / "model.onnx"))
    other = cases.decoder(tmp_path / "other.onnx", options)
    assert load_model(other) == replace(plain, name="other", source=str(other))


@pytest.mark.slow
def test_weights_of_sixteen_bits_are_recognised(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from tests.models.frontends.torch_modules import Decoder

    ids = torch.arange(16).reshape(2, 8)
    for name, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        file = cases.export(tmp_path / f"{name}.onnx", Decoder(tied=True).to(kind), ids)
        spec = load_model(file)
        assert (spec.dtype, spec.tied_embeddings, spec.layers) == (name, True, 2)


@pytest.mark.slow
def test_an_encoder_and_a_vit_are_counted_and_not_taken_for_decoders(tmp_path: Path) -> None:
    from tests.models.frontends.torch_modules import Encoder, VitBlock

    for name, module, layers in (("encoder", Encoder(), 3), ("vit", VitBlock(), 0)):
        file = getattr(cases, name)(tmp_path / f"{name}.onnx")
        found = describe(read_onnx(file).graph)
        assert found.parameters == sum(one.numel() for one in module.parameters())
        assert (found.layers, found.attentions) == (layers, max(layers, 1))
        with pytest.raises(InputError, match="not recognised as a causal decoder"):
            load_model(file)


@pytest.mark.slow
def test_a_decoder_without_a_gate_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    file = cases.decoder(tmp_path / "model.onnx", gated=False)
    with pytest.raises(InputError, match="gated feed-forward network"):
        load_model(file)


def test_products_without_layers_are_counted(tmp_path: Path) -> None:
    found = describe(read_onnx(cases.mlp(tmp_path / "mlp.onnx")).graph)
    assert (found.parameters, found.layers) == (32 * 16 + 32 + 32 * 8 + 8, 0)
    assert found.flop == 2.0 * 4 * 32 * (16 + 8)
    found = describe(read_onnx(cases.matmul2(tmp_path / "m.onnx")).graph)
    assert (found.parameters, found.flop) == (32 * 24, 2.0 * 8 * 32 * 24)
    with pytest.raises(InputError, match="one embedding table"):
        load_model(tmp_path / "m.onnx")


def test_layers_are_found_where_all_read_one_table(tmp_path: Path) -> None:
    """Five times y + (y w) * c, c made before them; a sixth that is wired otherwise is none."""
    make = helper.make_node
    nodes = [make("Sin", ["angles"], ["c"], "table")]
    last = "x"
    for index in range(5):
        nodes += [
            make("MatMul", [last, f"w{index}"], [f"m{index}"], f"product{index}"),
            make("Mul", [f"m{index}", "c"], [f"p{index}"], f"scaled{index}"),
            make("Add", [last, f"p{index}"], [f"y{index}"], f"sum{index}"),
        ]
        last = f"y{index}"
    nodes += [
        make("MatMul", [last, "w0"], ["m"], "product"),
        make("Mul", ["m", "c"], ["p"], "scaled"),
        make("Add", ["x", "p"], ["y"], "sum"),
    ]
    weights = {f"w{index}": cases.numbers(8, 8, seed=index) for index in range(5)}
    file = cases.save(
        tmp_path / "m.onnx", nodes, {"x": (4, 8)}, ["y"], weights | {"angles": cases.numbers(4, 8)}
    )
    graph = read_onnx(file).graph
    assert graph.layers == 5
    layers = {one.name: one.layer for one in graph.operators}
    assert [layers[f"sum{index}"] for index in range(5)] == [0, 1, 2, 3, 4]
    assert (layers["table"], layers["sum"]) == (-1, -1)


@pytest.mark.slow
def test_a_search_takes_an_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same plan as for the config of the same sizes."""
    from shardplan.search.main import run

    file = cases.decoder(tmp_path / "model.onnx")
    config(tmp_path, "LlamaForCausalLM")
    found = []
    for model in (file, tmp_path / "config.json"):
        words = ["search", "--model", str(model), "--cluster", "atlas-800t-a2", "--json"]
        assert run([*words, "--out", str(tmp_path / model.suffix)]) == 0
        plan = json.loads(capsys.readouterr().out)
        found.append({key: value for key, value in plan.items() if key in SAME_PLAN})
    assert found[0] == found[1]
    assert set(found[0]) == SAME_PLAN


SAME_PLAN = {"strategy", "performance", "memory"}
