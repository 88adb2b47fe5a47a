"""Learned gains on planted data: some dimensions agree within pairs, the others mislead."""

from __future__ import annotations

import math

import pytest
import torch

from patch_retriever.patch.gains import (
    Components,
    GainSettings,
    _info_nce,
    learn_gains,
)

N_PAIRS, C, D = 150, 12, 16
DISTRACTORS = [1, 4, 8, 11]
SIGNAL = [c for c in range(C) if c not in DISTRACTORS]
SETTINGS = GainSettings(steps=120, batch_size=100)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def planted():
    """Codes that pairs share, except in the distractors, which are as large and unrelated."""
    shared_nc = normal(N_PAIRS, C, seed=0)
    codes_nc = torch.cat([shared_nc, shared_nc]) + 0.3 * normal(2 * N_PAIRS, C, seed=1)
    codes_nc[:, DISTRACTORS] = 1.04 * normal(2 * N_PAIRS, len(DISTRACTORS), seed=2)
    dictionary_cd = torch.linalg.qr(normal(D, C, seed=3)).Q.T.contiguous()
    numbers = torch.arange(N_PAIRS)
    return codes_nc, dictionary_cd, torch.stack([numbers, numbers + N_PAIRS], 1)


def learn(planted, pairs_n2=None, settings=SETTINGS, seed=0):
    codes_nc, dictionary_cd, true_n2 = planted
    pairs = [true_n2 if pairs_n2 is None else pairs_n2]
    return learn_gains(
        codes_nc @ dictionary_cd, Components(codes_nc, dictionary_cd), pairs, settings, seed
    )


@pytest.fixture(scope="module")
def gains(planted):
    return learn(planted)


def test_gains_lie_between_zero_and_one(gains):
    assert gains.shape == (C,)
    assert bool(((gains >= 0) & (gains <= 1)).all())


def test_gains_find_the_planted_distractors(gains):
    assert float(gains[DISTRACTORS].max()) < 0.3
    assert float(gains[SIGNAL].min()) > 0.6


def test_shuffled_pairs_find_nothing(planted, gains):
    order = torch.randperm(N_PAIRS, generator=torch.Generator().manual_seed(5))
    pairs_n2 = torch.stack([planted[2][:, 0], planted[2][order, 1]], 1)
    shuffled = learn(planted, pairs_n2)
    gap = gains[SIGNAL].mean() - gains[DISTRACTORS].mean()
    shuffled_gap = shuffled[SIGNAL].mean() - shuffled[DISTRACTORS].mean()
    assert abs(float(shuffled_gap)) < float(gap) / 2
    assert float(shuffled[DISTRACTORS].min()) > 0.5


def test_the_same_seed_gives_the_same_gains(planted, gains):
    assert torch.equal(learn(planted), gains)


def test_another_seed_draws_other_batches(planted, gains):
    assert not torch.equal(learn(planted, seed=1), gains)


def test_directions_take_turns(planted, gains):
    codes_nc, dictionary_cd, pairs_n2 = planted
    base_nd = codes_nc @ dictionary_cd
    both = [pairs_n2, pairs_n2.flip(1)]
    found = learn_gains(base_nd, Components(codes_nc, dictionary_cd), both, SETTINGS, 0)
    assert torch.allclose(found, gains, atol=0.1)  # the loss is symmetric
    assert float(found[DISTRACTORS].max()) < 0.3


def test_sparsity_makes_concepts_earn_their_removal(planted, gains):
    sparse = learn(planted, settings=GainSettings(steps=120, batch_size=100, sparsity=5.0))
    assert float((1 - sparse).mean()) < float((1 - gains).mean())
    assert float(sparse[SIGNAL].min()) > 0.9


def info_nce_by_hand(q_nd, d_nd, queries, documents, temperature):
    """Symmetric InfoNCE, term by term; what equals the positive item is no negative."""
    total = 0.0
    for i in range(len(queries)):
        for rows, columns, same in ((q_nd, d_nd, documents), (d_nd, q_nd, queries)):
            scores = [
                float(rows[i] @ columns[j]) / temperature
                for j in range(len(queries))
                if j == i or same[j] != same[i]
            ]
            positive = float(rows[i] @ columns[i]) / temperature
            total += math.log(sum(math.exp(s) for s in scores)) - positive
    return total / 2 / len(queries)


@pytest.mark.parametrize(
    ("queries", "documents"),
    [
        ([0, 1, 2, 3], [4, 5, 6, 7]),
        ([0, 1, 2, 3], [4, 4, 6, 4]),
        ([0, 0, 2, 2], [4, 5, 6, 7]),
        ([0, 0, 2, 0], [4, 5, 5, 5]),
    ],
)
def test_duplicates_in_a_batch_are_no_negatives(queries, documents):
    e_md = torch.nn.functional.normalize(normal(8, 5, seed=4), dim=1)
    q_nd, d_nd = e_md[queries], e_md[documents]
    found = _info_nce(q_nd, d_nd, torch.tensor([queries, documents]).T, 0.2)
    expected = info_nce_by_hand(q_nd, d_nd, queries, documents, 0.2)
    assert float(found) == pytest.approx(expected, rel=1e-5)
