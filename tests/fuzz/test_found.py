"""Inputs that ended in a traceback, a hang or too much memory once, cut to what matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.fuzz import seeds
from tests.fuzz.judge import Judge
from tests.fuzz.targets import TARGETS
from tests.search.emit_cases import emit_plan

PLAN = emit_plan().dumps().encode()
LONG = "9" * 5000
"""More digits than Python makes a number of."""


def _changed(data: bytes, *path: Any, value: Any) -> bytes:
    """A JSON text with one value of another kind."""
    whole = json.loads(data)
    place = whole
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(whole).replace("Infinity", "1e400").encode()


def _table(device_id: object) -> bytes:
    return _changed(
        seeds.cluster_files()[0], "server_list", 0, "device", 0, "device_id", value=device_id
    )


def _mindie(*path: Any, value: Any) -> bytes:
    return _changed(seeds.mindie()[0], "BackendConfig", *path, value=value)


def _plan(*path: Any, value: Any) -> bytes:
    return _changed(PLAN, *path, value=value)


def _kernels(old: str, new: str) -> bytes:
    """A kernel table whose first product has other shapes."""
    text = seeds.kernel_tables()[0].decode()
    assert old in text
    return text.replace(old, new).encode()


def _own(old: str, new: str) -> bytes:
    return seeds.kernel_tables()[3].replace(old.encode(), new.encode(), 1)


def _log(old: str, new: str) -> bytes:
    data = seeds.logs()[0]
    assert old.encode() in data
    return data.replace(old.encode(), new.encode(), 1)


def _trials(old: str, new: str) -> bytes:
    lines = seeds.trials()[0].decode().splitlines()
    cells = lines[1].split(",")
    cells[lines[0].split(",").index(old)] = new
    return "\n".join([lines[0], ",".join(cells), *lines[2:], ""]).encode()


_GRID = b'[[matmul]]\ndtype = ["bf16"]\nsource = "x"\n'

FOUND: dict[str, tuple[str, bytes]] = {
    "an id without end": ("cluster file", _table(float("inf"))),
    "an id that is a switch": ("cluster file", _table(True)),
    "an id that is cut": ("cluster file", _table(1.5)),
    "an id of thirty digits": ("cluster file", _table(10**30)),
    "a broken archive": ("trace gzip", seeds.packed_traces()[0][:10] + b"\xff" * 40),
    "a size without end": ("profiler csv", _own("16,4096,4096", "1e400,4096,4096")),
    "a size that no number holds": ("profiler csv", _own("16,4096,4096", "1e300,4096,4096")),
    "bytes without end": (
        "profiler json",
        seeds.communications()[0].replace(b'"Transit Size(MB)": ', b'"Transit Size(MB)": 1e400'),
    ),
    "rows that are a number": ("profile grid", _GRID + b'shapes = ["m", "n", "k"]\nshape = 3\n'),
    "a grid without end": (
        "profile grid",
        _GRID + "".join(f"{name} = {[*range(1, 3000)]}\n" for name in "mnk").encode(),
    ),
    "a grid of long numbers": ("profile grid", _GRID + f"m = [{LONG}]\n".encode()),
    "a grid of large numbers": (
        "profile grid",
        _GRID + f"m = [1{'0' * 400}]\nn = [1]\nk = [1]\n".encode(),
    ),
    "a whole number without end": ("trials.csv", _trials("batch", "1e400")),
    "a whole number that is none": ("trials.csv", _trials("tp", "nan")),
    "words for a block size": ("mindie", _mindie("ScheduleConfig", "cacheBlockSize", value="x")),
    "words for a batch": ("mindie", _mindie("ScheduleConfig", "maxPrefillBatchSize", value=[1])),
    "slots that fill the memory": (
        "mindie", _mindie("ScheduleConfig", "maxBatchSize", value=2 * 10**14),
    ),
    "slots that take minutes": (
        "mindie", _mindie("ScheduleConfig", "maxBatchSize", value=2 * 10**8),
    ),
    "an order without axes": ("plan.json", _plan("strategy", "order", value=["pp"])),
    "an axis of nothing": ("plan.json", _plan("strategy", "tp", value=0)),
    "bytes that are no number": (
        "plan.json", _plan("cluster", "hbm_bytes", value=float("inf")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_refused(name: str, tmp_path: Path) -> None:
    """With one of our errors, soon, in little memory."""
    target, data = FOUND[name]
    judge = Judge(TARGETS[target], tmp_path)
    assert judge.judge(data) is None
    assert judge.counts == {"accepted": 0, "refused": 1}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("profiler csv", _kernels('"""512,4096"""', '"""0,4096"""')),
        ("profiler csv", _kernels("512,4096;", "²,4096;")),
        ("profiler csv", _kernels("512,4096;", f"{LONG},4096;")),
        ("profiler csv", _kernels("512,4096;", f"1,4096{',99999999' * 60};")),
        ("hccl log", _log("-n 8", f"-n {LONG}")),
    ],
    ids=["no rows", "a power", "a long size", "many sizes", "many ranks"],
)
def test_what_was_found_is_left_out(name: str, data: bytes, tmp_path: Path) -> None:
    """A file of a profiler holds many kernels: one that is odd is told, not fatal."""
    judge = Judge(TARGETS[name], tmp_path)
    assert judge.judge(data) is None


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "rope_theta"])
@pytest.mark.parametrize("number", ["1e400", "-0", "-0.0", "NaN", "Infinity", "true", '"8"', LONG])
def test_a_number_that_is_none_is_refused(key: str, number: str, tmp_path: Path) -> None:
    """Of a configuration: without end, negative, no number, a switch, a text, too long."""
    config = json.loads(seeds.configs()[0])
    text = json.dumps({**config, key: "@"}).replace('"@"', number)
    judge = Judge(TARGETS["config.json"], tmp_path)
    assert judge.judge(text.encode()) is None
    assert judge.counts == {"accepted": 0, "refused": 1}


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "max_position_embeddings"])
def test_a_size_of_thirty_digits_is_refused(key: str, tmp_path: Path) -> None:
    """Before anything is built of it."""
    judge = Judge(TARGETS["config.json"], tmp_path)
    assert judge.judge(_changed(seeds.configs()[0], key, value=10**30)) is None
    assert judge.counts == {"accepted": 0, "refused": 1}
