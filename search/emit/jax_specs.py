"""Target `jax`: a Python file with the PartitionSpec of every weight, and the mesh.

    partition_specs.py   mesh(devices), specs() by checkpoint name, BATCH and HIDDEN of activations
    README.md            how to use it

The mesh has the sub-axes of the plan (`shardplan.models.parallel`): tp0 and tp1 where the kv heads
run out, dp1 where experts are shared. A weight dim cut by several names them major to minor, which
is how jax nests them. Source: jax.sharding reference (Mesh, NamedSharding, PartitionSpec). XLA
inserts the collectives that the specs imply; tensor and data parallelism are checked to be the
plan's, sequence parallelism is XLA's own choice.
Left out, and refused: pipeline stages (a mesh holds one program), weights that a rank holds as
several slices.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardplan.models.apply import ShardedGraph
from shardplan.models.parallel import carry
from shardplan.search.emit.common import model_name, predicted, printable
from shardplan.search.emit.weights import (
    CutWeight,
    applied,
    check_one_stage,
    layer_weights,
    rank_grid,
    templates,
)
from shardplan.search.plan import Plan

__all__ = ["files"]

_TARGET = "jax"


def files(plan: Plan) -> dict[str, str]:
    """Texts by file name. `InputError` for a plan that one mesh cannot express."""
    check_one_stage(plan, _TARGET)
    graph = applied(plan, _TARGET)
    return {"partition_specs.py": _module(plan, graph), "README.md": _readme(plan)}


def _spec(cut: Sequence[Sequence[str]]) -> str:
    """A PartitionSpec as Python: None for a whole dim, a tuple where several axes cut one."""
    names = [
        repr(tuple(axes)) if len(axes) > 1 else repr(axes[0]) if axes else "None" for axes in cut
    ]
    while names and names[-1] == "None":
        names.pop()
    return f"P({', '.join(names)})".replace("'", '"')


def _table(name: str, found: Sequence[CutWeight]) -> list[str]:
    return [f"{name} = {{", *(f'    "{one.name}": {_spec(one.cut)},' for one in found), "}"]


def _activations(graph: ShardedGraph) -> tuple[str, str]:
    """Specs of token ids [batch, tokens] and of the hidden state [batch, tokens, hidden]."""
    lies = carry(graph.mesh, graph.parallel, "prefill")
    cut = [[a for a in graph.mesh.axes if lies.get(a) == dim] for dim in "BT"]
    ids = [[a for a in axes if a not in graph.mesh.groups["tp"]] for axes in cut]
    return _spec(ids), _spec(cut)


def _module(plan: Plan, graph: ShardedGraph) -> str:
    names, sizes = rank_grid(graph)
    mesh = graph.mesh
    swap = tuple(names.index(axis) for axis in mesh.axes)
    ids, hidden = _activations(graph)
    ends = [*layer_weights(graph, "embed", _TARGET), *layer_weights(graph, "head", _TARGET)]
    ends = list({one.name: one for one in ends}.values())
    lines = [
        f'"""PartitionSpecs of {model_name(plan)}: {plan.strategy.parallelism().describe()}."""',
        "",
        "import jax",
        "import numpy as np",
        "from jax.sharding import Mesh",
        "from jax.sharding import PartitionSpec as P",
        "",
        f"AXES = {_words(mesh.axes)}",
        f"RANKS = {mesh.ranks}",
        f"BATCH = {ids}",
        f"HIDDEN = {hidden}",
        "",
        *_table("ENDS", ends),
    ]
    for template in templates(graph):
        lines += _table(template.upper(), layer_weights(graph, template, _TARGET))
    runs = [name.upper() for name in graph.model.layers]
    lines += [
        f"LAYERS = [{', '.join(runs)}]"
        if len(set(runs)) > 1
        else f"LAYERS = [{runs[0]}] * {len(runs)}",
        "",
        "",
        "def mesh(devices=None) -> Mesh:",
        '    """The ranks of the deployment, in the plan\'s order."""',
        "    ranks = np.array(jax.devices() if devices is None else devices)[:RANKS]",
        f"    return Mesh(ranks.reshape({sizes}).transpose({swap}), AXES)",
        "",
        "",
        "def specs() -> dict[str, P]:",
        '    """The PartitionSpec of every weight by its name in the checkpoint."""',
        "    found = dict(ENDS)",
        "    for layer, table in enumerate(LAYERS):",
        '        found |= {f"model.layers.{layer}.{name}": one for name, one in table.items()}',
        "    return found",
    ]
    return "\n".join(lines) + "\n"


def _words(words: Sequence[str]) -> str:
    return "(" + "".join(f'"{word}", ' for word in words).rstrip(" ") + ")"


def _readme(plan: Plan) -> str:
    way = plan.strategy
    lines = [
        f"# {model_name(plan)} with jax: {way.parallelism().describe()}",
        "",
        f"For {printable(plan.cluster.title)}, {way.ranks} ranks.",
        "",
        "```python",
        "import jax",
        "from jax.sharding import NamedSharding",
        "import partition_specs as plan",
        "",
        "mesh = plan.mesh()",
        "weights = {",
        "    name: jax.device_put(checkpoint[name], NamedSharding(mesh, spec))",
        "    for name, spec in plan.specs().items()",
        "}",
        "ids = jax.device_put(ids, NamedSharding(mesh, plan.BATCH))",
        "# in the model, between layers:",
        "x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, plan.HIDDEN))",
        "```",
        "",
        "Weights have the names and the [out, in] shapes of the Hugging Face checkpoint; the "
        "routed experts of a layer are one array [experts, out, in].",
        "XLA chooses the collectives from these specs; the constraint on the hidden state makes "
        "it sum after each block, as the plan priced it.",
        "",
        "## What the plan promises",
        "",
        *predicted(plan),
    ]
    return "\n".join(lines) + "\n"
