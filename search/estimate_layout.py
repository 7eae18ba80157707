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
    switches         off (`shardplan.costmodel.overlap`), whatever the engine's own setting
    nodes            the fewest that hold the strategy's ranks, not below the cluster's default
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shardplan.costmodel.catalog import resolve_cards
from shardplan.costmodel.engines import EngineProfile
from shardplan.costmodel.hardware import Cluster, Device
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.ledger import Ledger
from shardplan.costmodel.optable import (
    NO_OVERLAP,
    Overlap,
    Row,
    block_rows,
    phase_rows,
    spans_of,
)
from shardplan.costmodel.placement import neighbour_tiers
from shardplan.costmodel.step import StepModel
from shardplan.models.accounting import Transfer, transfers
from shardplan.models.apply import ShardedGraph, apply
from shardplan.models.build import build_graph
from shardplan.models.catalog import load_model
from shardplan.models.errors import InputError, LayoutError
from shardplan.models.graph import Phase
from shardplan.models.modules import MODULES
from shardplan.models.parallel import Parallelism
from shardplan.models.ranks import extents
from shardplan.models.spec import ModelSpec
from shardplan.search.estimate_names import (
    find_cluster,
    find_engine,
    needed,
)
from shardplan.search.legality import first_broken_switch_rule
from shardplan.search.mtp import check_depth
from shardplan.search.rulebook import Subject, rules

__all__ = [
    "LAYOUT_COLUMNS",
    "Layout",
    "LayoutMaker",
    "check_switches",
]

_MODULE_RANKS = tuple(f"{module}_tp" for module in MODULES)
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
    "mtp",
    *_MODULE_RANKS,
    "weight_prefetch",
    "fused_collectives",
)
"""What fixes a layout and its op tables."""

_AXES = ("tp", "pp", "dp", "ep", "cp", "mtp", *_MODULE_RANKS)
_SWITCHES = ("weight_prefetch", "fused_collectives")
Rows = Mapping[str, tuple[Row, ...]]
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
    overlap: Overlap = NO_OVERLAP

    @property
    def device(self) -> Device:
        """One rank."""
        return self.cluster.device


def check_switches(layout: Layout, weight_dtype: str) -> None:
    """`InputError` where a switch of the engine is on and may not be."""
    rule = first_broken_switch_rule(
        Subject(
            spec=layout.spec,
            cluster=layout.cluster,
            engine=layout.engine,
            parallel=layout.parallel,
            overlap=layout.overlap,
            weight_dtype=weight_dtype,
        )
    )
    if rule is not None:
        on = [f"{name}=on" for name in _SWITCHES if getattr(layout.overlap, name)]
        raise InputError(
            f"this switch may not be on here: {rules()[rule].sentence}",
            got=f"{', '.join(on)}, {layout.parallel.describe()}, device={layout.device.name}, "
            f"engine_profile={layout.engine.name}, weight_dtype={weight_dtype}",
            hint="leave it off",
        )


def _notes(cluster: Cluster, engine: EngineProfile, ranks: int, chosen: str) -> tuple[str, ...]:
    notes = []
    if not chosen:
        notes.append(f"engine_profile={engine.name}, the first of {cluster.device.name}")
    try:
        resolve_cards(cluster, ranks)
    except InputError as error:
        notes.append(str(error))
    return tuple(notes)


@dataclass(slots=True)
class LayoutMaker:
    """Makes layouts; what several of them share is made once.

    Applied graphs, op tables and peaks of memory do not depend on how many stages a pipeline of
    more than one has; machines, not on the layout.
    """

    specs: dict[str, ModelSpec] = field(default_factory=dict)
    clusters: dict[tuple[Any, ...], Cluster] = field(default_factory=dict)
    engines: dict[tuple[str, int], EngineProfile] = field(default_factory=dict)
    machines: list[tuple[Device, str, Machine]] = field(default_factory=list)
    tables: dict[Hashable, tuple[Row, ...]] = field(default_factory=dict)
    """Op tables of single templates, on the first cluster that asked for them."""
    rows: dict[Hashable, Rows] = field(default_factory=dict)
    peaks: dict[int, Ledger] = field(default_factory=dict)
    kept: dict[int, Any] = field(default_factory=dict)
    """Applied blocks whose id is a key here: while they are kept, it is theirs alone."""

    def make(self, **columns: Any) -> tuple[Layout, ...]:
        """The layouts that rows may be priced as: with experts split over ranks, one an exchange.

        `columns` are `LAYOUT_COLUMNS`. Raises the `InputError` of whatever does not resolve,
        `LayoutError` where the strategy cannot be laid.
        """
        sizes = {name: columns[name] for name in _AXES if columns.get(name) is not None}
        first = self._one(Parallelism(**sizes), columns)
        if first.parallel.ep == 1:
            return (first,)
        note = "exchange: the faster of allgather and alltoall"
        second = self._one(replace(first.parallel, exchange="alltoall"), columns)
        return tuple(replace(one, notes=(*one.notes, note)) for one in (first, second))

    def split(self, layout: Layout, columns: Mapping[str, Any]) -> Layout | None:
        """The layout with tokens split over tp between products; None where that cannot be.

        Engines that have `sequence_parallel_tokens` do so in longer prefill steps, of models with
        experts where they are split over ranks. Decode steps stay as they are.
        """
        par = layout.parallel
        whole = layout.spec.moe is not None and par.ep == 1
        if not layout.engine.sequence_parallel_tokens or par.tp == 1 or whole:
            return None
        try:
            return self._one(replace(par, sp=True), columns, decode=layout.model.graphs["decode"])
        except LayoutError:
            return None

    def _one(
        self, par: Parallelism, columns: Mapping[str, Any], *, decode: ShardedGraph | None = None
    ) -> Layout:
        spec = self._spec(needed("model", columns["model"], "see `shardplan models`"))
        cluster = self._cluster(columns, par.ranks)
        engine = self._engine(columns["engine_profile"], cluster.device)
        check_depth(spec, engine, par.mtp)
        known: dict[Phase, ShardedGraph] = {} if decode is None else {"decode": decode}
        ahead = par.mtp > 0
        graphs = {
            phase: known[phase]
            if phase in known
            else apply(build_graph(spec, phase, mtp=ahead), par)
            for phase in _PHASES
        }
        self.kept |= {id(graph.blocks): graph.blocks for graph in graphs.values()}
        on: dict[str, Any] = {name: columns.get(name) == "on" for name in _SWITCHES}
        overlap = Overlap(**on)
        return Layout(
            spec=spec,
            cluster=cluster,
            engine=engine,
            parallel=par,
            model=self._model(graphs, cluster, engine, overlap),
            ledger=self._ledger(graphs["prefill"], cluster.device, engine),
            notes=_notes(cluster, engine, par.ranks, columns["engine_profile"]),
            overlap=overlap,
        )

    def _spec(self, name: str) -> ModelSpec:
        if name not in self.specs:
            self.specs[name] = load_model(name)
        return self.specs[name]

    def _cluster(self, columns: Mapping[str, Any], ranks: int) -> Cluster:
        names = {name: columns[name] for name in ("nodes", "device")}
        key = (columns["cluster"], *names.values(), ranks)
        if key not in self.clusters:
            self.clusters[key] = find_cluster(columns["cluster"], **names, ranks=ranks)
        return self.clusters[key]

    def _engine(self, name: str, device: Device) -> EngineProfile:
        if (name, id(device)) not in self.engines:
            self.engines[name, id(device)] = find_engine(name, device)
        return self.engines[name, id(device)]

    def _machine(self, device: Device, engine: str) -> Machine:
        for known, name, machine in self.machines:
            if name == engine and (known is device or known == device):
                return machine
        self.machines.append((device, engine, Machine.of(device, engine)))
        return self.machines[-1][2]

    def _model(
        self,
        graphs: Mapping[Phase, ShardedGraph],
        cluster: Cluster,
        engine: EngineProfile,
        overlap: Overlap,
    ) -> StepModel:
        machine = self._machine(cluster.device, engine.name)
        if overlap != NO_OVERLAP:
            switched = StepModel.of(graphs, cluster, engine, overlap=overlap)
            return replace(switched, machine=machine)
        rows = {phase: self._rows(graph, cluster, engine) for phase, graph in graphs.items()}
        return StepModel(graphs=graphs, machine=machine, engine=engine, rows=rows)

    def _rows(self, graph: ShardedGraph, cluster: Cluster, engine: EngineProfile) -> Rows:
        """The op tables of the templates that a phase runs, as `StepModel.of` makes them.

        They differ between clusters in the tiers that their collectives cross.
        """
        blocks = graph.blocks
        stages = neighbour_tiers(cluster, extents(graph.mesh, graph.parallel, ("pp",)))
        key = (id(blocks), stages, cluster.tiers, id(engine))
        if key not in self.rows:
            rows_of = functools.partial(self._template, graph, cluster, engine)
            used = dict.fromkeys(name for stage in graph.stages for name in stage.counts)
            self.rows[key] = phase_rows(graph, used, rows_of)
        return self.rows[key]

    def _template(
        self, graph: ShardedGraph, cluster: Cluster, engine: EngineProfile, name: str
    ) -> tuple[Row, ...]:
        """The op table of one template."""
        block = graph.blocks[name]
        first = (id(graph.blocks), name, id(engine))
        if first not in self.tables:
            self.tables[first] = block_rows(graph, block, cluster, engine)
            return self.tables[first]
        moves = transfers(graph, block, logits=engine.sampling)
        return _moved(self.tables[first], moves, cluster)

    def _ledger(self, graph: ShardedGraph, device: Device, engine: EngineProfile) -> Ledger:
        known = self.peaks.get(id(graph.blocks))
        if known is None:
            known = self.peaks[id(graph.blocks)] = Ledger.of(graph, device, engine)
        return Ledger(graph=graph, device=device, engine=engine, peaks=known.peaks)


def _moved(rows: tuple[Row, ...], moves: Iterator[Transfer], cluster: Cluster) -> tuple[Row, ...]:
    """The same rows on another cluster: collectives stand in the order of the transfers."""
    return tuple(
        row._replace(spans=spans_of(cluster, one))
        if row.is_collective and (one := next(moves))
        else row
        for row in rows
    )
