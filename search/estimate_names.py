"""Names of a row that is to be priced, looked up: cluster, engine, kernels and types."""

from __future__ import annotations

import math
from types import MappingProxyType

from shardplan.costmodel.catalog import load_cluster, load_device
from shardplan.costmodel.engines import EngineProfile, engine_names, load_engine
from shardplan.costmodel.hardware import Cluster, Device
from shardplan.costmodel.weight_types import canonical, is_mixed, with_types
from shardplan.models.errors import InputError, LayoutError, UnknownNameError
from shardplan.models.spec import ModelSpec
from shardplan.models.weight_groups import groups_of

__all__ = [
    "alone",
    "attention_for",
    "default_weight_dtype",
    "find_cluster",
    "find_engine",
    "kv_dtype_for",
    "needed",
    "own_kv_dtype",
    "sixteen_bit",
    "weight_dtype_for",
]

_SIXTEEN_BIT = ("bf16", "fp16")


_NATIVE = {"fp32": "bf16"}


_SAME_WIDTH = {"bf16": "fp16", "fp16": "bf16", "fp8": "w8a8"}


def needed(name: str, value: str | None, hint: str) -> str:
    if value is None:
        raise InputError(f"`{name}` is needed", got=f"{name} is empty", hint=hint)
    return value


def alone(device: Device) -> Cluster:
    """One rank of a device, joined to nothing."""
    return Cluster(
        name=device.name,
        title=device.title,
        device=device,
        ranks_per_node=1,
        nodes=1,
        max_nodes=1,
        rank_counts=(1,),
        tiers=(),
        facts=MappingProxyType({}),
    )


def find_cluster(name: str | None, *, nodes: int | None, device: str | None, ranks: int) -> Cluster:
    """The cluster that holds `ranks` ranks; a device alone stands for a cluster of one rank.

    `InputError` when both are missing, `LayoutError` when the ranks do not fit.
    """
    if name is None:
        hint = "see `shardplan clusters`"
        cluster = alone(load_device(needed("cluster", device, hint)))
    else:
        cluster = load_cluster(name, nodes=nodes, device=device, cards=ranks)
    if ranks > cluster.ranks:
        raise LayoutError(
            "tp*pp*dp*cp must not exceed the cluster's ranks",
            got=f"ranks={ranks}, cluster={cluster.name} with {cluster.ranks}",
            hint=f"set nodes={math.ceil(ranks / cluster.ranks_per_node)}"
            if name is not None
            else "name a cluster",
        )
    return cluster


def find_engine(name: str, device: Device) -> EngineProfile:
    """An engine profile that runs on the device; its default for an empty name."""
    engine = load_engine(name or device.engine_profiles[0])
    if name in engine_names() and engine.name not in device.engine_profiles:
        raise InputError(
            "the engine does not run on this device",
            got=f"engine_profile={engine.name}, device={device.name}",
            hint="try " + ", ".join(device.engine_profiles),
        )
    return engine


def default_weight_dtype(spec: ModelSpec, device: Device) -> str:
    """The checkpoint's own dtype, or one as wide where the device does not multiply that."""
    native = _NATIVE.get(spec.dtype, str(spec.dtype))
    if native in device.weight_dtypes:
        return native
    other = _SAME_WIDTH.get(native, "")
    if other not in device.weight_dtypes:
        raise UnknownNameError(f"weight_dtype on {device.name}", native, device.weight_dtypes)
    return other


def attention_for(asked: str, engine: EngineProfile) -> str:
    """The attention kernel to price: as asked, or the first that the engine runs."""
    return engine.attention[0] if asked == "auto" else asked


def sixteen_bit(asked: str, known: tuple[str, ...]) -> str:
    """The device's own 16-bit type for either."""
    if asked in _SIXTEEN_BIT and asked not in known:
        return next((dtype for dtype in _SIXTEEN_BIT if dtype in known), asked)
    return asked


def weight_dtype_for(asked: str, spec: ModelSpec, device: Device) -> str:
    """The weight dtype to price; `InputError` where the device has no unit for it."""
    known = device.weight_dtypes

    def one_of(word: str) -> str:
        own = word in ("", "auto")
        dtype = default_weight_dtype(spec, device) if own else sixteen_bit(word, known)
        if dtype not in known:
            raise UnknownNameError(f"weight_dtype on {device.name}", dtype, known)
        return dtype

    if not is_mixed(asked):
        return one_of(asked)
    return canonical(with_types(asked, one_of), groups_of(spec))


def own_kv_dtype(engine: EngineProfile, spec: ModelSpec, weight_dtype: str) -> str:
    """The cache that an engine gives a checkpoint: fp8 beside weights quantized to it, or bf16."""
    quantized = weight_dtype == "fp8" and spec.dtype in _SIXTEEN_BIT
    return "fp8" if engine.fp8_cache and quantized else "bf16"


def kv_dtype_for(asked: str, device: Device) -> str:
    """The dtype of the KV cache to price; `InputError` where the device cannot hold it."""
    dtype = sixteen_bit(asked or "bf16", device.kv_dtypes)
    if dtype not in device.kv_dtypes:
        raise UnknownNameError(f"kv_dtype on {device.name}", dtype, device.kv_dtypes)
    return dtype
