"""Sharding annotations: read back as written, refused where they are wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardplan.models.errors import InputError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import onnx
from tests.models.frontends import onnx_cases as cases
from tests.models.onnxout.lockstep import run_whole
from tests.models.onnxout.test_ranks import DECODERS, PLANS, inputs_of, mesh

from shardplan.models.frontends.onnx_graph import OnnxGraph, read_onnx
from shardplan.models.onnxout.annotate import annotate, read_annotations
from shardplan.models.onnxout.choose import megatron_strategy
from shardplan.models.onnxout.spec_check import check_annotations


def _round_trip(path: Path, plan: str) -> OnnxGraph:
    on, choose, stages = PLANS[plan]
    graph = read_onnx(path)
    strategy = graph.of_nodes(choose(graph, on))
    out = path.with_name("annotated.onnx")
    annotate(graph, strategy, on, out, stages)
    onnx.checker.check_model(str(out), full_check=True)
    again = read_onnx(out)
    found, read, layers = read_annotations(again)
    assert (found.axes, found.shape, layers) == (on.axes, on.shape, list(stages))
    assert read == {name: chosen for name, chosen in strategy.items() if chosen}
    return again


@pytest.mark.parametrize("model", ["mlp", "matmul2"])
@pytest.mark.parametrize("plan", [name for name in PLANS if "pp" not in name])
def test_annotations_read_back_are_the_strategy(model: str, plan: str, tmp_path: Path) -> None:
    path = getattr(cases, model)(tmp_path / "m.onnx")
    again = _round_trip(path, plan)
    given = inputs_of(path)
    for name, value in run_whole(path, given).items():
        assert (run_whole(again.file.path, given)[name] == value).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECODERS)
def test_annotations_of_a_decoder_read_back_are_the_strategy(kind: str, tmp_path: Path) -> None:
    options, sizes = DECODERS[kind]
    path = cases.decoder(tmp_path / "model.onnx", options, **sizes)
    for plan in PLANS:
        _round_trip(path, plan)


def test_a_file_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    graph = read_onnx(cases.matmul2(tmp_path / "m.onnx"))
    with pytest.raises(InputError, match=r"cannot be written"):
        annotate(graph, {}, mesh(2), tmp_path / "m.onnx" / "a.onnx")


def test_weights_outside_stay_where_they_are(tmp_path: Path) -> None:
    path = cases.matmul2(tmp_path / "m.onnx", hidden=512)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin")
    graph = read_onnx(path)
    strategy = megatron_strategy(graph.graph, mesh(2), "x")
    annotate(graph, strategy, mesh(2), tmp_path / "annotated.onnx")
    assert (tmp_path / "annotated.onnx").stat().st_size < 2000
    with pytest.raises(InputError, match="beside the weights"):
        annotate(graph, strategy, mesh(2), tmp_path / "else" / "annotated.onnx")


def _first(proto: Any) -> Any:
    return proto.graph.node[0].device_configurations[0]


def _spec(proto: Any) -> Any:
    """That of w1 [16, 32], split along dim 1 over x of a mesh x=2, y=2."""
    return next(one for one in _first(proto).sharding_spec if one.tensor_name == "w1")


def _set(place: Callable[[Any], Any], **values: Any) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        for name, value in values.items():
            setattr(place(proto), name, value)

    return change


def _group(proto: Any) -> Any:
    return _spec(proto).index_to_device_group_map[0]


def _twice(proto: Any) -> None:
    _first(proto).sharding_spec.add().CopyFrom(_spec(proto))


def _twice_named(proto: Any) -> None:
    proto.configuration.add().CopyFrom(proto.configuration[0])


def _axis_twice(proto: Any) -> None:
    _spec(proto).sharded_dim.add().CopyFrom(_spec(proto).sharded_dim[0])


def _one_shard_less(proto: Any) -> None:
    del _spec(proto).device[-1]
    del _spec(proto).index_to_device_group_map[-1]


def _overlap(proto: Any) -> None:
    _group(proto).value[0] = _spec(proto).index_to_device_group_map[1].value[0]


def _unused(proto: Any) -> None:
    _spec(proto).index_to_device_group_map.add(key=-9, value=[0])


def _empty(proto: Any) -> None:
    del _group(proto).value[:]


def _unknown_device(proto: Any) -> None:
    _group(proto).value[0] = 4


def _names(proto: Any) -> None:
    proto.configuration[0].device.extend(["npu:0", "npu:1"])


def _config_twice(proto: Any) -> None:
    proto.graph.node[0].device_configurations.add().CopyFrom(_first(proto))


def _split(proto: Any) -> Any:
    return _spec(proto).sharded_dim[0].simple_sharding[0]


WRONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "tensor of another node": (_set(_spec, tensor_name="w2"), "reads or writes.*node=first.*w2"),
    "no tensor": (_set(_spec, tensor_name="nothing"), "reads or writes.*nothing"),
    "axis": (_set(lambda p: _spec(p).sharded_dim[0], axis=9), "dims of its tensor.*axis=9"),
    "axis twice": (_axis_twice, "each once"),
    "does not divide": (_set(_split, num_shards=3), r"shards divide.*of 32, shards=\[3\]"),
    "no shards": (_set(_split, num_shards=0), "shards divide"),
    "size": (_set(_split, dim_value=64), "size of the dim"),
    "too few devices": (_one_shard_less, "as many entries of devices as shards.*shards=2"),
    "device": (_unknown_device, "devices are those of the configuration.*w1, 4"),
    "overlap": (_overlap, "disjoint"),
    "empty group": (_empty, "disjoint and not empty"),
    "unused group": (_unused, "every group of devices is used"),
    "sharded twice": (_twice, "a tensor has one sharding"),
    "configuration": (_set(_first, configuration_id="other"), "each configuration of the model"),
    "configured twice": (_config_twice, "each configuration of the model once"),
    "configuration twice": (_twice_named, "a name of its own"),
    "names of some devices": (_names, "names all of its devices or none"),
    "stage": (_set(_first, pipeline_stage=1), "reads what earlier stages make.*node=second"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_annotations_are_refused_that_onnx_lets_pass(name: str, tmp_path: Path) -> None:
    graph = read_onnx(cases.matmul2(tmp_path / "m.onnx"))
    on = mesh(2, 2)
    annotate(graph, megatron_strategy(graph.graph, on, "x"), on, tmp_path / "a.onnx")
    proto = onnx.load(tmp_path / "a.onnx")
    assert check_annotations(proto, graph.walked.shapes) == 2
    change, message = WRONG[name]
    change(proto)
    onnx.checker.check_model(proto, full_check=True)
    with pytest.raises(InputError, match=message):
        check_annotations(proto, graph.walked.shapes)


def test_shards_in_another_order_are_not_read_as_ours(tmp_path: Path) -> None:
    graph = read_onnx(cases.matmul2(tmp_path / "m.onnx"))
    annotate(graph, {"first": {"x": "n"}}, mesh(4), tmp_path / "a.onnx")
    proto = onnx.load(tmp_path / "a.onnx")
    _first(proto).sharding_spec[0].device[:] = [1, 0, 2, 3]
    onnx.save(proto, tmp_path / "a.onnx")
    with pytest.raises(InputError, match="row by row"):
        read_annotations(read_onnx(tmp_path / "a.onnx"))


def test_annotations_of_others_are_not_guessed_at(tmp_path: Path) -> None:
    graph = read_onnx(cases.matmul2(tmp_path / "m.onnx"))
    with pytest.raises(InputError, match=r"shardplan\.mesh"):
        read_annotations(graph)
    on = mesh(2)
    annotate(graph, {"first": {"x": "n"}}, on, tmp_path / "a.onnx")
    proto = onnx.load(tmp_path / "a.onnx")
    spec = _first(proto).sharding_spec[0]
    assert spec.tensor_name == "w1"
    spec.sharded_dim[0].axis = 0
    spec.sharded_dim[0].simple_sharding[0].dim_value = 16
    onnx.save(proto, tmp_path / "a.onnx")
    with pytest.raises(InputError, match="those of one strategy"):
        read_annotations(read_onnx(tmp_path / "a.onnx"))
    for text in (
        "",
        "[]",
        '{"axes": ["x"], "shape": ["2"], "stage_layers": []}',
        '{"axes": ["x"], "shape": [4], "stage_layers": []}',
    ):
        proto.metadata_props[-1].value = text
        onnx.save(proto, tmp_path / "a.onnx")
        with pytest.raises(InputError, match=r"mesh of the annotations"):
            read_annotations(read_onnx(tmp_path / "a.onnx"))
    proto.ir_version = 10
    with pytest.raises(InputError, match="IR version 11"):
        check_annotations(proto, graph.walked.shapes)
