"""The quantization command that goes with a plan, as a shell would run it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.search.emit_cases import emit_plan, moe, parser_of, run_script

from shardplan.search.emit import emit

SOURCE = "https://huggingface.co/Qwen/Qwen3-8B/blob/main/config.json"


@pytest.mark.parametrize(
    ("strategy", "named"),
    [
        ({"weight_dtype": "w8a8"}, "w8a8"),
        ({"weight_dtype": "w8a8", "kv_dtype": "int8"}, "w8a8c8"),
        ({"weight_dtype": "w4a8"}, "w4a8"),
        ({"weight_dtype": "w8a16"}, "w8a16"),
    ],
)
def test_the_plans_types_are_made_by_one_command(
    tmp_path: Path, strategy: dict[str, Any], named: str
) -> None:
    """From the 16-bit folder to the folder that the servers read; the model by its own name."""
    plan = emit_plan(model={"name": "qwen3-8b", "source": SOURCE}, **strategy)
    emit(plan, "vllm-ascend", tmp_path / "out")
    script = tmp_path / "out" / "quantize.sh"
    (call,) = run_script(script, "msmodelslim", FLOAT_MODEL="in $x", MODEL="out")
    assert call.words[0] == "quant"
    flags = parser_of("modelslim", "quant").parse_args(call.words[1:])
    assert (flags.model_path, flags.save_path) == ("in $x", "out")
    assert (flags.model_type, flags.quant_type) == ("Qwen3-8B", named)
    assert flags.trust_remote_code == "False"
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "./quantize.sh" in readme
    assert "quantize.sh" in readme.partition("Files: ")[2].partition("\n")[0]


def test_a_model_without_a_repository_asks_for_its_name(tmp_path: Path) -> None:
    """ModelSlim registers models by name; none is guessed."""
    emit(emit_plan(weight_dtype="w8a8", model={"source": "x"}), "vllm-ascend", tmp_path / "out")
    script = tmp_path / "out" / "quantize.sh"
    with pytest.raises(subprocess.CalledProcessError):
        run_script(script, "msmodelslim", FLOAT_MODEL="a", MODEL="b")
    (call,) = run_script(script, "msmodelslim", FLOAT_MODEL="a", MODEL="b", MODEL_TYPE="Qwen3-8B")
    assert "Qwen3-8B" in call.words
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "MODEL_TYPE=NAME ./quantize.sh" in readme


@pytest.mark.parametrize(
    "changes", [{}, {"weight_dtype": "w4a16", "ep": 8, "model": moe()}, {"kv_dtype": "int8"}]
)
def test_no_command_where_no_named_type_makes_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    """16-bit weights need none, and what ModelSlim has no named type for is not made up."""
    emit(emit_plan(**changes), "vllm-ascend", tmp_path / "out")
    assert not (tmp_path / "out" / "quantize.sh").exists()
    assert "quantize.sh" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
