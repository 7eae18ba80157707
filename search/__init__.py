"""Which strategy is best: the space, its legality rules, the engines that search it, the plan.

The name is the package's and the function's at once: `shardplan.search(...)` searches, and
`shardplan.search.plan` is a module. Python binds a sub-package onto its parent when it is first
imported, which would replace a function of the same name; so the package itself is callable and
passes the call on to `shardplan.search.ask.search`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """This package, callable as the function `search` of its module `api`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from shardplan.search import ask

        return ask.search(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
