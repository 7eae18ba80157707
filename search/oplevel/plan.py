"""What the operator-level search gives: the split of each operator and all that follows from it.

The models are the contract of the file that `save` writes; equal layers are told once, by their
first, with `times`. Layouts are {axis: dim of the tensor}, "+" for a partial sum. Seconds and bytes
are those of one rank; a row with `times` tells one of as many. As in `plan.json`, the same inputs
and version give the same bytes: `certificate.wall_s` is an upper bound, rounded up to a power of
ten of at least ten seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from shardplan.models.atomic import write_atomically
from shardplan.models.errors import InputError
from shardplan.models.opfold import first_alike
from shardplan.models.opgraph import OpGraph
from shardplan.search.plan import ClusterInfo, ProofInfo
from shardplan.search.plan_confidence import Part
from shardplan.search.plan_versions import read_plan
from shardplan.search.rounding import rounded

__all__ = [
    "HeldRow",
    "KindRow",
    "MoveRow",
    "OperatorCertificate",
    "OperatorPlan",
    "OperatorRequest",
    "OperatorRow",
    "StageRow",
    "layout_words",
    "operator_plan_schema",
]

_VERSION = 1
Layout = dict[str, int | str]
Size = Annotated[int, Field(ge=1, le=2**20)]


def layout_words(layout: Mapping[str, int | str]) -> str:
    """`x:0 y:+`, a dim or a partial sum on each axis; whole without any."""
    return " ".join(f"{axis}:{dim}" for axis, dim in layout.items()) or "whole"


class OperatorRow(Part):
    """One operator, the first of as many equal ones."""

    name: str
    kind: str
    where: str
    layer: int
    times: int
    split: dict[str, str]
    """{axis: loop}; axes that it leaves out compute the whole."""
    passes: tuple[str, ...]
    """Axes on which partial sums go through it."""
    reads: tuple[Layout, ...]
    """Of each tensor that it reads, in its order."""
    writes: tuple[Layout, ...]
    compute_s: float
    memory_s: float
    overhead_s: float
    total_s: float


class MoveRow(Part):
    """A tensor that lies one way and comes to lie another, once for all that read it so."""

    tensor: str
    times: int
    kind: Literal["slice", "reduce_scatter", "all_to_all", "all_reduce", "all_gather"]
    axes: tuple[str, ...]
    before: Layout
    after: Layout
    message_bytes: float
    """Of the full tensor of the group; of a slice, what is kept."""
    seconds: float


class HeldRow(Part):
    """A parameter, constant or cache, in each layout in which it is read."""

    tensor: str
    kind: Literal["parameter", "constant", "state"]
    times: int
    layouts: tuple[Layout, ...]
    bytes: float


class KindRow(Part):
    """Seconds of a run by kind of operator or collective; `send`: between stages."""

    kind: str
    calls: int
    compute_s: float
    memory_s: float
    collective_s: float
    overhead_s: float
    total_s: float


class StageRow(Part):
    """One pipeline stage; without a pipeline, all of the graph."""

    stage: int
    layers: Annotated[int, Field(ge=0)]
    seconds: float
    parameters_bytes: float
    constants_bytes: float
    states_bytes: float
    activations_bytes: float
    """A bound on what is alive at once."""
    total_bytes: float
    capacity_bytes: float
    """What the graph may use of the card, communicator buffers and the engine's part left out."""


class OperatorCertificate(Part):
    """Why no other split of the space is faster, by this cost model."""

    engine: Literal["ilp"] = "ilp"
    space_size: int
    """Ways to split all operators, equal layers alike, summed over the meshes."""
    meshes: int
    """Meshes that were searched."""
    variables: int
    integers: int
    rows: int
    lp_bound_s: float
    """Of the relaxation without integers."""
    bound_s: float
    gap: float
    """How far the plan may be above the bound, relative; 0 is optimal."""
    wall_s: float


class OperatorRequest(Part):
    """What was asked, beside the graph and the cluster."""

    sizes: dict[str, int] = Field(default_factory=dict)
    """Elements of symbolic dims that the graph was read with."""
    mesh: Literal["auto"] | dict[str, int] = "auto"
    stages: int = 1
    cards: int | None = None
    memory_bytes: float | None = None
    """Of a rank, where it is not what the card leaves."""
    time_limit_s: float | None = None
    pins: dict[str, Layout] = Field(default_factory=dict)
    forbid: dict[str, tuple[str, ...]] = Field(default_factory=dict)


class OperatorPlan(Part):
    """How every operator of a graph is split over a mesh."""

    schema_version: Literal[1] = 1
    kind: Literal["operators"] = "operators"
    """Sets it apart from the plan of a deployment (`shardplan.search.plan`)."""
    shardplan_version: str
    request: OperatorRequest
    graph: str
    source: str
    digest: str
    """Of the graph that it was made of (`models.opdescribe.graph_digest`)."""
    layers: int
    parameters: int
    cluster: ClusterInfo
    mesh: dict[str, Size]
    """Axes major to minor: ranks of the last are neighbours."""
    dtype: str
    total_s: float
    """One run of the whole graph, through all stages."""
    slowest_stage_s: float
    stages: tuple[StageRow, ...]
    operators: tuple[OperatorRow, ...]
    moves: tuple[MoveRow, ...]
    held: tuple[HeldRow, ...]
    inputs: dict[str, Layout]
    """How each input comes."""
    outputs: dict[str, Layout]
    """How each output is given; of equal layers' the first's."""
    costs: tuple[KindRow, ...]
    fits: bool
    """Whether every stage is within its memory; a priced strategy may not be."""
    certificate: OperatorCertificate
    proof: ProofInfo | None = None
    """Of level 1 (`search.oplevel.proof`); None where the plan is only priced."""
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """A short name: `x2 y4, 2 stages`."""
        mesh = " ".join(f"{axis}{size}" for axis, size in self.mesh.items())
        return mesh + (f", {len(self.stages)} stages" if len(self.stages) > 1 else "")

    @property
    def strategy(self) -> dict[str, dict[str, str]]:
        """{operator: {axis: loop}}, {} for one that runs whole; of equal layers the first's."""
        return {one.name: dict(one.split) for one in self.operators}

    def splits(self) -> list[tuple[str, str, int, float]]:
        """(kind, split as `x:n`, operators, seconds of one run), those that take longest first."""
        found: dict[tuple[str, str], tuple[int, float]] = {}
        for row in self.operators:
            words = layout_words(row.split)
            calls, seconds = found.get((row.kind, words), (0, 0.0))
            found[row.kind, words] = calls + row.times, seconds + row.times * row.total_s
        ordered = sorted(found.items(), key=lambda item: -item[1][1])
        return [(*names, *numbers) for names, numbers in ordered]

    def strategy_of(self, graph: OpGraph) -> dict[str, dict[str, str]]:
        """The same of every operator of the graph that it was made of, all layers.

        `InputError` where an operator of the graph is none of the plan's.
        """
        split, found = self.strategy, {}
        for name, first in first_alike(graph).items():
            if first not in split:
                raise InputError(
                    "a plan is of the graph that it was made of",
                    got=f"plan of {self.graph}, graph={graph.name}, operator={first}",
                )
            found[name] = dict(split[first])
        return found

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OperatorPlan:
        """Read a saved plan. `InputError` with the place and the rule where it breaks one."""
        return cls.of(read_plan(path), path)

    @classmethod
    def of(cls, data: object, file: str | os.PathLike[str]) -> OperatorPlan:
        """Likewise of what the JSON of `file` says."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InputError(
                f"an operator plan follows its schema, version {_VERSION}",
                got=f"{file}: {place}: {first['msg']}",
                hint="make it anew with `search_operators`",
            ) from None

    def verify(
        self, graph: OpGraph | None = None, *, level: int = 1, model: str | None = None
    ) -> ProofInfo:
        """Prove it again (`prove_operators`), on its graph or that of its file (or of `model`)."""
        from shardplan.search.oplevel.proof import graph_of_plan, prove_operators

        return prove_operators(self, graph or graph_of_plan(self, model), level=level)

    def emit(self, target: str, out: str | os.PathLike[str], **options: object) -> list[Path]:
        """Write the files of a target that takes plans of operators, `onnx`, into `out`."""
        from shardplan.search.emit import emit

        return emit(self, target, Path(out), force=False, **options)

    def dumps(self) -> str:
        """The bytes of the file; floats have ten digits, beyond which machines differ."""
        return json.dumps(rounded(self.model_dump(mode="json")), indent=2) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, whole or not at all."""
        write_atomically(Path(path), self.dumps())


def operator_plan_schema() -> dict[str, Any]:
    """JSON Schema of a saved plan."""
    return OperatorPlan.model_json_schema()
