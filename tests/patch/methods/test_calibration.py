"""What methods learn from: vectors after a subtraction, and their statistics, are made once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calibrations import C, make_calibration, normal

from patch_retriever.patch import fit
from patch_retriever.patch.methods import methods
from patch_retriever.patch.operators import Subtract


@pytest.fixture
def c():
    return make_calibration()


def subtraction(c, seed):
    return Subtract.from_sae(c.sae, normal(C, seed=seed).clamp(0, 1))


def test_the_same_subtraction_gives_the_same_vectors_and_statistics(c):
    first, again = (c.vectors(subtraction(c, 5)) for _ in range(2))
    assert first is again
    assert first.statistics("modality") is again.statistics("modality")
    assert first.pairs is again.pairs
    assert c.vectors() is c.vectors()


def test_another_strength_is_another_subtraction(c):
    one = subtraction(c, 5)
    other = replace(one, strength_m=one.strength_m / 2)
    assert c.vectors(one) is not c.vectors(other)
    changed_nd = c.vectors(one).x_nd - c.features.pooled_nd
    assert torch.allclose(c.vectors(other).x_nd - c.features.pooled_nd, changed_nd / 2, atol=1e-4)


def test_few_subtractions_are_kept(c):
    first = c.vectors(subtraction(c, 0))
    for seed in range(1, 5):
        c.vectors(subtraction(c, seed))
    assert c.vectors(subtraction(c, 0)) is not first


def test_vectors_after_maps_are_mapped_by_their_kinds(c):
    step = fit.centre(c.vectors().statistics("modality"))
    out_nd = c.vectors().after(step).x_nd
    for rows in c.groups("modality"):
        expected_nd = c.features.pooled_nd[rows] - c.features.pooled_nd[rows].mean(0)
        assert torch.allclose(out_nd[rows], expected_nd, atol=1e-4)


def test_the_device_reaches_everything_that_is_fitted(c, monkeypatch):
    asked = []
    c = replace(c, device="cpu:0")

    def learn(*arguments):
        asked.append(arguments[-1])
        return torch.ones(arguments[1].n_gains)

    monkeypatch.setattr("patch_retriever.patch.methods.gains.learn_gains", learn)
    for vectors in (c.vectors(), c.vectors(subtraction(c, 1))):
        assert {vectors.statistics(by).moments[0].device for by in ("all", "role", "modality")} == {
            "cpu:0"
        }
        assert vectors.pairs.device == "cpu:0"
    for method in methods(c):
        if "gains" in method.id:
            method.make(**method.grid[0])
    # the learned ones, those on random directions and on principal components; shuffled ones are
    # the learned ones again
    assert asked == ["cpu:0"] * 3
