"""A study of CMA-ES that holds more than the optimizer's state is refused, not run."""

from __future__ import annotations

import importlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardplan.models.errors import InputError
from shardplan.search.optimizer_state import read_states_plainly

cmaes = pytest.importorskip("cmaes")
theirs: Any = importlib.import_module("optuna.samplers._cmaes")


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What Optuna's sampler reads a state with."""
    monkeypatch.setattr(theirs, "pickle", theirs.pickle)
    read_states_plainly()
    return theirs.pickle.loads


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_state_is_read_as_it_was(loads: Any, protocol: int) -> None:
    """All that the optimizer holds; its generator it leaves out itself."""
    kept = cmaes.CMA(mean=np.zeros(3), sigma=1.0, bounds=np.array([[0.0, 1.0]] * 3), seed=1)
    for _ in range(3):
        kept.tell([(kept.ask(), float(i)) for i in range(kept.population_size)])
    data = pickle.dumps(kept, protocol=protocol)
    found, usual = loads(data), pickle.loads(data)
    assert type(found) is cmaes.CMA
    for one in (found, usual):
        one._rng.seed(7)
    assert np.array_equal(found.ask(), usual.ask())


def test_anything_else_is_refused(loads: Any, tmp_path: Path) -> None:
    """Before it is called."""
    for data in (pickle.dumps(Evil(tmp_path / "hit")), pickle.dumps(eval), pickle.dumps(Path)):
        with pytest.raises(InputError, match="nothing else"):
            loads(data)
    assert not (tmp_path / "hit").exists()
