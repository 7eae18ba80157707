"""The ModelSlim command that makes a plan's checkpoint from the published one.

    quantize.sh   msmodelslim quant: FLOAT_MODEL (16-bit folder) -> MODEL (the plan's folder)

`--model_type` is the name of the model's repository, which is what ModelSlim registers models by;
a plan without one asks for MODEL_TYPE. Named types and flags: `search/data/modelslim.toml`. Left
out: mixed types and those that ModelSlim takes from a configuration file only.
"""

from __future__ import annotations

import re

from shardplan.search.emit.common import Raw, command_line, table
from shardplan.search.plan import Plan

__all__ = ["quantize_script", "quantize_steps", "repository"]

_REPOSITORY = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/(?:blob|resolve)/\S*")


def repository(plan: Plan) -> str | None:
    """The Hugging Face repository that the plan's model was read from."""
    found = _REPOSITORY.fullmatch(plan.model.source)
    return found.group(1) if found else None


def quantize_script(plan: Plan) -> dict[str, str]:
    """`quantize.sh` by name; empty where no named type of ModelSlim makes the plan's types."""
    way = plan.strategy
    types = {
        (row["weight_dtype"], kv_dtype): row["quant_type"]
        for row in table("modelslim")["types"]
        for kv_dtype in row["kv_dtypes"]
    }
    named_type = types.get((way.weight_dtype, way.kv_dtype))
    if named_type is None:
        return {}
    named = repository(plan)
    flags: list[tuple[str, str | None]] = [
        ("--model_path", Raw('"$FLOAT_MODEL"')),
        ("--save_path", Raw('"$MODEL"')),
        ("--device", "npu"),
        ("--model_type", named.partition("/")[2] if named else Raw('"$MODEL_TYPE"')),
        ("--quant_type", named_type),
        ("--trust_remote_code", "False"),
    ]
    needs = [
        ': "${FLOAT_MODEL:?set FLOAT_MODEL to the folder of the 16-bit checkpoint}"',
        ': "${MODEL:?set MODEL to the folder to write}"',
    ]
    if not named:
        needs.append(': "${MODEL_TYPE:?set MODEL_TYPE to the name that ModelSlim has for it}"')
    lines = [
        "#!/usr/bin/env bash",
        "# Makes the quantized checkpoint with ModelSlim's one-command quantization.",
        "set -euo pipefail",
        *needs,
        "",
        "exec " + command_line("modelslim", "quant", ["msmodelslim", "quant"], flags) + ' "$@"',
    ]
    return {"quantize.sh": "\n".join(lines) + "\n"}


def quantize_steps(plan: Plan) -> list[str]:
    """The step of a README that names the script, where there is one."""
    if not quantize_script(plan):
        return []
    named = "" if repository(plan) else "MODEL_TYPE=NAME "
    return [
        "If there is no such checkpoint yet, ModelSlim makes it: "
        f"`FLOAT_MODEL=FOLDER MODEL=FOLDER {named}./quantize.sh`"
    ]
