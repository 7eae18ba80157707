"""Sizes of graphs: the dynamic program against every set of sizes, and cases done by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardplan.costmodel.buckets import best_sizes, cost_of, doubled, graph_memory, padding_of
from shardplan.costmodel.engines import load_engine

MIB = 2.0**20
matrices = st.integers(1, 7).flatmap(
    lambda count: st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 3.0, 7.25]), min_size=count, max_size=count),
        min_size=count,
        max_size=count,
    )
)


def by_hand(seconds: np.ndarray, places: tuple[int, ...]) -> float:
    """Every load at the first size that holds it, one after another."""
    return math.fsum(
        seconds[load, next(place for place in places if place >= load)]
        for load in range(len(seconds))
    )


def brute_force(seconds: np.ndarray, most: int, price_s: float) -> tuple[float, int]:
    """(least cost with the price of the graphs, fewest sizes that reach it) of every set."""
    last = len(seconds) - 1
    tried = [
        (by_hand(seconds, (*some, last)) + (len(some) + 1) * price_s, len(some) + 1)
        for count in range(min(most, len(seconds)))
        for some in itertools.combinations(range(last), count)
    ]
    return min(tried)


@given(matrices, st.integers(1, 8), st.sampled_from([0.0, 0.25, 2.0]))
def test_no_set_of_sizes_is_better(rows: list[list[float]], most: int, price_s: float) -> None:
    """Any prices, monotone or not: quarters of seconds, so that sums are exact."""
    seconds = np.array(rows)
    found = best_sizes(seconds, most=most, price_s=price_s)
    best, fewest = brute_force(seconds, most, price_s)
    assert found.expected_s == by_hand(seconds, found.places) == cost_of(seconds, found.places)[1]
    assert found.expected_s + len(found.places) * price_s == best
    assert len(found.places) == fewest
    assert found.places[-1] == len(seconds) - 1
    assert list(found.places) == sorted(set(found.places))


def linear(shares: list[float]) -> np.ndarray:
    """Seconds of loads 1, 2, ... that cost a second a unit of their size."""
    sizes = np.arange(1.0, len(shares) + 1.0)
    return np.outer(np.array(shares), sizes)


def test_two_sizes_by_hand() -> None:
    """Loads 1, 2, 8 with shares 1/2, 1/4, 1/4: 2 and 8 cost 3.5 s, 1 and 8 4.5 s, 8 alone 8 s."""
    seconds = linear([0.5, 0.25, 0, 0, 0, 0, 0, 0.25])
    assert best_sizes(seconds, most=1, price_s=0.0) == ((7,), 8.0)
    assert best_sizes(seconds, most=2, price_s=0.0) == ((1, 7), 3.5)
    assert best_sizes(seconds, most=3, price_s=0.0) == ((0, 1, 7), 3.0)


@pytest.mark.parametrize(("price_s", "sizes"), [(0.4, 3), (0.5, 2), (4.4, 2), (4.5, 1)])
def test_a_graph_is_taken_while_it_gains_more_than_its_price(price_s: float, sizes: int) -> None:
    """The third size gains 0.5 s, the second 4.5 s; of equal costs the fewest win."""
    seconds = linear([0.5, 0.25, 0, 0, 0, 0, 0, 0.25])
    assert len(best_sizes(seconds, most=8, price_s=price_s).places) == sizes


def test_padding_is_a_share_of_what_is_computed() -> None:
    """Loads 1 and 4 half and half, both at 4: 4 computed, 2.5 needed."""
    shares, loads = np.array([0.5, 0, 0, 0.5]), np.arange(1.0, 5.0)
    assert padding_of(shares, loads, (3,)) == 1.0 - 2.5 / 4.0
    assert padding_of(shares, loads, (0, 3)) == 0.0
    assert padding_of(np.zeros(4), loads, (3,)) == 0.0


def test_powers_of_two_end_with_the_largest() -> None:
    """Up to 6: 1, 2, 4, 6; in steps of 128 up to 640: 128, 256, 512, 640."""
    assert doubled(np.arange(1.0, 7.0)) == (0, 1, 3, 5)
    assert doubled(128.0 * np.arange(1.0, 6.0)) == (0, 1, 3, 4)
    assert doubled(np.array([1.0])) == (0,)


def test_memory_of_a_graph_is_the_engines_or_an_assumption() -> None:
    """Published for vLLM; nowhere for MindIE, and said so."""
    known, fact = graph_memory(load_engine("vllm-ascend"))
    assert known == 24 * MIB
    assert fact.kind == "derived"
    unknown, fact = graph_memory(load_engine("mindie"))
    assert unknown == 24 * MIB
    assert fact.kind == "assumed"
