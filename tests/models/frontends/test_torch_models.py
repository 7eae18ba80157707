"""Models of transformers: captured graphs, configurations and folded captures agree."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import shardplan
from shardplan.models.build import build_graph
from shardplan.models.counts import kv_bytes_per_token, parameter_count
from shardplan.models.errors import InputError
from shardplan.models.opdescribe import describe
from shardplan.models.opfold import unfolded
from shardplan.models.spec import ModelSpec

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
from tests.models.frontends.hf_cases import CASES, llama

from shardplan.models.frontends.decoder import decoder_of
from shardplan.models.frontends.torch_model import read_torch

TOKENS = 16
UNSEEN = ("name", "source", "extra", "dtype", "max_context", "rope_theta", "norm_eps", "mtp_layers")
"""What no graph shows."""


def products_flop(spec: ModelSpec, tokens: int) -> float:
    """Products of a prefill in the config front end's graph, logits of every token."""
    graph = build_graph(spec, "prefill")
    free = {"B": 1, "T": tokens, "S": tokens}
    sizes = {**graph.sizes, **free, "L": tokens}
    total = 0.0
    for block, _ in graph.sequence():
        for op in graph.blocks[block].ops():
            if op.kind == "matmul":
                product = 2.0 * op.density
                for dim in (*op.dims, *op.contract):
                    product *= sizes[dim]
                total += product
    scores = spec.layers * spec.heads * tokens * tokens
    value = spec.mla.v_head_dim if spec.mla is not None else spec.head_dim
    return total + 2.0 * scores * (spec.head_dim + value)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_graph_and_its_configuration_agree(name: str) -> None:
    """Parameters, FLOP, layers, cache, and every size that a search takes."""
    found = read_torch(*CASES[name], tokens=TOKENS).graph
    spec = shardplan.load_model(CASES[name])
    said = describe(found)
    assert said.parameters == parameter_count(spec)
    assert said.flop == products_flop(spec, TOKENS)
    assert said.layers == said.attentions == spec.layers
    assert said.kv_elements_per_token * 2 == kv_bytes_per_token(spec)
    assert said.vocabulary == spec.vocab
    seen = asdict(decoder_of(found))
    wanted = asdict(spec)
    if spec.moe is not None and not spec.dense_layers:
        wanted["ffn"] = spec.moe.ffn  # no layer of that width is there
    assert {n: v for n, v in seen.items() if n not in UNSEEN} == {
        n: v for n, v in wanted.items() if n not in UNSEEN
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_folded_capture_and_a_full_one_agree(name: str) -> None:
    short = read_torch(*CASES[name], tokens=TOKENS)
    full = read_torch(*CASES[name], tokens=TOKENS, folded=False)
    assert replace(describe(short.graph), operators={}) == replace(
        describe(full.graph), operators={}
    )
    assert len(short.graph.operators) < len(full.graph.operators)
    assert describe(unfolded(short.graph)).operators == describe(full.graph).operators


@pytest.mark.slow
def test_an_export_and_its_file_say_what_the_class_says(tmp_path: Path) -> None:
    """Recognised in the graph alone: an export has no configuration."""
    model_class, config = llama()
    program = read_torch(model_class(config), tokens=TOKENS, folded=False).capture.program
    spec = shardplan.load_model(program)
    torch.export.save(program, tmp_path / "llama.pt2")
    read = shardplan.load_model(tmp_path / "llama.pt2")
    wanted = asdict(shardplan.load_model(llama()))
    for one in (spec, read):
        assert {n: v for n, v in asdict(one).items() if n not in UNSEEN} == {
            n: v for n, v in wanted.items() if n not in UNSEEN
        }


def test_a_module_whose_parameters_are_not_those_of_its_configuration_is_refused() -> None:
    model_class, config = llama()
    with torch.device("meta"):
        model = model_class(config)
        model.extra = torch.nn.Linear(8, 8)
    with pytest.raises(InputError, match=r"parameters=.* by its configuration="):
        shardplan.load_model(model)


def test_a_class_needs_its_config() -> None:
    with pytest.raises(InputError, match="class and its config"):
        shardplan.load_model(hf.LlamaForCausalLM)
    with pytest.raises(InputError, match="built from its config"):
        shardplan.load_model((hf.LlamaForCausalLM, {"hidden_size": 8}))


@pytest.mark.slow
def test_bert_is_a_graph_but_no_decoder() -> None:
    config = hf.BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    graph = read_torch(hf.BertForMaskedLM, config, tokens=TOKENS).graph
    said = describe(graph)
    assert (said.layers, said.attentions) == (3, 3)
    with pytest.raises(InputError, match="causal decoder"):
        decoder_of(graph)


@pytest.mark.slow
def test_the_examples_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "capture.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    exec("\n".join(blocks), {})
    told = capsys.readouterr().out
    assert "70,553,706,496 parameters, 80 layers, folded: {1: 79}" in told
    assert "matmul" in told
