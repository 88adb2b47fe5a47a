"""Figures of geometry against their definitions, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import pdist

from patch_retriever.items import Item
from patch_retriever.pictures.picture import PictureBytes
from patch_retriever.retrieval import geometry
from patch_retriever.retrieval.geometry import (
    Hubness,
    Moments,
    alignment,
    kinds_of,
    modality_share,
    uniformity,
)


def unit(n: int, d: int = 6, seed: int = 0) -> np.ndarray:
    x_nd = np.random.default_rng(seed).normal(0.3, 1, (n, d))
    return (x_nd / np.linalg.norm(x_nd, axis=1, keepdims=True)).astype(np.float32)


KINDS_N = np.array([0, 1, 1, 0, 2] * 8, dtype=np.int8)


@pytest.mark.parametrize("chunk", [7, 100])
def test_anisotropy_and_gaps_are_those_of_all_pairs_and_means(monkeypatch, chunk):
    monkeypatch.setattr(geometry, "_CHUNK", chunk)
    x_nd = unit(40)
    found = Moments.of(x_nd, KINDS_N)
    assert found.anisotropy == pytest.approx(1 - pdist(x_nd, "cosine").mean(), abs=1e-6)
    means = [x_nd[kind == KINDS_N].mean(0) for kind in range(3)]
    expected = {
        "text, image": np.linalg.norm(means[0] - means[1]),
        "text, both": np.linalg.norm(means[0] - means[2]),
        "image, both": np.linalg.norm(means[1] - means[2]),
    }
    assert found.gaps() == pytest.approx(expected, rel=1e-5)


def test_moments_of_two_sides_add_up():
    x_nd = unit(40)
    parts = Moments.of(x_nd[:11], KINDS_N[:11]) + Moments.of(x_nd[11:], KINDS_N[11:])
    assert parts.anisotropy == pytest.approx(Moments.of(x_nd, KINDS_N).anisotropy)


def test_of_one_kind_there_is_no_gap_and_of_one_vector_no_pair():
    assert Moments.of(unit(5), np.zeros(5, np.int8)).gaps() == {}
    assert np.isnan(Moments.of(unit(1), np.zeros(1, np.int8)).anisotropy)
    assert np.isnan(uniformity(unit(1)))


def test_uniformity_is_that_of_all_pairs():
    x_nd = unit(700)
    expected = np.log(np.exp(-2 * pdist(x_nd.astype(float), "sqeuclidean")).mean())
    assert uniformity(x_nd) == pytest.approx(expected, rel=1e-6)


def test_uniformity_of_many_is_near_that_of_a_part(monkeypatch):
    x_nd = unit(3000)
    whole = uniformity(x_nd)
    monkeypatch.setattr(geometry, "PAIRS_OF", 800)
    assert uniformity(x_nd) == pytest.approx(whole, rel=0.03)
    assert uniformity(x_nd) != whole


def test_alignment_is_the_mean_squared_distance_of_the_pairs(monkeypatch):
    monkeypatch.setattr(geometry, "_CHUNK", 3)
    x_nd, y_nd = unit(9, seed=1), unit(12, seed=2)
    pairs = np.array([[0, 1], [0, 2], [8, 11], [3, 3]])
    expected = np.mean([np.sum((x_nd[q] - y_nd[c]) ** 2) for q, c in pairs])
    assert alignment(x_nd, y_nd, pairs) == pytest.approx(expected, rel=1e-5)
    assert np.isnan(alignment(x_nd, y_nd, pairs[:0]))


def test_hubness_is_the_skew_of_how_often_candidates_are_shown():
    found_qk = np.array([[0, 1], [0, 2], [0, -1], [0, 2]])
    counts = [4, 1, 2, 0, 0]
    assert Hubness.of(found_qk, 5) == Hubness(pytest.approx(stats.skew(counts)), 2 / 5)
    assert Hubness.of(np.array([[0], [1]]), 2) == Hubness(0.0, 0.0)


def test_shares_are_counted_by_kind_of_query():
    candidate_kinds = np.array([0, 0, 0, 1], dtype=np.int8)
    found_qk = np.array([[0, 3], [3, -1], [1, 2]])
    found = modality_share(found_qk, np.array([0, 0, 1], np.int8), candidate_kinds)
    assert found["pool"] == {"text": 0.75, "image": 0.25, "both": 0}
    assert found["text"] == {"text": pytest.approx(1 / 3), "image": pytest.approx(2 / 3), "both": 0}
    assert found["image"] == {"text": 1, "image": 0, "both": 0}
    assert set(found) == {"pool", "text", "image"}


def test_kinds_come_from_the_items_or_from_the_side():
    picture = PictureBytes("a", b"")
    items = [Item("a"), Item(None, picture), Item("a", picture)]
    assert kinds_of(items).tolist() == kinds_of(items, "mixed").tolist() == [0, 1, 2]
    assert kinds_of(items, "it").tolist() == [2, 2, 2]
