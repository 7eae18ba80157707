"""report.html: it tells the plan's numbers, needs nothing from elsewhere, and trusts no name."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.search.plan_factory import make_plan, make_strategy, make_trials

from shardplan.models.errors import InputError
from shardplan.search.plan import BasisShares, Confidence, Plan, WeakestPart
from shardplan.search.report import write_report
from shardplan.search.report.markup import tag
from shardplan.search.report.page import page
from shardplan.search.report.svg import scale
from shardplan.search.report.words import (
    certificate_sentences,
    command,
    limit_time,
    milliseconds,
    number,
    percent,
    signed_percent,
    strategy_sentences,
    time,
)

VOID = {"meta"}


class _Reader(HTMLParser):
    """Elements with their attributes, the text of the body, and whether all is closed."""

    def __init__(self, page_text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page_text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def count(self, name: str, class_: str) -> int:
        return sum(
            1 for tag, found in self.elements if tag == name and found.get("class") == class_
        )


def _read(plan: Plan, rows: int = 200) -> _Reader:
    reader = _Reader(page(plan, make_trials(rows)))
    assert reader.open == []
    return reader


def test_the_report_tells_what_the_plan_does() -> None:
    """Model, machine, rates, times, memory: the numbers of plan.json, as people read them."""
    plan = make_plan()
    does = plan.performance
    text = _read(plan).text
    for told in (
        plan.model.name,
        plan.cluster.title,
        f"{does.output_tokens_per_s:,.0f}",
        f"{does.output_tokens_per_s_per_card:,.0f}",
        f"{does.ttft_s * 1e3:.0f} ms",
        f"{does.tpot_s * 1e3:.1f} ms",
        f"{does.end_to_end_s:.1f} s",
        f"{plan.memory[0].total_bytes / 2**30:.1f} of {plan.memory[0].capacity_bytes / 2**30:.1f}",
        plan.largest_lever,
        plan.model.digest,
        *plan.notes,
        *plan.proof.checks,
    ):
        assert told in text, told


def test_every_kind_of_operator_and_its_basis_is_listed() -> None:
    """The time breakdown of both phases says what the numbers rest on."""
    text = _read(make_plan()).text
    assert "Prefill step" in text
    assert "Decode step" in text
    # 16 % of the toy decode step is attention, the one kind with measured coefficients
    assert "measured 16 %" in text
    for row in make_plan().breakdown:
        assert f"{row.kind} {row.basis} {row.calls:,}" in text


def test_the_report_says_how_sure_the_plan_is() -> None:
    """Bands, shares and what to run; nothing of that in a plan that does not tell."""
    plan = make_plan()
    assert "How sure" not in _read(plan).text
    sure = Confidence(
        level=0.9,
        basis=BasisShares(measured=0.1, fitted=0.6, derived=0.25, assumed=0.05),
        output_tokens_per_s_low=1234.0,
        output_tokens_per_s_high=5678.0,
        tpot_low_s=0.0111,
        tpot_high_s=0.0444,
        weakest=WeakestPart(
            name="matmul.bf16",
            kind="derived",
            error_share=0.5,
            source="a table",
            advice="run `shardplan profile` <now>",
        ),
    )
    told = _read(plan.model_copy(update={"confidence": sure}))
    for words in ("How sure", "1,234", "5,678", "11.1 ms", "44.4 ms", "fitted 60 %", "<now>"):
        assert words in told.text


def test_the_quantization_table_says_what_nothing_offers() -> None:
    """A dtype that does not fit is shown as such, not left out."""
    text = _read(make_plan()).text
    assert "+32 %" in text
    assert "w4a16 bf16 nothing fits or meets the limits" in text


def test_the_page_fetches_nothing() -> None:
    """Links to its own sections alone, and a policy that forbids to fetch anything."""
    text = page(make_plan(), make_trials())
    reader = _Reader(text)
    names = {name for name, _ in reader.elements}
    attributes = {key for _, found in reader.elements for key in found}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not attributes & {"src", "srcset", "action", "style"}
    targets = {str(found["id"]) for _, found in reader.elements if "id" in found}
    links = [str(found["href"]) for _, found in reader.elements if "href" in found]
    assert len(links) > 10
    assert {link[:1] for link in links} == {"#"}
    assert {link[1:] for link in links} <= targets
    assert not any(key.startswith("on") for key in attributes)
    assert not re.search(r"url\(|@import", text)
    assert make_plan().model.source in reader.text  # an address to read, not to follow
    policies = [found for _, found in reader.elements if "http-equiv" in found]
    assert [str(found["content"]).split(";")[0] for found in policies] == ["default-src 'none'"]


HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"


def test_hostile_names_stay_text() -> None:
    """Names come from files of others: none of them may become markup, wherever it stands."""
    plan = make_plan()
    model = dict.fromkeys(("name", "architecture", "source", "digest"), HOSTILE)
    rows = [row.model_copy(update={"kind": HOSTILE, "basis": HOSTILE}) for row in plan.breakdown]
    hostile = make_plan(
        model=plan.model.model_copy(update=model),
        cluster=plan.cluster.model_copy(update={"name": HOSTILE, "title": HOSTILE}),
        request=plan.request.model_copy(update={"engine_profile": HOSTILE}),
        breakdown=tuple(rows),
        largest_lever=HOSTILE,
        notes=(HOSTILE,),
        strategy=make_strategy(weight_dtype=HOSTILE),
        proof=plan.proof.model_copy(update={"checks": (HOSTILE,), "failures": (HOSTILE,)}),
        certificate=plan.certificate.model_copy(
            update={"space": {HOSTILE: [HOSTILE]}, "pruned_by": {HOSTILE: 1}, "engine": HOSTILE}
        ),
    )
    trials = make_trials()
    trials["weight_dtype"] = HOSTILE
    reader = _Reader(page(hostile, trials))
    assert reader.open == []
    assert not {"script", "img"} & {name for name, _ in reader.elements}
    assert reader.text.count("<script>alert('x')</script>") > 10


@given(st.text())
def test_any_text_comes_back_from_markup_as_it_went_in(text: str) -> None:
    """As an element's text and as an attribute's value."""
    reader = _Reader(tag("p", text, title=text))
    shown = "".join(reader.texts)
    unchanged = text.replace("\r\n", "\n").replace("\r", "\n")
    assert shown.replace("\r\n", "\n").replace("\r", "\n") == unchanged
    assert reader.elements == [("p", {"title": text})]


def test_a_hundred_thousand_trials_fit_in_two_megabytes(tmp_path: Path) -> None:
    """A sample is drawn, and the page says how many of how many."""
    trials = make_trials(100_000)
    path = tmp_path / "report.html"
    write_report(make_plan(), trials, path)
    assert path.stat().st_size <= 2e6
    reader = _Reader(path.read_text(encoding="utf-8"))
    feasible = int(trials["feasible"].sum())
    drawn = reader.count("circle", "cloud")
    assert 1_000 < drawn <= 2_000
    said = f"100,000 strategies, {feasible:,} of them feasible. {drawn:,} of them are drawn"
    assert said in reader.text


def test_few_trials_are_all_drawn() -> None:
    """The refused ones have no place in the plot; the plan is marked."""
    reader = _read(make_plan(), rows=300)
    assert reader.count("circle", "cloud") == int(make_trials(300)["feasible"].sum())
    assert reader.count("circle", "front") == len(make_plan().pareto)
    assert reader.count("circle", "chosen") == 1
    assert "All feasible ones are drawn." in reader.text


def test_every_mark_lies_inside_its_chart() -> None:
    """No dot or bar beyond 0 to 100 % of the width."""
    for name, found in _read(make_plan(), rows=2_000).elements:
        for key in ("cx", "x1", "x2", "width"):
            value = found.get(key) or ""
            if name in {"circle", "line", "rect"} and value.endswith("%"):
                assert -0.01 <= float(value[:-1]) <= 100.01


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    """No clock and no random choice in the page."""
    first, second = tmp_path / "a.html", tmp_path / "b.html"
    write_report(make_plan(), make_trials(5_000), first)
    write_report(make_plan(), make_trials(5_000), second)
    assert first.read_bytes() == second.read_bytes()


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    """One line for the user instead of a traceback."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(make_plan(), make_trials(), tmp_path / "file" / "report.html")


def test_a_bare_plan_still_gives_a_page() -> None:
    """Nothing feasible in the table, and every optional part empty."""
    trials = make_trials(50)
    bare = make_plan(memory=(), breakdown=(), pareto=(), alternatives=(), quantization=(), notes=())
    reader = _Reader(page(bare, trials[~trials["feasible"]]))
    assert reader.open == []
    assert "0 of them feasible" in reader.text
    assert reader.count("circle", "chosen") == 1


def test_stages_that_are_alike_share_a_bar() -> None:
    """A pipeline of two like stages and one that differs has two bars."""
    plan = make_plan()
    row = plan.memory[0]
    rows = [row.model_copy(update={"stage": stage, "layers": 30}) for stage in (0, 1)]
    rows.append(row.model_copy(update={"stage": 2, "layers": 20}))
    text = _read(make_plan(memory=tuple(rows))).text
    assert "Stages 0 to 1, 30 layers each" in text
    assert "Stage 2, 20 layers" in text


def test_a_failed_proof_is_not_hidden() -> None:
    """The badge, the sentence and the failure itself."""
    proof = make_plan().proof.model_copy(
        update={"passed": False, "failures": ("block 3: outputs differ by 0.2",)}
    )
    text = _read(make_plan(proof=proof)).text
    assert "proof failed" in text
    assert "do not deploy this plan" in text
    assert "block 3: outputs differ by 0.2" in text


def test_the_strategy_is_told_in_words() -> None:
    """Each axis above one gets its sentence; free cards are named."""
    plan = make_plan(
        strategy=make_strategy(tp=4, pp=2, dp=2, ep=8, exchange="alltoall", stage_layers=(41, 39))
    )
    told = " ".join(strategy_sentences(plan))
    assert "uses 16 ranks" in told
    assert "16 ranks stay free" in told
    assert "2 data-parallel groups of 8 ranks" in told
    assert "41 + 39 layers" in told
    assert "Experts are spread over 8 ranks (ep 8); tokens are sent to their experts" in told
    alone = make_plan(strategy=make_strategy(tp=1, pp=1, dp=1, stage_layers=(80,)))
    assert "one rank holds the whole model" in " ".join(strategy_sentences(alone))


@pytest.mark.parametrize(
    ("gap", "bound", "told"),
    [
        (0.0, 21_665.0, "Nothing in this space is better"),
        (0.031, 22_337.0, "more than 3.1 % better"),
        (None, None, "a better strategy may exist"),
    ],
)
def test_the_certificate_claims_no_more_than_it_holds(
    gap: float | None, bound: float | None, told: str
) -> None:
    """Optimal, within a bound, or sampled."""
    certificate = make_plan().certificate.model_copy(update={"gap": gap, "bound": bound})
    plan = make_plan(certificate=certificate)
    sentences = " ".join(certificate_sentences(plan))
    assert told in sentences
    assert "4,608 strategies: 2,304 were priced and 2,304 ruled out unpriced" in sentences
    assert "720 of those priced were refused (memory 700, ttft 20)" in sentences
    assert ("proven best" in _read(plan).text) == (gap == 0.0)


def test_a_latency_bound_is_told_as_a_time() -> None:
    """Its objective is the inverse of the end-to-end time: 1 / 0.25 per s is 4 s."""
    plan = make_plan()
    slow = make_plan(
        request=plan.request.model_copy(update={"objective": "latency"}),
        certificate=plan.certificate.model_copy(update={"bound": 0.25}),
    )
    assert "less than 4.00 s" in " ".join(certificate_sentences(slow))


def test_the_command_makes_the_plan_again() -> None:
    """Every option of the request; a path with a blank is quoted."""
    plan = make_plan()
    words = " ".join(command(plan))
    assert words.startswith("shardplan search --model llama-3.1-70b --cluster atlas-800t-a2")
    assert "--ttft-ms 2000 --tpot-ms 50 " in words
    assert "--rate" not in words
    other = make_plan(model=plan.model.model_copy(update={"source": "my-model/config.json"}))
    assert "--model my-model/config.json" in " ".join(command(other))
    odd = make_plan(model=plan.model.model_copy(update={"name": "a; rm -rf b"}))
    assert "--model 'a; rm -rf b'" in " ".join(command(odd))


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (number(21_665.03), "21,665"),
        (number(42.31), "42.3"),
        (number(0.3994), "0.399"),
        (number(0.0123456), "0.0123"),
        (number(0.0), "0"),
        (time(24.2), "24.2 s"),
        (time(0.798), "798 ms"),
        (time(3.1e-6), "3.10 µs"),
        (time(0.0), "0"),
        (limit_time(2.0), "2 s"),
        (limit_time(0.05), "50 ms"),
        (percent(0.125), "12 %"),
        (percent(0.034), "3.4 %"),
        (percent(1e-4), "<0.1 %"),
        (percent(0.0), "0 %"),
        (milliseconds(1e-7), "<0.001"),
        (milliseconds(0.0642), "64.2"),
        (milliseconds(0.0), "\N{EN DASH}"),
        (signed_percent(0.32), "+32 %"),
        (signed_percent(-0.034), "\N{MINUS SIGN}3.4 %"),
        (signed_percent(1e-9), "0 %"),
    ],
)
def test_numbers_are_written_as_people_read_them(told: str, expected: str) -> None:
    """Three digits, a unit, no exponent."""
    assert told == expected


@given(
    st.lists(st.floats(min_value=1e-6, max_value=1e9), min_size=1, max_size=6),
    st.booleans(),
)
def test_an_axis_holds_its_values_and_has_few_ticks(values: list[float], from_zero: bool) -> None:
    """Whatever the range: linear or logarithmic, every value between 0 and 1, 2 to 20 ticks."""
    axis = scale(values, from_zero=from_zero)
    assert all(-1e-9 <= axis.at(value) <= 1 + 1e-9 for value in values)
    assert 2 <= len(axis.ticks) <= 20
    assert list(axis.ticks) == sorted(set(axis.ticks))


def test_an_axis_ends_on_round_numbers() -> None:
    """23.5 to 50 in steps of 5; 1 to 90 on a logarithmic axis at 1, 2, 5, 10, 20, 50, 100."""
    assert scale([23.5, 50.0], from_zero=False).ticks == (20.0, 25.0, 30.0, 35.0, 40.0, 45.0, 50.0)
    assert scale([1.0, 90.0], from_zero=False).ticks == (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
