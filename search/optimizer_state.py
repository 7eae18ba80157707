"""The state of CMA-ES that Optuna keeps in a study, read without running what it holds.

Optuna's sampler writes the optimizer into the storage as a pickle and unpickles what it finds there
(optuna/samplers/_cmaes.py). A storage may come from elsewhere, and a pickle may call anything: here
it may make arrays, numbers and the optimizer itself.
"""

from __future__ import annotations

import importlib
import io
import pickle
from types import SimpleNamespace
from typing import Any

from shardplan.models.errors import InputError

__all__ = ["read_states_plainly"]

_KNOWN = {
    "cmaes._cma": ("CMA",),
    "numpy": ("dtype", "ndarray"),
    **dict.fromkeys(
        ("numpy.core.multiarray", "numpy._core.multiarray"), ("_reconstruct", "scalar")
    ),
    **dict.fromkeys(("numpy.core.numeric", "numpy._core.numeric"), ("_frombuffer",)),
}
"""Of numpy 1 and 2."""


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """A name that a state needs; `InputError` for any other."""
        if name not in _KNOWN.get(module, ()):
            raise InputError(
                "the study holds the state of an optimizer and nothing else",
                got=f"{module}.{name}"[:100],
                hint="take another storage, or another --study",
            )
        return super().find_class(module, name)


def _loads(data: bytes) -> Any:
    return _Plain(io.BytesIO(data)).load()


def read_states_plainly() -> None:
    """From here on Optuna's CMA-ES reads states of optimizers alone, in this process."""
    module: Any = importlib.import_module("optuna.samplers._cmaes")
    module.pickle = SimpleNamespace(dumps=pickle.dumps, loads=_loads)
