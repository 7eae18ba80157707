"""What checkpoint a plan needs under an engine on Ascend, and where it may come from.

A 16-bit plan of a preset whose published checkpoint is 16-bit too takes that repository unless
told otherwise. Every other plan must be told: a quantized checkpoint is made by ModelSlim, and
its quant_model_description.json chooses the scheme of each layer, so the engine needs no more
than a flag that says so. The same file turns an int8 KV cache on.
Sources: `schemes`, `kv_int8` and `mla` in the engine's table in `search/data`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from shardplan.costmodel.weight_types import is_mixed, type_of
from shardplan.models.catalog import load_model, model_names
from shardplan.models.errors import InputError
from shardplan.models.weight_groups import WeightGroup
from shardplan.search.emit.common import printable, refuse, table
from shardplan.search.emit.modelslim import repository
from shardplan.search.emit.vllm_layout import has_experts
from shardplan.search.plan import Plan

__all__ = ["Checkpoint", "checkpoint_of"]

_TARGET = "vllm-ascend"
_WIDE = ("bf16", "fp16")
_LAYERS: Mapping[WeightGroup, str] = {
    "attention": "attention layers",
    "ffn": "dense feed-forward layers",
    "shared": "shared experts",
    "experts": "routed experts",
}
"""Groups of layers as the checkpoint's README names them; the first three are linear layers to
the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What the model's files must be."""

    quantized: bool
    """Whether ModelSlim's description decides the layers (`--quantization ascend`)."""
    shell: tuple[str, ...]
    """Script lines that set MODEL."""
    needs: tuple[str, ...]
    """Sentences about the files."""


def checkpoint_of(plan: Plan, family: str, target: str = _TARGET) -> Checkpoint:
    """The checkpoint of the plan's dtypes. `InputError` where the engine has no scheme.

    `target`: the engine, whose table holds its schemes.
    """
    way = plan.strategy
    facts = table(target.replace("-", "_"))
    latent = plan.model.architecture in table("vllm_ascend")["mla"]["architectures"]
    if latent and family not in facts["mla"]["families"]:
        raise refuse(
            target,
            "no latent attention on this device",
            got=printable(f"{plan.model.architecture} on {plan.cluster.device}"),
            hint="plan for A2 or A3",
        )
    needs: list[str] = []
    if way.weight_dtype in _WIDE:
        needs.append(f"weights stored as {way.weight_dtype} (or another 16-bit type)")
    elif is_mixed(way.weight_dtype):
        needs.append(_by_groups(plan, family, target))
    else:
        names = _schemes(plan, family, target, way.weight_dtype, has_experts(plan))
        needs.append(
            f"{way.weight_dtype} weights quantized by ModelSlim, scheme {' or '.join(names)} in "
            "quant_model_description.json"
        )
    if way.kv_dtype not in _WIDE:
        needs.append(_int8_cache(plan, family, target, latent=latent))
    quantized = not (way.weight_dtype in _WIDE and way.kv_dtype in _WIDE)
    default = None if quantized else _published(plan)
    return Checkpoint(quantized=quantized, shell=_shell(default), needs=tuple(needs))


def _schemes(
    plan: Plan, family: str, target: str, dtype: str, experts: bool, what: str = ""
) -> list[str]:
    """Names of the schemes that serve weights of a type on this device."""
    kind = "experts" if experts else "dense"
    rows = table(target.replace("-", "_"))["schemes"]
    here = {row["weight_dtype"]: row[kind] for row in rows if family in row["families"]}
    names: list[str] = here.get(dtype, [])
    if not names:
        able = [*_WIDE, *sorted(one for one, found in here.items() if found)]
        what = what or ("models with experts" if experts else "dense models")
        raise refuse(
            target,
            f"no weight scheme of this dtype for {what} on {printable(plan.cluster.device)}",
            got=f"weight_dtype={printable(plan.strategy.weight_dtype)}",
            hint="try " + ", ".join(able),
        )
    return names


def _by_groups(plan: Plan, family: str, target: str) -> str:
    """The schemes of each group of layers; ModelSlim's description names one for every tensor."""
    words = []
    for group, layers in _LAYERS.items():
        dtype = type_of(plan.strategy.weight_dtype, group)
        if group in ("shared", "experts") and not has_experts(plan):
            continue
        if dtype in _WIDE:
            names = ["FLOAT"]
        else:
            names = _schemes(plan, family, target, dtype, group == "experts", layers)
        words.append(f"{layers} {' or '.join(names)} ({dtype})")
    return (
        "weights quantized by ModelSlim with a scheme by layers in quant_model_description.json: "
        + ", ".join(words)
    )


def _int8_cache(plan: Plan, family: str, target: str, *, latent: bool) -> str:
    rule = table(target.replace("-", "_"))["kv_int8"]
    if plan.strategy.kv_dtype != "int8" or family not in rule["families"] or latent:
        why = "latent attention keeps its cache in 16 bit outside disaggregated decode nodes"
        raise refuse(
            target,
            why if latent else "no such KV cache on this device",
            got=printable(f"kv_dtype={plan.strategy.kv_dtype}, device={plan.cluster.device}"),
            hint="try kv_dtype bf16 or fp16",
        )
    return (
        f'int8 KV cache: `"{rule["key"]}": "{rule["value"]}"` in '
        "quant_model_description.json, with the cache scales in the checkpoint"
    )


def _published(plan: Plan) -> str | None:
    """Repository of the preset's checkpoint, if its weights are 16-bit."""
    found = repository(plan)
    if found is None or plan.model.name not in model_names():
        return None
    try:
        stored = load_model(plan.model.name).dtype
    except InputError:
        return None
    return found if stored in _WIDE else None


def _shell(default: str | None) -> tuple[str, ...]:
    if default is None:
        return (
            ': "${MODEL:?set MODEL to the folder of the checkpoint (README.md: what it holds)}"',
        )
    return (f"published={shlex.quote(default)}", 'MODEL="${MODEL:-$published}"')
