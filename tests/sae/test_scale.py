"""A scale per token: standardised input, codes in the activations' units."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.features import Features
from patch_retriever.sae.codes import Codes
from patch_retriever.sae.convert import with_thresholds, with_unit_rows
from patch_retriever.sae.model import SparseAutoencoder
from patch_retriever.sae.scale import standardised, token_scale

D, C = 12, 40


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_sae(k=None, input_scale="token", seed=0):
    return SparseAutoencoder(
        normal(D, C, seed=seed),
        normal(C, seed=seed + 1),
        normal(C, D, seed=seed + 2),
        normal(D, seed=seed + 3),
        normal(C, seed=seed + 4).abs(),
        k,
        input_scale,
    )


def tokens(n=60, seed=9):
    """Norms that differ a thousandfold, and levels far from zero."""
    sizes_n1 = 10 ** (3 * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)) - 1)
    return sizes_n1 * (normal(n, D, seed=seed) + normal(n, 1, seed=seed + 1))


def saelens(sae, x_d):
    """SAELens' `layer_norm` and JumpReLU written out for one token in plain floats (saes/sae.py,
    saes/jumprelu_sae.py): feature activations and reconstruction."""
    x = x_d.tolist()
    mu = math.fsum(x) / D
    std = math.sqrt(math.fsum((v - mu) ** 2 for v in x) / (D - 1))
    normed = [(v - mu) / (std + 1e-5) for v in x]
    W_enc, W_dec = sae.W_enc_dc.tolist(), sae.W_dec_cd.tolist()
    b_enc, b_dec = sae.b_enc_c.tolist(), sae.b_dec_d.tolist()
    pre = [math.fsum(normed[j] * W_enc[j][c] for j in range(D)) + b_enc[c] for c in range(C)]
    if sae.k is None:
        acts = [u if u > t else 0.0 for u, t in zip(pre, sae.threshold_c.tolist(), strict=True)]
    else:
        least = sorted(pre)[-sae.k]
        acts = [max(u, 0.0) if u >= least else 0.0 for u in pre]
    out = [math.fsum(acts[c] * W_dec[c][j] for c in range(C)) + b_dec[j] for j in range(D)]
    return std, acts, [v * std + mu for v in out]


def test_standardised_tokens_have_mean_zero_and_unbiased_deviation_one():
    x_nd = tokens()
    assert torch.allclose(standardised(x_nd).mean(1), torch.zeros(60), atol=1e-5)
    assert torch.allclose(standardised(x_nd).var(1, unbiased=True), torch.ones(60), atol=1e-3)
    assert torch.equal(token_scale(x_nd), x_nd.std(1))
    assert torch.equal(standardised(torch.full((1, D), 3.0)), torch.zeros(1, D))


@pytest.mark.parametrize("k", [None, 5])
def test_codes_and_reconstruction_equal_those_of_saelens_written_out(k):
    sae, x_nd = make_sae(k), tokens()
    codes_nc = sae.encode(x_nd)
    out_nd = sae.decode(codes_nc, x_nd)
    assert 0 < int((codes_nc != 0).sum()) < codes_nc.numel()
    for x_d, codes_c, out_d in zip(x_nd, codes_nc, out_nd, strict=True):
        std, acts, expected = saelens(sae, x_d)
        assert codes_c.tolist() == pytest.approx([std * a for a in acts], rel=1e-4, abs=1e-4 * std)
        assert out_d.tolist() == pytest.approx(expected, rel=1e-4, abs=2e-4 * std)


@given(st.integers(0, 10_000), st.floats(0.01, 1000), st.sampled_from([None, 1, 7]))
@settings(max_examples=50, deadline=None)
def test_codes_grow_with_the_token(seed, factor, k):
    sae, x_nd = make_sae(k), 10 * normal(5, D, seed=seed)
    codes_nc, grown_nc = sae.encode(x_nd), sae.encode(factor * x_nd)
    # the added 1e-5 moves u by a millionth of itself, so only what is at a threshold may change
    near_nc = (codes_nc != 0) != (grown_nc != 0)
    assert int(near_nc.sum()) <= 1
    expected_nc = factor * codes_nc
    tolerance = 2e-3 * factor * float(token_scale(x_nd).max())
    assert float((grown_nc - expected_nc)[~near_nc].abs().max()) <= tolerance


def test_codes_do_not_see_the_level():
    sae, x_nd = make_sae(), normal(9, D, seed=3)
    assert torch.allclose(sae.encode(x_nd + 2.0), sae.encode(x_nd), atol=1e-4)


@pytest.mark.parametrize("k", [None, 4])
def test_some_concepts_alone_have_the_codes_of_all(k):
    sae, x_nd, concepts_m = make_sae(k), tokens(), torch.tensor([3, 0, 31])
    found_nm = sae.encode_some(x_nd, concepts_m)
    assert torch.allclose(found_nm, sae.encode(x_nd)[:, concepts_m], rtol=1e-4, atol=1e-4)


def test_sparse_codes_decode_like_dense_ones():
    sae, x_nd = make_sae(), tokens()
    dense_nd = sae.decode(sae.encode(x_nd), x_nd)
    assert torch.allclose(sae.decode(sae.codes(x_nd), x_nd), dense_nd, rtol=1e-4, atol=1e-3)


def test_without_a_scale_per_token_decoding_asks_for_no_activations():
    sae, x_nd = make_sae(input_scale="none"), tokens()
    codes_nc = sae.encode(x_nd)
    assert torch.equal(sae.decode(codes_nc), sae.decode(codes_nc, x_nd))
    assert sae.scale(x_nd) is None
    with pytest.raises(ValueError, match="known activations"):
        make_sae().decode(codes_nc)


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_pooled_codes_and_scales_reconstruct_the_pooled_reconstruction(seed):
    sae, x_td = make_sae(), tokens(7, seed=seed)
    weights_t = torch.rand(7, generator=torch.Generator().manual_seed(seed))
    weights_t /= weights_t.sum()
    codes_tc = sae.encode(x_td)
    pooled_1d, pooled_1c = weights_t[None] @ x_td, weights_t[None] @ codes_tc
    scale_1 = weights_t[None] @ sae.scale(x_td)
    features = Features(
        pooled_1d, pooled_1d, Codes.from_dense(pooled_1c), torch.zeros(1), scale_n=scale_1
    )
    expected_1d = weights_t[None] @ sae.decode(codes_tc, x_td)
    size = float(x_td.abs().max())
    assert torch.allclose(features.reconstructed(sae), expected_1d, atol=1e-5 * size, rtol=1e-4)


def test_unit_rows_reconstruct_the_same_with_a_scale_per_token():
    sae, x_nd = make_sae(), tokens()
    unit = with_unit_rows(sae)
    assert torch.allclose(unit.W_dec_cd.norm(dim=1), torch.ones(C), atol=1e-6)
    outs = [s.decode(s.encode(x_nd), x_nd) for s in (sae, unit)]
    assert torch.allclose(*outs, rtol=1e-3, atol=1e-3 * float(x_nd.abs().max()))


def test_thresholds_for_a_topk_gate_fire_as_often_with_a_scale_per_token():
    sae, x_nd = make_sae(k=6), tokens(400)
    converted, conversion = with_thresholds(sae, x_nd)
    assert converted.input_scale == "token"
    counts = [s.codes(x_nd).counts() for s in (sae, converted)]
    assert torch.equal(*counts)
    error_nd = (x_nd - sae.decode(sae.encode(x_nd), x_nd)) / x_nd.std(1, keepdim=True)
    seen_nd = standardised(x_nd)
    there = (seen_nd - seen_nd.mean(0)).square().sum()
    assert conversion.fvu_gate == pytest.approx(float(error_nd.square().sum() / there), rel=1e-3)
