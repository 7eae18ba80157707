"""A configuration as a question: its model, machine, layout and choice.

The model is the one asked for, else the preset that the configuration's path or repository stands
for; types are those asked for, else the configuration's, else what the checkpoint's name says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from shardplan.models.catalog import load_model, model_names
from shardplan.models.errors import InputError
from shardplan.models.parallel import Parallelism
from shardplan.models.spec import ModelSpec
from shardplan.search.configuration import Configuration
from shardplan.search.evaluate import Question
from shardplan.search.layouts import base_order
from shardplan.search.plan import Plan, StrategyInfo
from shardplan.search.request import Asked, Resolved, resolve
from shardplan.search.space import Choice

__all__ = ["Case", "case_of", "model_of", "of_plan", "parallel_of", "spec_of"]

_PLAIN_WORDS = re.compile(
    r"(-|_)(w\d+a\d+(-?dynamic)?|w8a16|int8|bf16|fp16|fp8|instruct|chat|base|hf|mtp|quarot|"
    r"vllm|ascend|\d{4})"
)
_TYPE = re.compile(r"(?<![a-z0-9])w(\d+)a(\d+)(?![0-9])")
_QUANTIZED = "w8a8"


def model_of(text: str) -> str | None:
    """The preset that a path or repository stands for, None where its name says no such thing.

    The last part of the name is a preset's, but for words that say nothing of the architecture
    (a number format, Instruct, a date).
    """
    last = text.rstrip("/").rpartition("/")[2].lower()
    bare = _PLAIN_WORDS.sub("", last)
    return bare if bare in model_names() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A configuration with everything resolved."""

    config: Configuration
    resolved: Resolved
    question: Question
    parallel: Parallelism
    choice: Choice


def spec_of(config: Configuration, asked: Asked) -> ModelSpec:
    if asked.model:
        return asked.model if isinstance(asked.model, ModelSpec) else load_model(asked.model)
    name = model_of(config.model) if config.model else None
    if name is None and config.model.endswith(".json") and Path(config.model).is_file():
        return load_model(config.model)
    if name is None:
        raise InputError(
            "the configuration's model is not one that is known by that name",
            got=f"model={config.model or 'a variable'}"[:120],
            hint="say which it is with --model: a preset or its config.json",
        )
    return load_model(name)


def parallel_of(config: Configuration, spec: ModelSpec) -> Parallelism:
    everyone = config.tp * config.dp * config.cp
    ep = everyone if config.experts_parallel else config.ep
    if spec.moe is None:
        ep = 1
    return Parallelism(
        tp=config.tp,
        pp=config.pp,
        dp=config.dp,
        ep=ep,
        cp=config.cp,
        sp=config.sp and config.tp > 1,
        exchange="alltoall" if config.exchange == "alltoall" and ep > 1 else "allgather",
        mtp=config.mtp,
    )


def _weights(config: Configuration) -> str:
    """The type of the weights: as said, else as the checkpoint's name says."""
    if config.weight_dtype is not None:
        return config.weight_dtype
    if not config.quantized:
        return "auto"
    named = _TYPE.search(config.model.lower())
    return named[0] if named else _QUANTIZED


def case_of(config: Configuration, spec: ModelSpec, par: Parallelism, asked: Asked) -> Case:
    """Everything resolved; `InputError` for a machine, a number of cards or a type it lacks."""
    weight = asked.weight_dtype if asked.weight_dtype != "auto" else _weights(config)
    cache = asked.kv_dtype if asked.kv_dtype != "auto" else config.kv_dtype or "auto"
    resolved = resolve(
        replace(
            asked,
            model=spec,
            cards=par.ranks,
            weight_dtype=weight,
            kv_dtype=cache,
            engine_profile=asked.engine_profile or config.engine_profile,
            weight_prefetch="on" if config.weight_prefetch else None,
            fused_collectives="on" if config.fused_collectives else None,
        )
    )
    own = resolved.engine
    engine = replace(
        own,
        memory_fraction=config.memory_fraction or own.memory_fraction,
        kv_block_tokens=config.block_size or own.kv_block_tokens,
    )
    par = replace(par, order=base_order(engine, par))
    question = Question(
        spec=spec,
        cluster=resolved.cluster,
        engine=engine,
        workload=resolved.request.workload,
        limits=resolved.request.limits,
        objective="throughput",
        cards=par.ranks,
    )
    first = resolved.choices[0]
    choice = next((one for one in resolved.choices if one.attention == "flash"), first)
    return Case(config=config, resolved=resolved, question=question, parallel=par, choice=choice)


def of_plan(plan: Plan, source: str) -> list[Configuration]:
    """The configuration that a plan stands for; of pools, that of an instance of each."""
    if not plan.pools:
        return [_of_way(plan, plan.strategy, source, "mixed")]
    return [
        _of_way(plan, pool.strategy, f"{source}, {pool.role} instance", pool.role)
        for pool in plan.pools
    ]


def _of_way(plan: Plan, way: StrategyInfo, source: str, role: str) -> Configuration:
    return Configuration(
        source=source,
        role=role,
        engine_profile=plan.request.engine_profile,
        model=plan.model.name if plan.model.name in model_names() else plan.model.source,
        tp=way.tp,
        pp=way.pp,
        dp=way.dp,
        ep=way.ep,
        cp=way.cp,
        sp=way.sp,
        exchange=way.exchange,
        mtp=way.mtp,
        max_num_seqs=way.batch,
        max_num_batched_tokens=way.chunk,
        weight_dtype=way.weight_dtype,
        kv_dtype=way.kv_dtype,
        weight_prefetch=way.weight_prefetch,
        fused_collectives=way.fused_collectives,
    )
