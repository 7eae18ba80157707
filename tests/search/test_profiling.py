"""`shardplan profile`: grids, the CSV it writes and takes up again, rates that cannot be."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.search.profiling_cases import MATMUL, row, target

from shardplan.models.errors import InputError, UnknownNameError
from shardplan.search.profiling.operators import rotations
from shardplan.search.profiling.plan import (
    collective_points,
    group_sizes,
    operator_points,
)
from shardplan.search.profiling.points import COLLECTIVES, OPERATORS, Point, load_grid
from shardplan.search.profiling.rates import ceiling_of, cold_bytes, heats, impossible, peaks
from shardplan.search.profiling.run import left_to_do
from shardplan.search.profiling.table import COLUMNS, Table, read_rows
from shardplan.search.profiling.timing import Timing


def grid_file(folder: Path, text: str) -> str:
    """A grid of the user's own."""
    path = folder / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_grid_is_every_combination_within_its_limits(tmp_path: Path) -> None:
    """Two shapes by two m; 2 m n k of the largest is 2 * 8 * 4 * 8 = 512, above the limit."""
    entry = (
        '[[matmul]]\ndtype = ["bf16"]\nm = [1, 8]\nshapes = ["n", "k"]\n'
        'shape = [[2, 3], [4, 8]]\nlimit_flop = 500\nsource = "by hand"\n'
    )
    found = [(p.m, p.n, p.k) for p in load_grid(grid_file(tmp_path, entry))]
    assert found == [(1, 2, 3), (8, 2, 3), (1, 4, 8)]


def test_a_limit_beyond_floats_leaves_nothing_out(tmp_path: Path) -> None:
    entry = '[[matmul]]\ndtype = ["bf16"]\nm = [1, 8]\nn = [2]\nk = [2]\nsource = "by hand"\n'
    path = grid_file(tmp_path, f"{entry}limit_flop = 1{'0' * 400}\n")
    assert [point.m for point in load_grid(path)] == [1, 8]


@pytest.mark.parametrize("name", ["tiny", "full"])
def test_the_shipped_grids_hold_every_operator_once(name: str) -> None:
    """No point twice, none without its sizes."""
    points = load_grid(name)
    assert {p.op for p in points} == {*OPERATORS, *COLLECTIVES}
    assert len(set(points)) == len(points)
    assert all(p.tensor_bytes() > 0 for p in points)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[matmul", "TOML"),
        ("[[matmull]]\nm = [1]", "did you mean matmul"),
        ("matmul = 3", "lists of tables"),
        ('[[copy]]\ndtype = ["bf16"]\nmessage_bytes = [0]\nsource = "x"', "above 0"),
        ('[[copy]]\ndtype = ["bf16"]\nmessage_bytes = [true]\nsource = "x"', "whole numbers"),
        ('[[copy]]\ndtype = ["bf16"]\nsource = "x"', "lacks a key"),
        ('[[copy]]\ndtype = ["bf16"]\nmessage_bytes = [8]', "lacks a key"),
        ('[[copy]]\ndtype = ["bf17"]\nmessage_bytes = [8]\nsource = "x"', "bf16"),
        ('[[copy]]\ndtype = ["bf16"]\nmesage_bytes = [8]\nsource = "x"', "message_bytes"),
        (
            '[[copy]]\ndtype = ["bf16"]\nmessage_bytes = [8]\nlimit_bytes = "a"\nsource = "x"',
            "limit",
        ),
    ],
)
def test_a_grid_that_breaks_a_rule_is_refused(tmp_path: Path, text: str, says: str) -> None:
    """One line that names what is wrong."""
    with pytest.raises(InputError, match=says):
        load_grid(grid_file(tmp_path, text))


def test_an_unknown_grid_names_those_there_are() -> None:
    """And a file that is not there is said."""
    with pytest.raises(UnknownNameError, match="tiny"):
        load_grid("tin")
    with pytest.raises(InputError, match="cannot be read"):
        load_grid("no_such_file.toml")


def test_work_of_a_point_by_hand() -> None:
    """FLOP and bytes as the cost model counts them."""
    size = {"batch": 2, "tokens": 3, "heads": 4, "kv_heads": 2, "head_dim": 8}
    prefill = Point(op="attention_prefill", dtype="bf16", **size)  # type: ignore[arg-type]  # ints
    decode = Point(op="attention_decode", dtype="bf16", **size)  # type: ignore[arg-type]  # ints
    moe = Point(op="moe", dtype="bf16", tokens=5, hidden=4, ffn=3, experts=7, topk=2)
    assert MATMUL.flop() == 2 * 4 * 8 * 16
    assert MATMUL.stored_bytes() == 8 * 16 * 2
    assert prefill.flop() == 4 * 2 * 4 * (1 + 2 + 3) * 8
    assert decode.flop() == 4 * 2 * 4 * 3 * 8
    assert decode.stored_bytes() == 2 * 2 * 3 * 2 * 8 * 2
    assert moe.flop() == 2 * 5 * 2 * (2 * 4 * 3 + 3 * 4)
    assert moe.stored_bytes() == 7 * (2 * 3 * 4 + 4 * 3) * 2


def test_weights_are_rotated_until_they_exceed_the_cache() -> None:
    """256 bytes of weights, a cache of 1000: 12 copies reach three caches, one more is spare."""
    copies = rotations(target(), MATMUL)
    assert copies == 13
    assert (copies - 1) * MATMUL.stored_bytes() >= 3 * 1000
    assert rotations(target(memory_bytes=4 * MATMUL.tensor_bytes()), MATMUL) == 2


def test_a_profile_is_taken_up_where_it_was_cut_off(tmp_path: Path) -> None:
    """The half-written last line goes, the rows before it stay, the next one follows them."""
    path = tmp_path / "sub" / "ops.csv"
    other = Point(op="copy", dtype="bf16", message_bytes=64, mode="eager", backend="torch")
    with Table(path, "a machine") as table:
        table.add(row())
    path.write_bytes(path.read_bytes() + b"matmul,bf16,99")
    with Table(path, "a machine") as table:
        assert [kept.point for kept in table.rows] == [MATMUL]
        table.add(row(other))
    rows, size = read_rows(path)
    assert [kept.point for kept in rows] == [MATMUL, other]
    assert size == path.stat().st_size


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    """Sizes that an operator lacks are empty cells, and the header is what users rely on."""
    path = tmp_path / "ops.csv"
    with Table(path, "a machine") as table:
        table.add(row())
    header, cells = list(csv.reader(path.open(encoding="utf-8")))
    assert tuple(header) == COLUMNS
    assert dict(zip(header, cells, strict=True))["tokens"] == ""
    assert read_rows(path)[0] == [row()]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "other columns"),
        ("hello", "something else"),
        (",".join(COLUMNS) + "\nmatmul,bf16\n", "line 2: 2 cells"),
        (",".join(COLUMNS) + "\n" + ",".join(row().cells()).replace("0.001,", "x,"), ""),
        (",".join(COLUMNS) + "\n" + ",".join(row().cells()).replace("0.001,", "x,") + "\n", "'x'"),
        (",".join(COLUMNS) + "\n" + ",".join(row(seconds=-1.0).cells()) + "\n", "above 0"),
    ],
)
def test_another_file_is_never_written_over(tmp_path: Path, text: str, says: str) -> None:
    """A file that is no profile is refused and stays; an unfinished row alone is forgiven."""
    path = tmp_path / "ops.csv"
    path.write_text(text, encoding="utf-8")
    if not says:
        assert read_rows(path)[0] == []
        return
    with pytest.raises(InputError, match=says):
        Table(path, "a machine")
    assert path.read_text(encoding="utf-8") == text


def test_one_profile_holds_one_device(tmp_path: Path) -> None:
    """Two machines in one file would be fitted as one."""
    path = tmp_path / "ops.csv"
    with Table(path, "one") as table:
        table.add(row(device="one"))
    with pytest.raises(InputError, match="is of one, this is two"):
        Table(path, "two")


def test_a_rate_above_the_machines_is_refused() -> None:
    """An H200 has 989 TFLOP/s in bf16 and 4.8 TB/s; clocks boost a little above."""
    big = Point(op="matmul", dtype="bf16", m=8192, n=8192, k=8192)
    seconds = big.flop() / 989e12
    ceiling = ceiling_of("NVIDIA H200")
    assert impossible(big, Timing(seconds, seconds, 5), ceiling, 0.0) == ""
    assert "FLOP/s" in impossible(big, Timing(seconds, seconds / 2, 5), ceiling, 0.0)
    assert "bytes/s" in impossible(MATMUL, Timing(1e-6, 1e-6, 5), ceiling, 6e6)
    assert "0 s" in impossible(MATMUL, Timing(0.0, 0.0, 5), ceiling, 0.0)


def test_the_ascend_names_of_the_runtime_are_known() -> None:
    """`torch.npu` says Ascend910B2 where we say 910b2."""
    assert ceiling_of("Ascend910B2").bytes_per_s < ceiling_of("NVIDIA H200").bytes_per_s
    assert ceiling_of("some new chip").bytes_per_s > 1e14


@given(st.floats(1e-9, 1.0), st.floats(1.0, 100.0))
def test_what_is_possible_stays_so_when_slower(seconds: float, factor: float) -> None:
    """The check has no other edge than too fast."""
    ceiling, slower = ceiling_of("NVIDIA H200"), seconds * factor
    if not impossible(MATMUL, Timing(seconds, seconds, 5), ceiling, 256.0):
        assert impossible(MATMUL, Timing(slower, slower, 5), ceiling, 256.0) == ""


def test_only_what_no_cache_holds_counts_as_memory_traffic() -> None:
    """A copy of ten caches does, one of a cache does not; weights do once rotated."""
    small = Point(op="copy", dtype="bf16", message_bytes=1000)
    large = Point(op="copy", dtype="bf16", message_bytes=10_000)
    assert cold_bytes(small, 1000.0) == 0.0
    assert cold_bytes(large, 1000.0) == 20_000.0
    assert cold_bytes(MATMUL, 1000.0, copies=13) == 256.0
    assert cold_bytes(MATMUL, 1000.0, copies=1) == 0.0


def test_peaks_are_the_best_medians() -> None:
    """The faster of two products, and the shorter of two calls."""
    fast = Point(op="matmul", dtype="bf16", m=40, n=8, k=16, mode="eager", backend="linear")
    best = {p.what: p for p in peaks([row(seconds=1e-3), row(fast, 2e-3)], 1000.0)}
    assert best["matmul bf16"].value == fast.flop() / 2e-3
    assert best["shortest call, eager"].value == 1e-3


def test_operators_that_a_device_lacks_are_left_out() -> None:
    """int8 rows below cuda's least, rope fused on an npu, what does not fit in memory."""
    int8 = Point(op="matmul", dtype="int8", m=1, n=64, k=64)
    rope = Point(
        op="rope", dtype="bf16", tokens=4, heads=2, kv_heads=1, head_dim=8, backend="fused"
    )
    ops = ("matmul", "rope")
    assert operator_points(target(kind="cuda"), [int8], ops) == []
    assert [p.backend for p in operator_points(target(), [int8], ops)] == ["int_mm"]
    assert operator_points(target(kind="npu"), [rope], ops) == []
    assert [p.backend for p in operator_points(target(), [rope], ops)] == ["inductor"]
    assert operator_points(target(memory_bytes=100.0), [rope], ops) == []


def test_groups_are_powers_of_two_and_all_ranks() -> None:
    """Six ranks: 2, 4 and 6; a message that six ranks cannot share evenly twice is left out."""
    assert group_sizes(8) == (2, 4, 8)
    assert group_sizes(6) == (2, 4, 6)
    assert group_sizes(2) == (2,)
    point = Point(op="all_to_all", dtype="bf16", message_bytes=4096)
    found = collective_points(target(), [point], COLLECTIVES, 6, "gloo")
    assert [(p.ranks, p.mode) for p in found] == [(2, "eager"), (4, "eager")]


def test_products_of_many_rows_heat_the_device_and_those_of_few_do_not() -> None:
    """128 rows of a large product do 128 FLOP a byte of weights, less its input and output."""
    few, many = (Point(op="matmul", dtype="bf16", m=m, n=8192, k=8192) for m in (64, 128))
    assert not heats(few)
    assert heats(many)
    assert not heats(Point(op="attention_decode", dtype="bf16", batch=8, tokens=512, heads=32,
                           kv_heads=8, head_dim=128))  # fmt: skip


def test_what_heats_the_device_is_measured_after_the_rest() -> None:
    """A device that comes from its power limit runs the next short call slower."""
    hot = Point(op="matmul", dtype="bf16", m=4096, n=4096, k=4096)
    cold = [Point(op="matmul", dtype="bf16", m=m, n=4096, k=4096) for m in (1, 2)]
    assert left_to_do([cold[0], hot, cold[1]], []) == [*cold, hot]
    assert left_to_do([hot, *cold], [row(cold[0])]) == [cold[1], hot]


@pytest.mark.parametrize(
    ("capability", "cudnn", "backend"),
    [((9, 0), 91900, "sdpa_cudnn"), ((9, 0), 90000, "sdpa_flash"), ((8, 0), 91900, "sdpa_flash")],
)
def test_attention_is_measured_with_the_kernel_that_pytorch_picks(
    capability: tuple[int, int], cudnn: int, backend: str
) -> None:
    """cuDNN's on Hopper from 9.15 on, unless the grid names another one."""
    torch = SimpleNamespace(backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: cudnn)))
    runtime = SimpleNamespace(get_device_capability=lambda: capability, CUDAGraph=object)
    device = target(kind="cuda", torch=torch, runtime=runtime)
    plain = Point(op="attention_decode", dtype="bf16", batch=1, tokens=8, heads=2, kv_heads=1,
                  head_dim=64)  # fmt: skip
    named = replace(plain, backend="sdpa_flash")
    found = operator_points(device, [plain, named], ("attention_decode",))
    assert [point.backend for point in found] == [backend, "sdpa_flash"]


def test_a_cache_that_is_written_to_is_rotated_as_one_that_is_read() -> None:
    """1024 positions at least, 2 kv heads of 64 in bf16: 256 KiB a sequence."""
    point = Point(op="kv_append", dtype="bf16", batch=3, tokens=1, kv_heads=2, head_dim=64)
    assert point.stored_bytes() == 3 * 1024 * 2 * 64 * 2
    assert rotations(target(cache_bytes=1e6), point) == 5
