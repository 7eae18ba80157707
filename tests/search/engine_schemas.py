"""Makes the JSON Schemas that emitted objects are checked against, from released wheels.

    python -m tests.search.engine_schemas kubernetes kubernetes-....whl
    python -m tests.search.engine_schemas ray ray-....whl

each written to `search/data/schemas/<name>.json`. The wheel's models are parsed, never imported.
Of Kubernetes' OpenAPI only the types in `KUBERNETES` are kept, and of those only the properties
whose types are kept: what the targets do not write stays unknown, and so is refused.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["KUBERNETES", "LEADER_WORKER_SET", "kubernetes_model", "ray_models", "schema_of"]

KUBERNETES = (
    "V1ConfigMap",
    "V1ConfigMapVolumeSource",
    "V1Container",
    "V1ContainerPort",
    "V1Deployment",
    "V1DeploymentSpec",
    "V1DeploymentStrategy",
    "V1EmptyDirVolumeSource",
    "V1EnvVar",
    "V1EnvVarSource",
    "V1ExecAction",
    "V1HTTPGetAction",
    "V1HostPathVolumeSource",
    "V1LabelSelector",
    "V1ObjectFieldSelector",
    "V1ObjectMeta",
    "V1PersistentVolumeClaimVolumeSource",
    "V1PodSpec",
    "V1PodTemplateSpec",
    "V1Probe",
    "V1ResourceRequirements",
    "V1Service",
    "V1ServicePort",
    "V1ServiceSpec",
    "V1StatefulSet",
    "V1StatefulSetSpec",
    "V1Volume",
    "V1VolumeMount",
)
LEADER_WORKER_SET = {
    "LeaderWorkerSet": {
        "apiVersion": {"enum": ["leaderworkerset.x-k8s.io/v1"]},
        "kind": {"enum": ["LeaderWorkerSet"]},
        "metadata": {"$ref": "#/$defs/V1ObjectMeta"},
        "spec": {"$ref": "#/$defs/LeaderWorkerSetSpec"},
    },
    "LeaderWorkerSetSpec": {
        "replicas": {"type": "integer", "minimum": 0},
        "leaderWorkerTemplate": {"$ref": "#/$defs/LeaderWorkerTemplate"},
        "startupPolicy": {"enum": ["LeaderCreated", "LeaderReady"]},
    },
    "LeaderWorkerTemplate": {
        "leaderTemplate": {"$ref": "#/$defs/V1PodTemplateSpec"},
        "workerTemplate": {"$ref": "#/$defs/V1PodTemplateSpec"},
        "size": {"type": "integer", "minimum": 1},
        "restartPolicy": {
            "enum": ["Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]
        },
    },
}
"""Fields of kubernetes-sigs/lws@024af084 api/leaderworkerset/v1/leaderworkerset_types.go that are
written; its CRD holds a whole pod template, which is Kubernetes' own here."""
_NEEDED = {
    "LeaderWorkerSet": ("apiVersion", "kind", "metadata", "spec"),
    "LeaderWorkerSetSpec": ("leaderWorkerTemplate",),
    "LeaderWorkerTemplate": ("workerTemplate",),
}
_RAY = {
    "ray/llm/_internal/serve/core/configs/llm_config.py": ("LLMConfig", "ModelLoadingConfig"),
    "ray/llm/_internal/common/placement.py": ("BundleConfig", "PlacementGroupConfig"),
    "ray/llm/_internal/serve/core/ingress/builder.py": ("LLMServingArgs",),
    "ray/llm/_internal/serve/serving_patterns/data_parallel/builder.py": ("DPOpenAiServingArgs",),
    "ray/llm/_internal/serve/serving_patterns/prefill_decode/builder.py": ("PDServingArgs",),
    "ray/serve/schema.py": ("HTTPOptionsSchema", "ServeApplicationSchema", "ServeDeploySchema"),
}
_OPEN = ("BundleConfig",)
"""Models that take any further property: names of resources."""
_PLAIN = {
    "str": "string",
    "StrictStr": "string",
    "datetime": "string",
    "bool": "boolean",
    "StrictBool": "boolean",
    "int": "integer",
    "StrictInt": "integer",
    "float": "number",
    "dict": "object",
    "Dict": "object",
}
_ANY = ("Any", "object")


def schema_of(node: ast.expr, known: Iterable[str]) -> dict[str, Any] | None:
    """JSON Schema of a type annotation; None for one that needs a type that is not kept."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return schema_of(ast.parse(node.value, mode="eval").body, known)
    if isinstance(node, ast.Name):
        if node.id in _PLAIN:
            return {"type": _PLAIN[node.id]}
        if node.id in _ANY:
            return {}
        return {"$ref": f"#/$defs/{node.id}"} if node.id in known else None
    if not isinstance(node, ast.Subscript):
        return None
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    return _generic(getattr(node.value, "id", "").lower(), parts, known)


def _generic(name: str, parts: list[ast.expr], known: Iterable[str]) -> dict[str, Any] | None:
    """Schema of `name[parts]`."""
    if name == "literal":
        return {"enum": [getattr(one, "value", None) for one in parts]}
    kept = [one for one in (schema_of(part, known) for part in parts) if one is not None]
    if not kept:
        return None
    if name == "list":
        return {"type": "array", "items": kept[0]}
    if name == "dict":
        return {"type": "object", "additionalProperties": kept[-1]}
    models = [one for one in kept if "$ref" in one]  # a dict beside a model is checked against it
    choices = models or kept
    return choices[0] if len(choices) == 1 else {"anyOf": choices}


def _object(properties: Mapping[str, Any], required: Iterable[str]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "type": "object",
        "properties": dict(sorted(properties.items())),
        "additionalProperties": False,
    }
    needed = sorted(set(required) & set(properties))
    return {**made, "required": needed} if needed else made


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(one for one in ast.walk(tree) if isinstance(one, ast.ClassDef) and one.name == name)


def kubernetes_model(source: str, name: str, known: Iterable[str]) -> dict[str, Any]:
    """Schema of a model of the Kubernetes client: `openapi_types`, `attribute_map`, Optional."""
    tables: dict[str, dict[str, str]] = {}
    required = []
    for one in _class(ast.parse(source), name).body:
        if not (isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)):
            continue
        field = one.target.id
        if field in ("openapi_types", "attribute_map") and one.value is not None:
            tables[field] = ast.literal_eval(one.value)
        elif "Optional" not in ast.unparse(one.annotation):
            required.append(field)
    wires = tables["attribute_map"]
    properties = {}
    for field, kind in tables["openapi_types"].items():
        found = schema_of(ast.parse(kind, mode="eval").body, known)
        if found is not None:
            properties[wires[field]] = found
    return _object(properties, [wires[field] for field in required if field in wires])


def ray_models(source: str, names: Iterable[str], known: Iterable[str]) -> dict[str, Any]:
    """Schemas of pydantic models: a field is required where it has no default."""
    tree = ast.parse(source)
    made = {}
    for name in names:
        properties, required = {}, []
        for one in _class(tree, name).body:
            if not (isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)):
                continue
            found = schema_of(one.annotation, known)
            if one.target.id.startswith("_") or one.target.id == "model_config" or found is None:
                continue
            properties[one.target.id] = found
            if not _has_default(one.value):
                required.append(one.target.id)
        made[name] = _object(properties, required)
        if name in _OPEN:
            made[name]["additionalProperties"] = {"type": "number", "minimum": 0}
    return made


def _has_default(value: ast.expr | None) -> bool:
    """Whether a field's value, or its `Field(...)`, holds a default."""
    if not isinstance(value, ast.Call):
        return value is not None
    told = [one.arg for one in value.keywords]
    first = value.args and getattr(value.args[0], "value", None) is not Ellipsis
    return bool(first) or "default" in told or "default_factory" in told


def _deployment_keys(source: str) -> list[str]:
    """Options of a deployment that LLMConfig's own description lists."""
    told = source.partition("Supported fields are:")[2].partition("For more details")[0]
    return sorted(set(re.findall(r"`(\w+)`", told)))


def _kubernetes(wheel: zipfile.ZipFile) -> dict[str, Any]:
    made = {}
    for name in KUBERNETES:
        file = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
        text = wheel.read(f"kubernetes/client/models/{file}.py").decode("utf-8")
        made[name] = kubernetes_model(text, name, KUBERNETES)
    for name, properties in LEADER_WORKER_SET.items():
        made[name] = _object(properties, _NEEDED[name])
    return made


def _ray(wheel: zipfile.ZipFile) -> dict[str, Any]:
    known = [name for names in _RAY.values() for name in names]
    made: dict[str, Any] = {}
    for file, names in _RAY.items():
        text = wheel.read(file).decode("utf-8")
        made |= ray_models(text, names, known)
        if "LLMConfig" in names:
            keys: dict[str, Any] = {name: {} for name in _deployment_keys(text)}
            made["LLMConfig"]["properties"]["deployment_config"] = _object(keys, ())
    made["LLMConfig"]["properties"]["placement_group_config"] = {
        "$ref": "#/$defs/PlacementGroupConfig"
    }
    return made


def main(package: str, path: str) -> None:
    """Write the schema of a wheel."""
    version = Path(path).name.split("-")[1]
    with zipfile.ZipFile(path) as wheel:
        defs = {"kubernetes": _kubernetes, "ray": _ray}[package](wheel)
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": f"Made by `python -m tests.search.engine_schemas {package} WHEEL`, not to be "
        f"edited; wheel of {package} {version} on the Python Package Index",
        "$defs": defs,
    }
    out = Path(__file__).parents[2] / "search" / "data" / "schemas" / f"{package}.json"
    out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
