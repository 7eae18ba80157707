"""Hugging Face `config.json` -> ModelSpec, without torch, from a table of facts.

What each architecture means by its keys stands in `data/architectures.json`. An architecture,
layer type, scoring function or quantization that the table does not hold is an error that
names it; a part that does not change the language model's cost (an activation, a multi-modal
wrapper) is noted in `ModelSpec.extra`. Leaves out: the scaling of rotary embeddings, dropout,
initialisation, routing among expert groups (DeepSeek's `n_group`), everything but the text part.

Under latent attention (MLA) `head_dim` is the width of a query or key head,
`qk_nope_head_dim + qk_rope_head_dim`, and `kv_heads` the number of heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

from shardplan.models.config_fields import MAX_LAYERS, MAX_SIZE, MAX_TOKENS, Fields, plain, shown
from shardplan.models.config_quant import checkpoint_dtype
from shardplan.models.config_table import Architecture, Guard, MoeKeys, config_table
from shardplan.models.errors import InputError, UnknownNameError
from shardplan.models.spec import MlaSpec, ModelSpec, MoeSpec

__all__ = ["spec_from_config", "supported_architectures"]

_MAX_NAME = 100


def supported_architectures() -> tuple[str, ...]:
    """Names of the Hugging Face architectures that can be read, sorted."""
    return tuple(sorted(config_table().architectures))


def spec_from_config(config: Mapping[str, Any], *, name: str, source: str) -> ModelSpec:
    """The model that a Hugging Face configuration describes.

    Args: `config` the parsed `config.json`; `name` what to call the model; `source` the file
    or address it came from, used in messages and kept in the result.
    Raises InputError (UnknownNameError for an architecture) naming file, key, value and rule.
    """
    if not isinstance(config, Mapping):
        raise InputError(
            "a model configuration must be a JSON object",
            got=f"file={source}, value={shown(config)}",
            hint="give the model's config.json",
        )
    architecture, fields, notes = _select(config, source)
    entry = config_table().architectures[architecture]
    notes += [*entry.notes, *_check_guards(entry.guards, fields)]
    dtype, dtype_notes = checkpoint_dtype(fields)
    spec = _described(architecture, fields, name)
    return replace(spec, dtype=dtype, source=source, extra=(*notes, *dtype_notes))


def _described(architecture: str, fields: Fields, name: str) -> ModelSpec:
    """Sizes and switches, without the element type and where they come from."""
    entry = config_table().architectures[architecture]
    layers = fields.required("num_hidden_layers", limit=MAX_LAYERS)
    moe = None if entry.moe is None else _moe(entry.moe, fields, layers)
    mla = _mla(fields) if entry.mla else None
    heads, kv_heads, head_dim = _heads(fields, mla)
    window, sliding_layers = _sliding(entry, fields, layers)
    return ModelSpec(
        name=name,
        architecture=architecture,
        hidden=fields.required("hidden_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=_ffn(fields, moe),
        vocab=fields.required("vocab_size"),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=fields.switch(entry.qkv_bias),
        o_bias=fields.switch(entry.o_bias),
        mlp_bias=fields.switch(entry.mlp_bias),
        qk_norm=_qk_norm(entry, fields),
        sandwich_norms=entry.sandwich_norms,
        sliding_window=window,
        sliding_layers=sliding_layers,
        mla=mla,
        moe=moe,
        mtp_layers=fields.optional("num_nextn_predict_layers", limit=MAX_LAYERS, minimum=0) or 0,
        max_context=fields.optional("max_position_embeddings", limit=MAX_TOKENS) or 0,
        rope_theta=_rope_theta(fields),
        norm_eps=fields.number("rms_norm_eps"),
    )


def _select(config: Mapping[str, Any], source: str) -> tuple[str, Fields, list[str]]:
    """The architecture, the part of the file that describes it, and notes on that choice."""
    table = config_table()
    outer = Fields(config=config, defaults={}, file=source)
    stated = _stated(outer)
    if stated not in table.architectures:
        for key in table.text_parts:
            part = outer.table(key)
            if part is not None:
                return _select_text(outer, key, part, stated)
    architecture, notes = _resolve(outer, stated)
    return architecture, _with_defaults(outer, architecture), notes


def _select_text(
    outer: Fields, key: str, part: Mapping[str, Any], stated: str | None
) -> tuple[str, Fields, list[str]]:
    shared = {k: outer.config[k] for k in config_table().inherited if k in outer.config}
    inner = Fields(config={**shared, **part}, defaults={}, file=outer.file, prefix=f"{key}.")
    architecture, notes = _resolve(inner, _stated(inner))
    whole = "the configuration" if stated is None else plain(stated)
    notes.insert(0, f"Only the language model ({key}) of {whole} is described.")
    return architecture, _with_defaults(inner, architecture), notes


def _with_defaults(fields: Fields, architecture: str) -> Fields:
    return Fields(
        config=fields.config,
        defaults=config_table().architectures[architecture].defaults,
        file=fields.file,
        prefix=fields.prefix,
    )


def _stated(fields: Fields) -> str | None:
    """First entry of `architectures`, None when the list is absent or empty."""
    listed = fields.entries("architectures")
    if not listed:
        return None
    if not isinstance(listed[0], str):
        raise fields.error(
            "architectures",
            "architectures must be a list of names",
            'for example ["LlamaForCausalLM"]',
        )
    return listed[0]


def _resolve(fields: Fields, stated: str | None) -> tuple[str, list[str]]:
    """A supported architecture, from its name or (without one) from `model_type`."""
    table = config_table()
    if stated is not None:
        if stated in table.architectures:
            return stated, []
        what = f"architecture in {fields.file}, key {fields.prefix}architectures"
        raise UnknownNameError(what, stated[:_MAX_NAME], table.architectures)
    model_type = fields.text("model_type")
    if model_type is None:
        raise fields.error(
            "architectures",
            "missing key architectures",
            f"supported: {', '.join(supported_architectures())}",
        )
    found = table.by_model_type(model_type)
    if found is None:
        known = [kind for entry in table.architectures.values() for kind in entry.model_types]
        what = f"model_type in {fields.file}, key {fields.prefix}model_type"
        raise UnknownNameError(what, model_type[:_MAX_NAME], known)
    return found, [f"The architecture is taken from model_type {model_type}."]


def _check_guards(guards: Sequence[Guard], fields: Fields) -> list[str]:
    """Refuse what cannot be described; return notes on what is left out."""
    notes = []
    for guard in guards:
        value = fields.raw(guard.key)
        if value is None:
            continue
        found = (fields.entries(guard.key) or ()) if guard.each else (value,)
        wrong = [v for v in found if not _is_among(v, guard.allowed)]
        if wrong and guard.refuse:
            allowed = " or ".join(shown(v) for v in guard.allowed)
            raise fields.error(guard.key, guard.says, f"supported: {allowed}")
        if wrong:
            key = f"{fields.prefix}{guard.key}"
            notes.append(f"{key} is {shown(wrong[0])}: {guard.says}.")
    return notes


def _is_among(value: object, allowed: Sequence[object]) -> bool:
    return any(type(value) is type(entry) and value == entry for entry in allowed)


def _heads(fields: Fields, mla: MlaSpec | None) -> tuple[int, int, int]:
    """Query heads, kv heads and head width, elements."""
    heads = fields.required("num_attention_heads")
    kv_heads = fields.optional("num_key_value_heads") or heads
    if heads % kv_heads:
        raise fields.error(
            "num_key_value_heads",
            f"num_key_value_heads must divide num_attention_heads, {heads}",
            "check both against the model card",
        )
    if mla is not None:
        return heads, heads, mla.qk_nope_head_dim + mla.qk_rope_head_dim
    head_dim = fields.optional("head_dim")
    if head_dim is None:
        hidden = fields.required("hidden_size")
        if hidden % heads:
            raise fields.error(
                "num_attention_heads",
                f"num_attention_heads must divide hidden_size, {hidden}, without head_dim",
                "add head_dim",
            )
        head_dim = hidden // heads
    return heads, kv_heads, head_dim


def _mla(fields: Fields) -> MlaSpec:
    return MlaSpec(
        q_lora_rank=fields.optional("q_lora_rank"),
        kv_lora_rank=fields.required("kv_lora_rank"),
        qk_nope_head_dim=fields.required("qk_nope_head_dim"),
        qk_rope_head_dim=fields.required("qk_rope_head_dim"),
        v_head_dim=fields.required("v_head_dim"),
    )


def _moe(keys: MoeKeys, fields: Fields, layers: int) -> MoeSpec:
    experts_key, experts = fields.first_of(keys.experts)
    active = fields.required("num_experts_per_tok")
    if active > experts:
        raise fields.error(
            "num_experts_per_tok",
            f"num_experts_per_tok must not exceed {experts_key}, {experts}",
            "check both against the model card",
        )
    if keys.one_expert_per_group and experts % active:
        raise fields.error(
            "num_experts_per_tok",
            f"num_experts_per_tok (one expert a group) must divide {experts_key}, {experts}",
            "check both against the model card",
        )
    ffn = fields.required(keys.ffn)
    return MoeSpec(
        experts=experts,
        experts_per_token=active,
        ffn=ffn,
        shared_ffn=_shared_ffn(keys, fields, ffn),
        shared_gate=keys.shared_gate,
        dense_layers=_dense_layers(keys, fields, layers),
        scoring=_scoring(keys, fields),
        normalise_topk=fields.switch(keys.normalise),
        router_bias=fields.switch(keys.router_bias),
        expert_groups=active if keys.one_expert_per_group else 1,
    )


def _shared_ffn(keys: MoeKeys, fields: Fields, ffn: int) -> int:
    """Total width of the shared experts, elements."""
    if keys.shared_count is not None:
        return (fields.optional(keys.shared_count, minimum=0) or 0) * ffn
    if keys.shared_width is not None:
        return fields.optional(keys.shared_width, minimum=0) or 0
    return 0


def _dense_layers(keys: MoeKeys, fields: Fields, layers: int) -> int:
    """How many leading layers keep a dense feed-forward network."""
    if keys.dense == "first_k_dense_replace":
        dense = fields.optional(keys.dense, limit=MAX_LAYERS, minimum=0) or 0
    elif keys.dense == "mlp_only_layers":
        listed = fields.entries(keys.dense) or ()
        if not all(_is_among(layer, range(len(listed))) for layer in listed) or len(
            set(listed)
        ) < len(listed):
            raise fields.error(
                keys.dense,
                f"{keys.dense} must name the first layers, each once",
                "dense layers between expert layers are not supported",
            )
        dense = len(listed)
    else:
        dense = 0
    if dense >= layers:
        raise fields.error(
            str(keys.dense),
            f"at least one of the {layers} layers must hold experts",
            "use the dense architecture for a model without experts",
        )
    return dense


def _scoring(keys: MoeKeys, fields: Fields) -> Literal["softmax", "sigmoid"]:
    if keys.scoring_key is None:
        return keys.scoring
    stated = fields.text(keys.scoring_key)
    if stated is None:
        return keys.scoring
    if stated not in ("softmax", "sigmoid"):
        raise fields.error(
            keys.scoring_key,
            f"{keys.scoring_key} must name a known scoring function",
            "supported: softmax, sigmoid",
        )
    return cast(Literal["softmax", "sigmoid"], stated)


def _ffn(fields: Fields, moe: MoeSpec | None) -> int:
    """Width of the dense feed-forward network; the expert's where no layer is dense."""
    width = fields.optional("intermediate_size")
    if width is None and moe is not None and moe.dense_layers == 0:
        return moe.ffn
    return fields.required("intermediate_size")


def _qk_norm(entry: Architecture, fields: Fields) -> Literal["none", "head", "full"]:
    used = entry.qk_norm_key is None or fields.flag(entry.qk_norm_key)
    return entry.qk_norm if used else "none"


def _sliding(entry: Architecture, fields: Fields, layers: int) -> tuple[int | None, int]:
    """Context of the sliding layers, tokens, and how many layers slide."""
    listed = _listed_sliding(fields, layers)
    used = entry.sliding == "all" or (entry.sliding != "none" and fields.flag("use_sliding_window"))
    if not used:
        if listed and entry.sliding == "none":
            raise fields.error(
                "layer_types", "this architecture has no sliding layers", "use full_attention"
            )
        return None, 0
    window = fields.optional("sliding_window", limit=MAX_TOKENS)
    if window is None:
        return None, 0
    if listed is None and entry.sliding == "listed":
        raise fields.error(
            "use_sliding_window",
            "which layers slide must be listed",
            "add layer_types, one entry a layer",
        )
    if listed is not None:
        sliding = listed
    elif entry.sliding == "after_max_window_layers":
        first = fields.optional("max_window_layers", limit=MAX_SIZE, minimum=0) or 0
        sliding = max(0, layers - first)
    else:
        sliding = layers
    return (window, sliding) if sliding else (None, 0)


def _listed_sliding(fields: Fields, layers: int) -> int | None:
    """How many entries of `layer_types` slide, None without that list."""
    listed = fields.entries("layer_types")
    if listed is None:
        return None
    if len(listed) != layers:
        raise fields.error(
            "layer_types",
            f"layer_types must have one entry for each of the {layers} layers, has {len(listed)}",
        )
    for kind in listed:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.error(
                "layer_types",
                f"the layer type {shown(kind)} is not supported",
                "supported: full_attention, sliding_attention",
            )
    return len([kind for kind in listed if kind == "sliding_attention"])


def _rope_theta(fields: Fields) -> float:
    """Base of the rotary embedding, from the top level or from `rope_parameters`."""
    parameters = fields.table("rope_parameters")
    if fields.config.get("rope_theta") is None and parameters is not None:
        nested = parameters.get("rope_theta")
        if nested is not None:
            return fields.positive("rope_parameters", nested)
    return fields.number("rope_theta")
