"""What a checkpoint's linear weights are stored in, read from its `config.json`.

Order: `quantize` (Ascend tools), `quantization_config` (or its old name
`compression_config`), then `torch_dtype` or `dtype`. A scheme that no name of
`CHECKPOINT_DTYPES` stands for is an error, never the nearest one. Leaves out: modules that a
quantized checkpoint keeps in 16 bit (said in a note), KV-cache quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardplan.models.config_fields import Fields, plain, shown
from shardplan.models.config_table import config_table
from shardplan.models.spec import CHECKPOINT_DTYPES, CheckpointDtype

__all__ = ["checkpoint_dtype"]

_KEPT_KEYS = ("ignore", "modules_to_not_convert", "ignored_layers")
_USUALLY_KEPT = ("lm_head", "gate", "e_score_correction_bias")


def checkpoint_dtype(fields: Fields) -> tuple[CheckpointDtype, tuple[str, ...]]:
    """Element type of the linear weights and sentences on what that leaves out.

    Raises InputError for a type or scheme that is not known.
    """
    quantize = fields.text("quantize")
    if quantize is not None:
        known = config_table().quantization["quantize_key"]
        found = known.get(quantize.lower())
        if found is None:
            raise fields.error("quantize", "quantize must name a known scheme", _one_of(known))
        if found:
            return _named(found), ()
    for key in ("quantization_config", "compression_config"):
        table = fields.table(key)
        if table:
            return _quantized(
                Fields(config=table, defaults={}, file=fields.file, prefix=f"{fields.prefix}{key}.")
            )
    return _plain(fields)


def _plain(fields: Fields) -> tuple[CheckpointDtype, tuple[str, ...]]:
    known = config_table().dtypes
    for key in ("torch_dtype", "dtype"):
        name = fields.text(key)
        if name is None or name == "auto":
            continue
        found = known.get(name.removeprefix("torch."))
        if found is None:
            raise fields.error(key, f"{key} must name a known element type", _one_of(known))
        return _named(found), ()
    return "bf16", ("The configuration names no element type; bf16 is taken.",)


def _quantized(fields: Fields) -> tuple[CheckpointDtype, tuple[str, ...]]:
    methods = config_table().quantization["methods"]
    method = fields.text("quant_method")
    if method is None:
        raise fields.error("quant_method", "missing key quant_method", _one_of(methods))
    rule = methods.get(method)
    if rule is None:
        raise fields.error(
            "quant_method", "quant_method must name a known method", _one_of(methods)
        )
    if "fixed" in rule:
        found = rule["fixed"]
    elif "bits" in rule:
        found = _weight_only(fields, rule["bits"])
    else:
        found = _by_groups(fields)
    return _named(found), _kept_note(fields, found)


def _weight_only(fields: Fields, keys: list[str]) -> str:
    key, bits = fields.first_of(keys)
    known: Mapping[str, str] = config_table().quantization["weight_only_bits"]
    if str(bits) not in known:
        raise fields.error(key, f"{key} must be a supported weight width", _one_of(known))
    return known[str(bits)]


def _by_groups(fields: Fields) -> str:
    groups = fields.table("config_groups")
    if not groups:
        raise fields.error("config_groups", "config_groups must hold at least one group")
    known: Mapping[str, str] = config_table().quantization["group_schemes"]
    schemes = set()
    for name in groups:
        inner = Fields(
            config=groups, defaults={}, file=fields.file, prefix=f"{fields.prefix}config_groups."
        )
        group = inner.table(name) or {}
        scheme = f"{_width(inner, name, group, 'weights')}/" + _width(
            inner, name, group, "input_activations"
        )
        if scheme not in known:
            raise inner.error(
                name, f"the weights/activations scheme {scheme} is not supported", _one_of(known)
            )
        schemes.add(known[scheme])
    if len(schemes) > 1:
        raise fields.error(
            "config_groups",
            f"all groups must share one scheme, found {', '.join(sorted(schemes))}",
            "describe the model with a config.json of one scheme",
        )
    return str(schemes.pop())


def _width(inner: Fields, name: str, group: Mapping[str, Any], part: str) -> str:
    """`int4`, `float8`... of one side of a group, `none` when it is not quantized."""
    side = Fields(config=group, defaults={}, file=inner.file, prefix=f"{inner.prefix}{name}.")
    table = side.table(part)
    if table is None:
        return "none"
    kind, bits = table.get("type", "int"), table.get("num_bits")
    if not isinstance(kind, str) or isinstance(bits, bool) or not isinstance(bits, int):
        raise side.error(
            part,
            f"{part} must give num_bits and type",
            'for example {"num_bits": 8, "type": "int"}',
        )
    return f"{plain(kind)[:16]}{shown(bits)}"


def _kept_note(fields: Fields, found: str) -> tuple[str, ...]:
    for key in _KEPT_KEYS:
        kept = [
            entry
            for entry in fields.entries(key) or ()
            if not any(part in str(entry) for part in _USUALLY_KEPT)
        ]
        if kept:
            return (
                f"{len(kept)} modules named in {fields.prefix}{key} are not quantized; "
                f"they are treated as {found} like the rest.",
            )
    return ()


def _named(name: str) -> CheckpointDtype:
    if name not in CHECKPOINT_DTYPES:
        raise ValueError(f"the data table names an unknown checkpoint type {name!r}")
    return name


def _one_of(known: Mapping[str, Any]) -> str:
    return "known: " + ", ".join(sorted(known))
