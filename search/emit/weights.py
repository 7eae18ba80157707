"""The weights of a plan as its checkpoint names them, and the mesh axes that cut each of them.

The applied graph knows parameters by named dims; a Hugging Face checkpoint holds matrices
[out, in]. A tensor's dim is a run of named dims (q_proj: out = K G D), and it is cut into equal
pieces along a mesh axis where the axis cuts the first of them, or the next one once each piece
holds a single index of those before. Anything else is no plain slice of the tensor and is refused.

    q_proj [K G D, H]   K on tp0, G on tp1   ->   rows cut over tp0, tp1, where K / tp0 is 1
    kv_b_proj [K (N D), C]                   ->   two parameters head by head: rows cut as K
    experts.gate_proj [E, I, H]              ->   all experts of a layer, stacked
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardplan.models.apply import ShardedGraph, ShardedOp, apply
from shardplan.models.build import build_graph
from shardplan.models.graph import Phase
from shardplan.models.modules import MODULES, module_ranks
from shardplan.search.emit.common import printable, refuse, table
from shardplan.search.plan import Plan
from shardplan.search.proof import model_of

__all__ = [
    "CutWeight",
    "applied",
    "check_modules_alike",
    "check_one_stage",
    "check_tensors",
    "layer_weights",
    "rank_grid",
    "templates",
    "weights",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CutWeight:
    """A tensor of the checkpoint: its size, elements, and the sub-axes that cut each dim."""

    name: str
    shape: tuple[int, ...]
    cut: tuple[tuple[str, ...], ...]


def applied(plan: Plan, target: str, phase: Phase = "prefill") -> ShardedGraph:
    """The graph that one rank of the plan runs.

    `InputError` for a plan of several pools, and where the model found is not the plan's.
    """
    if plan.pools:
        raise refuse(
            target,
            "one file describes one deployment, not pools of prefill and decode instances",
            got=", ".join(f"{one.instances} {one.role}" for one in plan.pools),
            hint="search with --serving agg, or use target vllm-ascend",
        )
    graph = build_graph(model_of(plan), phase, mtp=bool(plan.strategy.mtp))
    return apply(graph, plan.strategy.parallelism())


def check_one_stage(plan: Plan, target: str) -> None:
    """`InputError` for pipeline stages, and for tokens that are predicted ahead."""
    way = plan.strategy
    if way.pp > 1:
        wider = way.tp * way.pp
        example = f", for example tp={wider}" if wider <= plan.cluster.ranks_per_node else ""
        rule = "its file describes one stage, which holds the whole model"
        raise refuse(target, rule, got=f"pp={way.pp}", hint=f"search with --only pp=1{example}")
    if way.mtp:
        rule = "its file names no weights of a prediction layer"
        raise refuse(target, rule, got=f"mtp={way.mtp}", hint="search with mtp off")


def check_modules_alike(plan: Plan, target: str, rule: str) -> None:
    """`InputError` with `rule` for a module that is split over other ranks than tp."""
    way = plan.strategy
    for module in MODULES:
        ranks = module_ranks(way.parallelism(), module)
        if ranks != way.tp:
            got = f"{module}_tp={ranks}, tp={way.tp}"
            raise refuse(target, rule, got=got, hint=f"search with {module}_tp=0")


def _names(graph: ShardedGraph, target: str) -> dict[str, str]:
    """Checkpoint name by parameter, without the layer. `InputError` for others' architectures."""
    facts, spec = table("hf_names"), graph.model.spec
    known = [name for name in facts["architectures"] if name != "source"]
    if spec.architecture not in known:
        raise refuse(
            target,
            "the names of this architecture's weights are not known",
            got=f"architecture={printable(spec.architecture)}",
            hint="known: " + ", ".join(known),
        )
    extra = list(facts["architectures"][spec.architecture])
    if spec.mla is not None and spec.mla.q_lora_rank is None:
        extra.append("mla_direct")
    found: dict[str, str] = {}
    for part in ("whole", "layer", *extra):
        found |= {name: word for name, word in facts[part].items() if name != "source"}
    return found


def templates(graph: ShardedGraph) -> tuple[str, ...]:
    """Templates of the layers, each once, in the order they first stand."""
    return tuple(dict.fromkeys(graph.model.layers))


def layer_weights(graph: ShardedGraph, template: str, target: str) -> list[CutWeight]:
    """Tensors of one template (`embed`, `head` or a layer's), names without the layer's prefix.

    `InputError` where a cut is no plain slice of a tensor.
    """
    names = _names(graph, target)
    parts: dict[str, list[ShardedOp]] = {}
    for node in graph.blocks[template].ops():
        if node.op is not None and node.op.weight:
            parts.setdefault(_named(names, node.op.param, target), []).append(node)
    return [_tensor(graph, name, nodes, target) for name, nodes in parts.items()]


def weights(graph: ShardedGraph, target: str) -> Iterator[CutWeight]:
    """Every tensor of the checkpoint, each once, in computing order."""
    seen: set[str] = set()
    by_template = {
        name: layer_weights(graph, name, target) for name in (*templates(graph), "embed", "head")
    }
    for template, layer in graph.model.sequence():
        prefix = f"model.layers.{layer}." if layer >= 0 else ""
        for one in by_template[template]:
            name = prefix + one.name
            if name not in seen:
                seen.add(name)
                yield CutWeight(name=name, shape=one.shape, cut=one.cut)


def _named(names: Mapping[str, str], param: str, target: str) -> str:
    if param not in names:
        rule = "the checkpoint's name of a parameter is not known"
        raise refuse(target, rule, got=f"parameter={printable(param)}", hint="use another target")
    return names[param]


def _dims(node: ShardedOp) -> list[tuple[str, ...]]:
    """Named dims of each dim of the checkpoint's tensor."""
    op = node.op
    assert op is not None
    if op.kind not in ("matmul",):
        return [("V",), ("H",)] if op.kind == "embedding" else [op.weight]
    kept = tuple(d for d in op.weight if d not in op.contract)
    taken = tuple(d for d in op.weight if d in op.contract)
    stacked = [("E",)] if "E" in kept and op.role == "expert" else []
    return [*stacked, tuple(d for d in kept if (d,) not in stacked), taken]


def _tensor(graph: ShardedGraph, name: str, nodes: Sequence[ShardedOp], target: str) -> CutWeight:
    """One tensor from the parameters that it holds side by side."""
    found = [[_run(graph, node, dims, name, target) for dims in _dims(node)] for node in nodes]
    first = found[0]
    if len(nodes) == 1:
        return CutWeight(
            name=name, shape=tuple(size for size, _ in first), cut=tuple(cut for _, cut in first)
        )
    if any([cut for _, cut in one] != [cut for _, cut in first] for one in found):
        raise _no_slice(target, name, "its parts are cut differently")
    rows = sum(one[0][0] for one in found)
    return CutWeight(
        name=name,
        shape=(rows, *(size for size, _ in first[1:])),
        cut=tuple(cut for _, cut in first),
    )


def _run(
    graph: ShardedGraph, node: ShardedOp, dims: tuple[str, ...], name: str, target: str
) -> tuple[int, tuple[str, ...]]:
    """(size, sub-axes that cut it) of a run of named dims, major to minor."""
    size, open_dim, found = 1, "", []
    for dim in dims:
        axes = [axis for axis, cut in node.weight_layout if cut == dim]
        if axes and open_dim:
            why = f"{axes[0]} cuts {dim} inside pieces that hold several {open_dim}"
            raise _no_slice(target, name, why)
        found += axes
        here = graph.model.sizes[dim]
        size *= here
        if here > graph.mesh.size(tuple(axes)):
            open_dim = open_dim or dim
    return size, tuple(found)


def _no_slice(target: str, name: str, why: str) -> Exception:
    return refuse(
        target,
        "a rank's part of a weight is one slice of it",
        got=f"{name}: {why}",
        hint="search with a tp that divides the kv heads or that they divide, and no o_tp",
    )


def check_tensors(graph: ShardedGraph, target: str) -> None:
    """`InputError` unless each tensor is cut into plain slices."""
    for name in (*templates(graph), "embed", "head"):
        layer_weights(graph, name, target)


def rank_grid(graph: ShardedGraph) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(sub-axes as ranks are numbered, major to minor; their sizes) of one stage."""
    mesh, order = graph.mesh, graph.parallel.order
    axes = sorted(mesh.axes, key=lambda axis: order.index(axis.rstrip("0123456789")))
    return tuple(axes), tuple(mesh.size((axis,)) for axis in axes)
