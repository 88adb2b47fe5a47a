"""Erasure: subspaces and labels that are gone afterwards, and nothing else that changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fit_samples import D, make_x, mapped, normal, rotation, three_kinds
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from patch_retriever.patch import fit


def test_removed_subspace_leaves_nothing_of_its_directions():
    x_nd, directions_md = make_x(), normal(3, D, seed=7)
    step = fit.remove_subspace(directions_md)
    assert float((mapped(step, x_nd) @ directions_md.T).abs().max()) < 1e-4
    left = torch.linalg.svd(torch.eye(D) - step.weight_gde[0]).S
    assert torch.allclose(left, torch.tensor([1.0, 1, 1, 0, 0, 0]), atol=1e-5)


def test_removing_a_subspace_twice_is_removing_it_once():
    x_nd = make_x()
    step = fit.remove_subspace(normal(4, D, seed=7), r=2)
    once_nd = mapped(step, x_nd)
    assert torch.allclose(mapped(step, once_nd), once_nd, atol=1e-5)


def test_the_first_r_singular_directions_are_removed_and_no_more():
    turn_dd = rotation(seed=3)
    directions_md = torch.diag(torch.tensor([9.0, 4.0, 1.0, 0.5, 0.2, 0.1])) @ turn_dd
    step = fit.remove_subspace(directions_md, r=2)
    assert float((turn_dd[:2] @ step.weight_gde[0]).abs().max()) < 1e-5
    assert torch.allclose(turn_dd[2:] @ step.weight_gde[0], turn_dd[2:], atol=1e-5)


def cross_covariance(x_nd, labels_n):
    """(d, labels), dimension by dimension and label by label."""
    x_nd = x_nd.double()
    return torch.tensor(
        [
            [
                float(((x_nd[:, i] - x_nd[:, i].mean()) * (labels_n == label)).mean())
                for label in labels_n.unique()
            ]
            for i in range(x_nd.shape[1])
        ]
    )


@st.composite
def labelled_vectors(draw):
    """Correlated vectors with a label each; with fewer items than dimensions, too."""
    n, d, kinds = draw(st.integers(6, 40)), draw(st.integers(2, 8)), draw(st.integers(2, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    labels_n = torch.arange(n) % kinds
    x_nd = torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator)
    means_kd = 3 * torch.randn(kinds, d, generator=generator)
    return x_nd + means_kd[labels_n] + 5, labels_n


@settings(deadline=None, max_examples=40)
@given(labelled_vectors())
def test_after_leace_no_dimension_correlates_with_a_label(case):
    x_nd, labels_n = case
    assert float(cross_covariance(x_nd, labels_n).abs().max()) > 1e-2
    out_nd = mapped(fit.leace(fit.Moments(x_nd, torch.arange(len(x_nd))), labels_n), x_nd)
    assert float(cross_covariance(out_nd, labels_n).abs().max()) < 1e-4
    assert torch.allclose(out_nd.mean(0), x_nd.mean(0), atol=1e-3)


def least_change(x_nd, labels_n):
    """W of the map x W + b that changes x least among those after which the labels' covariances
    are zero: a quadratic program with linear constraints, solved by its Lagrange conditions."""
    x = x_nd.double().numpy()
    z = np.eye(int(labels_n.max()) + 1)[labels_n.numpy()]
    x, z = x - x.mean(0), z - z.mean(0)
    sigma_dd, cross_dz = x.T @ x, x.T @ z
    d, k = cross_dz.shape
    conditions = np.block([[sigma_dd, cross_dz], [cross_dz.T, np.zeros((k, k))]])
    goal = np.concatenate([sigma_dd, np.zeros((k, d))])
    return torch.from_numpy(np.linalg.lstsq(conditions, goal, rcond=1e-12)[0][:d]).float()


@pytest.mark.parametrize("seed", range(5))
def test_leace_is_the_least_change_that_does_it(seed):
    x_nd = three_kinds(gap=2.0)[0] @ normal(D, D, seed=seed) + 5
    labels_n = three_kinds(gap=2.0)[1]
    weight_dd = fit.leace(fit.Moments(x_nd, torch.arange(len(x_nd))), labels_n).weight_gde[0]
    assert torch.allclose(weight_dd, least_change(x_nd, labels_n), atol=1e-3)


def test_leace_of_three_labels_takes_two_directions():
    x_nd, labels_n = three_kinds(gap=2.0)
    removed_dd = (
        torch.eye(D) - fit.leace(fit.Moments(x_nd, torch.arange(len(x_nd))), labels_n).weight_gde[0]
    )
    assert int(torch.linalg.matrix_rank(removed_dd, atol=1e-4)) == 2
    assert torch.allclose(removed_dd @ removed_dd, removed_dd, atol=1e-4)


def test_after_leace_a_linear_classifier_can_only_guess():
    x_nd, labels_n = three_kinds(gap=12.0)
    out_nd = mapped(fit.leace(fit.Moments(x_nd, torch.arange(len(x_nd))), labels_n), x_nd)
    probabilities = []
    for features_nd in (x_nd, out_nd):
        machine = LogisticRegression(max_iter=2000).fit(features_nd.numpy(), labels_n.numpy())
        probabilities.append(machine.predict_proba(features_nd.numpy()))
    assert (probabilities[0].max(1) > 0.9).all()
    assert np.allclose(probabilities[1], 1 / 3, atol=0.01)


def test_leace_changes_nothing_where_there_is_one_label():
    x_nd = make_x()
    step = fit.leace(fit.Moments(x_nd, torch.arange(len(x_nd))), torch.zeros(len(x_nd)))
    assert torch.allclose(mapped(step, x_nd), x_nd, atol=1e-4)
