"""Indexes in memory against all inner products, from shards of any sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.errors import UserError
from patch_retriever.retrieval.index.build import build_index
from patch_retriever.retrieval.vectors import Shards


def unit(n, d, seed=0):
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def brute_force(queries, rows, k):
    scores = queries @ rows.T
    found = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, found, axis=1), found


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_exact_search_over_shards_is_brute_force(sizes, d, seed):
    rows, queries = unit(sum(sizes), d, seed), unit(5, d, seed + 1)
    index = build_index(Shards(np.split(rows, np.cumsum(sizes)[:-1])), "flat", d)
    k = min(10, len(rows))
    if k:
        scores, found = index.search(queries, k)
        expected, _ = brute_force(queries, rows, k)
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        own = np.take_along_axis(queries @ rows.T, found, axis=1)
        np.testing.assert_allclose(own, expected, atol=1e-5)
    assert index.ntotal == len(rows)


APPROXIMATE = {
    "hnsw": 0.95,
    "ivf": 0.6,
    "sq8": 0.95,
    "rabitq": 0.2,  # 16 bits a vector
    "IVF8,SQ8": 0.95,
    "IVF8,PQ8x4": 0.3,
    "IVF8,RaBitQ": 0.1,
    "OPQ4,IVF4,PQ4x4": 0.1,
    "SQfp16": 0.99,
    "IDMap2,Flat": 1.0,
}


@pytest.mark.parametrize("factory", APPROXIMATE)
def test_every_kind_finds_most_of_what_brute_force_finds(factory):
    rows, queries = unit(2000, 16), unit(50, 16, 1)
    _, found = build_index(Shards([rows[:700], rows[700:]]), factory, 16).search(queries, 10)
    _, expected = brute_force(queries, rows, 10)
    recall = np.mean([np.isin(e, f).mean() for e, f in zip(expected, found, strict=True)])
    assert recall >= APPROXIMATE[factory]


def test_rabitq_is_rotated_so_that_uneven_dimensions_do_not_spoil_it():
    rows = unit(2000, 64) * np.r_[np.full(8, 5), np.ones(56)].astype(np.float32) + np.float32(0.1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    _, expected = brute_force(rows[:50], rows, 10)
    plain, ours = (
        np.mean([np.isin(e, f).mean() for e, f in zip(expected, found, strict=True)])
        for found in (
            build_index(rows, f, 64).search(rows[:50], 10)[1] for f in ("RaBitQ", "rabitq")
        )
    )
    assert ours > 1.3 * plain


def test_the_same_vectors_train_the_same_index():
    rows = unit(3000, 8)
    first, second = (build_index(rows, "IVF32,Flat", 8) for _ in range(2))
    for a, b in zip(first.search(rows[:20], 5), second.search(rows[:20], 5), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("n", [0, 10])
def test_too_few_to_train_on_is_one_line(n):
    with pytest.raises(UserError, match=f"cannot be trained on {n} items") as raised:
        build_index(unit(n, 8), "IVF64,Flat", 8)
    assert "\n" not in str(raised.value)


def test_a_small_sample_makes_no_page_of_warnings(capfd):
    build_index(unit(300, 8), "IVF32,PQ4x4", 8)
    assert capfd.readouterr().err == ""
