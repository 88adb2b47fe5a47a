"""Thresholds in place of a gate, and normalisation folded into the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.sae.architectures import make_architecture
from patch_retriever.sae.convert import convert, matched_thresholds, with_thresholds
from patch_retriever.sae.learner import Learner, Weights
from patch_retriever.sae.model import SparseAutoencoder
from synthetic import sparse_tokens

QUICK = settings(deadline=None, database=None, max_examples=60)
ARCHITECTURES = ("topk", "batch-topk", "matryoshka", "jumprelu")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fires(x_nd, W_cd, b_c, threshold_c):
    """How often each concept's pre-activation is above its threshold, one by one."""
    return torch.stack(
        [(x_nd @ w_d + b > t).sum() for w_d, b, t in zip(W_cd, b_c, threshold_c, strict=True)]
    )


# thresholds from counts


@QUICK
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 1000), st.data())
def test_every_concept_fires_exactly_its_count(n, c, seed, data):
    counts = data.draw(st.lists(st.integers(0, n), min_size=c, max_size=c))
    x_nd, W_cd = normal(n, 4, seed=seed).double(), normal(c, 4, seed=seed + 1).double()
    b_c = torch.full((c,), 20.0).double()  # so that any count can be had above zero
    threshold_c = matched_thresholds(x_nd, W_cd, b_c, torch.tensor(counts))
    assert fires(x_nd, W_cd, b_c, threshold_c).tolist() == counts


@QUICK
@given(st.integers(1, 30), st.integers(0, 1000))
def test_silent_concepts_stay_silent_whatever_their_bias(n, seed):
    x_nd, W_cd, b_c = normal(n, 4, seed=seed), normal(9, 4, seed=seed + 1), 5 * normal(9, seed=seed)
    threshold_c = matched_thresholds(x_nd, W_cd, b_c, torch.zeros(9, dtype=torch.long))
    assert not fires(x_nd, W_cd, b_c, threshold_c).any()
    assert bool((threshold_c > 0).all())


def test_a_threshold_is_halfway_between_its_neighbours():
    x_nd = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    counts_c = torch.tensor([0, 1, 2, 3, 4])
    threshold_c = matched_thresholds(x_nd, torch.ones(5, 1), torch.zeros(5), counts_c)
    assert threshold_c[1:4].tolist() == [6.0, 3.0, 1.5]
    assert threshold_c[0] > 8
    assert 0 < threshold_c[4] < 1


def test_thresholds_are_not_below_zero():
    """A count that only negative pre-activations could fill is not filled: they are no codes."""
    x_nd = torch.tensor([[1.0], [-2.0], [-3.0]])
    threshold_c = matched_thresholds(x_nd, torch.ones(1, 1), torch.zeros(1), torch.tensor([2]))
    assert threshold_c[0] > 0


def test_many_concepts_are_taken_some_at_a_time():
    """More concepts times tokens than are computed at once."""
    x_nd, W_cd, b_c = normal(20_000, 3), normal(900, 3, seed=1), normal(900, seed=2) + 30
    counts_c = torch.randint(0, 40, (900,), generator=torch.Generator().manual_seed(3))
    threshold_c = matched_thresholds(x_nd, W_cd, b_c, counts_c)
    found_c = (x_nd.double() @ W_cd.T.double() + b_c > threshold_c).sum(0)
    assert int((found_c != counts_c).sum()) <= 5  # equal in float32, not in float64
    assert int((found_c - counts_c).abs().max()) <= 1


def test_equal_tokens_fire_together():
    """Ten tokens, all there three times; every count of three can be had."""
    x_nd = normal(10, 4).repeat(3, 1)
    counts_c = torch.tensor([0, 3, 9, 30, 27])
    W_cd, b_c = normal(5, 4, seed=1), torch.full((5,), 20.0)
    threshold_c = matched_thresholds(x_nd, W_cd, b_c, counts_c)
    assert torch.equal(fires(x_nd, W_cd, b_c, threshold_c), counts_c)


# somebody's TopK SAE


def topk_sae(k=3, d=6, c=20, bias=0.0, seed=0):
    rows_cd = torch.nn.functional.normalize(normal(c, d, seed=seed), dim=1)
    b_enc_c = 0.1 * normal(c, seed=seed + 1) + bias
    return SparseAutoencoder(
        rows_cd.T.contiguous(), b_enc_c, rows_cd, 0.1 * normal(d), torch.zeros(c), k
    )


def test_a_topk_sae_with_thresholds_fires_as_often_as_it_chose():
    sae, x_nd = topk_sae(), normal(300, 6, seed=5)
    converted, conversion = with_thresholds(sae, x_nd)
    u_nc = x_nd @ sae.W_enc_dc + sae.b_enc_c
    gate_nc = torch.zeros_like(u_nc).scatter(1, u_nc.topk(3, dim=1).indices, 1.0) * (u_nc > 0)
    assert converted.k is None
    assert sae.k == 3
    codes_nc = converted.encode(x_nd)
    assert torch.equal((codes_nc > 0).sum(0), gate_nc.sum(0).long())
    assert torch.equal(codes_nc[codes_nc > 0], u_nc[codes_nc > 0])
    for name in ("W_enc_dc", "b_enc_c", "W_dec_cd", "b_dec_d"):
        assert torch.equal(getattr(converted, name), getattr(sae, name)), name

    def fvu(z_nc):
        error_nd = x_nd - (z_nc @ sae.W_dec_cd + sae.b_dec_d)
        return float((error_nd**2).sum() / ((x_nd - x_nd.mean(0)) ** 2).sum())

    assert conversion.l0 == conversion.l0_gate == pytest.approx(float(gate_nc.sum()) / 300)
    assert conversion.fvu_gate == pytest.approx(fvu(gate_nc * u_nc), rel=1e-4)
    assert conversion.fvu == pytest.approx(fvu(codes_nc), rel=1e-4)


def test_a_topk_sae_that_chooses_nothing_stays_silent():
    converted, conversion = with_thresholds(topk_sae(bias=-100.0), normal(50, 6))
    assert not converted.encode(normal(50, 6)).any()
    assert (conversion.l0_gate, conversion.l0) == (0, 0)


# of a training


def learner_in_training(name, d=6, c=20, k=3, seed=0, bias=0.0):
    """Weights that look trained; the dictionary's rows have lengths of their own."""
    rows_cd = torch.nn.functional.normalize(normal(c, d, seed=seed), dim=1).double()
    lengths_c1 = 1 + torch.rand(c, 1, generator=torch.Generator().manual_seed(seed)).double()
    weights = Weights(
        rows_cd + 0.1 * normal(c, d, seed=seed + 1).double(),
        0.1 * normal(c, seed=seed + 2).double() + bias,
        rows_cd * lengths_c1,
        0.1 * normal(d, seed=seed + 3).double(),
        0.2 + 0.5 * torch.rand(c, generator=torch.Generator().manual_seed(seed)).double(),
    )
    return Learner(weights, make_architecture(name, k))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mean_scale_and_lengths_move_into_the_weights(name):
    learner, mean_d, scale = learner_in_training(name), 30 * normal(6, seed=9).double(), 7.0
    raw_nd = scale * normal(40, 6, seed=8).double() + mean_d
    sae, _ = convert(learner, mean_d, scale, raw_nd)
    weights = learner.weights
    lengths_c = weights.W_dec_cd.norm(dim=1)
    u_nc = (raw_nd - mean_d) / scale @ weights.W_enc_cd.T + weights.b_enc_c
    assert torch.allclose(raw_nd @ sae.W_enc_dc + sae.b_enc_c, scale * lengths_c * u_nc)
    assert torch.allclose(sae.W_dec_cd.norm(dim=1), torch.ones(20).double())
    codes_nc = sae.encode(raw_nd)
    assert bool((codes_nc > 0).any())
    active_nc = u_nc * (codes_nc > 0)
    decoded_nd = active_nc @ weights.W_dec_cd + weights.b_dec_d
    assert torch.allclose(sae.decode(codes_nc), scale * decoded_nd + mean_d)


def test_learned_thresholds_are_kept():
    learner, mean_d, scale = learner_in_training("jumprelu"), normal(6).double(), 3.0
    raw_nd = scale * normal(200, 6, seed=8).double() + mean_d
    sae, conversion = convert(learner, mean_d, scale, raw_nd)
    u_nc = (raw_nd - mean_d) / scale @ learner.weights.W_enc_cd.T + learner.weights.b_enc_c
    assert torch.equal(sae.encode(raw_nd) > 0, u_nc > learner.weights.threshold_c)
    assert conversion.l0 == conversion.l0_gate
    assert conversion.fvu == pytest.approx(conversion.fvu_gate)


@pytest.mark.parametrize("name", ["batch-topk", "matryoshka"])
def test_a_gate_over_the_batch_becomes_one_threshold(name):
    learner = learner_in_training(name)
    learner.weights.W_dec_cd /= learner.weights.W_dec_cd.norm(dim=1, keepdim=True)
    x_nd = normal(100, 6, seed=8).double()
    sae, conversion = convert(learner, torch.zeros(6).double(), 1.0, x_nd)
    u_nc = x_nd @ sae.W_enc_dc + sae.b_enc_c
    largest_e = u_nc.flatten().sort(descending=True).values
    assert len(sae.threshold_c.unique()) == 1
    assert largest_e[300] < float(sae.threshold_c[0]) <= largest_e[299] + 1e-9
    assert conversion.l0_gate == 3
    assert conversion.l0 == pytest.approx(3, abs=0.02)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_gate_that_chooses_nothing_becomes_a_silent_sae(name):
    learner = learner_in_training(name, bias=-100.0)
    x_nd = sparse_tokens(60, 6).double()
    sae, conversion = convert(learner, torch.zeros(6).double(), 1.0, x_nd)
    assert not sae.encode(x_nd).any()
    assert (conversion.l0_gate, conversion.l0) == (0, 0)
    assert bool(sae.threshold_c.isfinite().all())


def test_the_change_is_told_in_a_line():
    _, conversion = with_thresholds(topk_sae(), normal(100, 6))
    assert "\n" not in str(conversion)
    assert f"{conversion.fvu_gate:.4f} -> {conversion.fvu:.4f}" in str(conversion)
