"""Target `onnx`: the models of all ranks, cut from the ONNX file that the plan was made of.

    plan of operators   the plan's own program: its moves, partial sums and stages
    plan of a decoder   tp by columns and rows (`models.onnxout.choose`), pp by layers; one replica

    rank0000.onnx, rank0000.bin, ..., ranks.json      what each rank runs, its weights, the wiring
    annotated.onnx                                    the whole model with its shardings
    README.md

Shapes are those of one run: sizes of symbolic dims are the plan's, or the option `sizes`
(`sizes=batch=8,tokens=128`). `model` names the file where it has moved, `annotated=no` leaves the
whole model out; it is left out where the weights lie outside of the file, beside which it would
have to lie.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shardplan.models.errors import InputError
from shardplan.models.parallel import Mesh, balanced_stages
from shardplan.search.emit.common import printable, refuse
from shardplan.search.oplevel.plan import OperatorPlan
from shardplan.search.oplevel.program import check_same, mesh_of, program_of
from shardplan.search.oplevel.words import sizes_of
from shardplan.search.plan import Plan
from shardplan.search.proof import model_of

if TYPE_CHECKING:
    from shardplan.models.frontends.onnx_graph import OnnxGraph
    from shardplan.models.onnxout.laid import Laid

__all__ = ["files"]

_TARGET = "onnx"
_PLAIN = {"dp": 1, "ep": 1, "cp": 1, "sp": False, "mtp": 0}
_TP = "tp"


def files(
    plan: Plan | OperatorPlan,
    *,
    staging: Path,
    model: str = "",
    sizes: str = "",
    annotated: str = "yes",
) -> Mapping[str, str | Path]:
    """The files, written into `staging`. `InputError` for a plan of another model or one that
    models of ranks cannot express, for missing weights, and for what a collective does not take.
    """
    if annotated not in ("yes", "no"):
        raise InputError("`annotated` is yes or no", got=f"annotated={annotated!r}")
    path = _file(plan, model)
    asked = sizes_of([sizes] if sizes else [])
    if isinstance(plan, OperatorPlan):
        source, laid, stages = _of_operators(plan, path, asked or plan.request.sizes)
    else:
        source, laid, stages = _of_decoder(plan, path, asked)
    _check_room(staging, laid)
    from shardplan.models.onnxout.write import write_ranks

    write_ranks(laid, staging)
    outside = any(one.data_location for one in source.file.whole().graph.initializer)
    if annotated == "yes" and not outside:
        from shardplan.models.onnxout.annotate import annotate

        strategy = {name: one for name, one in _strategy(laid).items() if one}
        annotate(source, strategy, laid.mesh, staging / "annotated.onnx", stages)
    found: dict[str, str | Path] = {one.name: one for one in staging.iterdir()}
    return {**found, "README.md": _readme(plan, laid, sorted(found), path)}


# a function says which kinds of plan it takes; those that say nothing take deployments
files.plans = ("deployment", "operators")  # type: ignore[attr-defined]


def _file(plan: Plan | OperatorPlan, model: str) -> Path:
    source = plan.source if isinstance(plan, OperatorPlan) else plan.model.source
    path = Path(model or source)
    if path.suffix != ".onnx":
        raise refuse(
            _TARGET,
            "models of ranks are cut from an ONNX file",
            got=f"model={printable(model or source) or 'in memory'}",
            hint="give --option model=FILE.onnx, or search an .onnx file",
        )
    return path


def _of_operators(
    plan: OperatorPlan, path: Path, sizes: Mapping[str, int]
) -> tuple[OnnxGraph, Laid, list[int]]:
    from shardplan.models.frontends.onnx_graph import read_onnx
    from shardplan.models.onnxout.laid import lay

    source = read_onnx(path, sizes)
    check_same(plan, source.graph)
    program = program_of(plan, source.graph)
    stages = [one.layers for one in plan.stages] if len(plan.stages) > 1 else []
    laid = lay(source, plan.strategy_of(source.graph), mesh_of(plan), stages, program)
    given = {name: dict(key) for name, key in (*program.inputs.items(), *program.outputs)}
    lies = {**laid.held, **{name: laid.layouts[one] for name, one in laid.outputs.items()}}
    apart = [name for name, layout in given.items() if dict(lies[name]) != layout]
    if apart:
        raise refuse(
            _TARGET,
            "inputs come whole and outputs are given whole",
            got=f"pinned: {', '.join(apart[:5])}",
            hint="search without these pins",
        )
    return source, laid, stages


def _of_decoder(
    plan: Plan, path: Path, sizes: Mapping[str, int]
) -> tuple[OnnxGraph, Laid, list[int]]:
    from shardplan.models.frontends.onnx_graph import read_onnx
    from shardplan.models.onnxout.choose import megatron_strategy
    from shardplan.models.onnxout.laid import lay

    way, spec = plan.strategy, model_of(plan, str(path))
    others = [f"{n}={getattr(way, n)}" for n, v in _PLAIN.items() if getattr(way, n) != v]
    others += [f"{n}={v}" for n, v in way.model_dump().items() if n.endswith("_tp") and v]
    if plan.pools or others:
        raise refuse(
            _TARGET,
            "one replica, split by tp and pp, is written",
            got=", ".join(others) or f"{len(plan.pools)} pools",
            hint="search with --operators, or give a plan of tp and pp alone",
        )
    source = read_onnx(path, sizes)
    mesh = Mesh((_TP,), (way.tp,), {})
    stages = list(balanced_stages(spec, way.parallelism())) if way.pp > 1 else []
    return source, lay(source, megatron_strategy(source.graph, mesh, _TP), mesh, stages), stages


def _strategy(laid: Laid) -> dict[str, Mapping[str, str]]:
    from shardplan.models.onnxout.laid import Placed

    return {one.op.name: one.chosen for one in laid.steps if isinstance(one, Placed)}


def _check_room(staging: Path, laid: Laid) -> None:
    """`InputError` where the weights of all ranks would not fit on the disk."""
    from shardplan.models.onnxout.laid import local_shape
    from shardplan.models.opgraph import Tensor

    tensors, total = laid.source.raw.tensors, 0
    for name, layout in laid.held.items():
        one = tensors[name]
        if one.kind == "parameter":
            shape = local_shape(one.shape, layout, laid.mesh)
            total += Tensor(name=name, shape=shape, dtype=one.dtype, kind=one.kind).bytes
    needed, free = total * laid.mesh.ranks, shutil.disk_usage(staging).free
    if needed > free:
        raise InputError(
            "the folder has room for the weights of all ranks",
            got=f"needed={needed / 2**30:.2f} GiB, free={free / 2**30:.2f} GiB",
        )


def _readme(plan: Plan | OperatorPlan, laid: Laid, names: list[str], path: Path) -> str:
    moves = laid.moves()
    counts = {kind: sum(one.kind == kind for one in moves) for kind in {m.kind for m in moves}}
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
    mesh = " x ".join(f"{a}={n}" for a, n in zip(laid.mesh.axes, laid.mesh.shape, strict=True))
    name = plan.graph if isinstance(plan, OperatorPlan) else plan.model.name
    lines = [
        f"# {printable(name)} over {laid.ranks} ranks",
        "",
        f"Cut from `{printable(path.name)}`: a mesh of {mesh}, {laid.stages} stage(s); "
        f"inserted in each rank's models: {kinds}.",
        "",
        "- `rankNNNN.onnx` with its weights in `rankNNNN.bin`: what one rank runs. Collectives",
        "  are `com.microsoft` AllReduce, AllGather and AllToAll; the ranks of each stand in the",
        "  node's metadata (`shardplan.group`).",
        "- `ranks.json`: the stage of each rank, what it takes from which, how caches lie.",
        "- `annotated.onnx`, where written: the whole model with ONNX's multi-device annotations.",
        "",
        "Inputs are given whole to every rank, outputs are whole on every rank.",
        "",
        "Files: " + ", ".join(f"`{one}`" for one in names) + ".",
        "",
    ]
    return "\n".join(lines)
