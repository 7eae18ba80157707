"""Models of every rank compute what the whole model computes, run by onnxruntime in lock step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardplan.models.catalog import load_model
from shardplan.models.errors import InputError, LayoutError
from shardplan.models.parallel import Mesh

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import onnx
from onnx import helper
from tests.models.frontends import onnx_cases as cases
from tests.models.onnxout.lockstep import Values, run_ranks, run_whole

from shardplan.models.frontends.onnx_graph import OnnxGraph, read_onnx
from shardplan.models.onnxout.choose import both, follow_strategy, megatron_strategy
from shardplan.models.onnxout.laid import Laid, lay
from shardplan.models.onnxout.write import write_ranks

TOLERANCE = 1e-5
Strategy = dict[str, dict[str, str]]


def mesh(*sizes: int) -> Mesh:
    """Axes x, y, ... of these sizes."""
    return Mesh(tuple("xyz"[: len(sizes)]), sizes, {})


def error(whole: Values, ranks: list[Values]) -> float:
    """Largest difference over the outputs of all ranks, relative to the output's largest value."""
    assert any(ranks)
    return max(
        float(np.abs(found[name] - whole[name]).max() / np.abs(whole[name]).max())
        for found in ranks
        for name in found
    )


def inputs_of(path: Path) -> Values:
    """Numbers for the inputs of a file: token ids, truth values, or reals."""
    rng, found = np.random.default_rng(1), {}
    for one in onnx.load(path).graph.input:
        shape = [dim.dim_value for dim in one.type.tensor_type.shape.dim]
        kind = np.dtype(helper.tensor_dtype_to_np_dtype(one.type.tensor_type.elem_type))
        whole = rng.integers(2 if kind.kind == "b" else 8, size=shape)
        real = kind == np.float32
        found[one.name] = (rng.standard_normal(shape) if real else whole).astype(kind)
    return found


def proven(path: Path, laid: Laid, folder: Path) -> None:
    """The ranks agree with the original file."""
    write_ranks(laid, folder)
    given = inputs_of(path)
    assert error(run_whole(path, given), run_ranks(folder, given)) < TOLERANCE


def _megatron(graph: OnnxGraph, on: Mesh) -> Strategy:
    return megatron_strategy(graph.graph, on, "x")


def _megatron_and_data(graph: OnnxGraph, on: Mesh) -> Strategy:
    dims = {name: 0 for name, one in graph.raw.tensors.items() if one.kind == "input"}
    data = follow_strategy(graph.graph, on, "y", dims)
    return both(megatron_strategy(graph.graph, on, "x"), data)


def _nested(graph: OnnxGraph, on: Mesh) -> Strategy:
    """Megatron's split over both axes of the mesh."""
    found = megatron_strategy(graph.graph, mesh(on.ranks), "x")
    return {name: dict.fromkeys(on.axes, chosen["x"]) for name, chosen in found.items()}


def _whole(graph: OnnxGraph, on: Mesh) -> Strategy:
    return {}


PLANS: dict[str, tuple[Mesh, Callable[[OnnxGraph, Mesh], Strategy], tuple[int, ...]]] = {
    "whole": (mesh(2), _whole, ()),
    "tp2": (mesh(2), _megatron, ()),
    "tp4": (mesh(4), _megatron, ()),
    "tp2 dp2": (mesh(2, 2), _megatron_and_data, ()),
    "tp 2x2": (mesh(2, 2), _nested, ()),
    "pp2": (mesh(1), _whole, (1, 1)),
    "tp2 pp2": (mesh(2), _megatron, (1, 1)),
    "tp 2x2 pp2": (mesh(2, 2), _nested, (1, 1)),
}


@pytest.mark.parametrize("model", ["mlp", "matmul2"])
@pytest.mark.parametrize("plan", [name for name in PLANS if "pp" not in name])
def test_the_ranks_of_small_products_agree(model: str, plan: str, tmp_path: Path) -> None:
    path = getattr(cases, model)(tmp_path / "m.onnx")
    on, choose, _ = PLANS[plan]
    graph = read_onnx(path)
    laid = lay(graph, choose(graph, on), on)
    proven(path, laid, tmp_path / "out")
    if choose is _megatron:
        assert [one.kind for one in laid.moves()] == ["all_reduce"]


DECODERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "written out": ({}, {}),
    "tied, biases": ({}, {"tied": True, "bias": True}),
    "attention operator": ({"opset_version": 23}, {}),
    "TorchScript": ({"dynamo": False, "opset_version": 17, "external_data": True}, {}),
}


@pytest.fixture(scope="module", params=DECODERS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options, sizes = DECODERS[request.param]
    return cases.decoder(tmp_path_factory.mktemp("decoder") / "model.onnx", options, **sizes)


@pytest.mark.slow
def test_the_ranks_of_a_decoder_agree(exported: Path, tmp_path: Path) -> None:
    """Every plan; Megatron's has an all-reduce for the embedding and two a layer, and gathers the
    logits."""
    graph = read_onnx(exported)
    for name, (on, choose, stages) in PLANS.items():
        laid = lay(graph, choose(graph, on), on, stages)
        proven(exported, laid, tmp_path / name)
        if choose is _megatron:
            counts = Counter(one.kind for one in laid.moves())
            assert counts == {"all_reduce": 2 * 2 + 1, "all_gather": 1}, name


@pytest.mark.slow
@pytest.mark.parametrize("model", ["encoder", "vit"])
def test_the_ranks_of_encoders_agree(model: str, tmp_path: Path) -> None:
    path = getattr(cases, model)(tmp_path / "m.onnx")
    graph = read_onnx(path)
    for name in ("tp2", "tp4", "tp2 dp2"):
        on, choose, _ = PLANS[name]
        laid = lay(graph, choose(graph, on), on)
        assert laid.moves("all_reduce")
        proven(path, laid, tmp_path / name)


LINES: list[tuple[str, str]] = [
    (a, b) for a in ("b0", "m", "k", "n", "") for b in ("b0", "m", "k", "n", "")
]


@pytest.mark.parametrize(("first", "second"), LINES)
def test_every_redistribution_between_two_products(first: str, second: str, tmp_path: Path) -> None:
    """Two products of three dims; whatever split of one meets whatever split of the other."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "w2"], ["y"], "second"),
    ]
    weights = {"w1": cases.numbers(8, 12), "w2": cases.numbers(12, 16)}
    path = cases.save(tmp_path / "m.onnx", nodes, {"x": (4, 8, 8)}, ["y"], weights)
    chosen = {"first": {"y": first} if first else {}, "second": {"y": second} if second else {}}
    graph = read_onnx(path)
    for on in (mesh(2, 2), mesh(2, 4)):
        batch = {name: {"x": "b0"} for name in chosen}
        for strategy in (chosen, both(chosen, batch)):
            if any("b0" in one.values() for one in chosen.values()) and strategy is not chosen:
                continue
            laid = lay(graph, strategy, on)
            proven(path, laid, tmp_path / "out")
    kinds = {one.tensor: one.kind for one in laid.moves()}
    wanted = {"m": 1, "n": 2, "b0": 0}
    if first == "k" and second in ("m", "b0"):
        assert kinds["h"] == "reduce_scatter"
    elif first in wanted and second in ("m", "k", "b0"):
        reads = {"m": 1, "k": 2, "b0": 0}[second]
        assert kinds.get("h") == ("all_to_all" if wanted[first] != reads else None)


def test_caches_are_held_and_given_back_in_parts(tmp_path: Path) -> None:
    """A decode step of the attention operator; each rank has its kv heads of the cache."""
    names = ["q", "k", "v", "", "past_k", "past_v"]
    node = helper.make_node("Attention", names, ["y", "new_k", "new_v"], "attention", is_causal=1)
    shapes = {"q": (2, 8, 1, 4), "k": (2, 4, 1, 4), "v": (2, 4, 1, 4)}
    shapes |= {"past_k": (2, 4, 5, 4), "past_v": (2, 4, 5, 4)}
    path = cases.save(tmp_path / "m.onnx", [node], shapes, ["y", "new_k", "new_v"], {}, opset=23)
    graph = read_onnx(path)
    assert graph.raw.tensors["past_k"].kind == "state"
    write_ranks(lay(graph, {"attention": {"x": "h"}}, mesh(2)), tmp_path / "out")
    given = inputs_of(path)
    whole = run_whole(path, given)
    parts = [
        given | {name: np.split(given[name], 2, axis=1)[rank] for name in ("past_k", "past_v")}
        for rank in range(2)
    ]
    ranks = run_ranks(tmp_path / "out", parts)
    for name in ("new_k", "new_v"):
        joined = np.concatenate([one[name] for one in ranks], axis=1)
        assert np.array_equal(joined, whole[name])
    assert max(np.abs(one["y"] - whole["y"]).max() for one in ranks) < TOLERANCE


def routed(path: Path) -> Path:
    """Four experts, two a token: scores by softmax, the best scattered, all experts computed."""
    make = helper.make_node
    nodes = [
        make("MatMul", ["x", "router"], ["s"], "router"),
        make("Softmax", ["s"], ["p"], "softmax"),
        make("TopK", ["p", "two"], ["best", "chosen"], "topk"),
        make("Mul", ["p", "zero"], ["none"], "none"),
        make("ScatterElements", ["none", "chosen", "best"], ["gates"], "scatter", axis=1),
        make("Transpose", ["gates"], ["turned"], "turned"),
        make("Unsqueeze", ["turned", "last"], ["g"], "last_dim"),
        make("MatMul", ["x", "w1"], ["h"], "up"),
        make("Relu", ["h"], ["a"], "act"),
        make("MatMul", ["a", "w2"], ["o"], "down"),
        make("Mul", ["o", "g"], ["weighed"], "weigh"),
        make("ReduceSum", ["weighed", "first"], ["y"], "sum", keepdims=0),
    ]
    weights = {"router": cases.numbers(8, 4), "w1": cases.numbers(4, 8, 12)}
    weights |= {"w2": cases.numbers(4, 12, 8), "two": np.array([2]), "zero": np.float32(0)}
    weights |= {"last": np.array([-1]), "first": np.array([0])}
    return cases.save(path, nodes, {"x": (6, 8)}, ["y"], weights)


def test_experts_are_split_over_ranks_and_summed(tmp_path: Path) -> None:
    """Each rank has its experts; the sum over them is the one collective."""
    path = routed(tmp_path / "m.onnx")
    graph = read_onnx(path)
    for ways in (2, 4):
        strategy = follow_strategy(graph.graph, mesh(ways), "x", {"w1": 0})
        laid = lay(graph, strategy, mesh(ways))
        assert [one.kind for one in laid.moves() if one.kind != "slice"] == ["all_reduce"]
        assert laid.held["w1"] == laid.held["w2"] == {"x": 0}
        proven(path, laid, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3"])
def test_models_of_transformers_are_recognised_and_their_ranks_agree(
    name: str, tmp_path: Path
) -> None:
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 2}
    config = getattr(hf, f"{name}Config")(**sizes, head_dim=4, dtype="float32")

    from tests.models.frontends.torch_modules import Logits

    with torch.no_grad():
        path = cases.export(
            tmp_path / "m.onnx",
            Logits(hf.AutoModelForCausalLM.from_config(config)),
            torch.arange(16).reshape(2, 8),
        )
    config.architectures = [f"{name}ForCausalLM"]
    config.save_pretrained(tmp_path)
    found, wanted = load_model(path), load_model(tmp_path / "config.json")
    for field in (
        "architecture",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "ffn",
        "vocab",
        "qkv_bias",
        "qk_norm",
        "tied_embeddings",
        "dtype",
    ):
        assert getattr(found, field) == getattr(wanted, field), field
    graph = read_onnx(path)
    for plan in ("tp2", "tp4", "tp2 pp2"):
        on, choose, stages = PLANS[plan]
        proven(path, lay(graph, choose(graph, on), on, stages), tmp_path / plan)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp2", "tp4", "tp2 pp2"])
def test_a_decode_step_with_caches_agrees(plan: str, tmp_path: Path) -> None:
    """Caches are inputs and outputs, held by kv heads; the decoder is recognised in it."""
    torch = pytest.importorskip("torch")
    from tests.models.frontends.torch_modules import Decoder, DecodeStep

    past = [(torch.zeros(2, 4, 5, 4), torch.zeros(2, 4, 5, 4)) for _ in range(2)]
    ids = torch.zeros(2, 1, dtype=torch.long)
    path = cases.export(tmp_path / "m.onnx", DecodeStep(Decoder()), ids, past)
    assert load_model(path).kv_heads == 4
    graph, (on, choose, stages) = read_onnx(path), PLANS[plan]
    laid = lay(graph, choose(graph, on), on, stages)
    write_ranks(laid, tmp_path / "out")
    given = inputs_of(path)
    states = [name for name, one in graph.raw.tensors.items() if one.kind == "state"]
    assert len(states) == 4
    parts = [
        given | {name: np.split(given[name], on.ranks, 1)[rank % on.ranks] for name in states}
        for rank in range(laid.ranks)
    ]
    ranks, whole = run_ranks(tmp_path / "out", parts), run_whole(path, given)
    for name, value in whole.items():
        found = [one[name] for one in ranks if name in one]
        assert len(found) == on.ranks
        logits = found[0].shape == value.shape
        together = found[0] if logits else np.concatenate(found, axis=1)
        assert np.abs(together - value).max() < TOLERANCE * np.abs(value).max()


@pytest.mark.parametrize("plan", ["tp2", "tp4", "tp2 dp2", "tp 2x2"])
def test_every_element_of_a_weight_is_owned_the_right_number_of_times(
    plan: str, tmp_path: Path
) -> None:
    """As often as the mesh has ranks for each piece; the pieces together are the weight."""
    path = cases.mlp(tmp_path / "m.onnx")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        count = int(np.prod(tensor.dims))
        numbered = np.arange(count, dtype=np.float32).reshape(tensor.dims)
        tensor.CopyFrom(onnx.numpy_helper.from_array(numbered, tensor.name))
    onnx.save(model, path)
    on, choose, _ = PLANS[plan]
    graph = read_onnx(path)
    told = write_ranks(lay(graph, choose(graph, on), on), tmp_path / "out")
    split = {"w1": 0, "b1": 0, "w2": 0}
    for tensor in model.graph.initializer:
        owners = np.zeros(int(np.prod(tensor.dims)), int)
        for one in told["ranks"]:
            held = onnx.load(tmp_path / "out" / one["file"]).graph.initializer
            part = next(onnx.numpy_helper.to_array(t) for t in held if t.name == tensor.name)
            owners[part.astype(int).reshape(-1)] += 1
        ways = 1 if tensor.name not in split else on.ranks if plan == "tp 2x2" else on.shape[0]
        assert set(owners) == {on.ranks // ways}


def test_large_weights_lie_beside_the_model_of_their_rank(tmp_path: Path) -> None:
    path = cases.matmul2(tmp_path / "m.onnx", hidden=512)
    graph = read_onnx(path)
    laid = lay(graph, _megatron(graph, mesh(2)), mesh(2))
    write_ranks(laid, tmp_path / "out")
    assert (tmp_path / "out" / "rank0001.bin").stat().st_size >= 16 * 256 * 4
    assert (tmp_path / "out" / "rank0001.onnx").stat().st_size < 2000
    proven(path, laid, tmp_path / "again")


def test_what_cannot_be_laid_is_refused(tmp_path: Path) -> None:
    graph = read_onnx(cases.mlp(tmp_path / "m.onnx"))
    for strategy, on, message in (
        ({"nobody": {"x": "n"}}, mesh(2), "operators of the model.*nobody"),
        ({"up": {"z": "n"}}, mesh(2), "axes of the mesh.*operator=up, axis=z"),
        ({"up": {"x": "q"}}, mesh(2), "loop of its own"),
        ({"up": {"x": "n"}}, mesh(3), "divide it.*loop=n of 32, ranks=3"),
    ):
        with pytest.raises(LayoutError, match=message):
            lay(graph, strategy, on)
    with pytest.raises(LayoutError, match="hold all layers"):
        lay(graph, {}, mesh(1), (1, 1))
    with pytest.raises(LayoutError, match=r"tensor=x.*dim=0"):
        follow_strategy(graph.graph, mesh(3), "x", {"x": 0})


def test_a_collective_that_does_not_know_a_type_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("ReduceSum", ["x"], ["y"], "total", keepdims=0)]
    types = {"x": onnx.TensorProto.INT32}
    path = cases.save(tmp_path / "m.onnx", nodes, {"x": (8,)}, ["y"], {}, types=types)
    laid = lay(read_onnx(path), {"total": {"x": "d0"}}, mesh(2))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written.*folder="):
        write_ranks(laid, tmp_path / "file")
    with pytest.raises(InputError, match=r"AllReduce takes float16.*dtype=int32"):
        write_ranks(laid, tmp_path / "out")
