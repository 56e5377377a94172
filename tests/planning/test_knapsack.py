"""The knapsack against brute force."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vitlr.planning.knapsack import Prices, choose


def items_of(seed, count, options):
    g = np.random.default_rng(seed)
    items = []
    for _ in range(count):
        loss = np.sort(g.random(options) ** 3)[::-1].copy()
        cost = np.sort(g.integers(1, 50, options)).astype(float)
        items.append(Prices(cost, loss))
    return items


def brute_force(items, limit):
    best = None
    for picks in itertools.product(*(range(len(item.cost)) for item in items)):
        cost = sum(item.cost[i] for item, i in zip(items, picks, strict=True))
        loss = sum(item.loss[i] for item, i in zip(items, picks, strict=True))
        if cost <= limit and (best is None or loss < best):
            best = loss
    return best


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1.0))
def test_within_budget_and_within_one_step_of_the_optimum(seed, share):
    items = items_of(seed, 4, 5)
    limit = share * sum(item.cost.max() for item in items)
    best, picks = brute_force(items, limit), choose(items, limit)
    if best is None:
        assert picks is None
        return
    cost = sum(item.cost[i] for item, i in zip(items, picks, strict=True))
    loss = sum(item.loss[i] for item, i in zip(items, picks, strict=True))
    assert cost <= limit
    worst_step = max(item.loss.max() - item.loss.min() for item in items)  # the gap of the relaxation: one item's jump
    assert best - 1e-12 <= loss <= best + worst_step


def test_a_generous_budget_loses_nothing_and_equal_input_gives_equal_output():
    items = items_of(1, 6, 7)
    assert choose(items, 1e9) == [int(np.argmin(item.loss)) for item in items]
    assert choose(items, 90.0) == choose(items, 90.0)


def test_the_jump_to_dense_is_taken_where_it_pays():
    """Dense (the last option) lies off the concave part: half price per loss saved, but a large step."""
    flat = Prices(np.array([1.0, 2.0, 10.0]), np.array([1.0, 0.99, 0.0]))
    assert choose([flat, flat], 11.0) in ([0, 2], [2, 0])
