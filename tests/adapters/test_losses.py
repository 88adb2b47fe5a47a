"""The losses against loops and dense formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.adapters.losses import ConceptGroups, contrastive, rebalancing, retention
from patch_retriever.concepts.table import ConceptTable
from patch_retriever.sae.model import SparseAutoencoder


def unit(n, d, seed):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 5), st.integers(0, 10**6))
def test_contrastive_is_the_loop_over_pairs(q, extra, seed):
    queries, documents = unit(q, 5, seed), unit(q + extra, 5, seed + 1)
    generator = torch.Generator().manual_seed(seed + 2)
    relevant = torch.rand(q, q + extra, generator=generator) < 0.2
    relevant[range(q), range(q)] = True
    total = 0.0
    for n in range(q):
        rivals = [d for d in range(q + extra) if d == n or not relevant[n, d]]
        scores = {d: math.exp(float(queries[n] @ documents[d]) / 0.1) for d in rivals}
        total -= math.log(scores[n] / sum(scores.values()))
        rivals = [m for m in range(q) if m == n or not relevant[m, n]]
        scores = {m: math.exp(float(queries[m] @ documents[n]) / 0.1) for m in rivals}
        total -= math.log(scores[n] / sum(scores.values()))
    found = contrastive(queries, documents, relevant, 0.1)
    assert float(found) == pytest.approx(total / (2 * q), rel=1e-4, abs=1e-5)


def test_what_else_is_relevant_has_no_gradient():
    queries, documents = unit(3, 5, 0), unit(4, 5, 1).requires_grad_()
    relevant = torch.eye(3, 4).bool()
    relevant[0, 3] = relevant[1, 3] = relevant[2, 3] = True
    contrastive(queries, documents, relevant, 0.1).backward()
    assert documents.grad[3].abs().max() == 0
    assert documents.grad[:3].abs().min() > 0


def test_rebalancing_begins_at_two_and_ends_at_the_target():
    before = torch.tensor([[10.0, 2.0, 6.0], [4.0, 1.0, 2.0]])
    assert float(rebalancing(before, before, 0.25)) == pytest.approx(2)
    shares = before / before[:, :1]
    target = before.clone()
    target[:, 1] = before[:, 0] * (shares[:, 1] + 0.25 * (1 - shares[:, 1]))
    target[:, 2] = 0.75 * before[:, 2]
    assert float(rebalancing(target, before, 0.25)) == pytest.approx(0, abs=1e-9)
    beyond = target + (target - before)
    assert float(rebalancing(beyond, before, 0.25)) == pytest.approx(2)
    half = float(rebalancing((before + target) / 2, before, 0.25))
    assert half == pytest.approx(0.5)


def test_rebalancing_forbids_silence_and_growth():
    before = torch.tensor([[10.0, 2.0, 6.0]])
    for factor in (0.1, 10.0):
        assert float(rebalancing(factor * before, before, 0.25)) == pytest.approx(
            2 + math.log(factor) ** 2, rel=1e-5
        )


def test_items_without_energy_count_for_nothing():
    before = torch.tensor([[10.0, 2.0, 6.0], [0.0, 0.0, 0.0]])
    energy = before.clone().requires_grad_()
    loss = rebalancing(energy, before, 0.25)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1)
    assert torch.isfinite(energy.grad).all()
    assert energy.grad[1].abs().max() == 0


def table(**columns):
    n = len(next(iter(columns.values())))
    fields = dict.fromkeys(ConceptTable.__dataclass_fields__, torch.zeros(n))
    return ConceptTable(**{**fields, **{k: torch.tensor(v) for k, v in columns.items()}})


def random_sae(d=6, c=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(c, d, generator=g), dim=1)
    return SparseAutoencoder(
        rows.T.clone(), torch.zeros(c), rows, torch.zeros(d), torch.full((c,), 0.1)
    )


def test_groups_by_points():
    sae = random_sae(c=7)
    groups = ConceptGroups.of(
        sae,
        table(
            energy=[1.0, 1, 1, 1, 1, 1, 0],
            modality=[0.1, 0.1, 0.5, 0.9, 0.9, 0.5, 0.1],
            discriminative_centred=[1.0, -1, 1, 1, -1, -1, 1],
        ),
    )
    assert groups.up_c.tolist() == [True, False, True, False, False, False, False]
    assert groups.down_c.tolist() == [False, False, False, False, True, True, False]


def test_energy_is_the_dense_sum_whatever_the_chunk(monkeypatch):
    sae = random_sae()
    up_c, down_c = torch.arange(20) < 7, torch.arange(20) > 12
    groups = ConceptGroups(sae, up_c, down_c)
    tokens = torch.randn(11, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
    codes = sae.encode(tokens)
    expected = torch.stack([codes.sum(1), codes[:, up_c].sum(1), codes[:, down_c].sum(1)], 1)
    (gradient,) = torch.autograd.grad((expected**2).sum(), tokens)
    for size in (10**6, 60):
        monkeypatch.setattr("patch_retriever.adapters.losses.CHUNK_CODES", size)
        found = groups.energy(tokens)
        torch.testing.assert_close(found, expected)
        (mine,) = torch.autograd.grad((found**2).sum(), tokens)
        torch.testing.assert_close(mine, gradient)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_retention_is_the_divergence_of_the_next_tokens(softcap):
    g = torch.Generator().manual_seed(0)
    h, b, u = (torch.randn(n, 4, generator=g) for n in (5, 5, 9))
    h.requires_grad_()

    def logits(x):
        return x @ u.T if softcap is None else softcap * torch.tanh(x @ u.T / softcap)

    p, q = logits(b).softmax(1), logits(h).softmax(1)
    expected = (p * (p / q).log()).sum(1).mean()
    found = retention(h, b, u, softcap, 2)
    torch.testing.assert_close(found, expected)
    (mine,), (dense,) = torch.autograd.grad(found, h), torch.autograd.grad(expected, h)
    torch.testing.assert_close(mine, dense)
    assert float(retention(b, b, u, softcap, 2)) == pytest.approx(0, abs=1e-6)
