"""Dominance, crowding, hypervolume and knee against brute force."""

import itertools

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mendel.search.pareto import Frame, Losses, as_losses, best, crowding, front, knee, order, ranks

POINTS = st.integers(1, 4).flatmap(
    lambda m: st.integers(1, 24).flatmap(
        # Few different values, so that ties and equal rows are common.
        lambda n: arrays(np.float64, (n, m), elements=st.integers(0, 5).map(float))
    )
)


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a <= b).all() and (a < b).any())


def brute_ranks(losses: Losses) -> list[int]:
    left, found, level = set(range(len(losses))), [0] * len(losses), 0
    while left:
        now = {i for i in left if not any(dominates(losses[j], losses[i]) for j in left)}
        for i in now:
            found[i] = level
        left -= now
        level += 1
    return found


@settings(max_examples=150, deadline=None)
@given(POINTS)
def test_ranks_and_front_are_those_of_brute_force(losses: Losses) -> None:
    expected = brute_ranks(losses)
    assert ranks(losses).tolist() == expected
    assert front(losses) == [i for i, r in enumerate(expected) if r == 0]


@settings(max_examples=100, deadline=None)
@given(POINTS)
def test_order_sorts_by_rank_then_crowding(losses: Losses) -> None:
    rank, found = ranks(losses), order(losses)
    assert sorted(found) == list(range(len(losses)))
    distance = np.zeros(len(losses))
    for r in set(rank):
        distance[rank == r] = crowding(losses[rank == r])
    keys = [(rank[i], -distance[i], i) for i in found]
    assert keys == sorted(keys)


@settings(max_examples=100, deadline=None)
@given(POINTS, st.integers(0, 25))
def test_best_is_the_head_of_order(losses: Losses, count: int) -> None:
    assert set(best(losses, count)) == set(order(losses)[:count])


def test_crowding_of_a_line() -> None:
    losses = as_losses([(0, 10), (1, 6), (4, 2), (10, 0)])
    assert crowding(losses).tolist() == [np.inf, 0.4 + 0.8, 0.9 + 0.6, np.inf]


def test_a_column_without_spread_says_nothing() -> None:
    losses = as_losses([(0, 5), (1, 5), (2, 5), (4, 5)])
    assert crowding(losses).tolist() == [np.inf, 0.5, 0.75, np.inf]


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, (5, 2), elements=st.floats(0, 1)))
def test_hypervolume_of_two_objectives_is_the_union_of_rectangles(losses: Losses) -> None:
    frame = Frame((0.0, 0.0), (1.0, 1.0))
    corners = [sorted({*losses[:, m].tolist(), 1.1}) for m in range(2)]
    area = 0.0
    for (x0, x1), (y0, y1) in itertools.product(*(itertools.pairwise(c) for c in corners)):
        if any((row <= (x0, y0)).all() for row in losses):
            area += (x1 - x0) * (y1 - y0)
    assert frame.hypervolume(losses) == pytest.approx(area, abs=1e-12)


def test_hypervolume_in_units_of_the_study() -> None:
    frame = Frame((-1.0, 0.0), (0.0, 1e6))
    losses = as_losses([(-0.9, 2e5), (-0.5, 1e5), (5.0, 9e9)])
    inside = np.array([[0.1, 0.2], [0.5, 0.1]])
    expected = moocore.hypervolume(inside, ref=[1.1, 1.1])
    assert frame.hypervolume(losses) == pytest.approx(expected)
    assert frame.hypervolume(as_losses([])) == 0.0


def test_history_never_falls_and_ends_at_the_whole() -> None:
    losses = np.random.default_rng(0).random((200, 3))
    frame = Frame.around(losses, [(0.0, 1.0), None, None])
    history = frame.hypervolume_history(losses)
    assert history == sorted(history)
    for i in (0, 7, 50, 199):
        assert history[i] == pytest.approx(frame.hypervolume(losses[: i + 1]))


def test_a_frame_has_a_span_even_around_one_point() -> None:
    frame = Frame.around(as_losses([(3.0, 0.0)]), [None, None])
    assert frame.hypervolume(as_losses([(3.0, 0.0)])) == pytest.approx(1.1**2)


def test_knee() -> None:
    losses = as_losses([(0.0, 1.0), (0.1, 0.2), (0.5, 0.15), (1.0, 0.0)])
    assert knee(losses) == 1
    assert knee(as_losses([])) is None
    assert knee(as_losses([(4.0,), (2.0,)])) == 1
