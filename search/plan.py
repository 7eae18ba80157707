"""The plan: the chosen strategy with all that is needed to deploy it, as `plan.json`.

The models below are the contract of the file; `plan_schema()` gives its JSON Schema, which is
committed as `search/data/plan.schema.json`. Units are in the names: seconds, bytes, tokens and
their rates. The same inputs, seed and version give the same bytes: measured wall times stand in
`timing.json` beside it, and `certificate.wall_s` is their upper bound, rounded up to a power of
ten of at least a hundred seconds.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from shardplan.models.atomic import write_atomically
from shardplan.models.errors import InputError
from shardplan.models.parallel import AXES, Axis, Parallelism
from shardplan.search.plan_at_rate import AtRate
from shardplan.search.plan_batching import Batching
from shardplan.search.plan_capacity import Capacity
from shardplan.search.plan_confidence import BasisShares, Confidence, Part, WeakestPart
from shardplan.search.plan_cost import Cost
from shardplan.search.plan_parts import BreakdownRow, ClusterInfo, MemoryRow, ModelInfo
from shardplan.search.plan_pools import PoolTimes, ServingRow, Transfer
from shardplan.search.plan_refinement import Refinement
from shardplan.search.plan_request import Limits, Request, Workload
from shardplan.search.plan_robustness import PARTS, Robustness
from shardplan.search.plan_versions import read_plan, upgraded
from shardplan.search.rounding import rounded

__all__ = [
    "BasisShares",
    "BreakdownRow",
    "Candidate",
    "Certificate",
    "ClusterInfo",
    "Confidence",
    "Limits",
    "MemoryRow",
    "ModelInfo",
    "Performance",
    "Plan",
    "Pool",
    "PoolTimes",
    "ProofInfo",
    "QuantizationRow",
    "Request",
    "ServingRow",
    "StrategyInfo",
    "SwitchRow",
    "Transfer",
    "WeakestPart",
    "Workload",
    "plan_schema",
]

OPERATORS = "operators"
"""`kind` of a plan of operators (`search.oplevel.plan`)."""
_ASKED_FOR = ("at_rate", "batching", "capacity", "cost", "simulated")
"""Parts that only some questions ask for."""


def _both_roles(pools: tuple[Pool, ...]) -> tuple[Pool, ...]:
    if pools and [pool.role for pool in pools] != ["prefill", "decode"]:
        raise ValueError("pools are of prefill and decode, in this order, or none")
    return pools


def _every_axis(order: tuple[Axis, ...]) -> tuple[Axis, ...]:
    if sorted(order) != sorted(AXES):
        raise ValueError("order names every axis once")
    return order


class StrategyInfo(Part):
    """One point of the space."""

    tp: int = Field(ge=1)
    pp: int = Field(ge=1)
    dp: int = Field(ge=1)
    ep: int = Field(ge=1)
    cp: int = Field(default=1, ge=1)
    sp: bool
    exchange: Literal["allgather", "alltoall"]
    stage_layers: tuple[int, ...]
    attention: Literal["flash", "naive"]
    weight_dtype: str
    kv_dtype: str
    weight_prefetch: bool = False
    """Weights of the next product come into L2 while other kernels run."""
    fused_collectives: bool = False
    """A row-parallel product and its all_reduce are one kernel in prefill."""
    o_tp: int = Field(default=0, ge=0)
    """Ranks that the attention output projection is split over; 0: tp, as of the others."""
    ffn_tp: int = Field(default=0, ge=0)
    shared_tp: int = Field(default=0, ge=0)
    head_tp: int = Field(default=0, ge=0)
    embed_tp: int = Field(default=0, ge=0)
    order: Annotated[tuple[Axis, ...], AfterValidator(_every_axis)] = AXES
    """Axes of the rank numbers, the one with the farthest neighbours first."""
    mtp: int = Field(default=0, ge=0)
    """Tokens predicted ahead and verified in each decode step."""
    collectives: str = "auto"
    """Algorithm of the collectives between nodes."""
    batch: int = Field(ge=1)
    """Sequences that decode together in one dp group (the engine's max_num_seqs)."""
    chunk: int = Field(ge=1)
    """Tokens of one step of one dp group (the engine's max_num_batched_tokens)."""

    @property
    def ranks(self) -> int:
        """Ranks of the deployment."""
        return self.tp * self.pp * self.dp * self.cp

    def parallelism(self) -> Parallelism:
        """The part of the strategy that changes the graph."""
        return Parallelism(**{one.name: getattr(self, one.name) for one in fields(Parallelism)})


for _part in PARTS:
    _part.model_rebuild(_types_namespace={"StrategyInfo": StrategyInfo})


class Performance(Part):
    """What the deployment does under the workload; rates are of the whole deployment."""

    ttft_s: float
    tpot_s: float
    end_to_end_s: float
    output_tokens_per_s: float
    output_tokens_per_s_per_card: float
    requests_per_s: float
    concurrency: float
    """Requests in flight over the whole deployment."""
    prefill_step_s: float
    """One prompt, all its pieces, each beside the requests that decode meanwhile; where prompts go
    first, those that come together."""
    decode_step_s: float
    """A step in which every request of a microbatch decodes and none prefills."""
    mixed_step_s: float = 0.0
    """A step that carries prompt tokens beside the decoding requests."""
    mixed_share: float = 0.0
    """Share of steps that do."""


class Candidate(Part):
    """A strategy with what it does, as one row of `trials.csv`."""

    strategy: StrategyInfo
    performance: Performance
    memory_bytes: float
    objective: float
    prefill: StrategyInfo | None = None
    """Strategy of the prefill instances, where they are apart; `strategy` is then of the others."""
    prefill_instances: int = Field(default=0, ge=0)
    decode_instances: int = Field(default=0, ge=0)


class Pool(Part):
    """Instances of one role, all alike, of a disaggregated deployment."""

    role: Literal["prefill", "decode"]
    instances: int = Field(ge=1)
    cluster: ClusterInfo
    strategy: StrategyInfo
    """Of one instance. Prefill: `batch` counts the prompts that a dp group holds."""
    times: PoolTimes
    memory: tuple[MemoryRow, ...] = Field(min_length=1)
    largest_lever: str
    breakdown: tuple[BreakdownRow, ...]

    @property
    def cards(self) -> int:
        """Cards in use, of all its instances."""
        return self.instances * self.strategy.ranks


class QuantizationRow(Part):
    """The best strategy at other dtypes: shown beside the answer, never applied unasked."""

    weight_dtype: str
    kv_dtype: str
    objective: float | None
    """None when nothing of that dtype fits or meets the limits."""
    gain: float | None
    """Objective over the plan's own."""
    strategy: StrategyInfo | None


class SwitchRow(Part):
    """The best strategy with one of the engine's switches on: shown, never applied unasked."""

    weight_prefetch: bool
    fused_collectives: bool
    objective: float | None
    """None when no layout allows it, fits or meets the limits."""
    gain: float | None
    """Objective over the plan's own."""
    strategy: StrategyInfo | None


class ProofInfo(Part):
    """What was proven of the strategy, and how far."""

    level: int
    passed: bool
    checks: tuple[str, ...]
    failures: tuple[str, ...]


class Certificate(Part):
    """Why nothing in the stated space is better."""

    engine: str
    space: dict[str, list[Any]]
    """Values of each dimension that was searched."""
    space_size: int
    evaluated: int
    pruned: int
    """Left out unpriced, by legality rules and by bounds."""
    pruned_by: dict[str, int]
    infeasible: dict[str, int]
    """Priced and refused, by the limit that bound."""
    bound: float | None
    """Best objective that any strategy of the space could have; None where no engine proves one."""
    gap: float | None
    """Relative distance of the plan from the bound; 0 is optimal, None is unknown."""
    wall_s: float
    """Upper bound of the search's wall time, rounded up to a power of ten (at least 10)."""


class Plan(Part):
    """`plan.json`."""

    schema_version: Literal[2] = 2
    shardplan_version: str
    request: Request
    model: ModelInfo
    cluster: ClusterInfo
    strategy: StrategyInfo
    """Of the deployment; with `pools`, of one decode instance, as cluster, memory and breakdown."""
    performance: Performance
    """Of the whole deployment, all its slots in use."""
    at_rate: AtRate | None = None
    """At the rate, where one is asked; left out of the file where not."""
    pools: Annotated[tuple[Pool, ...], AfterValidator(_both_roles)] = ()
    """Prefill and decode instances, where each role has its own."""
    transfer: Transfer | None = None
    """How caches get from prefill to decode instances."""
    memory: tuple[MemoryRow, ...]
    largest_lever: str
    """What frees most memory at least cost, in one sentence."""
    breakdown: tuple[BreakdownRow, ...]
    confidence: Confidence | None = None
    """None in plans of versions that did not tell."""
    robustness: Robustness | None = None
    """Likewise."""
    proof: ProofInfo
    certificate: Certificate
    pareto: tuple[Candidate, ...]
    alternatives: tuple[Candidate, ...]
    quantization: tuple[QuantizationRow, ...]
    switches: tuple[SwitchRow, ...] = ()
    servings: tuple[ServingRow, ...] = ()
    """Aggregated and disaggregated serving side by side, where both were searched."""
    batching: Batching | None = None
    """Graph sizes and what the step sizes gain, where asked; likewise."""
    cost: Cost | None = None
    """At prices that were given; likewise."""
    capacity: Capacity | None = None
    """What is left when a card or a node is lost; likewise."""
    simulated: Refinement | None = None
    """The best strategies in the simulator, where they were refined; likewise."""
    notes: tuple[str, ...]

    @property
    def cards(self) -> int:
        """Cards in use, of all pools."""
        if self.pools:
            return sum(pool.cards for pool in self.pools)
        return self.strategy.ranks

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan.json, of an earlier schema version too.

        `InputError` with the place and the rule where it breaks one.
        """
        return cls.of(read_plan(path), path)

    @classmethod
    def of(cls, data: object, file: str | os.PathLike[str]) -> Plan:
        """Likewise of what the JSON of `file` says."""
        if isinstance(data, dict) and data.get("kind") == OPERATORS:
            raise InputError(
                "the plan of a deployment is wanted here",
                got=f"{file}: a plan of the operators of {str(data.get('graph'))[:80]!r}",
                hint="such a plan goes to `shardplan verify`, `explain` and `emit --target onnx`",
            )
        try:
            return cls.model_validate(upgraded(data, os.fspath(file)))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InputError(
                "a plan.json follows its schema", got=f"{file}: {place}: {first['msg']}"
            ) from None

    def dumps(self) -> str:
        """The bytes of plan.json; floats have ten digits, beyond which machines differ."""
        unasked = {name for name in _ASKED_FOR if getattr(self, name) is None}
        data = rounded(self.model_dump(mode="json", exclude=unasked))
        return json.dumps(data, indent=2, sort_keys=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write plan.json, whole or not at all."""
        write_atomically(Path(path), self.dumps())

    def emit(self, target: str, out: str | os.PathLike[str], **options: object) -> list[Path]:
        """Write the files and commands of one engine or compiler into `out`.

        `options` are the target's own, as `door="shards"` of `atc`.
        """
        from shardplan.search.emit import emit

        return emit(self, target, Path(out), force=False, **options)

    def verify(self, *, level: int = 1) -> ProofInfo:
        """Prove the plan's strategy again; the model is found by its source."""
        from shardplan.search.proof import verify_plan

        return verify_plan(self, level=level)

    def apply(self, module: Any, rank: int, **step: Any) -> Any:
        """The module of one rank of a Hugging Face module (`apply_plan`; extra `torch`)."""
        from shardplan.search.apply_plan import apply_plan

        return apply_plan(self, module, rank, **step)


def plan_schema() -> dict[str, Any]:
    """JSON Schema of plan.json."""
    return Plan.model_json_schema()
