"""Is what is priced what is proven: the op table and the ledger against the applied graph.

The collectives that a step is charged for, and the weights and cache of a rank, are counted
again by walking the applied graph layer by layer (`shardplan.models.accounting`), stage by stage,
at real sizes. They must be equal, to the element.
"""

from __future__ import annotations

from collections import Counter

from shardplan.costmodel.kernels.collectives import group_size
from shardplan.costmodel.ledger import Ledger
from shardplan.costmodel.step import StepModel
from shardplan.models.accounting import predict_communication
from shardplan.models.apply import ShardedGraph, Stage
from shardplan.models.errors import ProofError
from shardplan.models.graph import FREE_DIMS, Phase

__all__ = ["audit_collectives", "audit_memory"]

_SIXTEEN_BIT_BYTES = 2.0
Key = tuple[int, str, int]


def _charged(model: StepModel, graph: ShardedGraph, batch: int, tokens: int) -> Counter[Key]:
    """Elements by (stage, kind, ranks) that the op table charges one step."""
    found: Counter[Key] = Counter()
    for stage in graph.stages:
        for name, count in graph.runs(stage).items():
            for one in model.rows[graph.model.phase][name]:
                row = one.fused or one
                if not row.is_collective:
                    continue
                ranks = group_size(row.spans)
                once = row.group.startswith("draft") or (
                    row.group == "logits" and graph.model.phase != "decode"
                )
                moved = batch * (1 if once else tokens)  # the context has no prefix here
                found[stage.index, row.kind, ranks] += count * round(row.n * -(-moved // row.ways))
    return found


def audit_collectives(model: StepModel, phase: Phase) -> str:
    """The charged collectives in words; `ProofError` where they are not the graph's."""
    graph = model.graphs[phase]
    par = graph.parallel
    every = par.tp * par.cp
    batch, tokens = 2 * par.dp * every, 4 * every if phase == "prefill" else 1 + par.mtp
    made: Counter[Key] = Counter()
    for one in predict_communication(graph, batch, tokens, tokens, logits=model.engine.sampling):
        made[one.stage, one.kind, one.ranks] += one.elements
    charged = _charged(model, graph, batch, tokens)
    if made != charged:
        wrong = sorted({*made, *charged}, key=lambda key: made[key] == charged[key])[0]
        raise ProofError(
            "the collectives that are priced are those of the graph",
            got=f"{phase}, (stage, kind, ranks) = {wrong}: {charged[wrong]} elements priced, "
            f"{made[wrong]} in the graph",
        )
    return f"{sum(made.values()):,} elements, different collectives: {len(made)}"


def _held(graph: ShardedGraph, stage: Stage) -> tuple[int, float]:
    """(weight elements, cache elements a token) on one rank of a stage, counted layer by layer."""
    weights, cached = 0, 0.0
    whole: set[str] = set()
    for name, layer in graph.sequence(stage):
        for node in graph.blocks[name].ops():
            op = node.op
            if op is None:
                continue
            own = layer >= 0 and not op.shared
            if op.weight and (own or op.param not in whole):
                if not own:
                    whole.add(op.param)
                ways = graph.mesh.size(tuple(axis for axis, _ in node.weight_layout))
                weights += graph.model.size(op.weight) // ways
            if op.state:
                dims = tuple(d for d in op.dims if d not in FREE_DIMS)
                ways = graph.mesh.size(tuple(a for a, d in node.layout if d in (*dims, "S")))
                cached += graph.model.size(dims) / ways
    return weights, cached


def audit_memory(ledger: Ledger) -> str:
    """The charged weights and cache in words; `ProofError` where they are not the graph's."""
    total = 0.0
    for stage in ledger.graph.stages:
        weights, cached = _held(ledger.graph, stage)
        charged = ledger.weights_bytes(stage, "bf16"), ledger.kv_bytes_per_token(stage, "bf16")
        wanted = weights * _SIXTEEN_BIT_BYTES, cached * _SIXTEEN_BIT_BYTES
        if charged != wanted:
            raise ProofError(
                "the memory that is charged is that of the graph",
                got=f"stage {stage.index}: (weights, cache a token) {charged} bytes charged, "
                f"{wanted} in the graph",
            )
        total += charged[0]
    return f"{total:,.0f} bytes of 16-bit weights on one rank of each stage"
