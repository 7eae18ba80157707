"""How a communication group lies on the tiers: cases worked by hand, and invariants."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.catalog import load_cluster
from shardplan.costmodel.placement import group_tiers
from shardplan.models.errors import InputError


def spans(cluster: str, nodes: int, group: int, stride: int) -> list[tuple[str, int]]:
    found = group_tiers(load_cluster(cluster, nodes=nodes), group=group, stride=stride)
    return [(span.tier.name, span.members) for span in found]


@pytest.mark.parametrize(
    ("cluster", "nodes", "group", "stride", "expected"),
    [
        ("atlas-800t-a2", 1, 1, 1, []),
        ("atlas-800t-a2", 1, 8, 1, [("mesh", 8)]),
        ("atlas-800t-a2", 2, 16, 1, [("mesh", 8), ("roce", 2)]),
        ("atlas-800t-a2", 2, 2, 8, [("roce", 2)]),
        ("atlas-800t-a2", 4, 8, 4, [("mesh", 2), ("roce", 4)]),
        ("atlas-800i-a3", 1, 16, 1, [("sio", 2), ("hccs", 8)]),
        ("atlas-800i-a3", 1, 8, 2, [("hccs", 8)]),
        ("atlas-800i-a3", 1, 6, 1, [("sio", 2), ("hccs", 3)]),
        ("atlas-800i-a3", 1, 2, 8, [("hccs", 2)]),
        ("atlas-800-9000", 1, 8, 1, [("hccs", 4), ("pcie", 2)]),
        ("atlas-300i-duo", 1, 4, 1, [("card", 2), ("pcie", 2)]),
        ("cloudmatrix-384", 24, 384, 1, [("sio", 2), ("hccs", 8), ("supernode", 24)]),
    ],
)
def test_groups_that_fill_their_tiers(
    cluster: str, nodes: int, group: int, stride: int, expected: list[tuple[str, int]]
) -> None:
    assert spans(cluster, nodes, group, stride) == expected


@pytest.mark.parametrize(
    ("cluster", "nodes", "group", "stride", "expected"),
    [
        ("atlas-800t-a2", 2, 12, 1, [("roce", 12)]),  # 8 and 4 on the two nodes
        ("atlas-800i-a3", 1, 3, 1, [("hccs", 3)]),  # a pair and a die
        ("atlas-800t-a2", 2, 4, 3, [("roce", 4)]),  # 0, 3, 6 and 9
    ],
)
def test_an_uneven_group_is_counted_in_the_next_tier_out(
    cluster: str, nodes: int, group: int, stride: int, expected: list[tuple[str, int]]
) -> None:
    assert spans(cluster, nodes, group, stride) == expected


@pytest.mark.parametrize(("group", "stride"), [(0, 1), (2, 0), (-1, 1), (9, 1), (2, 8)])
def test_a_group_that_does_not_fit_is_refused(group: int, stride: int) -> None:
    with pytest.raises(InputError):
        group_tiers(load_cluster("atlas-800t-a2"), group=group, stride=stride)


@given(
    name=st.sampled_from(["atlas-800t-a2", "atlas-800i-a3", "atlas-800-9000", "cloudmatrix-384"]),
    nodes=st.integers(1, 48),
    group=st.integers(1, 64),
    stride=st.integers(1, 64),
)
def test_members_multiply_to_the_group_and_tiers_go_outwards(
    name: str, nodes: int, group: int, stride: int
) -> None:
    cluster = load_cluster(name, nodes=nodes)
    if (group - 1) * stride >= cluster.ranks:
        return
    found = group_tiers(cluster, group=group, stride=stride)
    assert math.prod(span.members for span in found) == group
    assert all(span.members > 1 for span in found)
    ranks = [span.tier.ranks for span in found]
    assert ranks == sorted(ranks)
    reach = (group - 1) * stride
    assert not found or ranks[-1] > reach or ranks[-1] == cluster.ranks
