"""Fitted geometry: closed forms against other implementations and on data with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fit_samples import ALL, GROUPS_2, D, N, covariance, make_x, mapped, normal, rotation
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from patch_retriever.patch import fit


def test_centring_takes_each_groups_mean_away():
    x_nd = make_x()
    step = fit.centre(fit.Statistics(x_nd, GROUPS_2, "role"))
    assert step.by == "role"
    for g, rows in enumerate(GROUPS_2):
        expected_nd = x_nd[rows] - x_nd[rows].mean(0)
        assert torch.allclose(mapped(step, x_nd[rows], g), expected_nd, atol=1e-5)


@pytest.mark.parametrize("few", [[], [3]])
def test_a_group_with_too_few_items_takes_the_statistics_of_all(few):
    x_nd = make_x()
    groups = [torch.arange(N), torch.tensor(few, dtype=torch.long), torch.arange(10)]
    for step in (
        fit.centre(fit.Statistics(x_nd, groups, "modality")),
        fit.all_but_the_top(fit.Statistics(x_nd, groups, "modality"), 2),
        fit.realign(fit.Statistics(x_nd, groups, "modality"), 0.5),
    ):
        assert torch.equal(step.weight_gde[1], step.weight_gde[0])
        assert torch.equal(step.bias_ge[1], step.bias_ge[0])
        assert not torch.equal(step.bias_ge[2], step.bias_ge[0])


@pytest.mark.parametrize("r", [1, 2, 5])
def test_all_but_the_top_equals_sklearns_components(r):
    x_nd = make_x()
    step = fit.all_but_the_top(fit.Statistics(x_nd, GROUPS_2, "role"), r)
    for g, rows in enumerate(GROUPS_2):
        pca = PCA(r).fit(x_nd[rows].double().numpy())
        centred_nd = x_nd[rows].double().numpy() - pca.mean_
        expected_nd = centred_nd - centred_nd @ pca.components_.T @ pca.components_
        assert torch.allclose(
            mapped(step, x_nd[rows], g), torch.from_numpy(expected_nd).float(), atol=1e-4
        )


def test_realign_with_beta_one_is_centring_up_to_scale():
    x_nd = make_x()
    step = fit.realign(fit.Statistics(x_nd, GROUPS_2, "role"), 1.0)
    for g, rows in enumerate(GROUPS_2):
        out_nd = mapped(step, x_nd[rows], g)
        centred_nd = x_nd[rows] - x_nd[rows].mean(0)
        scale = out_nd.norm() / centred_nd.norm()
        assert torch.allclose(out_nd, scale * centred_nd, atol=1e-4)


def test_realign_with_small_beta_gives_nearly_identity_covariance():
    x_nd = make_x()
    step = fit.realign(fit.Statistics(x_nd, GROUPS_2, "role"), 1e-4)
    for g, rows in enumerate(GROUPS_2):
        covariance_dd = covariance(mapped(step, x_nd[rows], g))
        covariance_dd /= covariance_dd.trace() / D
        assert torch.allclose(covariance_dd, torch.eye(D), atol=0.02)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_realign_is_the_papers_formula_on_unit_mean_variance(beta):
    x_nd = make_x().double()
    covariance_dd = torch.cov(x_nd.T)
    covariance_dd /= covariance_dd.trace() / D
    shrunk_dd = (1 - beta) * covariance_dd + beta * covariance_dd.trace() / D * torch.eye(D)
    values_d, u_dd = torch.linalg.eigh(shrunk_dd)
    expected_nd = (x_nd - x_nd.mean(0)) @ u_dd @ torch.diag((values_d + 1e-5) ** -0.5) @ u_dd.T
    step = fit.realign(fit.Statistics(x_nd.float(), ALL, "all"), beta)
    assert torch.allclose(mapped(step, x_nd.float()), expected_nd.float(), atol=1e-4)


def test_realign_does_not_depend_on_the_scale_of_the_activations():
    x_nd = make_x()
    small, large = (fit.realign(fit.Statistics(s * x_nd, ALL, "all"), 0.3) for s in (1e-3, 1e3))
    assert torch.allclose(small.weight_gde, large.weight_gde, atol=1e-4)


def test_principal_gains_scale_components():
    vectors_dd, gains_d = rotation(), torch.tensor([1.0, 0.5, 0, 0.25, 1, 0.75])
    step = fit.principal_gains(gains_d.double(), vectors_dd.double())
    coordinates_nd = make_x() @ vectors_dd
    assert torch.allclose(mapped(step, make_x()) @ vectors_dd, coordinates_nd * gains_d, atol=1e-4)


def round_x(seed=0):
    """Vectors whose standard deviations lie between 1 and 3, so that eps does not count."""
    return normal(N, D, seed=seed) @ torch.diag(torch.linspace(1, 3, D)) @ rotation() + 5


def assert_alike_up_to_scale(found_nd, expected_nd):
    found_nd, expected_nd = (torch.as_tensor(m).double() for m in (found_nd, expected_nd))
    scale = found_nd.norm() / expected_nd.norm()
    assert torch.allclose(found_nd, scale * expected_nd, atol=1e-3 * float(found_nd.abs().max()))


def test_standardisation_is_sklearns_in_every_group():
    x_nd = round_x()
    step = fit.standardise(fit.Statistics(x_nd, GROUPS_2, "role"))
    for g, rows in enumerate(GROUPS_2):
        expected_nd = StandardScaler().fit_transform(x_nd[rows].double().numpy())
        assert_alike_up_to_scale(mapped(step, x_nd[rows], g), expected_nd)


def test_standardisation_leaves_a_dimension_that_never_moves_at_zero():
    x_nd = round_x()
    x_nd[:, 2] = 7.0
    out_nd = mapped(fit.standardise(fit.Statistics(x_nd, ALL, "all")), x_nd)
    assert float(out_nd[:, 2].abs().max()) < 1e-3
    assert bool(torch.isfinite(out_nd).all())


@pytest.mark.parametrize("k", [1, 3, D])
def test_pca_whitening_is_sklearns_up_to_the_signs_of_components(k):
    x_nd = round_x()
    step = fit.pca_whiten(fit.Statistics(x_nd, GROUPS_2, "role"), k)
    for g, rows in enumerate(GROUPS_2):
        out_nk = mapped(step, x_nd[rows], g)
        expected_nk = PCA(k, whiten=True).fit_transform(x_nd[rows].double().numpy())
        expected_nk = torch.from_numpy(expected_nk).float()
        signs_k = (out_nk * expected_nk).sum(0).sign()
        assert out_nk.shape == (len(rows), k)
        assert_alike_up_to_scale(out_nk, expected_nk * signs_k)


def test_the_signs_of_whitened_components_do_not_depend_on_the_group():
    """Two groups of the same spread around other means get the same axes."""
    x_nd = round_x()
    step = fit.pca_whiten(
        fit.Statistics(torch.cat([x_nd, x_nd + 9]), [ALL[0], ALL[0] + N], "role"), D
    )
    assert torch.allclose(step.weight_gde[0], step.weight_gde[1], atol=1e-4)
    assert bool((step.weight_gde[0].gather(0, step.weight_gde[0].abs().argmax(0)[None]) > 0).all())


def test_zca_whitening_is_pca_whitening_turned_back():
    x_nd = round_x()
    step = fit.zca_whiten(fit.Statistics(x_nd, GROUPS_2, "role"))
    for g, rows in enumerate(GROUPS_2):
        pca = PCA(whiten=True)
        whitened_nd = pca.fit_transform(x_nd[rows].double().numpy())
        out_nd = mapped(step, x_nd[rows], g)
        assert_alike_up_to_scale(out_nd, whitened_nd @ pca.components_)
        covariance_dd = covariance(out_nd)
        assert torch.allclose(covariance_dd / covariance_dd[0, 0], torch.eye(D), atol=1e-3)


def test_zca_whitening_changes_the_vectors_least():
    """Of all whitenings, W Q with Q orthogonal, it keeps the correlation with x highest."""
    x_nd = round_x()
    centred_nd = x_nd - x_nd.mean(0)
    out_nd = mapped(fit.zca_whiten(fit.Statistics(x_nd, ALL, "all")), x_nd)
    best = float((out_nd * centred_nd).sum())
    for seed in range(20):
        assert float((out_nd @ rotation(seed=seed) * centred_nd).sum()) < best


@pytest.mark.parametrize("n", [3, 5])
def test_whitening_of_fewer_items_than_dimensions_is_finite(n):
    x_nd = round_x()[:n]
    for step in (
        fit.zca_whiten(fit.Statistics(x_nd, [torch.arange(n)], "all")),
        fit.pca_whiten(fit.Statistics(x_nd, [torch.arange(n)], "all"), D),
        fit.standardise(fit.Statistics(x_nd, [torch.arange(n)], "all")),
    ):
        assert np.isfinite(mapped(step, x_nd).numpy()).all()
