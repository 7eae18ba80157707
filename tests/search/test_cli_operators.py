"""Commands on plans of operators: search, verify, emit; what each refuses, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.search.onnx_files import branch, cut_short, huge, mlp, relu, without_weights
from tests.search.test_cli_bad_input import refused

from shardplan.search.main import run
from shardplan.search.oplevel.plan import OperatorPlan
from shardplan.search.plan import Plan
from shardplan.search.plan_file import load_plan

onnx = pytest.importorskip("onnx")
CLUSTER = ["--cluster", "atlas-800t-a2"]
Capture = pytest.CaptureFixture[str]


def searched(folder: Path, *more: str) -> Path:
    """The plan of an MLP in whose memory no rank can hold the whole."""
    model = str(mlp(folder / "mlp.onnx"))
    where = ["--mesh", "4", "--memory-gib", "0.0009", "--out", str(folder / "out")]
    assert run(["search", "--model", model, *CLUSTER, *where, *more]) == 0
    return folder / "out" / "plan.json"


def test_search_writes_the_plan_its_tables_and_a_summary(tmp_path: Path, capsys: Capture) -> None:
    """One answer, whole on disk."""
    file = searched(tmp_path)
    told = capsys.readouterr().out
    for words in ("plan: mesh x4", "inserted collectives", "gap 0", "proof: 6 checks", "emit"):
        assert words in told
    assert {one.name for one in file.parent.iterdir()} == {
        "plan.json", "operators.csv", "moves.csv", "report.html", "timing.json",
    }  # fmt: skip
    plan = load_plan(file)
    assert isinstance(plan, OperatorPlan)
    assert plan.describe() == "x4"
    rows = (file.parent / "moves.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + len(plan.moves) > 1


def test_json_is_the_plan_alone(tmp_path: Path, capsys: Capture) -> None:
    """The bytes of the file, as JSON."""
    file = searched(tmp_path, "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads(file.read_text(encoding="utf-8"))
    assert shown["kind"] == "operators"


def test_verify_reads_the_file_of_the_plan(tmp_path: Path, capsys: Capture) -> None:
    """Moved, it is named; another one is refused; so are levels that there are not."""
    file = str(searched(tmp_path))
    capsys.readouterr()
    assert run(["verify", file]) == 0
    assert "6 checks, all hold" in capsys.readouterr().out
    assert run(["verify", file, "--level", "0", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["checks"]) == 5
    refused(["verify", file, "--level", "2"], capsys, "level 0 or 1")
    (tmp_path / "mlp.onnx").rename(tmp_path / "moved.onnx")
    refused(["verify", file], capsys, "no such file")
    assert run(["verify", file, "--model", str(tmp_path / "moved.onnx")]) == 0
    capsys.readouterr()
    other = mlp(tmp_path / "other.onnx", ffn=2048)
    refused(["verify", file, "--model", str(other)], capsys, "the graph that it was made of")


def test_a_plan_that_does_not_compute_the_same_fails(tmp_path: Path, capsys: Capture) -> None:
    """Exit code 1, and what failed."""
    file = searched(tmp_path)
    data = json.loads(file.read_text(encoding="utf-8"))
    del data["moves"][0]
    file.write_text(json.dumps(data), encoding="utf-8")
    capsys.readouterr()
    assert run(["verify", str(file)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_commands_of_deployments_say_what_they_were_given(tmp_path: Path, capsys: Capture) -> None:
    """Whichever reads a plan."""
    file = str(searched(tmp_path))
    capsys.readouterr()
    out = ["--out", str(tmp_path / "deploy")]
    refused(["emit", file, "--target", "atc", *out], capsys, "takes plans of: deployment", "onnx")
    refused(["simulate", file], capsys, "a plan of the operators of 'mlp'")
    assert not (tmp_path / "deploy").exists()


def test_symbolic_dims_need_sizes(tmp_path: Path, capsys: Capture) -> None:
    """And verify reads the graph with the same."""
    model = str(mlp(tmp_path / "free.onnx", rows="rows"))
    asked = ["search", "--model", model, *CLUSTER, "--mesh", "2", "--out", str(tmp_path / "o")]
    refused(asked, capsys, "every symbolic dim needs a size", "dim=rows")
    refused([*asked, "--sizes", "rows=4,row=2"], capsys, "size of 'row'", "its symbols: rows")
    assert run([*asked, "--sizes", "rows=32"]) == 0
    plan = load_plan(tmp_path / "o" / "plan.json")
    assert isinstance(plan, OperatorPlan)
    assert plan.request.sizes == {"rows": 32}
    assert run(["verify", str(tmp_path / "o" / "plan.json")]) == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (cut_short, "file="),
        (without_weights, "gone.bin"),
        (huge, "bytes"),
        (branch, "If"),
        (lambda path: relu(path, opset=7), "opset"),
        (lambda path: relu(path, opset=99), "opset"),
        (lambda path: relu(path, dtype=14), "not complex"),
    ],
    ids=["cut", "no weights", "huge", "branch", "old opset", "new opset", "complex"],
)
def test_files_that_are_not_read_end_in_one_line(
    make: Callable[[Path], Path], words: str, tmp_path: Path, capsys: Capture
) -> None:
    """Nothing is written."""
    model = make(tmp_path / "model.onnx")
    out = tmp_path / "out"
    refused(["search", "--model", str(model), *CLUSTER, "--out", str(out)], capsys, words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mesh", "2y4"], "a mesh is auto"),
        (["--mesh", "3x5"], "fit in the cluster"),
        (["--mesh", "8", "--cards", "4"], "fill the cards"),
        (["--stages", "3"], "share the ranks evenly"),
        (["--stages", "2", "--mesh", "2"], "at least one layer"),
        (["--sizes", "rows"], "NAME=N"),
        (["--memory-gib", "0"], "above 0"),
        (["--ttft-ms", "3"], "`ttft_ms` belongs to the deployment"),
        (["--engine", "tpe"], "`engine` belongs to the deployment"),
        (["--ablation"], "are of deployments"),
        (["--sweep", "cards=1,2"], "are of deployments"),
        (["--explain-space"], "are of deployments"),
    ],
)
def test_options_that_do_not_fit_end_in_one_line(
    options: list[str], words: str, tmp_path: Path, capsys: Capture
) -> None:
    """With what to try."""
    model = str(mlp(tmp_path / "mlp.onnx"))
    refused(["search", "--model", model, *CLUSTER, "--operators", *options], capsys, words)


def test_memory_that_nothing_fits_in_is_told(tmp_path: Path, capsys: Capture) -> None:
    """Exit code 3, by how much."""
    model = str(mlp(tmp_path / "mlp.onnx"))
    asked = ["search", "--model", model, *CLUSTER, "--mesh", "2", "--memory-gib", "1e-5"]
    assert run(asked) == 3
    assert "least that any split needs" in capsys.readouterr().err


def test_plan_files_of_either_kind_are_told_apart(tmp_path: Path, capsys: Capture) -> None:
    """What is neither is refused as a plan.json."""
    assert isinstance(load_plan(searched(tmp_path)), OperatorPlan)
    asked = ["search", "--model", "llama-3.1-8b", *CLUSTER, "--cards", "2", "--json"]
    assert run([*asked, "--out", str(tmp_path / "d")]) == 0
    assert isinstance(load_plan(tmp_path / "d" / "plan.json"), Plan)
    capsys.readouterr()
    for text in ("[]", "nothing", '{"kind": "operators"}', '{"kind": 3}'):
        (tmp_path / "x.json").write_text(text, encoding="utf-8")
        refused(["verify", str(tmp_path / "x.json")], capsys, "x.json")
