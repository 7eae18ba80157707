"""Floats that are the same on every machine."""

from __future__ import annotations

from typing import Any

__all__ = ["rounded"]


def rounded(value: Any) -> Any:
    """The same data with every float rounded to ten significant digits."""
    if isinstance(value, float):
        return float(f"{value:.10g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value
