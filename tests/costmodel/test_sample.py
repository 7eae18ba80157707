"""Which rows of a table are cited, without the tables themselves."""

from __future__ import annotations

import numpy as np

from shardplan.costmodel.fitting.sample import pick, sample, table_text
from shardplan.costmodel.fitting.sample_tables import Family

SHAPES = [(float(size),) for size in range(1, 101)]
SECONDS = [size * 1e-6 for (size,) in SHAPES]


def family(**changed: object) -> Family:
    """A family of ten shapes, every second one kept back."""
    plain: dict[str, object] = {
        "file": "x.csv",
        "group": "910b2 matmul bf16",
        "source": "s",
        "fixed": {"device": "910b2", "phase": "op"},
        "columns": ("m",),
        "shapes": SHAPES[:10],
        "seconds": SECONDS[:10],
        "keep": [place % 2 == 0 for place in range(10)],
    }
    return Family(**{**plain, **changed})  # type: ignore[arg-type]  # names of fields


def test_the_picked_rows_span_all_times() -> None:
    """One of each tenth of the times, in order."""
    chosen = pick(SHAPES, SECONDS, 10)
    assert [place // 10 for place in chosen] == list(range(10))


def test_the_choice_does_not_hang_on_the_order_of_the_table() -> None:
    """The same shapes from a shuffled table."""
    order = np.random.default_rng(0).permutation(len(SHAPES)).tolist()
    shuffled = pick([SHAPES[one] for one in order], [SECONDS[one] for one in order], 10)
    assert [SHAPES[order[place]] for place in shuffled] == [
        SHAPES[place] for place in pick(SHAPES, SECONDS, 10)
    ]


def test_small_tables_are_taken_whole() -> None:
    """Fewer rows than wanted: all of them; none: none."""
    assert pick(SHAPES[:3], SECONDS[:3], 10) == [0, 1, 2]
    assert pick([], [], 10) == []


def test_only_rows_that_may_be_drawn_are() -> None:
    """Sizes odd here: the places that `keep` marks."""
    rows = sample(family())
    assert [row["m"] for row in rows] == ["1", "3", "5", "7", "9"]
    assert rows[0]["measured_s"] == "1e-06"


def test_held_out_is_said_of_the_fit_that_ships() -> None:
    """A section fitted to all rows of the table has seen those that it kept back before."""
    section = {"calibration": "910b2", "section": "attention.prefill"}
    rows = [(float(size),) for size in range(2000)]
    many = {"shapes": rows, "seconds": [1e-6] * 2000, "keep": [True] * 2000}
    assert sample(family(**section, **many), 1)[0]["held_out"] == "true"
    assert sample(family(**section), 1)[0]["held_out"] == "false"
    assert sample(family(held_out=False), 1)[0]["held_out"] == "false"


def test_a_table_of_an_engine_without_a_fit_of_its_own_is_unseen() -> None:
    """No engine of this name has sections of its own: the base's fit read another table."""
    engine = {"calibration": "910b2", "section": "matmul.bf16", "engine": "nobody"}
    assert sample(family(**engine), 1)[0]["held_out"] == "true"


def test_a_file_holds_families_of_different_columns() -> None:
    """Empty cells where a row has no such size; sources first, measurements last."""
    rows = [*sample(family(), 1), *sample(family(columns=("k",), note="n"), 1)]
    lines = table_text(rows).splitlines()
    assert lines[0] == "source,group,held_out,note,device,phase,m,k,measured_s"
    assert [line.count(",") for line in lines] == [8, 8, 8]
