"""`shardplan verify` and `shardplan emit`: prove a plan again, and write it for an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardplan.models.errors import InputError, ProofError
from shardplan.search.cli_common import (
    MODULE_RANKS,
    Force,
    Json,
    OptionalModel,
    print_json,
    stdout_console,
    whole,
)
from shardplan.search.completion import target_names_like

if TYPE_CHECKING:
    from shardplan.search.explanation import Rival
    from shardplan.search.oplevel.plan import OperatorPlan
    from shardplan.search.plan import Plan, ProofInfo

__all__ = ["emit", "explain", "verify"]

_LEVELS = "0: shapes; 1: arithmetic too; 2: PyTorch graphs too; 3: processes too (extra torch)."
PlanFile = Annotated[Path, typer.Argument(help="plan.json of a search.")]


def verify(
    plan: Annotated[Path | None, typer.Argument(help="plan.json of a search.")] = None,
    model: OptionalModel = None,
    tp: Annotated[int, whole("--tp", "Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, whole("--pp", "Pipeline stages.")] = 1,
    dp: Annotated[int, whole("--dp", "Data-parallel groups.")] = 1,
    ep: Annotated[int, whole("--ep", "Ranks that share the experts.")] = 1,
    cp: Annotated[int, whole("--cp", "Context-parallel ranks.")] = 1,
    o_tp: Annotated[int, whole("--o-tp", f"Attention output: {MODULE_RANKS}")] = 0,
    ffn_tp: Annotated[int, whole("--ffn-tp", f"Dense feed-forward: {MODULE_RANKS}")] = 0,
    shared_tp: Annotated[int, whole("--shared-tp", f"Shared experts: {MODULE_RANKS}")] = 0,
    head_tp: Annotated[int, whole("--head-tp", f"LM head: {MODULE_RANKS}")] = 0,
    embed_tp: Annotated[int, whole("--embed-tp", f"Embedding: {MODULE_RANKS}")] = 0,
    sp: Annotated[bool, typer.Option("--sp", help="Tokens split over tp between matmuls.")] = False,
    exchange: Annotated[
        str, typer.Option("--exchange", help="allgather or alltoall, for experts over ranks.")
    ] = "allgather",
    stage_layers: Annotated[
        str | None, typer.Option("--stage-layers", help="Layers of each stage, as 40,40.")
    ] = None,
    mtp: Annotated[
        int, typer.Option("--mtp", help="Tokens predicted ahead and verified in a decode step.")
    ] = 0,
    level: Annotated[int, whole("--level", _LEVELS)] = 1,
    json: Json = False,
) -> None:
    """Prove that a plan, or a strategy, computes what the model does."""
    if level not in range(4):
        raise InputError("`--level` is 0, 1, 2 or 3", got=f"level={level}")
    if plan is not None:
        proof, what = _prove_plan(plan, model, level)
    elif model is not None:
        strategy = {"tp": tp, "pp": pp, "dp": dp, "ep": ep, "cp": cp, "sp": sp, "mtp": mtp}
        strategy |= {"o_tp": o_tp, "ffn_tp": ffn_tp, "shared_tp": shared_tp}
        strategy |= {"head_tp": head_tp, "embed_tp": embed_tp}
        strategy |= _graph_options(exchange, stage_layers)
        proof, what = _prove_strategy(model, strategy, level)
    else:
        raise InputError("nothing to verify", hint="name a plan.json, or --model with --tp, --pp")
    _show(proof, what, json)
    if not proof.passed:
        raise ProofError("the proof failed", got=what, hint="this plan must not be deployed")


def _graph_options(exchange: str, stage_layers: str | None) -> dict[str, Any]:
    if exchange not in ("allgather", "alltoall"):
        raise InputError("`--exchange` is allgather or alltoall", got=f"exchange={exchange!r}")
    try:
        layers = tuple(int(part) for part in stage_layers.split(",")) if stage_layers else ()
    except ValueError:
        raise InputError(
            "`--stage-layers` holds whole numbers", got=f"stage_layers={stage_layers!r}"
        ) from None
    return {"exchange": exchange, "stage_layers": layers}


def _prove_plan(path: Path, model: str | None, level: int) -> tuple[ProofInfo, str]:
    from shardplan.search.plan import Plan
    from shardplan.search.plan_file import load_plan
    from shardplan.search.proof import verify_plan

    plan = load_plan(path)
    if not isinstance(plan, Plan):
        return plan.verify(level=level, model=model), f"{plan.graph}, {plan.describe()}"
    what = f"{plan.model.name}, {plan.strategy.parallelism().describe()}"
    return verify_plan(plan, level=level, model=model), what


def _prove_strategy(model: str, strategy: dict[str, Any], level: int) -> tuple[ProofInfo, str]:
    from shardplan.models.catalog import load_model
    from shardplan.models.parallel import Parallelism
    from shardplan.search.proof import prove_strategy

    spec, par = load_model(model), Parallelism(**strategy)
    return prove_strategy(spec, par, level=level), f"{spec.name}, {par.describe()}"


def _show(proof: ProofInfo, what: str, as_json: bool) -> None:
    if as_json:
        print_json({"strategy": what, **proof.model_dump()})
        return
    from shardplan.search.tables import print_proof

    print_proof(proof, what, stdout_console())


def emit(
    plan: PlanFile,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="atc, docker-compose, jax, k8s, megatron, mindie, mindspore, onnx, ray, sglang, "
            "torch, vllm-ascend, or a plug-in's.",
            autocompletion=target_names_like,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the files.")],
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="NAME=VALUE of the target, as door=shards; may be repeated."),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a plan's files for a compiler or a serving engine."""
    from shardplan.search.emit import emit as write
    from shardplan.search.plan_file import load_plan

    paths = write(load_plan(plan), target, out, force=force, **_options(option or []))
    if json:
        print_json({"target": target, "files": [str(path) for path in paths]})
        return
    for path in paths:
        typer.echo(path)


def explain(
    plan: PlanFile,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="A rival: tp=8,pp=2,... or prefill.tp=4,decode.tp=8, the other serving (agg, "
            "disagg), or what `shardplan lint` reads (a script, a command, a plan.json); of "
            "operators megatron, replicated or a plan.json.",
        ),
    ] = None,
    model: OptionalModel = None,
    shadows: Annotated[
        bool,
        typer.Option("--shadows/--no-shadows", help="Search what each change would buy."),
    ] = True,
    json: Json = False,
) -> None:
    """Say why a plan is best, what would change it, and what loses."""
    from shardplan.search.explain import explain as why
    from shardplan.search.plan import Plan
    from shardplan.search.plan_file import load_plan

    loaded = load_plan(plan)
    if not isinstance(loaded, Plan):
        _explain_operators(loaded, against, model, shadows=shadows, as_json=json)
        return
    found = why(loaded, model=model, shadows=shadows)
    if against is not None:
        found = found.model_copy(update={"rival": _rival(against, loaded, model)})
    if json:
        print_json(found.model_dump(mode="json"))
        return
    from shardplan.search.tables_explain import print_explanation

    print_explanation(found, stdout_console())


def _explain_operators(
    plan: OperatorPlan, against: str | None, model: str | None, *, shadows: bool, as_json: bool
) -> None:
    from shardplan.search.oplevel.explain import explain_operators
    from shardplan.search.oplevel.proof import graph_of_plan

    graph = graph_of_plan(plan, model)
    found = explain_operators(plan, graph, shadows=shadows, against=against)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    from shardplan.search.tables_operators import print_why

    print_why(found, stdout_console())


def _rival(against: str, plan: Plan, model: str | None) -> Rival:
    """A rival, of its own words, of a configuration or of a plan of pools."""
    from shardplan.search.asked_again import known_of
    from shardplan.search.cli_lint import plan_or_configurations
    from shardplan.search.explain_pools import known_pools
    from shardplan.search.lint_case import of_plan
    from shardplan.search.plan import Plan
    from shardplan.search.rival import rival_of, values_of, words_of
    from shardplan.search.rival_pools import (
        SERVINGS,
        is_of_pools,
        other_serving,
        rival_of_pools,
        rival_plan,
    )

    if is_of_pools(against):
        return rival_of_pools(known_pools(plan, model), against)
    known = known_of(plan, model)
    if against in SERVINGS:
        return other_serving(known, against)
    if "vllm" not in against and not Path(against).is_file():
        return rival_of(known, words_of(against))
    other = plan_or_configurations(against, "")
    if isinstance(other, Plan) and other.pools:
        return rival_plan(plan, other)
    first = of_plan(other, against)[0] if isinstance(other, Plan) else other[0]
    return rival_of(known, values_of(first, known))


def _options(given: list[str]) -> dict[str, str]:
    """Options of a target by name; `InputError` for a word that is none, or given twice."""
    found: dict[str, str] = {}
    for word in given:
        name, equals, value = word.partition("=")
        name = name.strip().replace("-", "_")
        if not (equals and name.isidentifier()) or name in {
            *found,
            "force",
            "plan",
            "target",
            "out",
        }:
            raise InputError(
                "`--option` is NAME=VALUE, each name once", got=repr(word[:100]), hint="door=shards"
            )
        found[name] = value
    return found
