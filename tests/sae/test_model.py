"""The SAE: encoding with thresholds or TopK, and decoding."""

from __future__ import annotations

import torch

from patch_retriever.sae.model import SparseAutoencoder

D, C = 6, 17


def make_sae(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    rows_cd = torch.nn.functional.normalize(rand(C, D), dim=1)
    return SparseAutoencoder(rand(D, C), rand(C), rows_cd, rand(D), rand(C).abs())


def test_encode_equals_a_loop_over_items_and_concepts():
    sae = make_sae()
    x_nd = torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    expected_nc = torch.zeros(9, C)
    for n in range(9):
        for c in range(C):
            u = float(sae.b_enc_c[c])
            u += sum(float(x_nd[n, j]) * float(sae.W_enc_dc[j, c]) for j in range(D))
            expected_nc[n, c] = u if u > float(sae.threshold_c[c]) else 0.0
    codes_nc = sae.encode(x_nd)
    assert torch.equal(codes_nc != 0, expected_nc != 0)
    assert torch.allclose(codes_nc, expected_nc, atol=1e-5)
    assert 0 < int((codes_nc != 0).sum()) < codes_nc.numel()


def test_a_concept_at_its_threshold_is_silent():
    eye, zero = torch.eye(2), torch.zeros(2)
    sae = SparseAutoencoder(eye, zero, eye, zero, torch.tensor([0.5, 0.25]))
    assert torch.equal(sae.encode(torch.tensor([[0.5, 0.5]])), torch.tensor([[0.0, 0.5]]))


def test_decode_adds_rows_and_bias():
    sae = make_sae()
    codes_nc = torch.zeros(1, C)
    codes_nc[0, [2, 5]] = torch.tensor([1.5, 0.5])
    expected_d = 1.5 * sae.W_dec_cd[2] + 0.5 * sae.W_dec_cd[5] + sae.b_dec_d
    assert torch.allclose(sae.decode(codes_nc)[0], expected_d, atol=1e-6)


def test_width_and_number_of_concepts():
    assert (make_sae().d_in, make_sae().n_concepts) == (D, C)


def test_a_topk_gate_equals_a_loop_over_ranks():
    sae = make_sae()
    sae.k = 3
    x_nd = torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    u_nc = x_nd @ sae.W_enc_dc + sae.b_enc_c
    expected_nc = torch.zeros(9, C)
    for n, u_c in enumerate(u_nc.tolist()):
        for c in sorted(range(C), key=u_c.__getitem__)[-3:]:
            expected_nc[n, c] = max(u_c[c], 0.0)
    codes_nc = sae.encode(x_nd)
    assert torch.equal(codes_nc != 0, expected_nc != 0)
    assert torch.allclose(codes_nc, expected_nc, atol=1e-5)


def test_a_topk_gate_has_no_use_for_thresholds():
    sae, high = make_sae(), make_sae()
    sae.k = high.k = 3
    high.threshold_c.fill_(100.0)
    x_nd = torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sae.encode(x_nd), high.encode(x_nd))
    assert bool((high.encode(x_nd) != 0).any())


def test_a_negative_pre_activation_is_silent_even_among_the_k_largest():
    eye, zero = torch.eye(3), torch.zeros(3)
    sae = SparseAutoencoder(eye, zero, eye, zero, zero, k=2)
    codes_nc = sae.encode(torch.tensor([[3.0, -1.0, -2.0], [1.0, 4.0, 3.0]]))
    assert torch.equal(codes_nc, torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 3.0]]))
