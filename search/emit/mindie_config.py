"""MindIE Server's settings of a plan, as `config.json` and Motor's `user_config.json` spell them.

    worldSize = tp * cp * groups    dp = groups    moe_ep = ep    moe_tp = worldSize / ep

`groups` are the dp groups that share experts; replicas are instances. `maxBatchSize` counts the
sequences of one group, as `shardplan lint` reads it. Prompts run in steps of their own
(templateType Standard), so one prompt must fit a step. Rules on layouts are those of
`search/data/rules.toml` for the engine; keys and ranges those of `schemas/mindie.json`.
Left out, and refused: SplitFuse, sequence parallelism as the plan means it (MindIE's `sp` splits
the cache, and goes with cp).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from shardplan.models.modules import module_ranks
from shardplan.search.emit.common import (
    algorithm_variable,
    check_algorithm,
    family_of,
    model_name,
    printable,
    refuse,
    table,
)
from shardplan.search.emit.vllm_flags import longest_request
from shardplan.search.emit.vllm_layout import has_experts
from shardplan.search.emit.vllm_schemes import Checkpoint, checkpoint_of
from shardplan.search.plan import Plan
from shardplan.search.rulebook import Role, rules, value

__all__ = [
    "TARGET",
    "checked",
    "deploy_config",
    "environment",
    "groups_of",
    "is_latent",
    "model_config",
    "schedule_config",
    "world_of",
]

TARGET = "mindie"


def groups_of(plan: Plan) -> int:
    """Data-parallel groups of one instance: those that share experts."""
    return plan.strategy.dp // plan.strategy.parallelism().replicas


def world_of(plan: Plan) -> int:
    """Ranks of one instance."""
    way = plan.strategy
    return way.tp * way.cp * groups_of(plan)


def is_latent(plan: Plan) -> bool:
    """Whether the model is of the DeepSeek kind, which has a section of its own."""
    return plan.model.architecture in table("vllm_ascend")["mla"]["architectures"]


def checked(plan: Plan, role: Role = "mixed") -> tuple[str, Checkpoint]:
    """(device family, checkpoint). `InputError` for what MindIE has not."""
    facts = table("mindie")
    hint = "its devices are Atlas 300I Duo, A2 and A3; use target atc"
    family = family_of(plan, TARGET, facts["families"], hint)
    for name, broken, got, near in _layout_rules(plan, family, role):
        if broken:
            raise refuse(TARGET, rules()[name].sentence, got=got, hint=near)
    for rule, broken, got, near in _own_rules(plan, family, role):
        if broken:
            raise refuse(TARGET, rule, got=got, hint=near)
    check_algorithm(TARGET, plan)
    return family, checkpoint_of(plan, family, TARGET)


def _layout_rules(plan: Plan, family: str, role: Role) -> list[tuple[str, bool, str, str]]:
    """(id of a rule, broken, got, hint)."""
    way, par, latent = plan.strategy, plan.strategy.parallelism(), is_latent(plan)
    old, inside = family == "310p", plan.cluster.ranks_per_node
    own = {name: module_ranks(par, name) != way.tp for name in ("ffn", "shared", "embed")}
    head, out = module_ranks(par, "head"), module_ranks(par, "o")
    sent = way.ep > 1 and way.exchange == "alltoall"
    return [
        ("pp-engine", way.pp > 1, f"pp={way.pp}", "search with --only pp=1"),
        ("ep-mindie", way.ep > 1 and not latent, f"ep={way.ep}", "search with --only ep=1"),
        (
            "sent-mindie",
            sent and way.ep % (way.tp * way.cp) > 0,
            f"ep={way.ep}, tp={way.tp}",
            f"try ep={way.tp * way.cp}",
        ),
        ("dp-mindie", old and groups_of(plan) > 1, f"dp={way.dp}, ep={way.ep}", "try ep=1"),
        ("cp-mindie", way.cp not in value("cp-mindie", "sizes"), f"cp={way.cp}", "try cp=2"),
        ("cp-mindie-model", way.cp > 1 and not latent, f"cp={way.cp}", "try cp=1"),
        ("cp-mindie-device", way.cp > 1 and old, f"cp={way.cp}", "try cp=1"),
        ("sp-mindie", way.sp, "sp=True", "search with --engine-profile mindie"),
        ("mtp-mindie-device", way.mtp > 0 and old, f"mtp={way.mtp}", "try mtp=0"),
        (
            "mtp-mindie-cp",
            way.mtp > 1 and way.cp > 1 and role != "prefill",
            f"mtp={way.mtp}, cp={way.cp}",
            "try mtp=1",
        ),
        (
            "head-mindie",
            head != way.tp and not (latent and head <= inside),
            f"head_tp={head}",
            "search with --module-tp off",
        ),
        (
            "o-mindie",
            out != way.tp and not (latent and out <= inside and way.tp == 1),
            f"o_tp={out}",
            "search with --module-tp off",
        ),
        (
            "modules-mindie",
            any(own.values()),
            ", ".join(name for name, differs in own.items() if differs),
            "search with --module-tp off",
        ),
    ]


def _own_rules(plan: Plan, family: str, role: Role) -> list[tuple[str, bool, str, str]]:
    """(rule, broken, got, hint) that the search has no rule for."""
    way, work, facts = plan.strategy, plan.request.workload, table("mindie")
    longest = work.input_len + work.output_len
    ahead, cached = facts["speculative"], facts["prefix_cache"]["architectures"]
    name = printable(plan.model.architecture)
    most = facts["slots"].get(family, 0)
    return [
        (
            "its attention is always fused",
            way.attention == "naive",
            "attention=naive",
            "search with flash attention",
        ),
        (
            "a prompt runs in one step",
            role != "decode" and way.chunk < work.input_len,
            f"chunk={way.chunk}, input_len={work.input_len}",
            "search with --engine-profile mindie",
        ),
        (
            f"at most {ahead['most']} tokens are predicted ahead, with "
            + ", ".join(ahead["architectures"]),
            way.mtp > ahead["most"]
            or (way.mtp > 0 and plan.model.architecture not in ahead["architectures"]),
            f"mtp={way.mtp}, architecture={name}",
            "search with mtp off",
        ),
        (
            "context parallelism takes quantized weights",
            way.cp > 1 and way.weight_dtype not in facts["context"]["weight_dtypes"],
            f"weight_dtype={printable(way.weight_dtype)}",
            "try " + ", ".join(facts["context"]["weight_dtypes"]),
        ),
        (
            f"prefixes are cached for {', '.join(cached)}, and not with data parallelism",
            work.prefix_hit > 0 and (plan.model.architecture not in cached or groups_of(plan) > 1),
            f"prefix_hit={work.prefix_hit:g}, architecture={name}, dp={groups_of(plan)}",
            "plan with prefix_hit=0",
        ),
        (
            "weight prefetch is for models of the DeepSeek kind",
            way.weight_prefetch and not is_latent(plan),
            "weight_prefetch=True",
            "search with weight prefetch off",
        ),
        (
            f"an instance has at most {most} slots on this device",
            bool(most) and way.batch > most,
            f"batch={way.batch}",
            "plan for fewer requests in flight",
        ),
        (
            "requests must fit the model's context",
            0 < plan.model.max_context < longest,
            f"input_len + output_len = {longest}, max_context = {plan.model.max_context}",
            "plan for shorter requests",
        ),
    ]


def model_config(plan: Plan, folder: str, world: int) -> dict[str, Any]:
    """An entry of `ModelConfig`; `world`: ranks that one configuration starts."""
    way, ranks = plan.strategy, world_of(plan)
    made: dict[str, Any] = {
        "modelInstanceType": "Standard",
        "modelName": model_name(plan),
        "modelWeightPath": folder,
        "worldSize": world,
        "cpuMemSize": 0,
        "npuMemSize": -1,
        "backendType": "atb",
        "trustRemoteCode": False,
        "tp": way.tp,
        "dp": groups_of(plan),
        "cp": way.cp,
        "sp": way.tp if way.cp > 1 else 1,
    }
    if has_experts(plan):
        made |= {"moe_ep": way.ep, "moe_tp": ranks // way.ep}
    if plugin := _plugin(plan):
        made["plugin_params"] = json.dumps(plugin)
    if is_latent(plan):
        made["models"] = {"deepseekv2": _deepseek(plan)}
    return made


def _plugin(plan: Plan) -> dict[str, Any]:
    """What `plugin_params` says, which is a text in JSON."""
    ahead, shared = plan.strategy.mtp, plan.request.workload.prefix_hit > 0
    named = [name for name, on in (("mtp", ahead), ("prefix_cache", shared)) if on]
    made: dict[str, Any] = {"plugin_type": ",".join(named)} if named else {}
    return {**made, "num_speculative_tokens": ahead} if ahead else made


def _deepseek(plan: Plan) -> dict[str, Any]:
    way, par = plan.strategy, plan.strategy.parallelism()
    made: dict[str, Any] = {"ep_level": 2 if way.ep > 1 and way.exchange == "alltoall" else 1}
    if plan.request.workload.prefix_hit > 0:
        made["kv_cache_options"] = {"enable_nz": True}
    if way.weight_prefetch:
        made["enable_mlapo_prefetch"] = True
    split = {
        key: module_ranks(par, name)
        for key, name in (("lm_head_local_tp", "head"), ("o_proj_local_tp", "o"))
        if module_ranks(par, name) != way.tp
    }
    return {**made, "parallel_options": split} if split else made


def deploy_config(plan: Plan, model: Mapping[str, Any]) -> dict[str, Any]:
    """`ModelDeployConfig`: lengths of requests, and the model."""
    block = table("mindie")["server"]["cacheBlockSize"]
    return {
        "maxSeqLen": longest_request(plan, block),
        "maxInputTokenLen": plan.request.workload.input_len,
        "truncation": 0,
        "ModelConfig": [dict(model)],
    }


def schedule_config(plan: Plan, role: Role = "mixed") -> dict[str, Any]:
    """`ScheduleConfig`: batches in sequences and tokens of one group."""
    way, work, facts = plan.strategy, plan.request.workload, table("mindie")["server"]
    tokens = max(way.chunk, work.input_len) if role == "decode" else way.chunk
    return {
        "templateType": "Standard",
        "templateName": "Standard_LLM",
        "cacheBlockSize": facts["cacheBlockSize"],
        "maxPrefillBatchSize": min(way.batch, max(tokens // work.input_len, 1)),
        "maxPrefillTokens": tokens,
        "prefillPolicyType": 0,
        "decodePolicyType": 0,
        "maxBatchSize": way.batch,
        "maxIterTimes": longest_request(plan, facts["cacheBlockSize"]) - work.input_len,
        "maxPreemptCount": 0,
        "supportSelectBatch": False,
        "maxQueueDelayMicroseconds": facts["maxQueueDelayMicroseconds"],
    }


def environment(plan: Plan) -> dict[str, str]:
    """Variables of a server: memory share, collectives, fused products."""
    way = plan.strategy
    wanted = {entry["name"]: entry["value"] for entry in table("mindie")["environment"]}
    wanted["ATB_LLM_LCOC_ENABLE"] = str(int(way.fused_collectives))
    if plan.memory:
        share = min(row.capacity_bytes for row in plan.memory) / plan.cluster.hbm_bytes
        wanted["NPU_MEMORY_FRACTION"] = f"{math.floor(share * 1e4 + 1e-6) / 1e4:g}"
    return wanted | algorithm_variable(plan)
