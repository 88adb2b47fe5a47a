"""Alignments: known rotations and shared directions are found, and equal other solvers'."""

from __future__ import annotations

import pytest
import torch
from fit_samples import D, mapped, normal, rotation
from sklearn.linear_model import Ridge

from patch_retriever.patch import fit


def turned_kinds():
    """Images; texts and items of both kinds are the images turned and moved."""
    image_nd, text_r, both_r = normal(20, D, seed=1), rotation(seed=2), rotation(seed=3)
    x_nd = torch.cat([image_nd @ text_r + 4, image_nd, image_nd @ both_r - 2])
    kinds_n = torch.tensor([0] * 20 + [1] * 20 + [2] * 20)
    numbers = torch.arange(20)
    pairs = {
        0: torch.stack([numbers, numbers + 20], 1),
        2: torch.stack([numbers + 40, numbers + 20], 1),
    }
    return x_nd, kinds_n, pairs


def test_procrustes_recovers_a_known_rotation():
    x_nd, kinds_n, pairs = turned_kinds()
    step = fit.procrustes(fit.PairStatistics(x_nd, kinds_n, pairs))
    image_nd = mapped(step, x_nd[kinds_n == 1], 1)
    assert torch.allclose(image_nd, x_nd[20:40] - x_nd[20:40].mean(0), atol=1e-5)
    for kind in (0, 2):
        assert torch.allclose(mapped(step, x_nd[kinds_n == kind], kind), image_nd, atol=1e-4)


def test_procrustes_from_some_of_the_pairs_turns_all_items():
    x_nd, kinds_n, pairs = turned_kinds()
    step = fit.procrustes(fit.PairStatistics(x_nd, kinds_n, {0: pairs[0][:10]}))
    text_nd, image_nd = (mapped(step, x_nd[kinds_n == k], k) for k in (0, 1))
    assert torch.allclose(text_nd, image_nd, atol=1e-4)


def test_procrustes_only_centres_a_kind_without_pairs():
    x_nd, kinds_n, pairs = turned_kinds()
    step = fit.procrustes(fit.PairStatistics(x_nd, kinds_n, {0: pairs[0]}))
    both_nd = x_nd[kinds_n == 2]
    assert torch.allclose(mapped(step, both_nd, 2), both_nd - both_nd.mean(0), atol=1e-5)


def test_procrustes_is_a_rotation_even_where_pairs_are_noisy():
    x_nd, kinds_n, pairs = turned_kinds()
    x_nd = x_nd + normal(*x_nd.shape, seed=9)
    weight_dd = fit.procrustes(fit.PairStatistics(x_nd, kinds_n, pairs)).weight_gde[0]
    assert torch.allclose(weight_dd @ weight_dd.T, torch.eye(D), atol=1e-5)


SHARED, N_PAIRS = 2, 400


def shared_views():
    """Texts and images with two common directions; the rest of each is its own noise."""
    shared_ns = normal(N_PAIRS, SHARED, seed=1)
    views = []
    for seed in (2, 3):
        own_nr = normal(N_PAIRS, D - SHARED, seed=seed)
        views.append(torch.cat([shared_ns, own_nr], 1) @ normal(D, D, seed=seed + 10) + seed)
    both_nd = views[1] @ normal(D, D, seed=20)  # each is a linear image of its picture
    x_nd = torch.cat([*views, both_nd])
    kinds_n = torch.arange(3).repeat_interleave(N_PAIRS)
    numbers = torch.arange(N_PAIRS)
    pairs = {
        0: torch.stack([numbers, numbers + N_PAIRS], 1),
        2: torch.stack([numbers + 2 * N_PAIRS, numbers + N_PAIRS], 1),
    }
    return x_nd, kinds_n, pairs


def canonical_correlations(a_nd, b_nd):
    """By QR (Bjorck and Golub 1973), another way than whitening."""
    qs = [torch.linalg.qr((m - m.mean(0)).double()).Q for m in (a_nd, b_nd)]
    return torch.linalg.svd(qs[0].T @ qs[1]).S.float()


def correlations(a_nr, b_nr):
    a_nr, b_nr = ((m - m.mean(0)) / m.std(0) for m in (a_nr, b_nr))
    return (a_nr * b_nr).sum(0) / (len(a_nr) - 1)


def test_cca_finds_the_shared_directions():
    x_nd, kinds_n, pairs = shared_views()
    step = fit.cca(fit.PairStatistics(x_nd, kinds_n, pairs), 0.0, D)
    text_nr, image_nr = (mapped(step, x_nd[kinds_n == k], k) for k in (0, 1))
    found_r = correlations(text_nr, image_nr)
    assert bool((found_r[:SHARED] > 0.99).all())
    assert bool((found_r[SHARED:] < 0.3).all())
    expected_r = canonical_correlations(x_nd[kinds_n == 0], x_nd[kinds_n == 1])
    assert torch.allclose(found_r, expected_r, atol=1e-3)


def test_cca_weights_each_canonical_pair_by_its_correlation():
    x_nd, kinds_n, pairs = shared_views()
    step = fit.cca(fit.PairStatistics(x_nd, kinds_n, pairs), 0.0, D)
    expected_r = canonical_correlations(x_nd[kinds_n == 0], x_nd[kinds_n == 1])
    for kind in (0, 1):
        variance_r = mapped(step, x_nd[kinds_n == kind], kind).var(0)
        assert torch.allclose(variance_r / variance_r[0], expected_r / expected_r[0], atol=0.01)


def test_cca_centres_each_kind_and_keeps_r_dimensions():
    x_nd, kinds_n, pairs = shared_views()
    step = fit.cca(fit.PairStatistics(x_nd, kinds_n, pairs), 0.3, 3)
    for kind in range(3):
        out_nr = mapped(step, x_nd[kinds_n == kind], kind)
        assert out_nr.shape == (N_PAIRS, 3)
        assert float(out_nr.mean(0).abs().max()) < 1e-3


def test_cca_regresses_items_of_both_kinds_onto_their_images():
    x_nd, kinds_n, pairs = shared_views()
    step = fit.cca(fit.PairStatistics(x_nd, kinds_n, pairs), 0.0, D)
    image_nr, both_nr = (mapped(step, x_nd[kinds_n == k], k) for k in (1, 2))
    assert torch.allclose(both_nr, image_nr, atol=1e-3)


def test_cca_treats_both_as_images_where_it_has_no_pairs():
    x_nd, kinds_n, pairs = shared_views()
    step = fit.cca(fit.PairStatistics(x_nd, kinds_n, {0: pairs[0]}), 0.3, D)
    assert torch.equal(step.weight_gde[2], step.weight_gde[1])


@pytest.mark.parametrize("shrinkage", [0.01, 1.0])
def test_ridge_regression_equals_sklearns(shrinkage):
    x_nd, kinds_n, pairs = shared_views()
    step = fit.ridge(fit.PairStatistics(x_nd, kinds_n, pairs), shrinkage)
    image_nd = x_nd[kinds_n == 1]
    for kind in (0, 2):
        a_nd = x_nd[kinds_n == kind].double().numpy()
        penalty = shrinkage * a_nd.var(0).mean() * len(a_nd)
        machine = Ridge(alpha=penalty, solver="cholesky").fit(a_nd, image_nd.double().numpy())
        expected_nd = torch.from_numpy(machine.predict(a_nd)).float() - image_nd.mean(0)
        assert torch.allclose(mapped(step, x_nd[kinds_n == kind], kind), expected_nd, atol=1e-3)


def test_ridge_regression_only_centres_images_and_kinds_without_pairs():
    x_nd, kinds_n, pairs = shared_views()
    step = fit.ridge(fit.PairStatistics(x_nd, kinds_n, {0: pairs[0]}), 0.1)
    for kind in (1, 2):
        rows_nd = x_nd[kinds_n == kind]
        expected_nd = rows_nd - rows_nd.mean(0)
        assert torch.allclose(mapped(step, rows_nd, kind), expected_nd, atol=1e-4)


def test_ridge_regression_finds_a_linear_map_from_few_pairs():
    x_nd, kinds_n, pairs = shared_views()
    step = fit.ridge(fit.PairStatistics(x_nd, kinds_n, {0: pairs[0], 2: pairs[2][:40]}), 1e-8)
    both_nd, image_nd = (mapped(step, x_nd[kinds_n == k], k) for k in (2, 1))
    assert torch.allclose(both_nd, image_nd, atol=1e-2)
