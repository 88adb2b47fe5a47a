"""Centring and ReAlign of finished vectors: what they are fitted on, what they give."""

from __future__ import annotations

import numpy as np
import pytest

from patch_retriever.retrieval.comparison import baselines as module
from patch_retriever.retrieval.comparison.baselines import (
    BETA,
    MappedVectors,
    baselines,
    calibrated,
    sample,
    transductive,
)
from patch_retriever.retrieval.vectors import at_hand

CENTRING, REALIGN = baselines(with_calibration=True)[:2]
D = 5


def unit(x_nd: np.ndarray) -> np.ndarray:
    return x_nd / np.linalg.norm(x_nd, axis=1, keepdims=True)


def made(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of texts and images, each around a mean of its own."""
    rng = np.random.default_rng(seed)
    kinds_n = (np.arange(n) % 2).astype(np.int8)
    offset_nd = np.eye(2, D)[kinds_n] + np.eye(D)[-1]
    return unit(rng.normal(0, 0.4, (n, D)) + 2 * offset_nd).astype(np.float32), kinds_n


def zca(x_nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and ReAlign's matrix as the paper has them (Eq. 11-12), for unit mean variance."""
    mean_d, cov_dd = x_nd.mean(0), np.cov(x_nd.T)
    cov_dd = cov_dd / (np.trace(cov_dd) / D)
    values_d, u_dd = np.linalg.eigh((1 - BETA) * cov_dd + BETA * np.eye(D))
    return mean_d, u_dd @ np.diag((values_d + 1e-5) ** -0.5) @ u_dd.T


def test_calibrated_centring_takes_the_mean_of_each_kind_of_calibration():
    known, known_kinds = made(60, 0)
    test, kinds = made(31, 1)
    found = calibrated(CENTRING, (known, known_kinds), (test, kinds))
    means_kd = np.stack([known[known_kinds == kind].mean(0) for kind in (0, 1)])
    np.testing.assert_allclose(found[:], unit(test - means_kd[kinds]), atol=1e-5)


def test_calibrated_realign_is_the_papers_for_each_kind():
    known, known_kinds = made(60, 0)
    test, kinds = made(31, 1)
    found = calibrated(REALIGN, (known, known_kinds), (test, kinds))
    for kind in (0, 1):
        mean_d, weight_dd = zca(known[known_kinds == kind].astype(float))
        expected = unit((test[kinds == kind] - mean_d) @ weight_dd)
        np.testing.assert_allclose(found[:][kinds == kind], expected, atol=1e-4)


def test_transductive_ones_know_the_side_itself_and_no_kinds():
    test, kinds = made(40, 2)
    centring, realign = baselines(with_calibration=False)
    assert centring.transductive and realign.transductive
    np.testing.assert_allclose(
        transductive(centring, (test, kinds))[:], unit(test - test.mean(0)), atol=1e-5
    )
    mean_d, weight_dd = zca(test.astype(float))
    expected = unit((test - mean_d) @ weight_dd)
    np.testing.assert_allclose(transductive(realign, (test, kinds))[:], expected, atol=1e-4)


def test_names_say_which_is_which():
    found = {b.name: b for b in baselines(with_calibration=True)}
    assert len(found) == 4
    for name, baseline in found.items():
        assert name.endswith("transductive" if baseline.transductive else "calibrated")
        assert ("transductive" in baseline.needs) == baseline.transductive


def test_a_kind_that_calibration_lacks_takes_the_statistics_of_all():
    known, known_kinds = made(20, 3)
    texts = known[known_kinds == 0]
    test, kinds = made(9, 4)
    found = calibrated(CENTRING, (texts, np.zeros(len(texts), np.int8)), (test, kinds))
    np.testing.assert_allclose(found[:], unit(test - texts.mean(0)), atol=1e-5)


def test_statistics_of_many_are_those_of_a_part(monkeypatch):
    monkeypatch.setattr(module, "MOST", 16)
    test, kinds = made(200, 5)
    rows = sample(test)
    assert len(rows) == 16 and (np.diff(rows) > 0).all()
    expected = unit(test - test[rows].mean(0))
    found = transductive(baselines(False)[0], (test, kinds))
    np.testing.assert_allclose(found[:], expected, atol=1e-5)


@pytest.mark.parametrize("rows", [slice(3, 9), np.array([8, 1, 1]), slice(None)])
def test_parts_of_mapped_vectors_are_parts_of_the_whole(rows):
    known, known_kinds = made(30, 6)
    test, kinds = made(12, 7)
    found = calibrated(REALIGN, (known, known_kinds), (test, kinds))
    assert isinstance(found, MappedVectors)
    whole = at_hand(found)
    assert isinstance(whole, np.ndarray)
    np.testing.assert_allclose(found[rows], whole[rows], atol=1e-6)
    assert at_hand(found, most=10) is found  # too large to keep
