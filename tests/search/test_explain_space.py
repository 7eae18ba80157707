"""`search --explain-space`: each strategy counts once, by the rule that removes it or as left."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given as given_case
from hypothesis import settings
from tests.search.disagg_cases import disagg_cases
from tests.search.oracle import dense, small_case, sparse

from shardplan.models.errors import InfeasibleError
from shardplan.search.api import search
from shardplan.search.disagg import search_disagg
from shardplan.search.disagg_question import DisaggQuestion
from shardplan.search.explain_space import count_pools, explain_space
from shardplan.search.legality import broken_pair_rules, broken_rules, first_broken_rule
from shardplan.search.main import run
from shardplan.search.request import Asked
from shardplan.search.rule_counts import SpaceRules, count_rules
from shardplan.search.rulebook import Subject, rules


def asked(**given: Any) -> Asked:
    """A small question on one Atlas 800T A2."""
    return Asked(**{"model": "mixtral-8x7b", "cluster": "atlas-800t-a2", **given})


@pytest.mark.parametrize("spec", [dense(), sparse()], ids=["dense", "experts"])
def test_counts_are_those_of_a_loop_over_every_layout(spec: Any) -> None:
    """First broken, broken at all, and left, each layout looked at by itself."""
    case = small_case(spec, cards=8)
    space, found = case.space(), count_rules(case.space())
    first = dict.fromkeys(rules(), 0)
    alone = dict(first)
    legal = 0
    for par in (replace(one, order=o) for one in space.raw() for o in space.raw_orders_of(one)):
        one = Subject(spec=spec, cluster=space.cluster, engine=space.engine, parallel=par)
        name = first_broken_rule(one)
        if name is None:
            legal += space.cuts_of(par) * space.per_layout
        else:
            first[name] += space.cuts_of(par) * space.per_layout
        for broken in broken_rules(one):
            alone[broken] += space.cuts_of(par) * space.per_layout
    assert found.left == legal
    assert found.legal_layouts == len(space.layouts)
    assert sum(one.first for one in found.rules) + found.left == found.size == space.size
    for rule in found.rules:
        assert (rule.first, rule.alone) == (first[rule.id], alone[rule.id])
        assert rule.first <= rule.alone
    assert not {one.id for one in found.rules} & set(found.not_binding)


def test_switches_are_counted_where_the_layout_is_legal() -> None:
    """Fused collectives on: of tp 1, 2, 4 and 8 and sp, three layouts without sp may have it."""
    case = small_case(dense(heads=8), cards=8)
    fused = replace(case.choices[0], fused_collectives=True)
    space = replace(case, choices=(case.choices[0], fused)).space()
    found = count_rules(space)
    per = {one.id: one.first for one in found.rules}
    free = [par for par in space.layouts if space.broken_switch(par, fused) is None]
    grid = len(space.batches) * len(space.chunks)
    every, kept = (
        sum(space.cuts_of(par) * len(space.orders_of(par)) for par in pars)
        for pars in (space.layouts, free)
    )
    assert 0 < len(free) < len(space.layouts)
    assert per["fused-group"] + per["fused-sp"] == (every - kept) * grid
    assert found.left == (every + kept) * grid


def test_the_search_prunes_what_is_explained() -> None:
    """The certificate of a search over the same space has the same counts."""
    question = asked(cards=2, weight_dtype="w8a8", input_len=256, output_len=64)
    (found,) = explain_space(question)
    assert isinstance(found, SpaceRules)
    pruned = search(
        "mixtral-8x7b", "atlas-800t-a2", cards=2, weight_dtype="w8a8", input_len=256, output_len=64
    ).plan.certificate
    assert pruned.space_size == found.size
    told = {f"rule {one.id}": one.first for one in found.rules if one.first}
    assert {k: v for k, v in pruned.pruned_by.items() if k.startswith("rule ")} == told


def test_json_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """Each rule with its sentence, scope, source and counts; what is left is left to price."""
    line = "search --model mixtral-8x7b --cluster atlas-800i-a3 --explain-space --json"
    assert run(line.split()) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["left"] == told["size"] - sum(one["first"] for one in told["rules"])
    by = {one["id"]: one for one in told["rules"]}
    assert by["gathered-a3"]["devices"] == ["a3"]
    assert by["gathered-a3"]["alone"] >= by["gathered-a3"]["first"] > 0
    assert by["tp-heads"]["engines"] == "all"
    assert all(one["sentence"] and one["source"] for one in told["rules"])
    assert "pp-engine" in told["not_binding"]


def test_tables_name_the_rules_that_remove_something(capsys: pytest.CaptureFixture[str]) -> None:
    line = "search --model mixtral-8x7b --cluster atlas-800i-a3 --explain-space"
    assert run(line.split()) == 0
    text = capsys.readouterr().out
    assert "gathered-a3" in text
    assert "mla-310p" not in text
    assert "are left to price" in text


@pytest.mark.parametrize("search_too", [False, True], ids=["explain", "search"])
def test_a_space_that_rules_empty_names_them_and_what_would_help(search_too: bool) -> None:
    """Latent attention on 310P: no number of cards helps under vLLM, another engine does."""
    given: dict[str, Any] = {"model": "deepseek-v2-lite", "cluster": "atlas-300i-duo", "cards": 4}
    with pytest.raises(InfeasibleError) as caught:
        search(**given) if search_too else explain_space(Asked(**given))
    assert caught.value.exit_code == 3
    assert "mla-310p (no latent attention on 310P)" in caught.value.got
    engine = re.findall(r"--engine-profile (\S+)", caught.value.hint)[0]
    assert explain_space(Asked(**given, engine_profile=engine))[0].left > 0


def test_the_nearest_number_of_cards_is_told() -> None:
    """One card has no all_reduce to fuse; two have."""
    given: dict[str, Any] = {
        "model": "llama-65b",
        "cluster": "atlas-800t-a2",
        "fused_collectives": "on",
    }
    with pytest.raises(InfeasibleError, match="fused-group") as caught:
        explain_space(Asked(**given, cards=1))
    assert caught.value.hint == "try --cards 2"
    assert explain_space(Asked(**given, cards=2))[0].left > 0


@settings(max_examples=25)
@given_case(disagg_cases())
def test_counts_of_pools_are_those_of_a_loop_over_every_pair(question: DisaggQuestion) -> None:
    """Each deployment counts once: by a rule of an instance, by one of the pair, or as left."""
    found = count_pools(question)
    shared, most = question.shared, (question.prefill.cards, question.decode.cards)
    size = paired = left = 0
    first: dict[str, int] = {}
    for one in question.prefill.ways():
        for two in question.decode.ways():
            subjects = question.prefill.subject(one), question.decode.subject(two)
            counts = sum(
                not shared or x * one.ranks + y * two.ranks <= most[1]
                for x in range(1, most[0] // one.ranks + 1)
                for y in range(1, most[1] // two.ranks + 1)
            )
            for pool, par in ((question.prefill, one), (question.decode, two)):
                counts *= pool.cuts_of(par) * pool.per_cut
            size += counts
            if any(map(broken_rules, subjects)):
                continue
            paired += counts
            names = broken_pair_rules(*subjects)
            left += 0 if names else counts
            if names and counts:
                first[names[0]] = first.get(names[0], 0) + counts
    assert (found.size, found.paired, found.left) == (size, paired, left)
    assert found.size == search_disagg(question).space_size
    assert {one.id: one.first for one in found.pairs if one.first} == first
    for pool, side in ((question.prefill, found.prefill), (question.decode, found.decode)):
        assert side.size == sum(pool.cuts_of(par) * pool.per_cut for par in pool.ways())


def test_pools_are_explained_where_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Either role's instances, their pairs; with auto the one pool before them."""
    line = "search --model mixtral-8x7b --cluster atlas-800t-a2 --explain-space --serving"
    assert run([*line.split(), "disagg"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "prefill instances: rules on mixtral-8x7b" in text
    assert "pd-decode-pp" in text
    assert "of pairs that may serve together are left to price" in text
    assert run([*line.split(), "auto", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["agg"]["left"] > 0
    pools = told["disagg"]
    assert pools["left"] == pools["paired"] - sum(one["first"] for one in pools["pairs"])


def test_pools_that_rules_empty_name_them() -> None:
    with pytest.raises(InfeasibleError, match="pd-310p") as caught:
        explain_space(Asked(model="qwen3-8b", cluster="atlas-300i-duo", serving="disagg"))
    assert caught.value.exit_code == 3
