"""Settings of every test: reproducible property tests, and skips where hardware is absent.

`HYPOTHESIS_PROFILE=explore` draws new examples and many more of them; the default, `ci`, draws
the same ones every time, so that a run tells only about the code.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,  # a shared machine's pauses are not a property of the code
    max_examples=50,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore", settings.get_profile("ci"), derandomize=False, max_examples=2000
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def _has_device(kind: str) -> bool:
    """Whether torch sees a device of this marker's kind."""
    module, attribute = {"gpu": ("torch", "cuda"), "npu": ("torch_npu", "npu")}[kind]
    if importlib.util.find_spec(module) is None:
        return False
    return bool(getattr(importlib.import_module(module), attribute).is_available())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` or `npu` where there is no such device."""
    for kind in ("gpu", "npu"):
        marked = [item for item in items if item.get_closest_marker(kind)]
        if marked and not _has_device(kind):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"no {kind} here"))
