"""Weight types by group of layers: spelling, memory by hand, and prices of the parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.costmodel.priced import PHASES, Priced, load, price

from shardplan.costmodel.bulk import Dtypes, Fleet
from shardplan.costmodel.load import Load
from shardplan.costmodel.steps import step_seconds
from shardplan.costmodel.weight_types import canonical, parts, type_of, with_types
from shardplan.models.catalog import load_model
from shardplan.models.errors import InputError
from shardplan.models.graph import Phase
from shardplan.models.parallel import Parallelism
from shardplan.models.weight_groups import WEIGHT_GROUPS, WeightGroup, groups_of

_types = st.sampled_from(["bf16", "w8a8", "w4a8"])
_named = st.dictionaries(st.sampled_from(WEIGHT_GROUPS), _types)


def spelled(default: str, groups: dict[WeightGroup, str]) -> str:
    return ",".join((default, *(f"{group}={dtype}" for group, dtype in groups.items())))


@given(default=_types, groups=_named, other=_types, others=_named)
def test_equal_meanings_are_spelled_alike_and_keep_their_meaning(
    default: str, groups: dict[WeightGroup, str], other: str, others: dict[WeightGroup, str]
) -> None:
    one, two = spelled(default, groups), spelled(other, others)

    def means(text: str) -> list[str]:
        return [type_of(text, group) for group in WEIGHT_GROUPS]

    assert means(canonical(one)) == means(one)
    assert canonical(canonical(one)) == canonical(one)
    assert (canonical(one) == canonical(two)) is (means(one) == means(two))
    assert set(parts(one)) == set(means(one))


@pytest.mark.parametrize(
    ("text", "model", "wanted"),
    [
        ("w8a8", "deepseek-v3", "w8a8"),
        ("w8a8, experts = w4a8", "deepseek-v3", "w8a8,experts=w4a8"),
        ("bf16,ffn=w8a8,experts=w8a8,shared=w8a8", "deepseek-v3", "w8a8,attention=bf16"),
        ("bf16,attention=bf16,ffn=w8a8,experts=w8a8", "deepseek-v3", "bf16,experts=w8a8,ffn=w8a8"),
        ("w8a8,experts=w4a8", "llama-2-70b", "w8a8"),  # it has no experts
        ("bf16,ffn=w8a8", "qwen3-30b-a3b", "bf16"),  # nor dense layers
        ("w8a8,experts=w4a8", "qwen3-30b-a3b", "w8a8,experts=w4a8"),
    ],
)
def test_the_spelling_is_that_of_the_models_groups(text: str, model: str, wanted: str) -> None:
    assert canonical(text, groups_of(load_model(model))) == wanted


@pytest.mark.parametrize(
    "text",
    ["w8a8,", ",ffn=w8a8", "ffn=w8a8", "w8a8,head=bf16", "w8a8,ffn", "w8a8,ffn=w4a8,ffn=w4a8"],
)
def test_what_is_not_of_the_form_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"w8a8,experts=w4a8"):
        parts(text)
    with pytest.raises(InputError):
        with_types(text, str.lower)


def test_memory_by_group_by_hand() -> None:
    """qwen3-30b-a3b on one rank: 48 layers, 32 heads on 4 of 128, 128 experts of width 768."""
    case = price(load_model("qwen3-30b-a3b"), Parallelism())
    (stage,) = case.graphs["prefill"].stages
    held = case.ledger.weights_bytes
    attention = 48 * (2 * 2048 * 4096 + 2 * 2048 * 512)
    experts = 48 * 128 * 3 * 2048 * 768
    scales = 4 * 48 * (4096 + 2 * 512 + 2048)
    rest = held(stage, "bf16") - 2 * (attention + experts)
    four_bit = experts / 2 + 2 * experts / 128
    assert held(stage, "w8a8,experts=w4a8") == attention + scales + four_bit + rest
    assert held(stage, "bf16,experts=w4a16") == 2 * attention + four_bit + rest


def seconds(case: Priced, phase: Phase, dtype: str, tokens: int) -> float:
    new, prefix = (1.0, 2048.0) if phase == "decode" else (float(tokens), 0.0)
    kinds: dict[str, Any] = {"kv_dtype": "bf16", "attention": "flash"}
    batch = float(tokens) if phase == "decode" else 1.0
    total, _ = step_seconds(
        case.model, phase, batch=batch, new=new, prefix=prefix, weight_dtype=dtype, **kinds
    )
    return float(total)


@pytest.mark.parametrize("name", ["dense tp8", "shared experts tp8", "moe dp4 tp2 ep8"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", ["bf16", "w8a8", "w4a16"])
def test_a_mixed_type_of_one_type_is_that_type(name: str, phase: Phase, dtype: str) -> None:
    """To the bit, priced as it stands and not in its short spelling."""
    case = load(name)
    mixed = f"{dtype},attention={dtype},experts={dtype}"
    assert seconds(case, phase, mixed, 64) == seconds(case, phase, dtype, 64)
    for stage in case.graphs["prefill"].stages:
        assert case.ledger.weights_bytes(stage, mixed) == case.ledger.weights_bytes(stage, dtype)


@pytest.mark.parametrize("phase", PHASES)
def test_groups_are_priced_apart_and_their_changes_add_up(phase: Phase) -> None:
    """Layers run one after another: a change of one group does not touch the price of others."""
    case = load("shared experts tp8")
    base = seconds(case, phase, "bf16", 64)
    one = seconds(case, phase, "bf16,experts=w8a8", 64) - base
    two = seconds(case, phase, "w8a8,experts=bf16", 64) - base
    assert one != 0.0 != two
    assert seconds(case, phase, "w8a8", 64) - base == pytest.approx(one + two, rel=1e-9)


def test_a_norm_quantizes_for_its_readers_alone() -> None:
    """Attention in 16 bit: the norm before it writes 16 bit, whatever the experts are."""
    model = load("dense tp8").model
    norms = [row for row in model.rows["prefill"]["dense"] if row.kind == "add_rmsnorm"]
    assert {row.weight_group for row in norms} == {"attention", "ffn"}
    priced = {
        row.weight_group: [
            float(
                model.price(
                    row, Load.of("prefill", model.engine, tokens=512, weight_dtype=one)
                ).total_s
            )
            for one in ("bf16", "w8a8", "w8a8,attention=bf16")
        ]
        for row in norms
    }
    sixteen, eight, mixed = priced["attention"]
    assert mixed == sixteen != eight
    sixteen, eight, mixed = priced["ffn"]
    assert mixed == eight != sixteen


def test_points_of_mixed_types_are_priced_together_as_alone() -> None:
    names = ("dense tp8", "shared experts tp8", "moe dp4 tp2 ep8")
    types = ("bf16", "w8a8", "w8a8,experts=w4a8", "w8a8,attention=bf16")
    models = [load(name).model for name in names]
    choices = [Dtypes(one, "bf16", "flash") for one in types]
    which, choice = (one.ravel() for one in np.meshgrid(np.arange(3), np.arange(4), indexing="ij"))
    fleet = Fleet.of(models, which, choices, choice)
    load_of = Load.of("prefill", models[0].engine, tokens=np.full(12, 512.0))
    together = fleet.parts("token", load_of)[0].total_s
    for place, (model, dtype) in enumerate(zip(which, choice, strict=True)):
        one = Load.of("prefill", models[0].engine, tokens=512.0, weight_dtype=types[dtype])
        alone = models[model].parts("token", one)[0].total_s
        assert together[place] == pytest.approx(float(alone), rel=1e-12)
