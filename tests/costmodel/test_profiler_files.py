"""Readers of profiler files: what they recognise, what they skip, and what they refuse."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.costmodel.errors import DataFileError
from shardplan.costmodel.profiler_files.measurement import Measurement, ReadFile, ReadOptions
from shardplan.costmodel.profiler_files.read import read_profile, read_profiles
from shardplan.costmodel.profiler_files.shapes import parse_shapes, product_of
from shardplan.models.errors import ShardplanError

SAMPLES = Path(__file__).parent / "profiler_samples"
KNOWN = ReadOptions(ranks=8, context=4096)
KERNELS = SAMPLES / "kernel_details.csv"


def by_op(file: ReadFile, op: str) -> list[Measurement]:
    """Measurements of one operator."""
    return [one for one in file.measurements if one.op == op]


def reasons(file: ReadFile) -> dict[str, str]:
    """Kernel -> why it is not used."""
    return {one.kernel: one.reason for one in file.skipped}


@pytest.mark.parametrize(
    ("name", "format_", "rows"),
    [
        ("kernel_details.csv", "kernel_details", 21),
        ("kernel_details_block_num.csv", "kernel_details", 4),
        ("op_summary_20260101.csv", "op_summary", 7),
        ("communication.json", "communication", 6),
        ("all_reduce_8.log", "hccl_test", 5),
        ("ops.csv", "profile", 12),
    ],
)
def test_every_format_is_told_from_its_first_lines(name: str, format_: str, rows: int) -> None:
    """Whatever the file is called."""
    found = read_profile(SAMPLES / name, KNOWN)
    assert (found.format, found.rows) == (format_, rows)
    assert found.measurements
    assert all(one.seconds > 0 and one.line > 1 for one in found.measurements)


def test_calls_of_one_shape_are_one_measurement_of_their_median() -> None:
    """62.5, 64.5 and 63.5 us; the start times are quoted with a TAB, the shapes twice."""
    found = by_op(read_profile(KERNELS, KNOWN), "matmul")[0]
    assert found.seconds == pytest.approx(63.5e-6)
    assert (found.count, found.line, found.dtype) == (3, 2, "bf16")
    assert found.sizes == (("m", 512.0), ("n", 4096.0), ("k", 4096.0))


def test_block_dim_and_block_num_tables_read_alike() -> None:
    """Older and newer versions name one column otherwise, as op_summary names four."""
    shapes = {
        name: [(m.sizes, m.seconds) for m in by_op(read_profile(SAMPLES / name), "matmul")][:2]
        for name in (
            "kernel_details.csv",
            "kernel_details_block_num.csv",
            "op_summary_20260101.csv",
        )
    }
    assert len({tuple(found) for found in shapes.values()}) == 1


def test_a_weight_in_fractals_is_unpacked() -> None:
    """320 x 200 fractals of 16 x 16 are 5120 x 3200; of 16 x 32, 128 x 448 are 4096 x 7168."""
    found = read_profile(KERNELS, KNOWN)
    assert by_op(found, "matmul")[1].sizes == (("m", 16.0), ("n", 3200.0), ("k", 5120.0))
    assert by_op(found, "matmul")[2].sizes == (("m", 256.0), ("n", 4096.0), ("k", 7168.0))


def test_a_quantized_product_includes_the_pass_that_its_price_includes() -> None:
    """76 us and 14 us of DynamicQuant on the same 256 x 7168; the other has no pass, so no use."""
    found = read_profile(KERNELS, KNOWN)
    assert [one.seconds for one in by_op(found, "matmul") if one.dtype == "w8a8"] == [
        pytest.approx(90e-6)
    ]
    assert "quantization kernel" in reasons(found)["QuantBatchMatmulV3"]


def test_prefill_and_decode_are_told_apart_by_shape() -> None:
    """Dense heads-first keys of as many tokens are a prefill; a paged cache is a decode."""
    found = read_profile(KERNELS, KNOWN)
    (prefill,), (decode,) = by_op(found, "attention_prefill"), by_op(found, "attention_decode")
    assert dict(prefill.sizes) == {
        "batch": 1, "tokens": 2048, "heads": 32, "kv_heads": 8, "head_dim": 128,
    }  # fmt: skip
    assert dict(decode.sizes) == {
        "batch": 16, "tokens": 4096, "heads": 4, "kv_heads": 1, "head_dim": 128,
    }  # fmt: skip


def test_what_the_shapes_do_not_say_is_asked_for_not_guessed() -> None:
    """The tokens in a paged cache and the ranks of a group."""
    found = read_profile(KERNELS)
    assert by_op(found, "attention_decode") == []
    assert "--context" in reasons(found)["FusedInferAttentionScore"]
    assert "--ranks" in reasons(found)["hcom_allReduce_"]


def test_a_collective_listed_twice_counts_once() -> None:
    """Without and with its hardware stream: the same start and duration."""
    found = read_profile(KERNELS, KNOWN)
    (one,) = by_op(found, "all_reduce")
    assert (one.count, one.size("message_bytes")) == (1, 16 * 5120 * 2)
    assert reasons(found)["hcom_allReduce_"].startswith("listed a second time")


def test_unknown_kernels_are_counted_and_listed() -> None:
    """Two sorts, and a product whose operands do not fit its output."""
    found = read_profile(KERNELS, KNOWN)
    counts = {one.kernel: one.count for one in found.skipped}
    assert counts["Sort"] == 2
    assert "for certain" in reasons(found)["MatMulV2"]
    used = sum(one.count for one in found.measurements)
    assert used + sum(counts.values()) == found.rows


def test_bytes_sent_give_the_message_and_waiting_is_left_out() -> None:
    """A rank of 8 sends 7/4 of an all_reduce: 3.5 MB for 2 MB; 0.25 ms less 0.05 ms of waiting."""
    found = read_profile(SAMPLES / "communication.json", KNOWN)
    one = by_op(found, "all_reduce")[0]
    assert (one.size("message_bytes"), one.count) == (2e6, 2)
    assert one.seconds == pytest.approx(0.2e-3)
    assert by_op(found, "all_gather")[0].size("message_bytes") == 2e6


def test_a_benchmark_log_says_its_collective_and_ranks_itself() -> None:
    """In the command line that it echoes."""
    found = read_profile(SAMPLES / "all_reduce_8.log")
    assert {one.op for one in found.measurements} == {"all_reduce"}
    assert {one.size("ranks") for one in found.measurements} == {8.0}
    assert {one.launch for one in found.measurements} == {"host"}
    assert found.measurements[0].seconds == pytest.approx(53.1e-6)


def test_our_own_csv_uses_what_an_engine_runs() -> None:
    """Not the int8 product without its pass, not a kernel as a sequence of calls."""
    found = read_profile(SAMPLES / "ops.csv")
    assert [one.dtype for one in by_op(found, "matmul")] == ["bf16", "bf16"]
    assert len(by_op(found, "swiglu")) == 1
    assert by_op(found, "all_to_all")[0].size("message_bytes") == 2**24 / 8
    assert by_op(found, "copy")[0].size("elements") == 2**27


def test_of_two_backends_the_faster_one_counts(tmp_path: Path) -> None:
    """Also at the shapes that it alone did not run, which are left out."""
    text = (SAMPLES / "ops.csv").read_text(encoding="utf-8")
    first, second = text.splitlines()[1:3]
    assert ",2.9e-05,2.8e-05," in first
    slow = first.replace(",2.9e-05,2.8e-05,", ",3.5e-05,3.4e-05,").replace(",linear", ",slow")
    alone = second.replace("matmul,bf16,256,", "matmul,bf16,512,").replace(",linear", ",slow")
    file = tmp_path / "ops.csv"
    file.write_text(f"{text}{slow}\n{alone}\n", encoding="utf-8")
    found = read_profile(file)
    assert {one.kernel for one in by_op(found, "matmul")} == {"matmul linear"}
    said = {one.kernel: (one.count, one.reason) for one in found.skipped}
    assert said["matmul slow"] == (2, "another backend is faster")


Edit = Callable[[str], str]


def _drop_cells(text: str) -> str:
    """The last line broken off inside."""
    return text.rstrip("\n")[:-20]


BAD: dict[str, tuple[str, Edit, str, int]] = {
    "truncated table": ("kernel_details.csv", _drop_cells, "as many cells", 22),
    "open quote": ("kernel_details.csv", lambda t: t + '1,"2', "CSV|cells", 23),
    "zero": ("kernel_details.csv", lambda t: t.replace(",62.5,", ",0.0,", 1), "above 0", 2),
    "negative": ("kernel_details.csv", lambda t: t.replace(",64.5,", ",-3,", 1), "above 0", 3),
    "nan": ("op_summary_20260101.csv", lambda t: t.replace(",62.5,", ",NaN,", 1), "above 0", 2),
    "word": ("kernel_details.csv", lambda t: t.replace(",62.5,", ",fast,", 1), "a number", 2),
    "one row": ("kernel_details.csv", lambda t: "\n".join(t.splitlines()[:2]), "one row", 1),
    "no rows": ("kernel_details.csv", lambda t: t.splitlines()[0], "one row", 1),
    "copied row": (
        "kernel_details.csv",
        lambda t: t + t.splitlines()[1] + "\n",
        "listed twice",
        23,
    ),
    "foreign": ("ops.csv", lambda _t: "a,b\n1,2\n", "must be one of", 1),
    "blank": ("ops.csv", lambda _t: "\n \n", "empty", 1),
    "cut json": ("communication.json", lambda t: t[: len(t) // 2], "whole JSON", 0),
    "other json": ("communication.json", lambda _t: '{"a": 1}', "must be one of", 1),
    "negative ms": (
        "communication.json",
        lambda t: t.replace('"Elapse Time(ms)": 0.25', '"Elapse Time(ms)": -0.25'),
        "above 0",
        41,
    ),
    "ms in a log": (
        "all_reduce_8.log",
        lambda t: t.replace("53.10", "0.0531"),
        "GB/s and us",
        4,
    ),
    "failed check": ("all_reduce_8.log", lambda t: t.replace("success", "failed"), "check", 4),
    "cut log": ("all_reduce_8.log", lambda t: t[: t.rindex("1020") - 4], "truncated", 8),
    "same shape": ("ops.csv", lambda t: t + t.splitlines()[1] + "\n", "twice", 14),
    "odd mode": ("ops.csv", lambda t: t.replace(",graph,", ",fast,", 1), "graph or eager", 2),
    "half a row": (
        "ops.csv",
        lambda t: t.replace("matmul,bf16,16,", "matmul,bf16,1.5,"),
        "size",
        2,
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_line_and_reason(case: str, tmp_path: Path) -> None:
    """Never fitted silently."""
    name, edit, reason, line = BAD[case]
    path = tmp_path / name
    text = (SAMPLES / name).read_text(encoding="utf-8")
    path.write_text(edit(text), encoding="utf-8")
    with pytest.raises(DataFileError, match=reason) as caught:
        read_profile(path, KNOWN)
    found = re.match(rf"{re.escape(name)}:(\d+)", caught.value.got)
    assert found is not None
    assert line in (0, int(found.group(1)))


@pytest.mark.parametrize("data", [b"", b"\xff\xfeS\0t\0", b"Name,Type\n1,\xe9\n", b"Name\0,\n1,\n"])
def test_a_file_that_is_not_utf8_text_is_refused(data: bytes, tmp_path: Path) -> None:
    """UTF-16, Latin-1, binary and empty ones."""
    path = tmp_path / "kernel_details.csv"
    path.write_bytes(data)
    with pytest.raises(DataFileError, match=r"UTF-8|text|empty"):
        read_profile(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """And a folder."""
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(DataFileError, match="readable"):
            read_profile(path)


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    """Under whatever name: its rows would count twice."""
    twin = tmp_path / "other.csv"
    twin.write_bytes(KERNELS.read_bytes())
    with pytest.raises(DataFileError, match="twice"):
        read_profiles([KERNELS, twin], KNOWN)


@given(
    m=st.integers(1, 500),
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    wide=st.sampled_from([16, 32]),
)
def test_a_product_is_read_the_same_however_its_weight_is_stored(
    m: int, n: int, k: int, wide: int
) -> None:
    """As [k, n], as [n, k], or in fractals, given the output's shape."""
    rows, columns = 64 * k, 64 * n
    blocks = ((columns // wide, rows // 16), (rows // 16, columns // wide))
    stored = [(rows, columns), (columns, rows), (*blocks[0], 16, wide), (*blocks[1], 16, wide)]
    for weight in stored[: 4 if wide == 16 else 3]:
        found = product_of((m, rows), weight, (m, columns))
        assert found is not None
        assert (found.m, found.n, found.k) == (m, columns, rows)


def test_shapes_without_an_output_are_used_only_when_they_are_certain() -> None:
    """k must be found in the weight."""
    assert product_of((4, 64), (32, 64), None) is not None
    assert product_of((4, 64), (32, 48), None) is None
    assert product_of((4,), (4, 4), None) is None
    assert parse_shapes('"4,64;;32,64"') == [(4, 64), (), (32, 64)]
    assert parse_shapes("4,x") is None


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(path.name for path in SAMPLES.iterdir())),
    start=st.floats(0, 1),
    length=st.integers(0, 40),
    junk=st.binary(max_size=12),
)
def test_a_damaged_file_is_read_or_refused_never_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, name: str, start: float, length: int, junk: bytes
) -> None:
    """Bytes replaced anywhere."""
    data = (SAMPLES / name).read_bytes()
    at = int(start * len(data))
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(data[:at] + junk + data[at + length :])
    with contextlib.suppress(ShardplanError):
        found = read_profile(path, KNOWN)
        assert all(0 < one.seconds < math.inf for one in found.measurements)


def test_a_collective_that_waits_longer_than_it_takes_is_refused(tmp_path: Path) -> None:
    """Times that contradict one another."""
    value = json.loads((SAMPLES / "communication.json").read_text(encoding="utf-8"))
    entry = next(iter(value["step1"]["collective"].values()))
    entry["Communication Time Info"]["Synchronization Time(ms)"] = 0.5
    path = tmp_path / "communication.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(DataFileError, match="must be below"):
        read_profile(path, KNOWN)
