"""`shardplan.search` of a graph that is no decoder: a plan of operators, from whatever holds it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import shardplan
from shardplan.costmodel.catalog import load_cluster
from shardplan.models.errors import InfeasibleError, InputError
from shardplan.models.onnxout.choose import megatron_strategy
from shardplan.models.opfold import first_alike, unfolded
from shardplan.models.parallel import Mesh
from shardplan.search.api import SearchResult
from shardplan.search.ask import search
from shardplan.search.oplevel.api import price_operators, search_operators
from shardplan.search.oplevel.ask import FILES, OperatorResult, write_operators
from shardplan.search.oplevel.plan import OperatorPlan, operator_plan_schema
from shardplan.search.oplevel.proof import prove_operators
from shardplan.search.oplevel.words import mesh_shape_of, sizes_of

torch = pytest.importorskip("torch")
CLUSTER = "atlas-800t-a2"


def network(width: int = 4096, ffn: int = 16384) -> Any:
    """Two products and an activation, on the meta device."""
    with torch.device("meta"):
        return torch.nn.Sequential(
            torch.nn.Linear(width, ffn), torch.nn.GELU(), torch.nn.Linear(ffn, width)
        ).to(torch.bfloat16)


def given(rows: int = 2048, width: int = 4096) -> tuple[Any, ...]:
    """Its inputs."""
    return (torch.zeros(rows, width, dtype=torch.bfloat16, device="meta"),)


def test_a_module_that_is_no_decoder_is_split_by_operators(tmp_path: Path) -> None:
    """Columns, rows, one sum; proven, and said why by operators."""
    found = search(network(), CLUSTER, inputs=given(), cards=4)
    assert isinstance(found, OperatorResult)
    plan = found.plan
    assert plan.mesh == {"x": 4}
    assert plan.moves
    assert plan.proof is not None
    assert plan.proof.passed
    assert "causal decoder" in plan.notes[0]
    assert "4 of the cluster's 8 ranks" in plan.notes[1]
    assert plan.verify(found.graph) == plan.proof
    assert list(found.operators["name"]) == [row.name for row in plan.operators]
    assert list(found.moves["kind"]) == [row.kind for row in plan.moves]
    paths = write_operators(found, tmp_path / "out")
    assert [path.name for path in paths] == list(FILES)
    again = OperatorPlan.load(paths[0])
    assert again.dumps() == plan.dumps()
    text = paths[1].read_text(encoding="utf-8").splitlines()
    assert text[0].startswith("name,kind,where,layer,times,split,passes,reads,writes,total_s")
    assert len(text) == 1 + len(plan.operators)
    with pytest.raises(InputError, match="empty folder"):
        write_operators(found, tmp_path / "out")


def test_the_same_question_gives_the_same_bytes() -> None:
    """The measured seconds stand apart."""
    one, two = (search(network(), CLUSTER, inputs=given(), mesh=(8,)).plan for _ in range(2))
    assert one.dumps() == two.dumps()


def test_an_export_is_read_from_its_file(tmp_path: Path) -> None:
    """And verified from there."""
    module = network(64, 128).to_empty(device="cpu")
    program = torch.export.export(module, (torch.zeros(16, 64, dtype=torch.bfloat16),))
    torch.export.save(program, tmp_path / "mlp.pt2")
    found = search(tmp_path / "mlp.pt2", CLUSTER, mesh=(2,), stages=1)
    assert isinstance(found, OperatorResult)
    assert found.plan.source == str(tmp_path / "mlp.pt2")
    assert found.plan.verify().passed
    with pytest.raises(InputError, match="deployment of a decoder"):
        search(tmp_path / "mlp.pt2", CLUSTER, tpot_ms=3.0)


def test_memory_binds_or_is_refused() -> None:
    """The weights of the network are 256 MiB."""
    held = 2.0 * 4096 * 16384 * 2
    plan = search(network(), CLUSTER, inputs=given(64), mesh=(8,), memory_bytes=held / 4).plan
    assert plan.stages[0].total_bytes <= held / 4
    with pytest.raises(InfeasibleError, match=r"least that any split needs is .* MiB"):
        search(network(), CLUSTER, inputs=given(64), mesh=(8,), memory_bytes=held / 64)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"ttft_ms": 3.0}, "`ttft_ms` belongs to the deployment of a decoder"),
        ({"mesh": (3, 5)}, "fit in the cluster"),
        ({"mesh": (4,), "cards": 8}, "fill the cards"),
        ({"cards": 9, "nodes": 1}, "some of the cluster's"),
        ({"stages": 2}, "at least one layer"),
        ({"weight_dtype": "w1a1"}, "w1a1"),
        ({"memory_bytes": 0.0}, "`memory_bytes` is above 0"),
        ({"inputs": None}, "example inputs"),
        ({"sizes": {"batch": 0}}, "whole numbers from 1"),
    ],
)
def test_what_breaks_a_rule_is_one_error(asked: dict[str, Any], match: str) -> None:
    """With the value and what to try."""
    with pytest.raises(InputError, match=match):
        search(network(), CLUSTER, **{"inputs": given(64), **asked})


def test_arguments_of_a_graph_are_none_of_a_decoder() -> None:
    """By name; unknown ones are Python's own error."""
    wrong: tuple[dict[str, Any], ...] = ({"mesh": (8,)}, {"stages": 2}, {"pins": {"x": {}}})
    for asked in wrong:
        with pytest.raises(InputError, match="belongs to a search of operators"):
            search("llama-3.1-8b", CLUSTER, **asked)
    with pytest.raises(InputError, match="`tokens` belongs to a graph"):
        search("llama-3.1-8b", CLUSTER, tokens=64)
    with pytest.raises(InputError, match="operator graph is read from"):
        search("llama-3.1-8b", CLUSTER, operators=True)
    with pytest.raises(TypeError, match="no_such"):
        search("llama-3.1-8b", CLUSTER, no_such=1)
    with pytest.raises(TypeError, match="no_such"):
        search(network(), CLUSTER, inputs=given(), no_such=1)


def test_a_decoder_is_deployed_unless_operators_are_asked_for() -> None:
    """A class and its config, as a pair or apart."""
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=4096, dtype="bfloat16",
    )  # fmt: skip
    assert isinstance(search((hf.LlamaForCausalLM, config), CLUSTER, cards=2), SearchResult)
    found = search(
        (hf.LlamaForCausalLM, config),
        CLUSTER,
        operators=True,
        tokens=512,
        mesh=(8,),
        weight_dtype="bf16",
    )
    assert isinstance(found, OperatorResult)
    assert found.plan.layers == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mixtral"])
def test_graphs_of_transformers_are_split_no_worse_than_megatron(name: str) -> None:
    """By this cost model, on one axis; the plan is proven on every layer."""
    hf = pytest.importorskip("transformers")
    config = getattr(hf, f"{name}Config")(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=8, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=32000,
    )  # fmt: skip
    graph = shardplan.load_graph(getattr(hf, f"{name}ForCausalLM"), config, tokens=2048)
    plan = search_operators(graph, load_cluster(CLUSTER), (8,), dtype="bf16")
    first = first_alike(unfolded(graph))
    split = megatron_strategy(graph, Mesh(("x",), (8,), {}), "x")
    known = {one: axes for one, axes in split.items() if first.get(one) == one}
    assert plan.certificate.gap == 0.0
    assert plan.total_s <= price_operators(graph, CLUSTER, (8,), known, dtype="bf16").total_s
    proof = prove_operators(plan, graph)
    assert proof.passed, proof.failures


def test_the_schema_is_the_committed_one() -> None:
    """A change is made on purpose, in the file too."""
    text = (resources.files("shardplan.search") / "data" / "operators.schema.json").read_text(
        "utf-8"
    )
    assert text == json.dumps(operator_plan_schema(), indent=2) + "\n"


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("auto", "auto"),
        ("8", [8]),
        ("2x4", [2, 4]),
        ("x=2,y=4", {"x": 2, "y": 4}),
        (" 2X4 ", [2, 4]),
    ],
)
def test_meshes_in_words(text: str, shape: Any) -> None:
    """As the command takes them."""
    assert mesh_shape_of(text) == shape


@pytest.mark.parametrize(
    "text", ["", "x", "2y4", "x=2,4", "x=2,x=4", "-2x4", "2x", "2x¾", "9" * 40]
)
def test_words_that_are_no_mesh(text: str) -> None:
    """One error for all."""
    with pytest.raises(InputError, match="a mesh is auto"):
        mesh_shape_of(text)


def test_sizes_in_words() -> None:
    """Symbols may be sums."""
    assert sizes_of(["batch=8,tokens=128", "past + tokens=256"]) == {
        "batch": 8, "tokens": 128, "past + tokens": 256,
    }  # fmt: skip
    for text in ("batch", "batch=", "=4", "batch=0", "batch=-1", "batch=x", "a=1,,b=2"):
        with pytest.raises(InputError, match="NAME=N"):
            sizes_of([text])
