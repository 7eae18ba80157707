"""MindIE Server's `config.json` as a configuration, with the rules of its own that it breaks.

Read are the parts of `BackendConfig` that bear on legality, memory and speed: `ModelConfig` (the
first entry), `ScheduleConfig`, `ModelDeployConfig`, `npuDeviceIds`. Rules and defaults are those of
MindIE-LLM's service parameter page (docs/zh/user_guide/user_manual/
service_parameter_configuration.md and docs/zh/user_guide/optimization_and_tuning.md, revision
8b4871ad): what a sample leaves out has its default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shardplan.models.errors import InputError
from shardplan.search.configuration import Configuration, whole_number

__all__ = ["read_mindie"]

MAX_BYTES = 1 << 20
_ALL_TO_ALL = 2
"""`ep_level` at which tokens are sent to their experts rather than gathered everywhere."""
_MOST_BLOCK, _BLOCK_STEP = 128, 16
_DEFAULTS = {
    "maxBatchSize": 200,
    "maxPrefillBatchSize": 1,
    "maxPrefillTokens": 8192,
    "cacheBlockSize": 128,
}
_Broken = tuple[str, str, str]


def read_mindie(text: str, source: str) -> Configuration:
    """The configuration of a file; `InputError` where it is not one of MindIE Server."""
    if len(text.encode()) > MAX_BYTES:
        raise InputError("a MindIE config.json has at most 1 MiB", got=source)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError("a MindIE config.json is JSON", got=f"{source}: {error}") from None
    backend = _part(whole, "BackendConfig", source)
    deploy = _part(backend, "ModelDeployConfig", source)
    entries = deploy.get("ModelConfig")
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], Mapping):
        raise InputError("`ModelConfig` lists a model", got=source)
    schedule = {**_DEFAULTS, **_part(backend, "ScheduleConfig", source)}
    return _configuration(entries[0], deploy, schedule, backend, source)


def _part(whole: object, name: str, source: str) -> Mapping[str, Any]:
    part = whole.get(name) if isinstance(whole, Mapping) else None
    if not isinstance(part, Mapping):
        raise InputError(f"a MindIE config.json has `{name}`", got=source)
    return part


def _axis(model: Mapping[str, Any], name: str, default: int) -> int:
    """Size of an axis; -1 is off."""
    value = model.get(name, -1)
    return default if value == -1 else whole_number(name, value)


def _configuration(
    model: Mapping[str, Any],
    deploy: Mapping[str, Any],
    schedule: Mapping[str, Any],
    backend: Mapping[str, Any],
    source: str,
) -> Configuration:
    world = whole_number("worldSize", model.get("worldSize", 1))
    dp, cp = _axis(model, "dp", 1), _axis(model, "cp", 1)
    tp = _axis(model, "tp", max(world // (dp * cp), 1))
    moe_tp = _axis(model, "moe_tp", tp * dp)
    moe_ep = _axis(model, "moe_ep", 1)
    options = _part({"x": model.get("models") or {}}, "x", source)
    level = max(
        (
            whole_number("ep_level", one.get("ep_level", 1))
            for one in options.values()
            if isinstance(one, Mapping)
        ),
        default=1,
    )
    sizes = {"world": world, "tp": tp, "dp": dp, "cp": cp, "moe_tp": moe_tp, "moe_ep": moe_ep}
    return Configuration(
        source=source,
        engine_profile="mindie",
        model=str(model.get("modelWeightPath") or model.get("modelName") or ""),
        tp=tp,
        dp=dp,
        cp=cp,
        pp=_axis(model, "pp", 1),
        ep=moe_ep,
        exchange="alltoall" if level == _ALL_TO_ALL else "allgather",
        mtp=_mtp(model),
        ranks=world,
        max_num_seqs=whole_number("maxBatchSize", schedule["maxBatchSize"]),
        max_num_batched_tokens=whole_number("maxPrefillTokens", schedule["maxPrefillTokens"]),
        max_model_len=whole_number("maxSeqLen", deploy.get("maxSeqLen", 2560)),
        block_size=whole_number("cacheBlockSize", schedule["cacheBlockSize"]),
        broken=tuple(_broken(sizes, deploy, schedule, backend)),
        unread=("sp",) if _axis(model, "sp", 1) > 1 else (),  # it splits the cache, unlike ours
    )


def _mtp(model: Mapping[str, Any]) -> int:
    """Tokens predicted ahead, which a text in JSON says."""
    text = model.get("plugin_params") or "{}"
    try:
        plugin = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        raise InputError("`plugin_params` is JSON in a text", got=str(text)[:60]) from None
    if not isinstance(plugin, Mapping):
        return 0
    if "mtp" not in str(plugin.get("plugin_type")).split(","):  # plugins that go together
        return 0
    return whole_number("num_speculative_tokens", plugin.get("num_speculative_tokens", 1))


def _broken(
    sizes: Mapping[str, int],
    deploy: Mapping[str, Any],
    schedule: Mapping[str, Any],
    backend: Mapping[str, Any],
) -> list[_Broken]:
    """(sentence, values, hint) of the engine's rules that do not hold."""
    world = sizes["world"]
    prompts = whole_number("maxInputTokenLen", deploy.get("maxInputTokenLen", 2048))
    block, step, together, most = (
        whole_number(name, schedule[name])
        for name in ("cacheBlockSize", "maxPrefillTokens", "maxPrefillBatchSize", "maxBatchSize")
    )
    grid, experts = sizes["tp"] * sizes["dp"] * sizes["cp"], sizes["moe_tp"] * sizes["moe_ep"]
    listed = backend.get("npuDeviceIds")
    listed = listed if isinstance(listed, list) else []
    devices = [len(one) for one in listed if isinstance(one, list)]
    alone = not backend.get("multiNodesInferEnabled", False)
    rules = (
        (
            grid != world,
            "tp * dp * cp is worldSize",
            f"tp={sizes['tp']}, dp={sizes['dp']}, cp={sizes['cp']}, worldSize={world}",
            f"try tp={max(world // (sizes['dp'] * sizes['cp']), 1)}",
        ),
        (
            experts != world and sizes["moe_ep"] > 1,
            "moe_tp * moe_ep is worldSize",
            f"moe_tp={sizes['moe_tp']}, moe_ep={sizes['moe_ep']}, worldSize={world}",
            f"try moe_tp={max(world // sizes['moe_ep'], 1)}",
        ),
        (
            sizes["cp"] > 1 and sizes["dp"] > 1,
            "context parallelism goes without data parallelism",
            f"cp={sizes['cp']}, dp={sizes['dp']}",
            "try dp=1",
        ),
        (
            step < prompts,
            "maxPrefillTokens holds the longest prompt",
            f"maxPrefillTokens={step}, maxInputTokenLen={prompts}",
            f"try maxPrefillTokens={prompts}",
        ),
        (
            together > most,
            "maxPrefillBatchSize is at most maxBatchSize",
            f"maxPrefillBatchSize={together}, maxBatchSize={most}",
            f"try maxPrefillBatchSize={most}",
        ),
        (
            block > _MOST_BLOCK or block % _BLOCK_STEP != 0,
            f"cacheBlockSize is a multiple of {_BLOCK_STEP}, at most {_MOST_BLOCK}",
            f"cacheBlockSize={block}",
            f"try cacheBlockSize={_MOST_BLOCK}",
        ),
        (
            alone and bool(devices) and devices[0] != world,
            "an instance lists as many devices as it has ranks",
            f"npuDeviceIds[0] has {devices[0] if devices else 0}, worldSize={world}",
            "list every device of the instance",
        ),
    )
    return [(rule, got, hint) for wrong, rule, got, hint in rules if wrong]
