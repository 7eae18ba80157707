"""Faults put into the models of ranks must show when they are run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import onnx
from onnx import numpy_helper
from tests.models.frontends import onnx_cases as cases
from tests.models.onnxout.lockstep import run_ranks, run_whole
from tests.models.onnxout.test_ranks import TOLERANCE, error, inputs_of, mesh

from shardplan.models.frontends.onnx_graph import read_onnx
from shardplan.models.onnxout.choose import megatron_strategy
from shardplan.models.onnxout.laid import lay
from shardplan.models.onnxout.nodes import COLLECTIVES, GROUP
from shardplan.models.onnxout.write import rank_file, write_ranks

SEEN = 1e-3
Models = list[onnx.ModelProto]


def _of(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(node for node in model.graph.node if node.op_type == op)
    return found


def _weight(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    found: onnx.TensorProto = next(one for one in model.graph.initializer if one.name == name)
    return found


def drop_all_reduce(models: Models) -> None:
    """The partial sum is taken for the sum."""
    for model in models:
        node = _of(model, "AllReduce")
        node.op_type, node.domain = "Identity", ""


def double_count(models: Models) -> None:
    """The sum is taken twice."""
    for model in models:
        nodes = list(model.graph.node)
        place = next(i for i, node in enumerate(nodes) if node.op_type == "AllReduce")
        again = onnx.NodeProto()
        again.CopyFrom(nodes[place])
        nodes[place].output[0] += "/once"
        again.input[0] = nodes[place].output[0]
        nodes.insert(place + 1, again)
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def swapped_ranks(models: Models) -> None:
    """Two ranks have each other's rows of the last weight."""
    first, second = (_weight(model, "w2") for model in models[:2])
    kept = onnx.TensorProto()
    kept.CopyFrom(first)
    first.CopyFrom(second)
    second.CopyFrom(kept)


def swapped_group(models: Models) -> None:
    """The pieces of a gather come in the wrong order."""
    for model in models:
        for prop in _of(model, "AllGather").metadata_props:
            if prop.key == GROUP:
                prop.value = ",".join(reversed(prop.value.split(",")))


def stale_weight(models: Models) -> None:
    """One rank has the other's piece of a weight too."""
    _weight(models[1], "w1").CopyFrom(_weight(models[0], "w1"))


def wrong_cut(models: Models) -> None:
    """A square weight is cut along its other dim."""
    whole = np.concatenate([numpy_helper.to_array(_weight(one, "w1")) for one in models], axis=1)
    for rank, model in enumerate(models):
        size = whole.shape[0] // len(models)
        part = whole[rank * size : (rank + 1) * size]
        _weight(model, "w1").CopyFrom(numpy_helper.from_array(part.T.copy(), "w1"))


SMALL = [drop_all_reduce, double_count, swapped_ranks, stale_weight, wrong_cut]


def _mutated(path: Path, folder: Path, fault: Callable[[Models], None] | None) -> float:
    """The error of the ranks with a fault in them."""
    graph, on = read_onnx(path), mesh(2)
    told = write_ranks(lay(graph, megatron_strategy(graph.graph, on, "x"), on), folder)
    models = [onnx.load(folder / one["file"]) for one in told["ranks"]]
    if fault is not None:
        fault(models)
    for rank, model in enumerate(models):
        onnx.save(model, folder / rank_file(rank))
    given = inputs_of(path)
    return error(run_whole(path, given), run_ranks(folder, given))


@pytest.mark.parametrize("fault", SMALL)
def test_a_fault_in_two_products_is_seen(fault: Callable[[Models], None], tmp_path: Path) -> None:
    path = cases.matmul2(tmp_path / "m.onnx", hidden=16)
    assert _mutated(path, tmp_path / "right", None) < TOLERANCE
    assert _mutated(path, tmp_path / "wrong", fault) > SEEN


@pytest.mark.slow
def test_a_fault_in_a_decoder_is_seen(tmp_path: Path) -> None:
    path = cases.decoder(tmp_path / "m.onnx", vocab=32, hidden=32)
    assert _mutated(path, tmp_path / "right", None) < TOLERANCE
    assert _mutated(path, tmp_path / "gather", swapped_group) > SEEN
    for place in range(5):

        def drop(models: Models, place: int = place) -> None:
            for model in models:
                found = [node for node in model.graph.node if node.op_type in COLLECTIVES]
                found[place].op_type, found[place].domain = "Identity", ""

        assert _mutated(path, tmp_path / f"drop{place}", drop) > SEEN


def test_a_gather_along_the_wrong_dim_is_seen(tmp_path: Path) -> None:
    path = cases.matmul2(tmp_path / "m.onnx", hidden=16)
    model = onnx.load(path)
    del model.graph.node[1:]
    model.graph.node[0].output[0] = "y"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 16
    onnx.save(model, path)
    assert _mutated(path, tmp_path / "right", None) < TOLERANCE

    def wrong(models: Models) -> None:
        for one in models:
            back = [node for node in one.graph.node if node.op_type == "Transpose"][-1]
            shape = [16, 8]
            assert list(back.attribute[0].ints) == [1, 0]
            flat = numpy_helper.from_array(np.array(shape[::-1]), "flat")
            one.graph.initializer.append(flat)
            back.op_type = "Reshape"
            back.input.append("flat")
            del back.attribute[:]

    assert _mutated(path, tmp_path / "wrong", wrong) > SEEN
