"""Which edits a kind of file gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

from tests.fuzz.mutate import (
    MOST_BYTES,
    edit_bytes,
    edit_csv,
    edit_json,
    edit_jsonl,
    edit_lines,
    edit_toml,
    edit_words,
)
from tests.fuzz.mutate_packed import edit_gzip, edit_onnx, edit_parquet, edit_sqlite, edit_zip

__all__ = ["MUTATORS", "Mutator", "mutated"]

Mutator = Callable[[bytes, Sequence[bytes], Random], bytes]
_BYTES_TOO = 0.1
"""Share of structured inputs whose bytes are edited as well."""


def mutated(kind: str, data: bytes, others: Sequence[bytes], chance: Random) -> bytes:
    """An example of a kind with a few edits."""
    try:
        found = MUTATORS[kind](data, others, chance)
    except Exception:  # what no parser reads any more is edited as bytes
        found = edit_bytes(data, others, chance)
    if chance.random() < _BYTES_TOO:
        found = edit_bytes(found, others, chance)
    return found[:MOST_BYTES]


MUTATORS: Mapping[str, Mutator] = {
    "bytes": edit_bytes,
    "csv": edit_csv,
    "gzip": edit_gzip,
    "json": edit_json,
    "jsonl": edit_jsonl,
    "lines": edit_lines,
    "onnx": edit_onnx,
    "parquet": edit_parquet,
    "sqlite": edit_sqlite,
    "toml": edit_toml,
    "words": edit_words,
    "zip": edit_zip,
}
