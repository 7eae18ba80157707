"""Target `mindspore`: the strategy checkpoint by which MindSpore slices a checkpoint.

    strategy.ckpt   ParallelStrategyMap: how every weight lies on the ranks of its stage
    slice.py        `transform_checkpoint_by_rank` for each rank of the plan
    README.md       how to use it

Each weight gets a mesh of its own, the plan's with neighbouring sub-axes that cut the same dim
joined to one, because a dim of a weight names one mesh dim (`strategy_proto`). MindSpore numbers
ranks stage by stage: rank = stage * ranks of a stage + place in the stage.
Left out, and refused: ranks in another order than stage by stage, weights that a rank holds as
several slices, optimizer shards (this is inference).
"""

from __future__ import annotations

from collections.abc import Iterator

from shardplan.models.apply import ShardedGraph
from shardplan.search.emit.common import model_name, predicted, printable, refuse
from shardplan.search.emit.strategy_proto import ParameterLayout, encode
from shardplan.search.emit.weights import (
    CutWeight,
    applied,
    layer_weights,
    rank_grid,
    templates,
)
from shardplan.search.plan import Plan

__all__ = ["files", "parameter_layouts"]

_TARGET = "mindspore"


def files(plan: Plan) -> dict[str, str | bytes]:
    """Contents by file name. `InputError` for a plan that the format cannot express."""
    way = plan.strategy
    if way.mtp:
        rule = "the file names no weights of a prediction layer"
        raise refuse(_TARGET, rule, got=f"mtp={way.mtp}", hint="search with mtp off")
    if way.pp > 1 and way.order[0] != "pp":
        raise refuse(
            _TARGET,
            "MindSpore numbers ranks stage by stage",
            got=f"order={'>'.join(way.order)}, pp={way.pp}",
            hint="search with the order pp>dp>cp>tp",
        )
    graph = applied(plan, _TARGET)
    return {
        "strategy.ckpt": encode(list(parameter_layouts(graph))),
        "slice.py": _script(plan),
        "README.md": _readme(plan),
    }


def parameter_layouts(graph: ShardedGraph) -> Iterator[ParameterLayout]:
    """Layouts of every weight on every stage that holds it, in computing order."""
    names = (*templates(graph), "embed", "head")
    found = {name: layer_weights(graph, name, _TARGET) for name in names}
    for stage in graph.stages:
        seen: set[str] = set()
        for template, layer in graph.sequence(stage):
            prefix = f"model.layers.{layer}." if layer >= 0 else ""
            mark = f"{stage.index}-" if len(graph.stages) > 1 else ""
            for one in found.get(template, ()):
                if prefix + one.name not in seen:
                    seen.add(prefix + one.name)
                    yield _layout(graph, one, mark + prefix + one.name)


def _layout(graph: ShardedGraph, weight: CutWeight, name: str) -> ParameterLayout:
    axes, sizes = rank_grid(graph)
    whole = dict(zip(axes, sizes, strict=True))
    joined = list(axes)
    for cut in weight.cut:
        if len(cut) > 1:
            at = joined.index(cut[0])
            if tuple(joined[at : at + len(cut)]) != cut:
                raise refuse(
                    _TARGET,
                    "axes that cut one dim of a weight are neighbours in the rank numbers",
                    got=f"{weight.name}: {' and '.join(cut)} of {'>'.join(axes)}",
                    hint="search with the order pp>dp>cp>tp",
                )
            joined[at : at + len(cut)] = [cut[0]]
            for axis in cut[1:]:
                whole[cut[0]] *= whole[axis]
    place = {axis: len(joined) - 1 - at for at, axis in enumerate(joined)}
    return ParameterLayout(
        name=name,
        mesh=tuple(whole[axis] for axis in joined) or (1,),
        cut=tuple(place[cut[0]] if cut else -1 for cut in weight.cut),
    )


def _script(plan: Plan) -> str:
    lines = [
        f'"""Slice a whole checkpoint of {model_name(plan)} for each of '
        f'{plan.strategy.ranks} ranks."""',
        "",
        "import sys",
        "from pathlib import Path",
        "",
        "import mindspore as ms",
        "",
        "HERE = Path(__file__).resolve().parent",
        f"RANKS = {plan.strategy.ranks}",
        "",
        'if __name__ == "__main__":',
        "    whole, out = sys.argv[1], Path(sys.argv[2])",
        "    for rank in range(RANKS):",
        '        target = out / f"rank_{rank}"',
        "        target.mkdir(parents=True, exist_ok=True)",
        "        ms.transform_checkpoint_by_rank(",
        "            rank,",
        "            {0: whole},",
        '            str(target / "model.ckpt"),',
        "            None,",
        '            str(HERE / "strategy.ckpt"),',
        "        )",
    ]
    return "\n".join(lines) + "\n"


def _readme(plan: Plan) -> str:
    way = plan.strategy
    lines = [
        f"# {model_name(plan)} with MindSpore: {way.parallelism().describe()}",
        "",
        f"For {printable(plan.cluster.title)}, {way.ranks} ranks.",
        "",
        "`python slice.py whole.ckpt out` writes `out/rank_<n>/model.ckpt` for every rank: it "
        "calls `mindspore.transform_checkpoint_by_rank` with `strategy.ckpt`, the plan's layout "
        "of every weight.",
        "",
        "- Weights in `whole.ckpt` have the names and [out, in] shapes of the Hugging Face "
        "checkpoint (q_proj, k_proj, v_proj apart); the routed experts of a layer are one tensor "
        "[experts, out, in].",
        "- The strategy says where weights lie; the network's own `shard` or parallel layers say "
        "how they are used.",
        "",
        "## What the plan promises",
        "",
        *predicted(plan),
        f"- priced for engine profile {printable(plan.request.engine_profile)}",
    ]
    return "\n".join(lines) + "\n"
