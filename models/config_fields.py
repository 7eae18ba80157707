"""Typed reading of one configuration: every wrong value becomes one sentence that names it.

A message holds the rule, then file, key and value, then what to try. An absent key takes the
default of its architecture; a key given as `null` has no value, whatever the default.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardplan.models.errors import InputError

__all__ = ["MAX_LAYERS", "MAX_SIZE", "MAX_TOKENS", "Fields", "plain", "shown"]

MAX_SIZE = 2**24
"""Largest width, head or vocabulary size taken seriously, elements."""
MAX_LAYERS = 10_000
MAX_TOKENS = 2**40
"""Longest context taken seriously, tokens."""

_MAX_SHOWN_BITS = 128
_MAX_NAME = 120


class _ShortRepr(reprlib.Repr):
    """Python 3.11 takes the limits only as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict = 2, 4, 4
        self.maxstring = self.maxother = 60


_REPR = _ShortRepr()


def shown(value: object) -> str:
    """A short, printable form of any value from a file."""
    if isinstance(value, int) and value.bit_length() > _MAX_SHOWN_BITS:
        return f"a whole number of {value.bit_length()} bits"
    return _REPR.repr(value)


def plain(text: str) -> str:
    """A name from a file, safe to print on any terminal and not too long."""
    return text.encode("unicode_escape").decode("ascii")[:_MAX_NAME]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """One configuration, its defaults and where it stands (for messages)."""

    config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    file: str
    prefix: str = ""
    """Path of the part that is read, as `text_config.`."""

    def error(self, key: str, rule: str, hint: str = "") -> InputError:
        """The error of a key that breaks a rule."""
        got = f"file={self.file}, key={plain(self.prefix + key)}"
        if key in self.config or key in self.defaults:
            got += f", value={shown(self.raw(key))}"
        return InputError(rule, got=got, hint=hint)

    def raw(self, key: str) -> Any:
        """The value of a key, its default when absent, None when neither is there."""
        return self.config[key] if key in self.config else self.defaults.get(key)

    def required(self, key: str, *, limit: int = MAX_SIZE) -> int:
        """A whole number in [1, limit] that must be there."""
        value = self.optional(key, limit=limit)
        if value is None:
            null = key in self.config
            raise self.error(
                key,
                f"{key} must not be null" if null else f"missing key {key}",
                f"add {key} with a whole number of at least 1",
            )
        return value

    def optional(self, key: str, *, limit: int = MAX_SIZE, minimum: int = 1) -> int | None:
        """A whole number in [minimum, limit], None when absent or null."""
        value = self.raw(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"{key} must be a whole number", "write it without quotes or dot")
        if not minimum <= value <= limit:
            raise self.error(
                key, f"{key} must be from {minimum} to {limit}", "check it against the model card"
            )
        return value

    def first_of(self, keys: Sequence[str], *, limit: int = MAX_SIZE) -> tuple[str, int]:
        """The first of several names that the file itself gives, else the first one's default."""
        for key in keys:
            if self.config.get(key) is not None:
                return key, self.required(key, limit=limit)
        return keys[0], self.required(keys[0], limit=limit)

    def number(self, key: str) -> float:
        """A positive finite number (the default of its architecture when absent or null)."""
        value = self.raw(key)
        if value is None:
            value = self.defaults.get(key)
        return self.positive(key, value)

    def positive(self, key: str, value: object) -> float:
        """`value` as a positive finite float, or the error of `key`."""
        rule = f"{key} must be a positive finite number"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, rule, "write it without quotes")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or number <= 0:
            raise self.error(key, rule, "check it against the model card")
        return number

    def flag(self, key: str) -> bool:
        """A boolean, False when absent or null."""
        value = self.raw(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.error(key, f"{key} must be true or false", "write true or false")
        return value

    def switch(self, fact: bool | str) -> bool:
        """A fact of the architecture: settled, or decided by the key that it names."""
        return fact if isinstance(fact, bool) else self.flag(fact)

    def text(self, key: str) -> str | None:
        """A string, None when absent or null."""
        value = self.raw(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"{key} must be a string", "write it in quotes")
        return value

    def table(self, key: str) -> Mapping[str, Any] | None:
        """A JSON object, None when absent or null."""
        value = self.raw(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(key, f"{key} must be an object", "write it in braces")
        return value

    def entries(self, key: str) -> Sequence[Any] | None:
        """A JSON list, None when absent or null."""
        value = self.raw(key)
        if value is not None and not isinstance(value, list | tuple):
            raise self.error(key, f"{key} must be a list", "write it in square brackets")
        return value
