"""Target `torch`: a Python file with the DTensor plan of a Hugging Face model.

    parallel_plan.py   device_mesh(), plan() of parallel styles by module, parallelize(model, mesh)
    README.md          how to use it, which collectives one step then makes

Styles by module, tensor parallel only (`sp`: tokens split over tp between the products):

    q k v gate up      ColwiseParallel
    o down             RowwiseParallel -> whole, or with sp Shard(1)
    embed_tokens       RowwiseParallel over the vocabulary
    lm_head            ColwiseParallel, logits gathered
    norms              with sp: SequenceParallel;  attention and mlp then PrepareModuleInput

Source: torch.distributed.tensor.parallel reference (parallelize_module and its styles). Data
parallel groups are the other dim of the mesh. Left out, and refused: pipeline stages, contexts and
experts over ranks (no style splits them), modules over other ranks than tp, norms over all heads,
tp beyond the kv heads.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardplan.models.accounting import predict_communication
from shardplan.models.apply import ShardedGraph
from shardplan.search.emit.common import model_name, predicted, printable, refuse
from shardplan.search.emit.weights import (
    applied,
    check_modules_alike,
    check_one_stage,
    check_tensors,
)
from shardplan.search.plan import Plan

__all__ = ["files"]

_TARGET = "torch"
_TIED = ["    model.lm_head.weight = model.model.embed_tokens.weight  # one table, held once"]
_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def files(plan: Plan) -> dict[str, str]:
    """Texts by file name. `InputError` for a plan that DTensor styles cannot express."""
    check_one_stage(plan, _TARGET)
    check_modules_alike(plan, _TARGET, "its file splits all modules over the same ranks")
    graph = applied(plan, _TARGET)
    _check(plan, graph)
    check_tensors(graph, _TARGET)
    return {"parallel_plan.py": _module(plan, graph), "README.md": _readme(plan, graph)}


def _check(plan: Plan, graph: ShardedGraph) -> None:
    """`InputError` for what no parallel style does."""
    way, spec = plan.strategy, graph.model.spec
    if spec.moe is not None:
        raise refuse(
            _TARGET,
            "experts are no linear modules, which are all that parallel styles split",
            got=f"architecture={printable(spec.architecture)}",
            hint="use target vllm-ascend, jax or mindspore",
        )
    if way.cp > 1:
        rule = "no parallel style splits contexts"
        raise refuse(_TARGET, rule, got=f"cp={way.cp}", hint="search with cp=1")
    if way.tp > 1 and spec.kv_heads % way.tp:
        tries = [str(n) for n in range(1, way.tp) if spec.kv_heads % n == 0 and way.tp % n == 0]
        raise refuse(
            _TARGET,
            "ColwiseParallel gives every rank whole kv heads",
            got=f"tp={way.tp}, kv heads={spec.kv_heads}",
            hint=f"try tp={' or '.join(tries)}",
        )
    if way.tp > 1 and spec.qk_norm == "full":
        rule = "a norm over all heads needs a sum over ranks, which no parallel style makes"
        raise refuse(_TARGET, rule, got=f"tp={way.tp}", hint="search with tp=1")


def _styles(graph: ShardedGraph) -> Iterator[tuple[str, str]]:
    """(module, style) as Python, in the order a token passes."""
    sp = graph.parallel.sp
    between = ", output_layouts=Shard(1), use_local_output=False" if sp else ""
    yield "model.embed_tokens", f"RowwiseParallel(input_layouts=Replicate(){between})"
    names = {"self_attn": (*_COLUMNS[:3], "o_proj"), "mlp": (*_COLUMNS[3:], "down_proj")}
    norms = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
    for part, linears in names.items():
        if sp:
            yield f"model.layers.*.{norms[part]}", "SequenceParallel()"
            yield f"model.layers.*.{part}", _gather(part)
        for name in linears:
            style = "ColwiseParallel()"
            if name not in _COLUMNS:
                style = f"RowwiseParallel({between.removeprefix(', ')})"
            yield f"model.layers.*.{part}.{name}", style
    if sp:
        yield "model.norm", "SequenceParallel()"
    lies = "input_layouts=Shard(1), " if sp else ""
    yield "lm_head", f"ColwiseParallel({lies}output_layouts=Replicate())"


def _gather(part: str) -> str:
    """The style that gathers a block's tokens; attention takes them by keyword."""
    if part == "self_attn":
        return (
            'PrepareModuleInput(input_kwarg_layouts={"hidden_states": Shard(1)}, '
            'desired_input_kwarg_layouts={"hidden_states": Replicate()}, use_local_output=True)'
        )
    return (
        "PrepareModuleInput(input_layouts=(Shard(1),), "
        "desired_input_layouts=(Replicate(),), use_local_output=True)"
    )


def _module(plan: Plan, graph: ShardedGraph) -> str:
    way = plan.strategy
    axes = [axis for axis in way.order if axis in ("dp", "tp")]
    shape = ", ".join(str(getattr(way, axis)) for axis in axes)
    words = ", ".join(f'"{axis}"' for axis in axes)
    styles = list(_styles(graph)) if way.tp > 1 else []
    entries = [f'        "{name}": {style},' for name, style in styles]
    found = [style.partition("(")[0] for _, style in styles]
    used = sorted({"ParallelStyle", "parallelize_module", *found})
    body = ["    return {", *entries, "    }"] if entries else ["    return {}"]
    lines = [
        f'"""DTensor plan of {model_name(plan)}: tp {way.tp}, dp {way.dp}'
        + (', tokens split over tp."""' if way.sp else '."""'),
        "",
        "from torch import nn",
        "from torch.distributed.device_mesh import DeviceMesh, init_device_mesh",
        *(["from torch.distributed.tensor import Replicate, Shard"] if styles and way.sp else []),
        *(["from torch.distributed.tensor import Replicate"] if styles and not way.sp else []),
        "from torch.distributed.tensor.parallel import (",
        *(f"    {name}," for name in used),
        ")",
        "",
        "",
        'def device_mesh(device_type: str = "npu") -> DeviceMesh:',
        '    """The ranks of the deployment, in the plan\'s order."""',
        f"    return init_device_mesh(device_type, ({shape}), mesh_dim_names=({words}))",
        "",
        "",
        "def plan() -> dict[str, ParallelStyle]:",
        '    """The parallel style of each module that is split or prepared."""',
        *body,
        "",
        "",
        "def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:",
        '    """Split a Hugging Face causal language model over the tp dim of the mesh."""',
        '    model = parallelize_module(model, mesh["tp"], plan())',
        *(_TIED if graph.model.spec.tied_embeddings else []),
        "    return model",
    ]
    return "\n".join(lines) + "\n"


def _readme(plan: Plan, graph: ShardedGraph) -> str:
    way, spec = plan.strategy, graph.model.spec
    counts: dict[str, int] = {}
    for one in predict_communication(graph, way.dp, way.tp, way.tp):
        counts[one.kind] = counts.get(one.kind, 0) + 1
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "no collective"
    lines = [
        f"# {model_name(plan)} with torch DTensor: tp {way.tp}, dp {way.dp}",
        "",
        f"For {printable(plan.cluster.title)}, {way.ranks} ranks, started with torchrun.",
        "",
        "```python",
        "import torch, torch_npu",
        "from transformers import AutoModelForCausalLM",
        "from parallel_plan import device_mesh, parallelize",
        "",
        'model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="sdpa")',
        "mesh = device_mesh()",
        "model = parallelize(model, mesh)",
        "```",
        "",
        f"Modules are named as in {printable(spec.architecture)} of transformers. Ranks of one dp "
        "group take the same sequences, groups different ones.",
        "",
        f"Each forward pass of a prompt makes: {told}.",
        *(_split_tokens() if way.sp else []),
        "",
        "## What the plan promises",
        "",
        *predicted(plan),
        f"- priced for engine profile {printable(plan.request.engine_profile)}; attention, "
        "quantization and batching are the engine's part, not this file's",
    ]
    return "\n".join(lines) + "\n"


def _split_tokens() -> list[str]:
    return [
        "Tokens are split over tp along the prompt, whose length tp must divide; a decode step "
        "of one token takes the plan with sp off."
    ]
