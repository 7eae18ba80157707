"""A plan applied to a Hugging Face module: the module of one rank (extra `torch`).

    plan.apply(module, rank, phase="prefill")  ->  torch.fx.GraphModule

The module of a rank holds that rank's part of the weights and takes and gives tensors as they lie
on it: ids of the sequences of its data-parallel group, caches of its heads; a pipeline stage takes
and gives the hidden state. Shapes are those of one step, as a static-shape compiler needs them. It
is a plain FX module, so `torch.compile(rank_module, backend=...)` takes it with any backend.

Where `torch.distributed` runs with as many processes as the plan has ranks, the collectives are
bound to process groups, which every process makes alike: all call `apply`, in the same order.
Elsewhere the groups keep the names of the axes that they join ("dp0.tp0").
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shardplan.models.errors import InputError
from shardplan.models.fx.torch_lib import torch_lib, transformers_lib
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism, balanced_stages, make_mesh
from shardplan.models.ranks import axis_stride
from shardplan.models.spec import ModelSpec

if TYPE_CHECKING:
    from shardplan.search.plan import Plan

__all__ = ["apply_plan", "global_rank", "place_of_rank"]


def place_of_rank(par: Parallelism, rank: int) -> tuple[int, int]:
    """(stage, number within the stage) of a rank of the deployment.

    `InputError` for a rank that the plan does not have.
    """
    if not 0 <= rank < par.ranks:
        raise InputError(
            "a rank is below the ranks of the plan", got=f"rank={rank}, ranks={par.ranks}"
        )
    at = {axis: rank // axis_stride(par, axis) % getattr(par, axis) for axis in par.order}
    return at["pp"], (at["dp"] * par.cp + at["cp"]) * par.tp + at["tp"]


def global_rank(par: Parallelism, stage: int, number: int) -> int:
    """The rank of the deployment from its stage and its number within it."""
    rest, tp = divmod(number, par.tp)
    dp, cp = divmod(rest, par.cp)
    at = {"pp": stage, "dp": dp, "cp": cp, "tp": tp}
    return sum(at[axis] * axis_stride(par, axis) for axis in par.order)


def apply_plan(
    plan: Plan,
    module: Any,
    rank: int,
    *,
    phase: Phase = "prefill",
    batch: int | None = None,
    tokens: int | None = None,
    device: Any = None,
) -> Any:
    """The module of one rank for one step.

    `batch`: sequences of the whole deployment (the plan's by default); `tokens`: of a prompt in
    prefill, in the cache in decode (the workload's by default). Raises `InputError` for a module of
    other sizes than the plan's, or a plan with a pool for each phase.
    """
    from shardplan.models.frontends.torch_model import spec_of_module
    from shardplan.search.proof import model_digest

    torch_lib()
    transformers_lib()
    spec = spec_of_module(module)
    if plan.pools:
        raise InputError(
            "a plan whose phases have pools of their own is applied pool by pool",
            got=", ".join(pool.role for pool in plan.pools),
            hint="search with serving='agg'",
        )
    if model_digest(spec) != plan.model.digest:
        raise InputError(
            "the plan was made for a model of other sizes",
            got=f"{spec.name}: {model_digest(spec)[:12]}, plan: {plan.model.digest[:12]}",
        )
    par = plan.strategy.parallelism()
    sequences = batch or plan.strategy.batch * par.dp
    length = tokens or plan.request.workload.input_len
    return _module_of(spec, par, module, rank, (phase, sequences, length, device))


def _module_of(
    spec: ModelSpec,
    par: Parallelism,
    module: Any,
    rank: int,
    asked: tuple[Phase, int, int, Any],
) -> Any:
    from shardplan.models.fx.decoders import export_step, prepare
    from shardplan.models.fx.emit import emit
    from shardplan.models.fx.modules import bind_groups, group_names, process_groups, rank_module
    from shardplan.models.fx.roles import decoder_program
    from shardplan.models.fx.stages import cut_stages

    phase, batch, tokens, device = asked
    stage, number = place_of_rank(par, rank)
    mesh = make_mesh(spec, par)
    exported, graph = export_step(prepare(module, par.tp), phase, batch, tokens)
    whole = emit(exported, decoder_program(graph, mesh, par, phase))
    stages = cut_stages(whole, balanced_stages(spec, par))
    own = stages[stage]
    made = rank_module(own.graph, own.held, exported.tensors, mesh, number, device=device)
    made.meta["shardplan"] = {
        "stage": stage,
        "wires_in": own.wires_in,
        "inputs": own.inputs,
        "wires_out": own.wires_out,
        "outputs": own.outputs,
    }
    distributed = importlib.import_module("torch.distributed")
    if distributed.is_initialized() and distributed.get_world_size() == par.ranks:
        names = group_names(one.graph for one in stages)
        groups = process_groups(names, mesh, par.pp, lambda s, r: global_rank(par, s, r))
        bind_groups(made, groups)
    return made
