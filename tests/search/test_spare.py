"""What a loss takes with it: replicas as they lie on nodes, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.search.legality_cases import P
from tests.search.test_cli_bad_input import BOTH, refused

from shardplan.models.parallel import AXES, Axis, Parallelism
from shardplan.search.main import run
from shardplan.search.spare import Spare, instances_lost, replica_of_ranks, replicas_lost

RATE = ["--cards", "2", "--rate", "1"]
CARD, NODE = Spare(count=1, unit="card"), Spare(count=1, unit="node")
SCATTERED: tuple[Axis, ...] = ("pp", "tp", "dp", "cp")


def test_replicas_lie_together_where_nothing_chose_otherwise() -> None:
    """tp 2 pp 2 dp 2: ranks 0 to 3, then 4 to 7; with dp last but one they alternate."""
    layout = P(tp=2, pp=2, dp=2)
    assert replica_of_ranks(layout).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    other = P(tp=2, pp=2, dp=2, order=SCATTERED)
    assert replica_of_ranks(other).tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


def test_groups_that_share_experts_are_lost_together() -> None:
    """dp 8 with ep 4 at tp 1: two replicas of four ranks."""
    assert replica_of_ranks(P(dp=8, ep=4)).tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("layout", "spare", "lost"),
    [
        (P(tp=2, dp=8), CARD, 1),
        (P(tp=2, dp=8), Spare(count=3, unit="card"), 3),
        (P(tp=2, dp=8), NODE, 4),
        (P(tp=8, dp=2), NODE, 1),
        (P(tp=8, pp=2, dp=2), NODE, 1),
        (P(tp=2, pp=4, dp=2, order=SCATTERED), NODE, 2),
        (P(tp=8), CARD, 1),
        (P(tp=2, dp=2), Spare(count=9, unit="card"), 2),
        (P(tp=8, dp=4, ep=32), CARD, 1),
    ],
)
def test_what_stops_with_a_card_or_a_node_of_eight(
    layout: Parallelism, spare: Spare, lost: int
) -> None:
    """By hand; at most all of them."""
    assert replicas_lost(layout, 8, spare) == lost
    assert spare.share_left(layout, 8) == (layout.replicas - lost) / layout.replicas


@given(
    st.sampled_from([P(tp=2, dp=4), P(tp=4, pp=2, dp=2), P(tp=1, dp=16, ep=8), P(pp=2, dp=8)]),
    st.permutations(AXES),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([CARD, NODE, Spare(count=2, unit="node")]),
)
def test_no_order_loses_less_than_the_best(
    layout: Parallelism, order: list[Axis], per_node: int, spare: Spare
) -> None:
    """What bounds take for granted; and a node takes at least as much as a card."""
    one = P(tp=layout.tp, pp=layout.pp, dp=layout.dp, ep=layout.ep, order=tuple(order))
    assert spare.share_left(one, per_node) <= spare.share_left(one, per_node, best=True)
    assert replicas_lost(one, per_node, CARD) <= replicas_lost(one, per_node, NODE)
    assert np.bincount(replica_of_ranks(one)).tolist() == [one.ranks // one.replicas] * one.replicas


def test_instances_of_pools_divide_a_node_or_fill_some() -> None:
    """Of 2, 8 and 16 cards on nodes of 8."""
    ranks = np.array([2.0, 8.0, 16.0])
    assert instances_lost(ranks, 8, CARD).tolist() == [1.0, 1.0, 1.0]
    assert instances_lost(ranks, 8, Spare(count=2, unit="node")).tolist() == [8.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([*RATE, "--spare", "0"], ("from 1 to", "spare=0", "try 1")),
        ([*RATE, "--spare", "-1"], ("from 1 to", "spare=-1")),
        (["--cards", "2", "--spare", "1"], ("headroom is held over a rate", "--rate")),
        ([*RATE, "--spare", "1", "--spare-unit", "rack"], ("card, node", "rack")),
        ([*RATE, "--spare-unit", "node"], ("spare=None", "--spare 1")),
        (
            ["--cards", "4", "--rate", "1", "--spare", "1", "--serving", "disagg"],
            ("serving=disagg", "--objective cards"),
        ),
    ],
)
def test_headroom_that_cannot_be_is_refused(
    more: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The value, the rule and what to try."""
    refused(["search", *BOTH, *more], capsys, *words)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rate", "1e6", "--spare", "1"], ("saturated at", "with 1 card lost", "1e+06 asked")),
        (["--rate", "1e6"], ("saturated at", "1e+06 asked", "try --rate")),
        (["--rate", "1", "--spare", "9"], ("saturated at 0", "with 9 cards lost", "--spare")),
    ],
)
def test_a_rate_above_all_cards_is_said_to_saturate(
    more: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3, and the rate that is served."""
    assert run(["search", *BOTH, "--cards", "4", "--objective", "cards", *more]) == 3
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
