"""The YAML that targets write is read back as it was meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.search.emit.yaml_text import yaml_text

yaml = pytest.importorskip("yaml")

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "yes",
        "NO",
        "~",
        "null",
        "1e3",
        "0x1f",
        "-",
        "- a",
        "a: b",
        "#x",
        "a\nb\n",
        " a\nb\n",
        "=",
        "",
    ]
)
LINES = st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126)), max_size=4).map(
    lambda lines: "\n".join(lines) + "\n"
)
VALUE = st.recursive(
    st.booleans() | st.integers() | st.decimals(-9, 9, places=4).map(float) | TEXT | LINES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)


@given(value=st.dictionaries(TEXT, VALUE, max_size=4))
def test_anything_comes_back(value: dict[str, object]) -> None:
    """Whatever a key or a text holds."""
    text = yaml_text("what it is", value)
    assert yaml.safe_load(text) == (value or None)


def test_it_reads_as_people_write_it() -> None:
    """Words are plain, scripts are blocks, numbers in quotes stay texts."""
    value = {"kind": "Service", "n": ["1", 1, True], "run.sh": "#!/bin/sh\n\nls\n", "none": []}
    assert yaml_text("one\ntwo", {"a": [{"b": "c", "d": "e"}]}, value) == (
        "# one\n# two\na:\n  - b: c\n    d: e\n---\nkind: Service\n"
        '"n":\n  - "1"\n  - 1\n  - true\nrun.sh: |\n  #!/bin/sh\n\n  ls\nnone: []\n'
    )


def test_what_yaml_is_not_written_for_is_an_error() -> None:
    for value in (1e-9, float("nan"), None):
        with pytest.raises(TypeError, match="no YAML"):
            yaml_text("", {"a": value})
