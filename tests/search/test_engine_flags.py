"""The reader of released argument definitions, on sources of the shapes that engines have."""

from __future__ import annotations

import tomllib

import pytest
from tests.search.engine_flags import (
    literal_flags,
    sglang_fields,
    toml_of,
    vllm_engine,
    vllm_fields,
)

from shardplan.search.emit.common import table

VLLM = """
class ParallelConfig:
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    numa_bind: bool | None = None
class EngineArgs:
    @staticmethod
    def add_cli_args(parser):
        parallel_kwargs = get_kwargs(ParallelConfig)
        group = parser.add_argument_group(title="x")
        group.add_argument("--tensor-parallel-size", "-tp",
                           **parallel_kwargs["tensor_parallel_size"])
        group.add_argument("--enable-expert-parallel",
                           **parallel_kwargs["enable_expert_parallel"])
        group.add_argument("--numa-bind", **parallel_kwargs["numa_bind"])
        group.add_argument("--headless", action="store_true")
        group.add_argument("--swap-space", type=float)
"""
SGLANG = """
class Parallel:
    tp_size: A[int, Arg(help="x", aliases=["--tensor-parallel-size"])] = 1
    enable_dp_attention: A[bool, "help"] = False
    hidden: A[int, Arg(help="x", no_cli=True)] = 0
    moe_mode: A[str, Arg(help="x", cli_name="--deepep-mode")] = "auto"
    plain: int = 0
"""


def test_fields_decide_what_is_a_switch() -> None:
    found = vllm_engine(VLLM, vllm_fields(VLLM))
    assert found == {
        "--tensor-parallel-size": False,
        "--enable-expert-parallel": True,
        "--numa-bind": True,
        "--headless": True,
        "--swap-space": False,
    }


def test_actions_decide_where_they_are_written_out() -> None:
    text = 'p.add_argument("--a", action="store_true")\np.add_argument("-b", "--bb", type=int)'
    assert literal_flags(text) == {"--a": True, "--bb": False}


def test_fields_of_a_namespace_are_flags_unless_they_say_no() -> None:
    assert sglang_fields(SGLANG) == {
        "--tp-size": False,
        "--tensor-parallel-size": False,
        "--enable-dp-attention": True,
        "--deepep-mode": False,
    }


def test_the_table_is_toml_with_a_source() -> None:
    text = toml_of("toy", "1.0", [("serve", "toy/args.py", {"--b": True, "--a": False})])
    read = tomllib.loads(text)
    assert read["release"]["toy"] == "1.0"
    (group,) = read["flags"]
    assert (group["values"], group["switches"]) == (["--a"], ["--b"])
    assert group["source"] == "toy 1.0 toy/args.py"


@pytest.mark.parametrize(
    ("name", "package", "known"),
    [
        ("vllm_flags", "vllm", ["--data-parallel-start-rank", "--kv-transfer-config"]),
        ("sglang_flags", "sglang", ["--dp-size", "--disaggregation-mode", "--moe-a2a-backend"]),
    ],
)
def test_a_shipped_table_is_of_the_release_that_its_target_names(
    name: str, package: str, known: list[str]
) -> None:
    target = {"vllm_flags": "vllm_ascend", "sglang_flags": "sglang"}[name]
    assert table(name)["release"][package] == table(target)["engine"][package]
    values = [flag for group in table(name)["flags"] for flag in group["values"]]
    assert set(known) <= set(values)
    assert len(values) == len({*values}) or package == "vllm"
