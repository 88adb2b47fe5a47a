"""TopK: k concepts in every token."""

from __future__ import annotations

import pytest
import torch

from patch_retriever.sae import ops
from patch_retriever.sae.architectures.topk import TopK
from patch_retriever.sae.ops import PreActivations


def pre_activations(u_nc):
    """These values exactly."""
    c = u_nc.shape[1]
    return PreActivations(u_nc, torch.eye(c), torch.zeros(c))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_every_token_has_its_k_largest(k, monkeypatch):
    monkeypatch.setattr(ops, "CHUNK_TOKENS", 2)
    u_nc = torch.tensor([[3.0, 1, 2], [-1, -3, -2], [5, 6, -7]])
    ranked = [[0, 2, 1], [0, 2, 1], [1, 0, 2]]
    entries = TopK(k).select(pre_activations(u_nc), torch.zeros(3))
    assert entries.rows_e.tolist() == [row for row in range(3) for _ in range(k)]
    found = [set(row) for row in entries.concepts_e.view(3, k).tolist()]
    assert found == [set(row[:k]) for row in ranked]


def test_thresholds_play_no_part():
    u_nc = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    entries = [TopK(2).select(pre_activations(u_nc), torch.full((9,), t)) for t in (0.0, 9.0)]
    assert torch.equal(entries[0].concepts_e, entries[1].concepts_e)


def test_negative_ones_are_not_active_and_pass_no_gradient():
    u_e = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    z_e = TopK(1).activate(u_e, torch.zeros(3))
    z_e.sum().backward()
    assert z_e.tolist() == [0, 0, 2]
    assert u_e.grad.tolist() == [0, 0, 1]


def test_there_is_one_prefix_and_no_term_for_sparsity():
    assert TopK(3).prefix_ends(10) == [10]
    nothing_e = torch.zeros(0)
    assert TopK(3).sparsity_loss(nothing_e, nothing_e, nothing_e.bool(), 1) is None
    assert not TopK(3).learns_threshold
