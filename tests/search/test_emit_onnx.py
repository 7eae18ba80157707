"""Target `atc` on an ONNX file: the two-card matmul of CANN's guide, from the file to its slices.

The slices are run rank by rank in one thread each; a barrier stands for the collective.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tests.search.emit_cases import emit_plan, parser_of, run_script

from shardplan.models.errors import InputError
from shardplan.search.emit import emit

HAS_ONNX = importlib.util.find_spec("onnx") is not None
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs onnx")


def _matmuls(path: Path, *sizes: int) -> None:
    """A chain of products x [2, k] w [k, n], written to a file."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(7)
    nodes, weights, name = [], [], "x"
    for i, (k, n) in enumerate(itertools.pairwise(sizes)):
        values = rng.standard_normal((k, n)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{i}"], [f"y{i}"]))
        name = f"y{i}"
    ends = [
        helper.make_tensor_value_info(end, TensorProto.FLOAT, [2, size])
        for end, size in (("x", sizes[0]), (name, sizes[-1]))
    ]
    graph = helper.make_graph(nodes, "matmul2", ends[:1], ends[1:], weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def _plan(parameters: int, **changes: Any) -> Any:
    """Two 910 cards."""
    model = {"name": "matmul2", "parameters": parameters}
    types = {"weight_dtype": "fp16", "kv_dtype": "fp16"}
    return emit_plan(soc="Ascend910A", model=model, **{"tp": 2, **types, **changes})


def _run(slices: list[Path], x: Any) -> list[Any]:
    """Outputs of all ranks."""
    from onnx.reference import ReferenceEvaluator

    base: Any = importlib.import_module("onnx.reference.op_run").OpRun

    barrier, shared, found = threading.Barrier(len(slices)), {}, {}

    def joined(join: Callable[[list[Any]], Any], x: Any) -> tuple[Any]:
        shared[threading.current_thread().name] = x
        barrier.wait()
        whole = join([shared[str(rank)] for rank in range(len(slices))])
        barrier.wait()
        return (whole,)

    def all_reduce(_: Any, x: Any, group_size: int | None = None) -> tuple[Any]:
        assert group_size == len(slices)
        return joined(sum, x)

    def all_gather(
        _: Any, x: Any, axis: int | None = None, group_size: int | None = None
    ) -> tuple[Any]:
        assert group_size == len(slices)
        return joined(lambda parts: np.concatenate(parts, axis), x)

    kinds = {"AllReduce": all_reduce, "AllGather": all_gather}
    joins = [
        type(kind, (base,), {"op_domain": "com.microsoft", "_run": run})
        for kind, run in kinds.items()
    ]

    def rank(index: int) -> None:
        run = ReferenceEvaluator(str(slices[index]), new_ops=joins)
        (result,) = cast("list[Any]", run.run(None, {"x": x}))
        found[index] = result

    threads = [threading.Thread(target=rank, args=(i,), name=str(i)) for i in range(len(slices))]
    for one in threads:
        one.start()
    for one in threads:
        one.join(timeout=60)
    return [found[i] for i in range(len(slices))]


@needs_onnx
def test_the_guides_matmul_on_two_cards_split_by_the_compiler(tmp_path: Path) -> None:
    """The command line of the guide, with an ONNX file in the place of its own format."""
    _matmuls(tmp_path / "matmul2.onnx", 8, 16)
    emit(_plan(128), "atc", tmp_path / "out", model=str(tmp_path / "matmul2.onnx"))
    out = tmp_path / "out"
    (call,) = run_script(out / "atc.sh", "atc")
    found = vars(parser_of("atc", "atc").parse_args(call.words))
    assert {key: value for key, value in found.items() if value is not None} == {
        "model": str(out / "model" / "matmul2.onnx"),
        "framework": "5",
        "output": str(out / "matmul2"),
        "soc_version": "Ascend910A",
        "distributed_cluster_build": "1",
        "cluster_config": str(out / "numa_config.json"),
        "enable_graph_parallel": "1",
        "graph_parallel_option_path": str(out / "parallel_option.json"),
    }
    option = json.loads((out / "parallel_option.json").read_text("utf-8"))["graph_parallel_option"]
    assert option["tensor_parallel_option"] == {"tensor_parallel_size": 2}
    (cluster,) = json.loads((out / "numa_config.json").read_text("utf-8"))["cluster"]
    assert len(cluster["cluster_nodes"][0]["item_list"]) == 2
    given = (tmp_path / "matmul2.onnx").read_bytes()
    assert (out / "model" / "matmul2.onnx").read_bytes() == given


@needs_onnx
@pytest.mark.parametrize(
    ("sizes", "ranks", "kinds"),
    [
        ((8, 16), 2, ["MatMul", "AllGather"]),
        ((8, 15), 2, ["Slice", "MatMul", "AllReduce"]),
        ((8, 16, 6, 8), 4, ["MatMul", "AllGather", "Slice", "MatMul", "AllReduce", "MatMul"]),
    ],
)
def test_slices_compute_what_the_whole_does(
    tmp_path: Path, sizes: tuple[int, ...], ranks: int, kinds: list[str]
) -> None:
    """Columns where they divide, rows where those do, weights sliced, outputs whole."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    _matmuls(tmp_path / "matmul2.onnx", *sizes)
    count = sum(k * n for k, n in itertools.pairwise(sizes))
    whole = str(tmp_path / "matmul2.onnx")
    emit(_plan(count, tp=ranks), "atc", tmp_path / "out", door="shards", model=whole)
    slices = [tmp_path / "out" / "shards" / f"matmul2_rank{r}.onnx" for r in range(ranks)]
    model = onnx.load(slices[0])
    assert [node.op_type for node in model.graph.node][: len(kinds)] == kinds
    held = sum(int(np.prod(w.dims)) for w in model.graph.initializer if w.name.startswith("w"))
    assert held < count if len(sizes) > 2 else held == count // ranks
    x = np.random.default_rng(3).standard_normal((2, sizes[0])).astype(np.float32)
    (expected,) = cast("list[Any]", ReferenceEvaluator(whole).run(None, {"x": x}))
    for found in _run(slices, x):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@needs_onnx
def test_the_slices_are_named_where_the_compiler_looks(tmp_path: Path) -> None:
    """model_relation_config names the files of the folder that the command line names."""
    _matmuls(tmp_path / "matmul2.onnx", 8, 16)
    whole = str(tmp_path / "matmul2.onnx")
    emit(_plan(128), "atc", tmp_path / "out", door="shards", model=whole)
    (call,) = run_script(tmp_path / "out" / "atc.sh", "atc")
    found = vars(parser_of("atc", "atc").parse_args(call.words))
    folder = Path(found["shard_model_dir"])
    config = json.loads(Path(found["model_relation_config"]).read_text("utf-8"))
    names = [one["submodel_name"] for one in config["deploy_config"]]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert found["framework"] == "5"


@needs_onnx
@pytest.mark.parametrize(
    ("size", "changes", "rule"),
    [
        (128, {"tp": 3}, "divides"),
        (129, {}, "model of other sizes"),
        (128, {"pp": 2}, "pipeline stages"),
    ],
)
def test_a_model_that_does_not_fit_the_plan_is_refused(
    tmp_path: Path, size: int, changes: dict[str, Any], rule: str
) -> None:
    """And nothing is written."""
    _matmuls(tmp_path / "matmul2.onnx", 8, 16)
    whole = str(tmp_path / "matmul2.onnx")
    with pytest.raises(InputError, match=rule):
        emit(_plan(size, **changes), "atc", tmp_path / "out", door="shards", model=whole)
    assert not (tmp_path / "out").exists()


@needs_onnx
@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x08\x01" * 9, None])
def test_a_broken_file_is_one_clear_error(tmp_path: Path, content: bytes | None) -> None:
    """Unreadable, empty, or of another format."""
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="model"):
        emit(_plan(128), "atc", tmp_path / "out", model=str(path))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(HAS_ONNX, reason="onnx is installed")
def test_without_onnx_the_extra_is_named(tmp_path: Path) -> None:
    """The core does not need it."""
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(InputError, match=r"shardplan\[onnx\]"):
        emit(_plan(128), "atc", tmp_path / "out", model=str(tmp_path / "m.onnx"))
