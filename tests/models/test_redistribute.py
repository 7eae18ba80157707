"""The table of transitions, each alone and any two layouts, on tensors cut by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.models.apply import Layout, ShardedOp
from shardplan.models.errors import LayoutError, ProofError
from shardplan.models.lockstep import MOVES, unplace
from shardplan.models.parallel import Mesh
from shardplan.models.redistribute import PARTIAL, redistributions
from shardplan.models.weights import Array, place

MESH = Mesh(("a", "b", "c"), (2, 3, 2), {})
DIMS = ("T", "H")
WHOLE: Array = np.arange(24.0 * 12).reshape(24, 12) + 1.0


def lay(layout: Layout, seed: int = 0) -> Array:
    """The whole tensor cut so; on partial axes, random parts that sum to it."""
    x = np.array(place(WHOLE, DIMS, tuple(p for p in layout if p[1] != PARTIAL), MESH))
    rng = np.random.default_rng(seed)
    for axis in (axis for axis, dim in layout if dim == PARTIAL):
        lead = MESH.axes.index(axis)
        noise = rng.standard_normal(x.shape)
        x = x / x.shape[lead] + noise - noise.mean(axis=lead, keepdims=True)
    return x


def move(have: Layout, want: Layout) -> tuple[Array, list[tuple[str, tuple[str, ...]]]]:
    """The tensor after redistribution, and (kind, axes) of each step."""
    x, before, made = lay(have), have, []
    for kind, axes, layout in redistributions(dict(have), dict(want), MESH):
        after = tuple((a, layout[a]) for a in MESH.axes if a in layout)
        node = ShardedOp(
            name=kind, kind=kind, inputs=(), dims=DIMS, layout=after, axes=axes, before=before
        )
        x, before = MOVES[kind](node, x, MESH), after
        made.append((kind, axes))
    assert before == want
    return x, made


def test_a_cut_by_hand() -> None:
    """T over a then b: rank (a, b, c) holds rows from 12a + 4b; its replicas differ in c."""
    x = place(WHOLE, DIMS, (("a", "T"), ("b", "T")), MESH)
    assert x.shape == (2, 3, 2, 4, 12)
    for rank in np.ndindex(2, 3, 2):
        first = 12 * rank[0] + 4 * rank[1]
        assert (x[rank] == WHOLE[first : first + 4]).all()


@pytest.mark.parametrize(
    ("have", "want", "steps"),
    [
        ((("b", PARTIAL),), (), [("all_reduce", ("b",))]),
        ((("b", PARTIAL),), (("b", "T"),), [("reduce_scatter", ("b",))]),
        ((("b", "T"),), (), [("all_gather", ("b",))]),
        ((("b", "T"),), (("b", "H"),), [("all_to_all", ("b",))]),
        ((), (("b", "H"),), [("slice", ("b",))]),
    ],
    ids=["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "slice"],
)
def test_each_transition_alone(
    have: Layout, want: Layout, steps: list[tuple[str, tuple[str, ...]]]
) -> None:
    x, made = move(have, want)
    assert made == steps
    assert np.allclose(x, lay(want), rtol=0, atol=1e-11)


def test_axes_of_one_transition_share_a_collective() -> None:
    assert move((("a", PARTIAL), ("b", PARTIAL)), ())[1] == [("all_reduce", ("a", "b"))]
    assert move((("a", "T"), ("c", "T")), ())[1] == [("all_gather", ("a", "c"))]


def test_what_is_cut_moves_less() -> None:
    """A slice comes before a sum, a sum before a gather."""
    made = move((("a", PARTIAL), ("b", "T")), (("c", "H"),))[1]
    assert [kind for kind, _ in made] == ["slice", "all_reduce", "all_gather"]


def test_a_slice_and_an_exchange_onto_one_dim_go_through_a_gather() -> None:
    """b would have to nest inside a, which has yet to come."""
    x, made = move((("a", "T"),), (("a", "H"), ("b", "H")))
    assert made == [("all_gather", ("a",)), ("slice", ("a", "b"))]
    assert np.allclose(x, lay((("a", "H"), ("b", "H"))))


def test_an_exchange_from_under_a_minor_axis_goes_through_a_gather() -> None:
    x, made = move((("a", "T"), ("b", "T")), (("a", "H"),))
    assert made == [("all_gather", ("a", "b")), ("slice", ("a",))]
    assert np.allclose(x, lay((("a", "H"),)))


@pytest.mark.parametrize(
    ("have", "want"),
    [
        ((("a", "T"), ("b", "T")), (("b", "T"),)),
        ((("b", "T"),), (("a", "T"), ("b", "T"))),
        ((("a", PARTIAL), ("b", "T")), (("a", "T"), ("b", "T"))),
    ],
    ids=["major leaves", "major joins", "major is scattered"],
)
def test_axes_leave_and_join_a_dim_at_its_minor_end(have: Layout, want: Layout) -> None:
    with pytest.raises(LayoutError, match="axes that share a dim nest major to minor"):
        move(have, want)


@pytest.mark.parametrize("have", [(), (("a", "T"),)], ids=["whole", "split"])
def test_nothing_becomes_a_partial_sum(have: Layout) -> None:
    with pytest.raises(LayoutError, match="cannot become a partial sum"):
        move(have, (("a", PARTIAL),))


def test_a_partial_sum_cannot_be_cut_from_a_whole() -> None:
    with pytest.raises(ProofError, match="cannot be placed as a partial sum"):
        place(WHOLE, DIMS, (("a", PARTIAL),), MESH)


def test_a_slice_that_does_not_divide_is_refused() -> None:
    node = ShardedOp(
        name="s", kind="slice", inputs=(), dims=DIMS, layout=(("b", "T"),), axes=("b",)
    )
    with pytest.raises(ProofError, match="size=4, ways=3"):
        MOVES["slice"](node, np.zeros((2, 3, 2, 4, 12)), MESH)


_STATES = st.sampled_from([None, "T", "H"])


@st.composite
def _layouts(draw: st.DrawFn, states: st.SearchStrategy[str | None]) -> Layout:
    chosen = [(axis, draw(states)) for axis in MESH.axes]
    return tuple((axis, dim) for axis, dim in chosen if dim is not None)


@given(_layouts(st.sampled_from([None, "T", "H", PARTIAL])), _layouts(_STATES))
def test_any_redistribution_is_right_or_refused(have: Layout, want: Layout) -> None:
    refused = None
    try:
        x, _ = move(have, want)
    except LayoutError as error:
        refused = error.rule
    if refused is not None:
        assert refused == "axes that share a dim nest major to minor"
        assert len({axis for axis, _ in have + want}) > 1
        return
    assert x.shape == lay(want).shape
    assert np.allclose(x, lay(want), rtol=0, atol=1e-10)


@given(_layouts(_STATES))
def test_cutting_and_joining_give_the_tensor_back(layout: Layout) -> None:
    node = ShardedOp(name="x", kind="input", inputs=(), dims=DIMS, layout=layout)
    assert (unplace(lay(layout), node, MESH) == WHOLE).all()
