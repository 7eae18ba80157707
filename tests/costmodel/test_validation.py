"""Errors of groups worked by hand, and the guard that keeps them from growing."""

from __future__ import annotations

import csv
import tomllib
from dataclasses import replace
from importlib import resources

import pytest

from shardplan.costmodel.validation import (
    FLOOR,
    GROWTH,
    Figure,
    GroupErrors,
    baseline_of,
    group_errors,
    shipped_tables,
    tightened,
    unguarded,
    worse,
)


def figure(measured: float = 1.0, predicted: float | None = 1.0, **changed: object) -> Figure:
    """One figure of a group."""
    plain = Figure(
        family="f",
        group="g",
        where="t.csv:2",
        what="op=matmul",
        metric="step_s",
        unit="s",
        measured=measured,
        predicted=predicted,
        reason="",
        held_out=True,
        unseen=None,
        low=None,
        high=None,
        fits=None,
        source="s",
    )
    return replace(plain, **changed)  # type: ignore[arg-type]  # names of fields


def group(*predicted: float, name: str = "g") -> GroupErrors:
    """Errors of figures that were all measured as 1."""
    return group_errors(name, [figure(predicted=value) for value in predicted])


def test_errors_by_hand() -> None:
    """Errors -0.2, +0.1, +0.3: mean size 0.2, median size 0.2, p90 0.28, signed median +0.1."""
    found = group_errors(
        "g", [figure(2.0, 1.6), figure(10.0, 11.0), figure(1.0, 1.3, held_out=False)]
    )
    assert (found.figures, found.priced, found.held_out) == (3, 3, 2)
    assert found.mape == pytest.approx(0.2)
    assert found.held_mape == pytest.approx(0.15)
    assert found.median == pytest.approx(0.2)
    assert found.p90 == pytest.approx(0.28)
    assert found.worst == pytest.approx(0.3)
    assert found.bias == pytest.approx(0.1)


def test_what_is_not_priced_counts_but_has_no_error() -> None:
    """Neither the mean nor the digest changes its meaning; none priced gives no numbers."""
    some = group_errors("g", [figure(predicted=None), figure(predicted=1.5)])
    assert (some.figures, some.priced, some.mape) == (2, 1, 0.5)
    none = group_errors("g", [figure(predicted=None)])
    assert (none.figures, none.priced, none.mape, none.bias) == (1, 0, None, None)
    assert none.held_mape is None
    assert group_errors("g", [figure(held_out=False)]).held_mape is None


def test_the_share_inside_the_band() -> None:
    """Only figures with a band count; a figure at its end is inside."""
    banded = [figure(low=0.5, high=1.0), figure(low=1.1, high=2.0), figure()]
    assert group_errors("g", banded).inside == 0.5
    assert group_errors("g", [figure()]).inside is None


def test_the_guard_lets_a_tenth_and_the_floor_pass() -> None:
    """At the limit nothing is said, just above it the group and both numbers are."""
    baseline = baseline_of([group(1.2)])
    limit = 0.2 * (1 + GROWTH) + FLOOR
    assert worse(baseline, [group(1.0 + limit - 1e-6)]) == []
    lines = worse(baseline, [group(1.0 + limit + 1e-4)])
    assert lines == ["g: mape was 20.00%, is 22.21%", "g: median was 20.00%, is 22.21%"]


def test_the_guard_sees_a_lost_group_and_a_lost_figure() -> None:
    """An error cannot be mended by no longer pricing it."""
    baseline = baseline_of([group(1.2, 1.2), group(1.1, name="h")])
    half = group_errors("g", [figure(predicted=1.2), figure(predicted=None)])
    assert worse(baseline, [half]) == [
        "g: 2 figures were priced, 1 are",
        "h: its 1 figures are gone",
    ]


def test_other_figures_need_a_new_baseline() -> None:
    """Errors of other measurements are not compared, and are named as unguarded."""
    other = group_errors("g", [figure(2.0, 4.0)])
    assert worse(baseline_of([group(1.2)]), [other]) == []
    assert unguarded(baseline_of([group(1.2)]), [other, group(1.0, name="new")]) == ["g", "new"]
    assert unguarded(baseline_of([group(1.2)]), [group(1.9)]) == []


def test_the_baseline_is_a_ratchet() -> None:
    """Ten steps of nine per cent do not pass: the least error stays the measure."""
    baseline = baseline_of([group(1.2)])
    assert tightened(baseline, [group(1.21)])["g"]["mape"] == pytest.approx(0.2)
    assert tightened(baseline, [group(1.1)])["g"]["mape"] == pytest.approx(0.1)
    other = group_errors("g", [figure(2.0, 4.0)])
    assert tightened(baseline, [other])["g"]["mape"] == pytest.approx(1.0)


def test_every_shipped_figure_names_its_source() -> None:
    """A row its own, a file an entry with kind and licence; no entry without a file."""
    folder = resources.files("shardplan.costmodel") / "data" / "validation"
    entries = tomllib.loads((folder / "sources.toml").read_text(encoding="utf-8"))
    assert sorted(entries) == [table.name for table in shipped_tables()]
    for entry in entries.values():
        assert entry["kind"] == "measured"
        assert entry["source"]
        assert entry["license"]
    for table in shipped_tables():
        rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
        assert rows
        assert all(row["source"].strip() for row in rows), table.name


def test_of_tables_without_a_licence_only_a_few_figures_ship() -> None:
    """At most 32 rows of a table, as its sampler says."""
    folder = resources.files("shardplan.costmodel") / "data" / "validation"
    text = (folder / "ascend_910b.csv").read_text(encoding="utf-8")
    counts: dict[str, int] = {}
    for row in csv.DictReader(text.splitlines()):
        counts[row["group"]] = counts.get(row["group"], 0) + 1
    assert max(counts.values()) <= 32
