"""Whitening, the linear map and the selections against what defines them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.analysis.stand_ins import matched_in_energy, pca_whitening, ridge, unimodal
from patch_retriever.patch import fit

steady = settings(deadline=None, derandomize=True)


def vectors(n=400, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix_dd = torch.randn(d, d, generator=generator)
    return torch.randn(n, d, generator=generator) @ mix_dd + 3


def apply(step, x_nd, group=0):
    return x_nd @ step.weight_gde[group] + step.bias_ge[group]


def test_pca_whitening_gives_each_group_a_covariance_like_the_identity():
    x_nd = vectors()
    groups = [torch.arange(0, 150), torch.arange(150, 400)]
    step = pca_whitening(x_nd, groups, "role")
    for g, rows in enumerate(groups):
        out_nd = apply(step, x_nd[rows], g)
        assert torch.allclose(out_nd.mean(0), torch.zeros(6), atol=1e-3)
        covariance_dd = torch.cov(out_nd.T)
        assert torch.allclose(covariance_dd / covariance_dd[0, 0], torch.eye(6), atol=2e-3)


def test_pca_and_zca_whitening_differ_by_a_rotation():
    x_nd = vectors()
    groups = [torch.arange(400)]
    pca, zca = pca_whitening(x_nd, groups, "all"), fit.realign(x_nd, groups, "all", 0.0)
    a_nd, b_nd = apply(pca, x_nd), apply(zca, x_nd)
    assert torch.allclose(a_nd @ a_nd.T, b_nd @ b_nd.T, atol=1e-2)
    assert not torch.allclose(a_nd, b_nd, atol=1e-2)


@pytest.mark.parametrize("strength", [0.03, 1.0])
def test_ridge_is_least_squares_with_rows_for_the_penalty(strength):
    x_nd, d = vectors(300, 5), 5
    kinds_n = torch.tensor([0] * 100 + [1] * 100 + [2] * 100)
    pairs_n2 = torch.tensor([[i, 100 + (7 * i) % 100] for i in range(60)])
    step = ridge(x_nd, kinds_n, pairs_n2, strength)
    a, b = (x_nd[side].double().numpy() for side in pairs_n2.T)
    a, b = a - a.mean(0), b - b.mean(0)
    penalty = strength * np.trace(a.T @ a) / d
    rows_a = np.vstack([a, np.sqrt(penalty) * np.eye(d)])
    rows_b = np.vstack([b, np.zeros((d, d))])
    expected, *_ = np.linalg.lstsq(rows_a, rows_b, rcond=None)
    np.testing.assert_allclose(step.weight_gde[0].numpy(), expected, atol=1e-5)
    for kind in range(3):
        assert torch.allclose(
            apply(step, x_nd[kinds_n == kind], kind).mean(0), torch.zeros(d), atol=1e-4
        )
    assert torch.equal(step.weight_gde[1], torch.eye(d))


def test_ridge_does_without_items_of_both():
    x_nd = vectors(40, 3)
    kinds_n = torch.tensor([0] * 20 + [1] * 20)
    step = ridge(x_nd, kinds_n, torch.tensor([[i, 20 + i] for i in range(20)]), 0.1)
    assert bool(torch.isfinite(step.bias_ge).all())


def test_unimodal_concepts_fire_for_one_modality_only():
    modality_c = torch.tensor([0.0, 0.04, 0.06, 0.5, 0.94, 0.96, 1.0, 1.0])
    energy_c = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    assert unimodal(modality_c, energy_c).tolist() == [
        True, True, False, False, False, True, True, False,
    ]  # fmt: skip


@steady
@given(st.integers(1, 200), st.integers(0, 1000), st.integers(0, 2**31))
def test_random_concepts_are_a_one_to_one_exchange_of_neighbours_in_energy(c, seed, data_seed):
    generator = torch.Generator().manual_seed(data_seed)
    energy_c = torch.rand(c, generator=generator)
    ranking_m = torch.randperm(c, generator=generator)
    partner_m = matched_in_energy(energy_c, ranking_m, seed, reach=5)
    assert sorted(partner_m.tolist()) == list(range(c))
    place = {concept: p for p, concept in enumerate(energy_c.argsort(descending=True).tolist())}
    for concept, partner in zip(ranking_m.tolist(), partner_m.tolist(), strict=True):
        assert abs(place[concept] - place[partner]) <= 5
    first = matched_in_energy(energy_c, ranking_m[: c // 2], seed, reach=5)
    assert torch.equal(first, partner_m[: c // 2])  # more of a ranking exchanges the same ones
