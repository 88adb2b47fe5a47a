"""Paired tests against scipy and by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from patch_retriever.retrieval import statistics
from patch_retriever.retrieval.statistics import Difference, Resamples, Tally, holm, sign_flip_p

steady = settings(deadline=None, derandomize=True)


def mean(x, axis=-1):
    return np.mean(x, axis=axis)


def drawn(n: int, seed: int, shift: float = 0.05) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 0.3, n)


@pytest.mark.parametrize("seed", range(4))
def test_the_interval_is_scipys_percentile_bootstrap(seed):
    delta_q = drawn(200, seed)
    found = Resamples({"a": 200}, seed, draws=4000).interval({"a": delta_q})
    scipys = stats.bootstrap((delta_q,), mean, method="percentile", n_resamples=4000, rng=1)
    low, high = scipys.confidence_interval
    near = 0.05 * (high - low)
    assert found.mean == pytest.approx(delta_q.mean())
    assert (found.low, found.high) == (pytest.approx(low, abs=near), pytest.approx(high, abs=near))


def test_tasks_weigh_equally_whatever_their_size():
    deltas = {"large": np.zeros(500), "small": drawn(20, 1, 1.0)}
    both = Resamples({"large": 500, "small": 20}, 0).interval(deltas)
    alone = Resamples({"large": 500, "small": 20}, 0).interval({"small": deltas["small"]})
    assert both == Difference(*(pytest.approx(x / 2) for x in (alone.mean, alone.low, alone.high)))


def test_drawing_in_parts_changes_nothing(monkeypatch):
    deltas = {"a": drawn(30, 1), "b": drawn(7, 2)}
    sizes = {name: len(delta_q) for name, delta_q in deltas.items()}
    whole = Resamples(sizes, 5).interval(deltas)
    monkeypatch.setattr(statistics, "_AT_ONCE", 64)
    parts = Resamples(sizes, 5).interval(deltas)
    assert (parts.mean, parts.low, parts.high) == pytest.approx((whole.mean, whole.low, whole.high))


@steady
@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.0, 0.25, 1.0]), min_size=1, max_size=9))
def test_few_queries_are_flipped_in_every_way(delta):
    delta_q = np.array(delta)
    sums = [np.dot(signs, delta_q) for signs in itertools.product((-1, 1), repeat=len(delta))]
    expected = np.mean(np.abs(sums) >= abs(delta_q.sum()) - 1e-9)
    assert sign_flip_p({"a": delta_q}, 0) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_few_queries_have_scipys_exact_p(seed):
    delta_q = drawn(11, seed, 0.15)
    scipys = stats.permutation_test((delta_q,), mean, permutation_type="samples")
    assert sign_flip_p({"a": delta_q}, seed) == pytest.approx(scipys.pvalue)


@pytest.mark.parametrize(("seed", "kind"), [(0, "normal"), (1, "normal"), (2, "hits"), (3, "hits")])
def test_many_queries_have_scipys_p(seed, kind):
    delta_q = drawn(300, seed, 0.03)
    if kind == "hits":
        delta_q = np.sign(delta_q.round(0)) + (np.arange(300) < 8)
    scipys = stats.permutation_test(
        (delta_q,), mean, permutation_type="samples", n_resamples=20_000, batch=1000, rng=1
    )
    found = sign_flip_p({"a": delta_q}, 7)
    assert 0.001 < scipys.pvalue < 0.999
    assert found == pytest.approx(scipys.pvalue, abs=4 * np.sqrt(scipys.pvalue / 10_000) + 1e-3)


def test_over_tasks_the_mean_of_means_is_flipped():
    deltas = {"a": drawn(3, 1), "b": drawn(6, 2)}
    found = []
    for signs in itertools.product((-1, 1), repeat=9):
        a, b = np.array(signs[:3]) * deltas["a"], np.array(signs[3:]) * deltas["b"]
        found.append(abs((a.mean() + b.mean()) / 2))
    seen = abs((deltas["a"].mean() + deltas["b"].mean()) / 2)
    assert sign_flip_p(deltas, 0) == pytest.approx(np.mean(np.array(found) >= seen - 1e-12))


def test_random_flips_never_give_a_p_of_zero_and_are_the_same_again():
    clear = {"a": np.ones(100)}
    assert sign_flip_p(clear, 0) == 1 / (1 + statistics.FLIPS)
    vague = {"a": drawn(100, 0, 0.02)}
    assert sign_flip_p(vague, 3) == sign_flip_p(vague, 3)
    assert sign_flip_p(vague, 3) != sign_flip_p(vague, 4)


def test_flips_in_parts_count_all(monkeypatch):
    monkeypatch.setattr(statistics, "_AT_ONCE", 500)
    assert sign_flip_p({"a": np.ones(100)}, 0) == 1 / (1 + statistics.FLIPS)
    assert sign_flip_p({"a": drawn(100, 0, 0.0)}, 0) > 0.1


def test_where_nothing_differs_p_is_one():
    assert sign_flip_p({"a": np.zeros(30), "b": np.zeros(2)}, 0) == 1


def test_under_no_difference_p_is_uniform():
    rng = np.random.default_rng(0)
    found = [sign_flip_p({"a": rng.normal(0, 1, 25)}, i, flips=500) for i in range(300)]
    assert stats.kstest(found, "uniform").pvalue > 0.01


def holm_by_steps(p: list[float]) -> list[float]:
    """Holm's procedure as it is told: go from the smallest p on, give up at the first that fails;
    the corrected p is the smallest level at which one is rejected."""
    levels = sorted({min(1.0, x * m) for x in p for m in range(1, len(p) + 1)})
    corrected = [1.0] * len(p)
    for level in reversed(levels):
        order = sorted(range(len(p)), key=lambda i: p[i])
        for step, i in enumerate(order):
            if p[i] * (len(p) - step) > level:
                break
            corrected[i] = level
    return corrected


@steady
@given(st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.02, 0.03, 0.04, 0.2, 0.9, 1.0]), max_size=7))
def test_holm_is_what_its_steps_give(p):
    assert holm(p) == pytest.approx(holm_by_steps(p))


def test_holm_of_an_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_rounding_is_a_tie():
    assert Tally.of(np.array([0.5, 1e-15, -1e-15, 0.0, -1.0, -0.1])) == Tally(1, 2, 3)
