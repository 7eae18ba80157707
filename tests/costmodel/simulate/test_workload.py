"""Workloads: distributions, arrivals, traces of both formats, and what is wrong with bad ones."""

from __future__ import annotations

import gzip
import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from shardplan.costmodel.simulate.describe import describe
from shardplan.costmodel.simulate.lengths import Fixed, Histogram, Lognormal, read_lengths
from shardplan.costmodel.simulate.request import Asked
from shardplan.costmodel.simulate.traces import is_trace, read_trace, trace_lines
from shardplan.costmodel.simulate.workload import Demand, requests
from shardplan.models.errors import InputError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:09.9799600,110,27
"""
ZONED = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.509930+00:00,2399,6
"""
MOONCAKE = """{"timestamp": 1e3, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 8]}
{"timestamp": 11535, "input_length": 1200, "output_length": 26, "hash_ids": [46, 47, 50]}

{"timestamp": 27482, "input_length": 655, "output_length": 52}
"""


def demand(**changes: object) -> Demand:
    """Fixed lengths in a closed loop, and what is changed."""
    values: dict[str, object] = {"input_len": Fixed(512), "output_len": Fixed(64)}
    return Demand(**{**values, **changes})  # type: ignore[arg-type]  # fields of it


def test_traces_of_azure_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(AZURE, encoding="utf-8")
    found = list(read_trace(path))
    assert [(one.input_len, one.output_len) for one in found] == [(4808, 10), (3180, 8), (110, 27)]
    assert [one.arrival_s for one in found] == pytest.approx([0.0, 0.052, 6.0], abs=1e-5)
    path.write_text(ZONED, encoding="utf-8")
    assert [one.arrival_s for one in read_trace(path)] == pytest.approx([0.0, 0.5], abs=1e-5)


def test_traces_of_mooncake_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl.gz"
    path.write_bytes(gzip.compress(MOONCAKE.encode()))
    found = list(read_trace(path))
    assert [one.arrival_s for one in found] == pytest.approx([0.0, 10.535, 26.482])
    assert [one.prefix for one in found] == [(46, 47, 8), (46, 47, 50), ()]
    about = describe(iter(found), demand(trace=path))
    assert about["prefix"] == {
        "requests_with_ids": 2,
        "reused_tokens": 1024,
        "reused_share": pytest.approx(1024 / 2955),
    }
    assert about["arrivals"]["gap_s"]["max"] == pytest.approx(15.947)


@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
def test_what_is_written_is_read_again(kind: str, tmp_path: Path) -> None:
    given = list(requests(demand(rate=20.0, count=300, prefix_groups=3, prefix_len=512)))
    path = tmp_path / f"t{kind}"
    path.write_text("".join(trace_lines(given, kind)), encoding="utf-8")
    found = list(read_trace(path))
    times = [one.arrival_s - given[0].arrival_s for one in given]
    assert [one.arrival_s for one in found] == pytest.approx(times, abs=2e-6)
    if kind == ".jsonl":
        assert [one.prefix for one in found] == [one.prefix for one in given]


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BAD = {
    "empty.csv": ("", "columns TIMESTAMP"),
    "head.csv": (HEAD, "at least one request"),
    "columns.csv": ("a,b,c\n1,2,3\n", "columns TIMESTAMP"),
    "order.csv": (HEAD + "5,10,10\n4,10,10\n", "order of time"),
    "nan.csv": (HEAD + "nan,10,10\n", "row 2: timestamp='nan'"),
    "date.csv": (HEAD + "2023-13-45,10,10\n", "finite number"),
    "zero.csv": (HEAD + "1,10,0\n", "GeneratedTokens=0"),
    "negative.csv": (HEAD + "1,-3,5\n", "ContextTokens=-3"),
    "fraction.csv": (HEAD + "1,1.5,5\n", "whole number"),
    "short.csv": (HEAD + "1,10\n", "a row has 3 cells"),
    "quote.csv": (HEAD + '1,"10,5\n', "a row has 3 cells"),
    "empty.jsonl": ("\n\n", "at least one request"),
    "text.jsonl": ("hello\n", "one JSON object"),
    "list.jsonl": ("[1]\n", "one JSON object"),
    "deep.jsonl": ("[" * 100_000 + "\n", "one JSON object"),
    "lacks.jsonl": ('{"timestamp": 1, "input_length": 3}\n', "`output_length`"),
    "zero.jsonl": ('{"timestamp": 1, "input_length": 3, "output_length": 0}\n', "output_length=0"),
    "true.jsonl": ('{"timestamp": true, "input_length": 3, "output_length": 1}\n', "timestamp"),
    "large.jsonl": (
        '{"timestamp": 1%s, "input_length": 3, "output_length": 1}\n' % ("0" * 400),
        "finite",
    ),
    "inf.jsonl": ('{"timestamp": Infinity, "input_length": 3, "output_length": 1}\n', "finite"),
    "ids.jsonl": (
        '{"timestamp": 1, "input_length": 3, "output_length": 1, "hash_ids": [-1]}\n',
        "hash_ids",
    ),
    "trace.txt": (HEAD, "is .csv"),
    "cut.csv.gz": ("not gzip", "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_trace_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    text, words = BAD[name]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as refused:
        list(read_trace(path))
    assert words in str(refused.value)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        list(read_trace(path))
    packed = gzip.compress(AZURE.encode() * 100)
    (tmp_path / "c.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        list(read_trace(tmp_path / "c.csv.gz"))
    with pytest.raises(InputError, match="regular file"):
        list(read_trace(tmp_path / "none.csv"))
    assert is_trace(Path("a.jsonl.gz"))
    assert not is_trace(Path("a.toml"))


def test_lengths_have_the_means_that_were_asked() -> None:
    luck = np.random.default_rng(0)
    drawn = read_lengths("input_len", {"mean": 1000, "cv": 1.5}).draw(luck, 400_000)
    assert drawn.mean() == pytest.approx(1000, rel=0.01)
    assert drawn.std() / drawn.mean() == pytest.approx(1.5, rel=0.05)
    drawn = read_lengths("x", {"edges": [1, 11, 21], "weights": [3, 1]}).draw(luck, 100_000)
    assert (drawn.min(), drawn.max()) == (1, 20)
    assert (drawn <= 10).mean() == pytest.approx(0.75, abs=0.01)
    assert read_lengths("x", 7) == Fixed(7)
    assert read_lengths("x", {"mean": 9, "cv": 0}) == Lognormal(9.0, 0.0, 1, 2**24)
    assert isinstance(read_lengths("x", {"edges": [1, 2], "weights": [1]}), Histogram)


@pytest.mark.parametrize(
    "value",
    [
        0,
        -5,
        True,
        1.5,
        "many",
        float("nan"),
        {},
        {"mean": 0},
        {"mean": float("nan")},
        {"mean": 5, "cv": -1},
        {"mean": 5, "min": 9, "max": 3},
        {"mean": 5, "sigma": 3},
        {"edges": [1, 2]},
        {"edges": [1, 2], "weights": []},
        {"edges": [2, 1], "weights": [1]},
        {"edges": [1, 2, 3], "weights": [0, 0]},
        {"edges": [1, 2], "weights": ["x"]},
        {"edges": "ab", "weights": "c"},
    ],
    ids=str,
)
def test_bad_lengths_are_refused(value: object) -> None:
    with pytest.raises(InputError, match="input_len"):
        read_lengths("input_len", value)


def test_arrivals_are_as_frequent_and_as_bursty_as_asked() -> None:
    for shape in (1.0, 0.25):
        about = describe(
            requests(demand(rate=50.0, burstiness=shape, count=40_000)), demand(rate=50.0)
        )
        assert about["arrivals"]["requests_per_s"] == pytest.approx(50.0, rel=0.03)
        assert about["arrivals"]["gap_cv"] == pytest.approx(shape**-0.5, rel=0.03)


def test_the_same_seed_gives_the_same_requests() -> None:
    one = demand(input_len=Lognormal(500.0, 1.0, 1, 4000), rate=3.0, count=100)
    assert list(requests(one)) == list(requests(one))
    other = demand(input_len=Lognormal(500.0, 1.0, 1, 4000), rate=3.0, count=100, seed=1)
    assert list(requests(one)) != list(requests(other))


def test_a_trace_may_come_at_another_rate(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(AZURE, encoding="utf-8")
    found = list(requests(demand(trace=path, rate=1e3, count=2)))
    assert [one.input_len for one in found] == [4808, 3180]
    assert found[1].arrival_s < 0.05


def test_a_request_beyond_the_context_is_refused() -> None:
    with pytest.raises(InputError, match="request 0: 512 \\+ 64 tokens, context 500"):
        list(requests(demand(count=1), longest=500))


@pytest.mark.slow
def test_a_long_trace_takes_little_memory(tmp_path: Path) -> None:
    """Two hundred thousand rows are seen one at a time."""
    path = tmp_path / "long.jsonl"
    rows = (
        json.dumps({"timestamp": n, "input_length": 2048, "output_length": 9, "hash_ids": [0, n]})
        for n in range(200_000)
    )
    path.write_text("\n".join(rows), encoding="utf-8")
    tracemalloc.start()
    about = describe(read_trace(path), demand(trace=path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert about["requests"] == 200_000
    assert peak < 8 * 2**20


def test_a_stream_without_end_is_drawn_as_it_is_wanted() -> None:
    some = list(itertools.islice(requests(demand(rate=1.0)), 10))
    assert len(some) == 10
    assert isinstance(some[0], Asked)
