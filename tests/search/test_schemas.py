"""The reader of the shipped schemas agrees with the reference implementation."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.models.errors import InputError
from shardplan.search.emit.schemas import check, schema

NAMES = ("compose", "kubernetes", "mindie", "ray")
WORDS: dict[str, Any] = {
    "modelInstanceNumber": 1,
    "npuDeviceIds": [[0, 1]],
    "tokenizerProcessNumber": 8,
    "ModelDeployConfig": {
        "maxSeqLen": 128,
        "maxInputTokenLen": 64,
        "ModelConfig": [
            {
                "modelName": "m",
                "modelWeightPath": "/data/m",
                "worldSize": 2,
                "cpuMemSize": 0,
                "npuMemSize": -1,
                "backendType": "atb",
            }
        ],
    },
    "ScheduleConfig": {
        "maxPrefillBatchSize": 1,
        "maxPrefillTokens": 64,
        "maxBatchSize": 8,
        "maxIterTimes": 64,
        "cacheBlockSize": 128,
    },
}


def _agrees(name: str, definition: str, value: object) -> bool:
    """Whether both say the same of a value; the answer is whether it is valid."""
    whole = {**schema(name), "$ref": f"#/$defs/{definition}"}
    valid = jsonschema.Draft202012Validator(whole).is_valid(value)
    if valid:
        check("t", name, definition, value)
    else:
        with pytest.raises(InputError, match="t cannot express this plan"):
            check("t", name, definition, value)
    return valid


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_schema_is_one_and_names_its_source(name: str) -> None:
    whole = dict(schema(name))
    jsonschema.Draft202012Validator.check_schema(whole)
    assert whole["$comment"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats(0, 1) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(path=st.lists(st.integers(0, 9), min_size=1, max_size=4), value=JSON)
def test_any_change_is_judged_alike(path: list[int], value: object) -> None:
    """A value somewhere in a valid object is replaced by anything."""
    whole = copy.deepcopy(WORDS)
    place: Any = whole
    for step in path[:-1]:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        below = place[keys[step % len(keys)]]
        if not isinstance(below, dict | list) or not below:
            break
        place = below
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    place[keys[path[-1] % len(keys)]] = value
    _agrees("mindie", "BackendConfig", whole)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"noSuchKey": 1}, "BackendConfig.noSuchKey is no key"),
        ({"modelInstanceNumber": 11}, "modelInstanceNumber is at most 10"),
        ({"modelInstanceNumber": True}, "modelInstanceNumber is of type integer"),
        ({"npuDeviceIds": [[0, -1]]}, r"npuDeviceIds.0.1 is at least 0"),
    ],
)
def test_the_place_and_the_rule_are_named(changes: dict[str, Any], place: str) -> None:
    with pytest.raises(InputError, match=place):
        check("t", "mindie", "BackendConfig", {**WORDS, **changes})
    assert _agrees("mindie", "BackendConfig", WORDS)
