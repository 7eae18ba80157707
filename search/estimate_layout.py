"""What a row's prices are computed with: model, machine, engine, applied graphs and ledger.

Names are resolved and graphs applied once for all rows that share them. Defaults that depend on
the machine are settled here, and every one that is taken is said in a note:

    engine_profile   the first that the device's file lists
    weight_dtype     the checkpoint's own; one as wide where the device cannot multiply that
                     (fp8 -> w8a8, bf16 -> fp16)
    kv_dtype         16-bit
    attention        the first kernel that the engine runs
    exchange         how tokens reach experts of other ranks: gathered everywhere or sent where
                     needed, whichever is faster for the row
    nodes            the fewest that hold the strategy's ranks, not below the cluster's default
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from shardplan.costmodel.catalog import load_cluster, load_device, resolve_cards
from shardplan.costmodel.engines import EngineProfile, engine_names, load_engine
from shardplan.costmodel.hardware import Cluster, Device
from shardplan.costmodel.ledger import Ledger
from shardplan.costmodel.memo import Memo
from shardplan.costmodel.step import Parts, StepModel
from shardplan.models.apply import apply
from shardplan.models.build import build_graph
from shardplan.models.catalog import load_model
from shardplan.models.errors import InputError, LayoutError, UnknownNameError
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec

__all__ = [
    "LAYOUT_COLUMNS",
    "Layout",
    "attention_for",
    "default_weight_dtype",
    "find_cluster",
    "find_engine",
    "kv_dtype_for",
    "make_layout",
    "make_layouts",
    "weight_dtype_for",
]

LAYOUT_COLUMNS = (
    "model",
    "cluster",
    "nodes",
    "device",
    "engine_profile",
    "tp",
    "pp",
    "dp",
    "ep",
    "cp",
)
"""What fixes a layout."""

_SIXTEEN_BIT = ("bf16", "fp16")
_NATIVE = {"fp32": "bf16"}
_SAME_WIDTH = {"bf16": "fp16", "fp16": "bf16", "fp8": "w8a8"}
_PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One model laid on one cluster under one engine, ready to be priced."""

    spec: ModelSpec
    cluster: Cluster
    engine: EngineProfile
    parallel: Parallelism
    model: StepModel
    ledger: Ledger
    notes: tuple[str, ...]

    @property
    def device(self) -> Device:
        """One rank."""
        return self.cluster.device


def _needed(name: str, value: str | None, hint: str) -> str:
    if value is None:
        raise InputError(f"`{name}` is needed", got=f"{name} is empty", hint=hint)
    return value


def _alone(device: Device) -> Cluster:
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
        cluster = _alone(load_device(_needed("cluster", device, hint)))
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


def _sixteen_bit(asked: str, known: tuple[str, ...]) -> str:
    """The device's own 16-bit type for either."""
    if asked in _SIXTEEN_BIT and asked not in known:
        return next((dtype for dtype in _SIXTEEN_BIT if dtype in known), asked)
    return asked


def weight_dtype_for(asked: str, spec: ModelSpec, device: Device) -> str:
    """The weight dtype to price; `InputError` where the device has no unit for it."""
    dtype = _sixteen_bit(asked, device.weight_dtypes) or default_weight_dtype(spec, device)
    if dtype not in device.weight_dtypes:
        raise UnknownNameError(f"weight_dtype on {device.name}", dtype, device.weight_dtypes)
    return dtype


def kv_dtype_for(asked: str, device: Device) -> str:
    """The dtype of the KV cache to price; `InputError` where the device cannot hold it."""
    dtype = _sixteen_bit(asked or "bf16", device.kv_dtypes)
    if dtype not in device.kv_dtypes:
        raise UnknownNameError(f"kv_dtype on {device.name}", dtype, device.kv_dtypes)
    return dtype


def _notes(cluster: Cluster, engine: EngineProfile, ranks: int, chosen: str) -> tuple[str, ...]:
    notes = []
    if not chosen:
        notes.append(f"engine_profile={engine.name}, the first of {cluster.device.name}")
    try:
        resolve_cards(cluster, ranks)
    except InputError as error:
        notes.append(str(error))
    return tuple(notes)


def make_layout(
    *,
    model: str | None,
    cluster: str | None,
    nodes: int | None,
    device: str | None,
    engine_profile: str,
    tp: int,
    pp: int,
    dp: int,
    ep: int,
    cp: int,
    memo: Memo[Parts] | None = None,
    **graph: Any,
) -> Layout:
    """Everything that rows of one layout are priced with.

    `memo` is that of another layout on the same machine and engine; `graph` takes the further
    fields of `Parallelism` (sp, exchange, stage_layers). Raises the
    `InputError` of whatever does not resolve, `LayoutError` where the strategy cannot be laid.
    """
    spec = load_model(_needed("model", model, "see `shardplan models`"))
    par = Parallelism(tp=tp, pp=pp, dp=dp, ep=ep, cp=cp, **graph)
    found = find_cluster(cluster, nodes=nodes, device=device, ranks=par.ranks)
    engine = find_engine(engine_profile, found.device)
    graphs = {phase: apply(build_graph(spec, phase), par) for phase in _PHASES}
    return Layout(
        spec=spec,
        cluster=found,
        engine=engine,
        parallel=par,
        model=StepModel.of(graphs, found, engine, memo),
        ledger=Ledger.of(graphs["prefill"], found.device, engine),
        notes=_notes(found, engine, par.ranks, engine_profile),
    )


def make_layouts(**columns: Any) -> tuple[Layout, ...]:
    """The layouts that rows may be priced as: with experts split over ranks, one an exchange."""
    first = make_layout(**columns)
    if first.parallel.ep == 1:
        return (first,)
    note = "exchange: the faster of allgather and alltoall"
    second = make_layout(**columns, exchange="alltoall", memo=first.model.memo)
    return tuple(replace(one, notes=(*one.notes, note)) for one in (first, second))
