"""The reader of released models, on sources of the shapes that the two packages have."""

from __future__ import annotations

import ast

import pytest
from tests.search.engine_schemas import KUBERNETES, kubernetes_model, ray_models, schema_of

from shardplan.search.emit.schemas import schema

CLIENT = """
class V1Toy(BaseModel):
    api_version: Optional[str] = None
    spec: V1ToySpec
    other: Optional[V1Unknown] = None
    openapi_types: ClassVar[Dict[str, str]] = {
        'api_version': 'str',
        'spec': 'V1ToySpec',
        'other': 'V1Unknown',
    }
    attribute_map: ClassVar[Dict[str, str]] = {
        'api_version': 'apiVersion',
        'spec': 'spec',
        'other': 'other',
    }
"""
PYDANTIC = """
class Toy(BaseModelExtended):
    model_config = ConfigDict(extra="allow")
    needed: str
    asked: int = Field(description="x")
    given: Optional[List[float]] = Field(default=None)
    mode: Literal["a", "b"] = "a"
    _private: int = 0
"""


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        ("str", {"type": "string"}),
        ("Optional[int]", {"type": "integer"}),
        ("List[V1Toy]", {"type": "array", "items": {"$ref": "#/$defs/V1Toy"}}),
        ("Dict[str, bool]", {"type": "object", "additionalProperties": {"type": "boolean"}}),
        ("Literal['a', 'b']", {"enum": ["a", "b"]}),
        ("Union[str, dict, V1Toy]", {"$ref": "#/$defs/V1Toy"}),
        ("Any", {}),
        ("V1Unknown", None),
    ],
)
def test_annotations_are_types_of_json(annotation: str, expected: object) -> None:
    node = ast.parse(annotation, mode="eval").body
    assert schema_of(node, ["V1Toy"]) == expected


def test_a_client_model_has_wire_names_and_only_kept_types() -> None:
    found = kubernetes_model(CLIENT, "V1Toy", ["V1Toy", "V1ToySpec"])
    assert found["properties"] == {
        "apiVersion": {"type": "string"},
        "spec": {"$ref": "#/$defs/V1ToySpec"},
    }
    assert (found["required"], found["additionalProperties"]) == (["spec"], False)


def test_a_pydantic_field_without_a_default_is_required() -> None:
    found = ray_models(PYDANTIC, ["Toy"], [])["Toy"]
    assert found["required"] == ["asked", "needed"]
    assert set(found["properties"]) == {"asked", "given", "mode", "needed"}


def test_every_kept_type_is_shipped_and_every_reference_leads_somewhere() -> None:
    for name in ("kubernetes", "mindie", "ray"):
        whole = schema(name)
        text = repr(whole)
        for part in text.split("#/$defs/")[1:]:
            assert part.partition("'")[0] in whole["$defs"]
    assert set(KUBERNETES) <= set(schema("kubernetes")["$defs"])
