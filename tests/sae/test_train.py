"""Training on a small store of synthetic sparse activations."""

from __future__ import annotations

from dataclasses import replace
from itertools import repeat

import pytest
import torch

from patch_retriever.activations.collect import no_progress
from patch_retriever.activations.store import Store, StoreWriter
from patch_retriever.sae.train import SAESettings, _fold, _loss, _TopK, train_sae

N_TOKENS = 1024
SETTINGS = SAESettings(expansion=4, k=4, steps=200, batch_size=N_TOKENS, dead_after=20)
"""One batch is the whole store, so that what holds on a batch holds on all tokens."""


def sparse_tokens(d=16, active=3, directions=24, seed=0):
    """Each token is a sum of a few of the directions."""
    generator = torch.Generator().manual_seed(seed)
    rows_cd = torch.nn.functional.normalize(torch.randn(directions, d, generator=generator), dim=1)
    order_tc = torch.rand(N_TOKENS, directions, generator=generator)
    strength_tk = 1 + torch.rand(N_TOKENS, active, generator=generator)
    codes_tc = torch.zeros(N_TOKENS, directions)
    return codes_tc.scatter_(1, order_tc.topk(active).indices, strength_tk) @ rows_cd


def clustered_tokens(seed=0):
    """Sparse tokens around three far points, where many concepts never get a chance to fire."""
    generator = torch.Generator().manual_seed(seed)
    points_pd = 2 * torch.randn(3, 32, generator=generator)
    tokens_td = sparse_tokens(32, 4, 64, seed)
    return tokens_td + points_pd[torch.randint(0, 3, (N_TOKENS,), generator=generator)]


def make_store(folder, tokens_td):
    writer = StoreWriter(folder)
    writer.add(tokens_td, torch.zeros(len(tokens_td)), torch.ones(len(tokens_td)))
    writer.close()
    return Store(folder)


def stored_tokens(store):
    return store.read(0)["activations_td"].float()


def train(store, seed=0, **changes):
    return train_sae(store, replace(SETTINGS, **changes), seed, 0.0, no_progress)


def fvu(sae, x_nd):
    """Fraction of variance unexplained."""
    error_nd = x_nd - sae.decode(sae.encode(x_nd))
    return float(error_nd.pow(2).sum() / (x_nd - x_nd.mean(0)).pow(2).sum())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"), sparse_tokens())


@pytest.fixture(scope="module")
def trained(store):
    return train(store)


def test_training_explains_most_of_the_variance(store, trained):
    untrained, _ = train(store, lr=0.0, steps=2)
    x_nd = stored_tokens(store)
    assert fvu(trained[0], x_nd) < 0.25
    assert fvu(untrained, x_nd) > 3 * fvu(trained[0], x_nd)


def test_figures_are_those_of_the_sae_that_is_returned(store, trained):
    sae, figures = trained
    x_nd = stored_tokens(store)
    assert figures["fvu"] == pytest.approx(fvu(sae, x_nd), rel=1e-3)
    active = float((sae.encode(x_nd) > 0).sum(1).float().mean())
    assert figures["active"] == pytest.approx(active, rel=1e-3)


def test_the_same_seed_gives_the_same_weights(store):
    (first, _), (second, _) = train(store, steps=20), train(store, steps=20)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_another_seed_gives_other_weights(store):
    (first, _), (second, _) = train(store, steps=2), train(store, seed=1, steps=2)
    assert not torch.allclose(first.W_dec_cd, second.W_dec_cd, atol=0.1)


def test_concepts_have_unit_directions_and_positive_thresholds(trained):
    sae = trained[0]
    assert sae.W_dec_cd.shape == (4 * 16, 16)
    assert torch.allclose(sae.W_dec_cd.norm(dim=1), torch.ones(64), atol=1e-5)
    assert bool((sae.threshold_c > 0).all())


def test_each_concept_fires_as_often_as_the_gate_chose_it(store, trained):
    sae, x_nd = trained[0], stored_tokens(store)
    u_nc = x_nd @ sae.W_enc_dc + sae.b_enc_c
    values_nk, concepts_nk = u_nc.topk(SETTINGS.k, dim=1)
    chosen_c = torch.bincount(concepts_nk[values_nk > 0], minlength=sae.n_concepts)
    fires_c = (sae.encode(x_nd) > 0).sum(0)
    assert int(chosen_c.max()) > 20
    assert torch.equal(fires_c, chosen_c)


def test_each_concept_fires_about_as_often_where_batches_are_small(store):
    sae, _ = train(store, batch_size=128)
    x_nd = stored_tokens(store)
    values_nk, concepts_nk = (x_nd @ sae.W_enc_dc + sae.b_enc_c).topk(SETTINGS.k, dim=1)
    chosen_c = torch.bincount(concepts_nk[values_nk > 0], minlength=sae.n_concepts)
    fires_c = (sae.encode(x_nd) > 0).sum(0)
    assert int((fires_c - chosen_c).abs().max()) <= 0.01 * N_TOKENS


def test_dead_concepts_are_revived(tmp_path):
    store = make_store(tmp_path, clustered_tokens())
    settings = {"expansion": 8, "batch_size": 256, "k_aux": 16}
    _, without = train(store, aux_weight=0.0, **settings)
    _, revived = train(store, aux_weight=0.25, **settings)
    assert without["dead"] > 20
    assert revived["dead"] < without["dead"] / 2


def test_raw_activations_of_large_mean_and_scale_reconstruct_well(tmp_path, trained, store):
    large = make_store(tmp_path, 40 * sparse_tokens() + 250)
    sae, _ = train(large)
    assert fvu(sae, stored_tokens(large)) < 1.2 * fvu(trained[0], stored_tokens(store))


def make_model(d=5, c=14, seed=0):
    """A model in the middle of training, in float64."""
    generator = torch.Generator().manual_seed(seed)
    model = _TopK(d, c, generator).double()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.3 * noise.double()
    return model


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_folding_moves_mean_and_scale_into_the_weights():
    model, mean_d, scale = make_model(), normal(5) * 30, 7.0
    raw_nd = normal(20, 5, seed=2) * scale + mean_d
    sae = _fold(model, mean_d, scale, repeat(raw_nd), SAESettings(k=3))
    normalised_nd = (raw_nd - mean_d) / scale
    u_nc = raw_nd @ sae.W_enc_dc + sae.b_enc_c
    assert torch.allclose(u_nc, scale * model.pre_activations(normalised_nd))
    codes_nc = sae.encode(raw_nd)
    decoded_nd = (codes_nc / scale) @ model.W_dec_cd + model.b_dec_d
    assert torch.allclose(sae.decode(codes_nc), scale * decoded_nd + mean_d)


def dense_loss(model, x_nd, dead, k, k_aux, aux_weight):
    """The objective written out with dense codes: squared error per variance, plus AuxK."""

    def gated(u_nc, allowed, k):
        z_nc = torch.zeros_like(u_nc)
        for n in range(len(u_nc)):
            row_c = u_nc[n].detach()
            best = sorted(allowed, key=row_c.tolist().__getitem__, reverse=True)[:k]
            for c in best:
                z_nc[n, c] = u_nc[n, c].clamp(min=0)
        return z_nc

    u_nc = (x_nd - model.b_dec_d) @ model.W_enc_dc + model.b_enc_c
    z_nc = gated(u_nc, range(u_nc.shape[1]), k)
    residual_nd = x_nd - (z_nc @ model.W_dec_cd + model.b_dec_d)
    error = (residual_nd**2).sum() / ((x_nd - x_nd.mean(0)) ** 2).sum()
    if not dead:
        return error, error, z_nc
    target_nd = residual_nd.detach()
    left_nd = target_nd - gated(u_nc, dead, k_aux) @ model.W_dec_cd
    return error + aux_weight * (left_nd**2).sum() / (target_nd**2).sum(), error, z_nc


@pytest.mark.parametrize("dead", [[], [2, 3, 7, 11, 12], [4]])
def test_loss_and_gradient_equal_dense_autograd(dead):
    model, x_nd = make_model(), normal(12, 5)
    settings = SAESettings(k=4, k_aux=3, aux_weight=0.5)
    dead_c = torch.zeros(14, dtype=torch.bool)
    dead_c[dead] = True
    loss, error, fired_c = _loss(model, x_nd, dead_c, settings)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters)
    expected_loss, expected_error, z_nc = dense_loss(model, x_nd, dead, 4, 3, 0.5)
    expected = torch.autograd.grad(expected_loss, parameters)
    assert torch.allclose(loss, expected_loss)
    assert torch.allclose(error, expected_error)
    assert torch.equal(fired_c, (z_nc > 0).any(0))
    for name, a, b in zip(names, found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-10), name
