"""Learned gains on planted data: some dimensions agree within pairs, the others mislead."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from largest import Largest
from patch_retriever.patch.gains import (
    CentredCodes,
    Components,
    GainSettings,
    _info_nce,
    learn_gains,
)
from patch_retriever.sae.codes import Codes

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


def sparse_codes(n, c, active, seed):
    """Random codes, a few active in each row."""
    generator = torch.Generator().manual_seed(seed)
    codes_nc = torch.rand(n, c, generator=generator)
    return codes_nc * (codes_nc > 1 - active / c)


KINDS_N = torch.arange(300) % 3


def sparse_and_dense(c=40):
    """The same centred codes, sparse with their means, and as the definition has them."""
    codes_nc = sparse_codes(len(KINDS_N), c, 6, seed=6)
    dictionary_cd = normal(c, D, seed=7)
    centred_nc = codes_nc.clone()
    for kind in range(3):
        centred_nc[kind == KINDS_N] -= codes_nc[kind == KINDS_N].mean(0)
    sparse = CentredCodes.of(Codes.from_dense(codes_nc), KINDS_N, dictionary_cd)
    return sparse, Components(centred_nc, dictionary_cd)


def test_sparse_codes_with_means_are_the_dense_centred_codes():
    sparse, dense = sparse_and_dense()
    items_m, weight_c = torch.tensor([0, 5, 5, 299, 17]), torch.rand(40)
    weights = [weight_c.clone().requires_grad_() for _ in range(2)]
    sums = [p.weighted(items_m, w) for p, w in zip((sparse, dense), weights, strict=True)]
    assert torch.allclose(*sums, atol=1e-6)
    target_md = normal(5, D, seed=8)
    for one, weight in zip(sums, weights, strict=True):
        (one * target_md).square().sum().backward()
        assert weight.grad is not None
    largest = float(weights[1].grad.abs().max())
    assert float((weights[0].grad - weights[1].grad).abs().max()) < 1e-6 * largest


def test_the_gradient_through_sparse_codes_is_exact():
    sparse, _ = sparse_and_dense(12)
    double = CentredCodes(
        replace(sparse.codes, values_e=sparse.codes.values_e.double()),
        sparse.means_kc.double(),
        sparse.kinds_n,
        sparse.dictionary_cd.double(),
        sparse.width,
    )
    weight_c = torch.rand(12, dtype=torch.float64, requires_grad=True)
    items_m = torch.tensor([1, 4, 4, 8])
    assert torch.autograd.gradcheck(lambda w: double.weighted(items_m, w), (weight_c,))


def test_gains_from_sparse_codes_are_those_from_dense_ones():
    sparse, dense = sparse_and_dense()
    base_nd = dense.weighted(torch.arange(300), torch.ones(40)) + 0.1 * normal(300, D, seed=9)
    pairs = [torch.stack([torch.arange(0, 300, 3), torch.arange(1, 300, 3)], 1)]
    few = GainSettings(steps=40, batch_size=50)
    found = [learn_gains(base_nd, parts, pairs, few, 0) for parts in (sparse, dense)]
    assert float((found[0] - 0.88).abs().max()) > 0.2  # something was learned
    assert torch.allclose(*found, atol=1e-5)


def test_codes_of_no_kind_stay_as_they_are():
    codes_nc = sparse_codes(6, 10, 3, seed=1)
    kinds_n = torch.tensor([0, 0, -1, 1, 1, -1])
    parts = CentredCodes.of(Codes.from_dense(codes_nc), kinds_n, torch.eye(10))
    expected_nc = codes_nc.clone()
    for kind in (0, 1):
        expected_nc[kinds_n == kind] -= codes_nc[kinds_n == kind].mean(0)
    assert torch.allclose(parts.weighted(torch.arange(6), torch.ones(10)), expected_nc, atol=1e-6)


def test_learning_makes_nothing_of_the_size_of_dense_codes():
    n, c, active = 400, 60_000, 8
    concepts_e = torch.randint(c, (n * active,), generator=torch.Generator().manual_seed(0))
    codes = Codes(torch.arange(0, n * active + 1, active), concepts_e, torch.ones(n * active), c)
    dictionary_cd = normal(c, 4, seed=1)
    parts = CentredCodes.of(codes, torch.arange(n) % 2, dictionary_cd)
    pairs = [torch.arange(n).view(-1, 2)]
    with Largest() as largest:
        learn_gains(normal(n, 4, seed=2), parts, pairs, GainSettings(steps=2, batch_size=100), 0)
    assert largest.numel <= 4 * c  # the dictionary and the means of the kinds


def test_learning_runs_on_the_device_that_is_asked_for():
    moved = []

    class Spy(Components):
        def to(self, device):
            moved.append(device)
            return self

    pairs = [torch.arange(20).view(-1, 2)]
    learn_gains(
        normal(20, D, seed=0),
        Spy(normal(20, C, seed=1), normal(C, D, seed=2)),
        pairs,
        GainSettings(steps=1),
        0,
        "cpu:0",
    )
    assert moved == ["cpu:0"]


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
