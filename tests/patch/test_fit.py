"""Fitting: closed forms against other implementations and on data with a known answer."""

from __future__ import annotations

import pytest
import torch
from sklearn.decomposition import PCA

from patch_retriever.patch import fit
from patch_retriever.patch.operators import apply_maps

N, D = 60, 6
GROUPS_2 = [torch.arange(0, 25), torch.arange(25, N)]
ALL = [torch.arange(N)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(d=D, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed).double()).Q.float()


def make_x(seed=0):
    """Correlated vectors with a large mean; the two groups lie apart."""
    x_nd = normal(N, D, seed=seed) @ normal(D, D, seed=seed + 1) + 5
    x_nd[GROUPS_2[1]] += 3 * normal(D, seed=seed + 2)
    return x_nd


def mapped(step, x_nd, group=0):
    return x_nd @ step.weight_gde[group] + step.bias_ge[group]


def covariance(x_nd):
    return torch.cov(x_nd.double().T).float()


def test_centring_takes_each_groups_mean_away():
    x_nd = make_x()
    step = fit.centre(x_nd, GROUPS_2, "role")
    assert step.by == "role"
    for g, rows in enumerate(GROUPS_2):
        expected_nd = x_nd[rows] - x_nd[rows].mean(0)
        assert torch.allclose(mapped(step, x_nd[rows], g), expected_nd, atol=1e-5)


@pytest.mark.parametrize("few", [[], [3]])
def test_a_group_with_too_few_items_takes_the_statistics_of_all(few):
    x_nd = make_x()
    groups = [torch.arange(N), torch.tensor(few, dtype=torch.long), torch.arange(10)]
    for step in (
        fit.centre(x_nd, groups, "modality"),
        fit.all_but_the_top(x_nd, groups, "modality", 2),
        fit.realign(x_nd, groups, "modality", 0.5),
    ):
        assert torch.equal(step.weight_gde[1], step.weight_gde[0])
        assert torch.equal(step.bias_ge[1], step.bias_ge[0])
        assert not torch.equal(step.bias_ge[2], step.bias_ge[0])


@pytest.mark.parametrize("r", [1, 2, 5])
def test_all_but_the_top_equals_sklearns_components(r):
    x_nd = make_x()
    step = fit.all_but_the_top(x_nd, GROUPS_2, "role", r)
    for g, rows in enumerate(GROUPS_2):
        pca = PCA(r).fit(x_nd[rows].double().numpy())
        centred_nd = x_nd[rows].double().numpy() - pca.mean_
        expected_nd = centred_nd - centred_nd @ pca.components_.T @ pca.components_
        assert torch.allclose(
            mapped(step, x_nd[rows], g), torch.from_numpy(expected_nd).float(), atol=1e-4
        )


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


def test_realign_with_beta_one_is_centring_up_to_scale():
    x_nd = make_x()
    step = fit.realign(x_nd, GROUPS_2, "role", 1.0)
    for g, rows in enumerate(GROUPS_2):
        out_nd = mapped(step, x_nd[rows], g)
        centred_nd = x_nd[rows] - x_nd[rows].mean(0)
        scale = out_nd.norm() / centred_nd.norm()
        assert torch.allclose(out_nd, scale * centred_nd, atol=1e-4)


def test_realign_with_small_beta_gives_nearly_identity_covariance():
    x_nd = make_x()
    step = fit.realign(x_nd, GROUPS_2, "role", 1e-4)
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
    step = fit.realign(x_nd.float(), ALL, "all", beta)
    assert torch.allclose(mapped(step, x_nd.float()), expected_nd.float(), atol=1e-4)


def test_realign_does_not_depend_on_the_scale_of_the_activations():
    x_nd = make_x()
    small, large = (fit.realign(s * x_nd, ALL, "all", 0.3) for s in (1e-3, 1e3))
    assert torch.allclose(small.weight_gde, large.weight_gde, atol=1e-4)


def test_principal_gains_scale_components():
    vectors_dd, gains_d = rotation(), torch.tensor([1.0, 0.5, 0, 0.25, 1, 0.75])
    step = fit.principal_gains(make_x(), gains_d.double(), vectors_dd.double())
    coordinates_nd = make_x() @ vectors_dd
    assert torch.allclose(mapped(step, make_x()) @ vectors_dd, coordinates_nd * gains_d, atol=1e-4)


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
    step = fit.procrustes(x_nd, kinds_n, pairs)
    image_nd = mapped(step, x_nd[kinds_n == 1], 1)
    assert torch.allclose(image_nd, x_nd[20:40] - x_nd[20:40].mean(0), atol=1e-5)
    for kind in (0, 2):
        assert torch.allclose(mapped(step, x_nd[kinds_n == kind], kind), image_nd, atol=1e-4)


def test_procrustes_from_some_of_the_pairs_turns_all_items():
    x_nd, kinds_n, pairs = turned_kinds()
    step = fit.procrustes(x_nd, kinds_n, {0: pairs[0][:10]})
    text_nd, image_nd = (mapped(step, x_nd[kinds_n == k], k) for k in (0, 1))
    assert torch.allclose(text_nd, image_nd, atol=1e-4)


def test_procrustes_only_centres_a_kind_without_pairs():
    x_nd, kinds_n, pairs = turned_kinds()
    step = fit.procrustes(x_nd, kinds_n, {0: pairs[0]})
    both_nd = x_nd[kinds_n == 2]
    assert torch.allclose(mapped(step, both_nd, 2), both_nd - both_nd.mean(0), atol=1e-5)


def test_procrustes_is_a_rotation_even_where_pairs_are_noisy():
    x_nd, kinds_n, pairs = turned_kinds()
    x_nd = x_nd + normal(*x_nd.shape, seed=9)
    weight_dd = fit.procrustes(x_nd, kinds_n, pairs).weight_gde[0]
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
    step = fit.cca(x_nd, kinds_n, pairs, 0.0, D)
    text_nr, image_nr = (mapped(step, x_nd[kinds_n == k], k) for k in (0, 1))
    found_r = correlations(text_nr, image_nr)
    assert bool((found_r[:SHARED] > 0.99).all())
    assert bool((found_r[SHARED:] < 0.3).all())
    expected_r = canonical_correlations(x_nd[kinds_n == 0], x_nd[kinds_n == 1])
    assert torch.allclose(found_r, expected_r, atol=1e-3)


def test_cca_weights_each_canonical_pair_by_its_correlation():
    x_nd, kinds_n, pairs = shared_views()
    step = fit.cca(x_nd, kinds_n, pairs, 0.0, D)
    expected_r = canonical_correlations(x_nd[kinds_n == 0], x_nd[kinds_n == 1])
    for kind in (0, 1):
        variance_r = mapped(step, x_nd[kinds_n == kind], kind).var(0)
        assert torch.allclose(variance_r / variance_r[0], expected_r / expected_r[0], atol=0.01)


def test_cca_centres_each_kind_and_keeps_r_dimensions():
    x_nd, kinds_n, pairs = shared_views()
    step = fit.cca(x_nd, kinds_n, pairs, 0.3, 3)
    for kind in range(3):
        out_nr = mapped(step, x_nd[kinds_n == kind], kind)
        assert out_nr.shape == (N_PAIRS, 3)
        assert float(out_nr.mean(0).abs().max()) < 1e-3


def test_cca_regresses_items_of_both_kinds_onto_their_images():
    x_nd, kinds_n, pairs = shared_views()
    step = fit.cca(x_nd, kinds_n, pairs, 0.0, D)
    image_nr, both_nr = (mapped(step, x_nd[kinds_n == k], k) for k in (1, 2))
    assert torch.allclose(both_nr, image_nr, atol=1e-3)


def test_cca_treats_both_as_images_where_it_has_no_pairs():
    x_nd, kinds_n, pairs = shared_views()
    step = fit.cca(x_nd, kinds_n, {0: pairs[0]}, 0.3, D)
    assert torch.equal(step.weight_gde[2], step.weight_gde[1])


def three_kinds(gap):
    kinds_n = torch.arange(90) % 3
    means_kd = gap * torch.eye(3, D)
    return normal(90, D, seed=4) + means_kd[kinds_n], kinds_n


def test_a_gate_separates_kinds_that_lie_apart():
    mean_nd, kinds_n = three_kinds(gap=12.0)
    gate = fit.fit_gate(100 * mean_nd + 300, kinds_n)
    assert torch.equal(gate.kinds(100 * mean_nd + 300), kinds_n)
    assert 0 < gate.margin <= 1


def test_the_closest_item_lies_one_unit_from_its_hyperplane():
    mean_nd, kinds_n = three_kinds(gap=12.0)
    gate = fit.fit_gate(mean_nd, kinds_n)
    distance_n2 = (mean_nd @ gate.direction_2d.T + gate.offset_2).abs()
    assert torch.allclose(distance_n2.min(0).values, torch.ones(2), atol=1e-3)


def test_there_is_no_gate_where_kinds_overlap():
    mean_nd, kinds_n = three_kinds(gap=0.5)
    assert fit.fit_gate(mean_nd, kinds_n) is None


@pytest.mark.parametrize("kinds", [(0, 1), (0, 2), (1, 2), (0,), (1,), (2,)])
def test_a_missing_kind_is_never_chosen(kinds):
    mean_nd, kinds_n = three_kinds(gap=12.0)
    there_n = torch.isin(kinds_n, torch.tensor(kinds))
    gate = fit.fit_gate(mean_nd[there_n], kinds_n[there_n])
    assert torch.equal(gate.kinds(mean_nd[there_n]), kinds_n[there_n])
    elsewhere_nd = 20 * normal(200, D, seed=5)
    assert set(gate.kinds(elsewhere_nd).tolist()) <= set(kinds)


def test_a_gate_switches_maps_by_modality_in_place():
    mean_nd, kinds_n = three_kinds(gap=12.0)
    groups = [(kinds_n == kind).nonzero()[:, 0] for kind in range(3)]
    step = fit.centre(mean_nd, groups, "modality")
    out_nd = apply_maps((step,), fit.fit_gate(mean_nd, kinds_n), mean_nd, mean_nd, 1)
    for rows in groups:
        assert float(out_nd[rows].mean(0).abs().max()) < 1e-4
