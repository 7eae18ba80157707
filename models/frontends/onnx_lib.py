"""The one place that imports onnx (extra `onnx`): the rest of the package asks here."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from shardplan.models.errors import InputError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto

__all__ = [
    "OLDEST_OPSET",
    "GraphProto",
    "ModelProto",
    "NodeProto",
    "TensorProto",
    "TypeProto",
    "need_onnx",
]

OLDEST_OPSET = 13
"""Before it, axes of Squeeze and ReduceSum are attributes and Softmax flattens its input (ONNX
Changelog, operators' since_version)."""


def need_onnx() -> ModuleType:
    """The package onnx with the parts that are used here; `InputError` where it is not installed.

    1.18 is the first with IR version 11, which holds device configurations.
    """
    try:
        import onnx
        import onnx.checker
        import onnx.inliner
        import onnx.numpy_helper
        import onnx.reference
        import onnx.shape_inference
    except ImportError:
        raise InputError(
            "ONNX files are read and written with the package onnx, 1.18 or later",
            hint="install the extra: pip install 'shardplan[onnx]'",
        ) from None
    found: ModuleType = onnx
    return found
