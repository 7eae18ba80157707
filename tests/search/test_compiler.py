"""torch.compile(backend="shardplan"): plan, report, delegate; and modules of single ranks."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import shardplan
from shardplan.models.errors import InputError
from shardplan.models.frontends.torch_model import spec_of_module
from shardplan.models.parallel import AXES, Parallelism
from shardplan.search.apply_plan import (
    global_rank,
    place_of_rank,
)
from shardplan.search.plan import Plan
from shardplan.search.plan_file import load_plan
from shardplan.search.report import write_report
from shardplan.search.trial_table import TrialTable

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from shardplan.search.compiler import backend, inner_backend  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def _model() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
        attn_implementation="sdpa",
        dtype="float32",
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def _plan(model: Any, **asked: Any) -> Plan:
    sizes: dict[str, Any] = {
        "cards": 4,
        "input_len": 16,
        "output_len": 8,
        "concurrency": 4,
        "serving": "agg",
    }
    found: Plan = shardplan.search(model, "atlas-800t-a2", **(sizes | asked)).plan
    return found


def _small(x: Any) -> Any:
    """Something to compile."""
    return torch.sin(x) + x


def test_the_backend_is_registered_where_torch_looks() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    value = groups["torch_dynamo_backends"]["shardplan"]
    assert EntryPoint("shardplan", value, "torch_dynamo_backends").load() is backend


@pytest.mark.slow
def test_the_backend_plans_reports_and_hands_on(tmp_path: Path) -> None:
    model, plans, graphs = _model(), list[Plan](), list[Any]()

    def inner(graph: Any, _: Sequence[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    report = tmp_path / "plan.json"
    asked: dict[str, Any] = {
        "model": model,
        "cluster": "atlas-800t-a2",
        "cards": 2,
        "serving": "agg",
    }
    asked |= {"report": report, "on_plan": plans.append, "inner": inner}
    compiled = torch.compile(model, backend=backend, options=asked)
    ids = torch.randint(0, 512, (2, 8))
    with torch.no_grad():
        got, want = compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    assert torch.equal(got, want)
    assert graphs
    assert Plan.load(report).dumps() == plans[0].dumps()
    assert plans[0].strategy.ranks == 2


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_other_backends_compile_by_name(inner: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_small, backend=backend, options={"inner": inner})
    assert torch.allclose(compiled(torch.ones(3)), _small(torch.ones(3)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"inner": "nothing"}, "nothing"),
        ({"inner": "npu"}, "torch_npu"),
        ({"model": "llama-65b"}, "cluster"),
        ({"model": "llama-65b", "cluster": "atlas-800t-a2", "colour": 1}, "colour"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        backend(None, (), options={"inner": "eager", **options})


def test_a_callable_is_taken_as_it_is() -> None:
    assert inner_backend(print) is print


def test_a_module_is_planned_by_its_configuration() -> None:
    model = _model()
    spec = spec_of_module(model)
    assert (spec.hidden, spec.kv_heads, spec.vocab) == (256, 4, 512)
    assert _plan(model).model.architecture == "LlamaForCausalLM"
    with pytest.raises(InputError, match="Linear"):
        spec_of_module(torch.nn.Linear(2, 2))


def test_a_module_that_is_no_decoder_is_planned_by_operators(tmp_path: Path) -> None:
    """Found, reported, and read again in place of a search."""
    module = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64)
    )
    told: list[Any] = []
    asked = {
        "model": module, "inputs": (torch.zeros(4, 64),), "cluster": "atlas-800t-a2",
        "mesh": (2,), "weight_dtype": "bf16", "report": tmp_path / "plan.json",
        "on_plan": told.append, "inner": lambda graph, _: graph,
    }  # fmt: skip
    assert str(backend("graph", (), options=asked)) == "graph"
    assert told[0].dumps() == (tmp_path / "plan.json").read_text(encoding="utf-8")
    again = {name: asked[name] for name in ("on_plan", "inner")}
    backend("graph", (), options={**again, "plan": tmp_path / "plan.json"})
    assert told[1] == load_plan(tmp_path / "plan.json")
    with pytest.raises(InputError, match="plan of a deployment"):
        write_report(told[0], TrialTable({}), tmp_path / "report.html")


def test_ranks_are_numbered_as_the_plan_orders_its_axes() -> None:
    par = Parallelism(tp=2, pp=2, dp=3, order=("dp", "pp", "cp", "tp"))
    places = [place_of_rank(par, rank) for rank in range(par.ranks)]
    assert places[:5] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]
    assert [global_rank(par, *place) for place in places] == list(range(par.ranks))
    assert place_of_rank(Parallelism(tp=2, pp=2, order=AXES), 3) == (1, 1)
    with pytest.raises(InputError, match="rank=12"):
        place_of_rank(par, 12)


@pytest.mark.slow
def test_modules_of_ranks_hold_their_parts_and_compile(tmp_path: Path) -> None:
    model = _model()
    plan = _plan(model)
    strategy = plan.strategy.model_copy(
        update={"tp": 2, "pp": 2, "dp": 1, "sp": False, "stage_layers": (), "order": AXES}
    )
    plan = plan.model_copy(update={"strategy": strategy})
    first = plan.apply(model, 0, batch=2, tokens=8)
    last = plan.apply(model, 3, batch=2, tokens=8)
    assert first.meta["shardplan"]["stage"] == 0
    assert last.meta["shardplan"]["stage"] == 1
    name = "model.model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first.get_parameter(name), model.get_parameter(name[6:])[:128])
    held = sum(one.numel() for rank in (0, 1, 2, 3) for one in _parameters(plan, model, rank))
    norms = 5 * 256
    assert held == sum(one.numel() for one in model.parameters()) + norms
    from shardplan.models.fx.modules import save_weights

    save_weights(first, tmp_path / "rank0.safetensors")
    assert (tmp_path / "rank0.safetensors").stat().st_size > 4 * 128 * 256


def _parameters(plan: Plan, model: Any, rank: int) -> Any:
    return plan.apply(model, rank, batch=2, tokens=8).parameters()


@pytest.mark.slow
def test_decode_takes_and_gives_caches_of_the_rank() -> None:
    model = _model()
    plan = _plan(model)
    strategy = plan.strategy.model_copy(
        update={"tp": 1, "pp": 1, "dp": 1, "sp": False, "stage_layers": (), "order": AXES}
    )
    plan = plan.model_copy(update={"strategy": strategy})
    prefill = plan.apply(model, 0, batch=2, tokens=8)
    decode = plan.apply(model, 0, phase="decode", batch=2, tokens=8)
    ids = torch.randint(0, 512, (2, 9))
    with torch.no_grad():
        _, *caches = torch.compile(prefill, backend="eager", fullgraph=True)(ids[:, :8])
        logits, *grown = decode(ids[:, 8:], *caches)
        want = model(ids, use_cache=False).logits[:, -1:]
    assert torch.allclose(logits, want, atol=1e-5)
    assert [one.shape[2] for one in grown] == [9] * 4


def test_a_module_of_other_sizes_is_refused() -> None:
    plan = _plan("llama-2-13b", cards=8)
    with pytest.raises(InputError, match="other sizes"):
        plan.apply(_model(), 0)
