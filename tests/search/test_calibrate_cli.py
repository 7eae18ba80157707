"""`shardplan calibrate`: what it prints, what it writes, and what takes the result."""

from __future__ import annotations

import csv
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardplan.costmodel.catalog import load_device
from shardplan.costmodel.kernels.base import Machine
from shardplan.costmodel.kernels.matmul import matmul
from shardplan.search.main import run

SAMPLES = Path(__file__).parents[1] / "costmodel" / "profiler_samples"
KERNELS = str(SAMPLES / "kernel_details.csv")
POINT = {
    "model": "llama-3.1-8b", "cluster": "atlas-800t-a2", "tp": "4",
    "phase": "decode", "batch": "16", "tokens": "4096",
}  # fmt: skip
STEP = [word for key, value in POINT.items() for word in (f"--{key}", value)]
PRODUCTS = [(m, n, 4096) for m in (1, 16, 64, 256, 1024, 4096) for n in (1024, 4096, 8192, 12288)]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints as JSON."""
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def step_s(capsys: pytest.CaptureFixture[str], *device: str) -> float:
    """The price of the step that is used throughout."""
    return float(answer(capsys, "estimate", *STEP, *device)["step_s"])


@pytest.fixture
def slow_file(tmp_path: Path) -> Path:
    """kernel_details.csv of a 910B2 whose products take 1.4 times what is priced."""
    path = tmp_path / "kernel_details.csv"
    m, n, k = (np.asarray(axis, dtype=np.float64) for axis in zip(*PRODUCTS, strict=True))
    time = matmul(Machine.of(load_device("910b2")), m, n, k, "bf16", weights="cold")
    head = (
        "Type", "Name", "Start Time(us)", "Duration(us)", "Stream ID", "Input Shapes",
        "Input Data Types", "Output Shapes",
    )  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle)
        table.writerow(head)
        for row, (sizes, us) in enumerate(zip(PRODUCTS, 1.4e6 * time.total_s, strict=True)):
            shapes = f'"{sizes[0]},{sizes[2]};{sizes[1]},{sizes[2]}"'
            start, out = f"{1e6 + 1e4 * row:.3f}\t", f'"{sizes[0]},{sizes[1]}"'
            dtypes = "DT_BF16;DT_BF16"
            cells = ("MatMulV3", f"mm{row}", start, f"{us:.3f}", 2, shapes, dtypes, out)
            table.writerow(cells)
    return path


def test_the_table_says_what_was_read_skipped_and_gained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A person sees each of them."""
    assert run(["calibrate", KERNELS, "--device", "910b2", "--context", "4096"]) == 0
    out, err = capsys.readouterr()
    for word in ("kernel_details.csv", "matmul.bf16", "median", "under 3", "Sort", "not used"):
        assert word in out
    assert "nothing was written" in err


def test_a_slow_machine_costs_more_everywhere(
    slow_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--device and --cluster take the profile; the error on held-out rows is gone."""
    out = tmp_path / "profile.toml"
    found = answer(capsys, "calibrate", str(slow_file), "--device", "910b2", "--out", str(out))
    (section,) = found["sections"]
    assert section["section"] == "matmul.bf16"
    assert section["before"]["median"] == pytest.approx(1 - 1 / 1.4, abs=0.01)
    assert section["after"]["median"] < 0.01
    plain = step_s(capsys)
    by_device = step_s(capsys, "--device", str(out))
    assert 1.05 * plain < by_device < 1.4 * plain
    words = ["--cluster" if word == "--cluster" else word for word in STEP]
    words[words.index("--cluster") + 1] = str(out)
    assert answer(capsys, "estimate", *words)["step_s"] == by_device
    assert answer(capsys, "devices", str(out))["name"] == "910b2-calibrated"


def test_a_profile_searches_and_its_plan_verifies(
    slow_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result is a device like any other."""
    out, folder = tmp_path / "profile.toml", tmp_path / "plan"
    assert run(["calibrate", str(slow_file), "--device", "910b2", "--out", str(out)]) == 0
    words = ["search", "--model", "llama-3.1-8b", "--cluster", str(out), "--cards", "1"]
    assert run([*words, "--input-len", "256", "--output-len", "32", "--out", str(folder)]) == 0
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    assert plan["cluster"]["device"] == "910b2-calibrated"
    assert run(["verify", str(folder / "plan.json")]) == 0
    capsys.readouterr()


def test_the_profile_says_where_it_comes_from_and_is_the_same_each_time(
    slow_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files by digest, rows, version; no date and no path."""
    texts = []
    for name in ("one.toml", "two.toml"):
        out = tmp_path / name
        assert run(["calibrate", str(slow_file), "--device", "910b2", "--out", str(out)]) == 0
        texts.append(out.read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    assert str(tmp_path) not in texts[0]
    table = tomllib.loads(texts[0])
    (file,) = table["provenance"]["files"]
    assert (file["file"], file["rows"], len(file["sha256"])) == ("kernel_details.csv", 24, 64)
    change = table["correction"]["matmul.bf16"]
    assert change["kind"] == "fitted"
    assert (change["rows_fitted"], change["rows_held_out"]) == (24, 24)
    assert "left out in turn" in change["source"]
    capsys.readouterr()


def test_one_measured_step_corrects_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The anchor's step then costs what was measured, marked as spread from one number."""
    want = 1.3 * step_s(capsys)
    out = tmp_path / "profile.toml"
    pairs = ",".join(f"{key}={value}" for key, value in POINT.items())
    anchor = f"{pairs},step_ms={1e3 * want:.6f}"
    found = answer(capsys, "calibrate", "--device", "910b2", "--anchor", anchor, "--out", str(out))
    assert found["anchor"]["factor"] > 1.3
    assert found["anchor"]["kind"] == "derived"
    assert step_s(capsys, "--device", str(out)) == pytest.approx(want, rel=2e-4)
    assert "one end-to-end number" in out.read_text(encoding="utf-8")


def test_an_anchor_leaves_measured_kernels_as_measured(
    slow_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It sets the rest, so that the step is still met."""
    alone, both = tmp_path / "alone.toml", tmp_path / "both.toml"
    base = ["calibrate", str(slow_file), "--device", "910b2", "--out"]
    assert run([*base, str(alone)]) == 0
    want = 1.1 * step_s(capsys, "--device", str(alone))
    pairs = ",".join(f"{key}={value}" for key, value in POINT.items())
    assert run([*base, str(both), "--anchor", f"{pairs},step_ms={1e3 * want:.6f}"]) == 0
    tables = [tomllib.loads(p.read_text(encoding="utf-8"))["correction"] for p in (alone, both)]
    assert tables[0]["matmul.bf16"] == tables[1]["matmul.bf16"]
    assert step_s(capsys, "--device", str(both)) == pytest.approx(want, rel=2e-4)


def test_collectives_of_a_log_are_held_against_the_devices_cluster(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """910b2 is the device of atlas-800t-a2; five sizes are enough."""
    log = str(SAMPLES / "all_reduce_8.log")
    found = answer(capsys, "calibrate", log, "--device", "910b2")
    assert found["cluster"] == "atlas-800t-a2"
    (section,) = found["sections"]
    assert section["section"] == "collectives.mesh.host.all_reduce"
    assert section["shapes"] == 5


REFUSED = {
    "no device": ([KERNELS], "--device"),
    "no files": (["--device", "910b2"], "anchor"),
    "unknown device": ([KERNELS, "--device", "911b"], "unknown device"),
    "not toml": ([KERNELS, "--device", "910b2", "--out", "x.csv"], "TOML"),
    "ranks": ([KERNELS, "--device", "910b2", "--ranks", "1"], "--ranks"),
    "context": ([KERNELS, "--device", "910b2", "--context", "0"], "--context"),
    "name": ([KERNELS, "--device", "910b2", "--name", "a/b"], "name"),
    "twice": ([KERNELS, KERNELS, "--device", "910b2"], "twice"),
    "anchor": (["--device", "910b2", "--anchor", "model=x,speed=3"], "key=value"),
    "anchor lacks": (["--device", "910b2", "--anchor", "model=llama-3.1-8b"], "lacks"),
    "another vendor": ([KERNELS, "--device", "910b2", "--cluster", "hgx-h200"], "vendor"),
    "missing": (["none.csv", "--device", "910b2"], "readable"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_command_ends_in_one_line_and_code_2(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what to do."""
    arguments, says = REFUSED[case]
    assert run(["calibrate", *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("step_ms", "says"), [("0.0001", "host time"), ("1e9", "factor"), ("x", "step_ms")]
)
def test_an_anchor_out_of_reach_is_refused(
    step_ms: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Less than the host takes, a thousand times too much, no number."""
    pairs = ",".join(f"{key}={value}" for key, value in POINT.items())
    assert run(["calibrate", "--device", "910b2", "--anchor", f"{pairs},step_ms={step_ms}"]) == 2
    assert says in capsys.readouterr().err


def test_durations_in_ms_are_refused(
    slow_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would be faster than the device's peak."""
    rows = list(csv.DictReader(slow_file.open(encoding="utf-8", newline="")))
    path = tmp_path / "ms.csv"
    with path.open("w", newline="", encoding="utf-8") as handle:
        table = csv.DictWriter(handle, rows[0].keys())
        table.writeheader()
        for row in rows:
            table.writerow({**row, "Duration(us)": float(row["Duration(us)"]) / 1e3})
    assert run(["calibrate", str(path), "--device", "910b2"]) == 2
    err = capsys.readouterr().err
    assert "ms.csv:2" in err
    assert "in ms" in err


def test_a_profile_is_not_overwritten_or_calibrated_again(
    slow_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless told to; corrections do not pile up."""
    out = tmp_path / "profile.toml"
    words = ["calibrate", str(slow_file), "--device", "910b2", "--out", str(out)]
    assert run(words) == 0
    assert run(words) == 2
    assert run([*words, "--force"]) == 0
    assert run(["calibrate", str(slow_file), "--device", str(out)]) == 2
    assert "profile itself" in capsys.readouterr().err


def test_a_device_from_a_file_is_found_from_the_profile(
    slow_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its path from the profile's folder."""
    shipped = Path(__file__).parents[2] / "costmodel/data/devices/910b2.toml"
    (tmp_path / "mine.toml").write_text(shipped.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "deep").mkdir()
    out = tmp_path / "deep" / "profile.toml"
    device = str(tmp_path / "mine.toml")
    assert run(["calibrate", str(slow_file), "--device", device, "--out", str(out)]) == 0
    assert tomllib.loads(out.read_text(encoding="utf-8"))["base"] == "./../mine.toml"
    assert load_device(out).corrections
    capsys.readouterr()
