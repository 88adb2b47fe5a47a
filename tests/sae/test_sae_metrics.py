"""An SAE's figures against loops and dense tensors."""

from __future__ import annotations

import json
import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.sae.metrics import DENSE, fvu, measure, neighbour_recall, stability
from patch_retriever.sae.model import SparseAutoencoder


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_sae(d=8, c=30, seed=0):
    """Thresholds of all sizes, so that some concepts are dead and some are dense."""
    rows_cd = torch.nn.functional.normalize(normal(c, d, seed=seed), dim=1)
    thresholds_c = torch.linspace(0.2, 5, c)
    return SparseAutoencoder(
        rows_cd.T.contiguous(), 0.1 * normal(c), rows_cd, normal(d, seed=3), thresholds_c
    )


def fvu_by_hand(x_nd, out_nd):
    left = sum(
        float(((x - y) ** 2).sum()) for x, y in zip(x_nd.double(), out_nd.double(), strict=True)
    )
    mean_d = x_nd.double().mean(0)
    return left / sum(float(((x - mean_d) ** 2).sum()) for x in x_nd.double())


def test_fvu_is_zero_for_the_same_and_one_for_the_mean():
    x_nd = normal(50, 4) + 7
    assert fvu(x_nd, x_nd) == 0
    assert fvu(x_nd, x_nd.mean(0).expand_as(x_nd)) == pytest.approx(1)
    assert fvu(x_nd, normal(50, 4, seed=1)) == pytest.approx(
        fvu_by_hand(x_nd, normal(50, 4, seed=1))
    )


def test_all_figures_against_loops():
    sae, x_nd, roles_n = make_sae(), normal(160, 8, seed=1) + 1, torch.arange(160) % 3
    found = measure(sae, x_nd, roles_n, ("a", "b", "c", "nobody"))
    z_nc = sae.encode(x_nd)
    out_nd = sae.decode(z_nc)
    counts = [sum(float(z) != 0 for z in column) for column in z_nc.T]
    assert found.tokens == 160
    assert found.fvu == pytest.approx(fvu_by_hand(x_nd, out_nd), rel=1e-4)
    assert list(found.fvu_by_role) == ["a", "b", "c"]
    for number, name in enumerate("abc"):
        rows = roles_n == number
        expected = fvu_by_hand(x_nd[rows], out_nd[rows])
        assert found.fvu_by_role[name] == pytest.approx(expected, rel=1e-4)
    assert found.l0 == pytest.approx(sum(counts) / 160)
    assert 0 < found.dead < 1
    assert found.dead == pytest.approx(counts.count(0) / 30)
    assert 0 < found.dense < 1
    assert found.dense == pytest.approx(sum(n > DENSE * 160 for n in counts) / 30)
    cosines = [float(x @ y) / float(x.norm() * y.norm()) for x, y in zip(x_nd, out_nd, strict=True)]
    assert found.cosine == pytest.approx(sum(cosines) / 160, rel=1e-4)
    assert found.neighbours == pytest.approx(recall_by_hand(x_nd, out_nd, 10), abs=2e-3)


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_the_headline_is_over_image_and_text_tokens(seed):
    """Template tokens may be many and far away: they do not hide what images and texts lose."""
    generator = torch.Generator().manual_seed(seed)
    roles_n = torch.randint(0, 4, (150,), generator=generator)
    x_nd = normal(150, 8, seed=seed)
    x_nd[roles_n == 3] += 200
    sae = make_sae()
    names = ("image", "text", "instruction", "special")
    found = measure(sae, x_nd, roles_n, names)
    z_nc = sae.encode(x_nd)
    out_nd = sae.decode(z_nc)
    cosine_n = torch.cosine_similarity(x_nd, out_nd)
    content = roles_n < 2
    assert found.fvu == pytest.approx(fvu_by_hand(x_nd[content], out_nd[content]), rel=1e-4)
    assert found.l0 == pytest.approx(float((z_nc[content] != 0).sum(1).float().mean()))
    assert found.cosine == pytest.approx(float(cosine_n[content].mean()), abs=1e-5)
    assert found.neighbours == neighbour_recall(x_nd[content], out_nd[content])
    assert (found.tokens, sum(found.tokens_by_role.values())) == (150, 150)
    for number, name in enumerate(names):
        rows = roles_n == number
        assert found.tokens_by_role[name] == int(rows.sum())
        by_role = fvu_by_hand(x_nd[rows], out_nd[rows])
        assert found.fvu_by_role[name] == pytest.approx(by_role, rel=2e-3)
        l0 = float((z_nc[rows] != 0).sum(1).float().mean())
        assert found.l0_by_role[name] == pytest.approx(l0)
        assert found.cosine_by_role[name] == pytest.approx(float(cosine_n[rows].mean()), abs=1e-5)
        silent = float((z_nc[rows] == 0).all(0).float().mean())
        assert found.dead_by_role[name] == pytest.approx(silent)
    assert found.dead == pytest.approx(float((z_nc == 0).all(0).float().mean()))
    assert found.dead <= min(found.dead_by_role.values())


def test_without_image_and_text_tokens_the_headline_is_over_all():
    sae, x_nd = make_sae(), normal(60, 8)
    found = measure(sae, x_nd, torch.full((60,), 3), ("image", "text", "instruction", "special"))
    assert found.fvu == found.fvu_by_role["special"]
    assert list(found.l0_by_role) == ["special"]


def test_one_kind_of_content_alone_is_the_headline():
    roles_n = torch.arange(60) % 2 * 3
    found = measure(make_sae(), normal(60, 8), roles_n, ("image", "text", "instruction", "special"))
    assert found.fvu == found.fvu_by_role["image"]


def test_figures_are_json_values_and_all_numbers():
    """Also where a role's tokens are all alike, as the prompt's first token always is."""
    x_nd, roles_n = normal(60, 8), torch.arange(60) % 2
    x_nd[roles_n == 1] = 2.0  # exact, so that its variance is zero
    found = measure(make_sae(), x_nd, roles_n, ("varied", "alike")).to_json()
    assert json.loads(json.dumps(found)) == found
    figures = [v for v in found.values() if not isinstance(v, dict)]
    assert all(math.isfinite(v) for v in [*figures, *found["fvu_by_role"].values()])


def test_a_role_of_a_single_token_has_no_variance_to_explain():
    roles_n = torch.tensor([0] * 19 + [1])
    assert list(measure(make_sae(), normal(20, 8), roles_n, ("a", "b")).fvu_by_role) == ["a"]


def test_a_silent_sae_is_measured():
    sae = make_sae()
    sae.threshold_c.fill_(1e6)
    found = measure(sae, normal(40, 8), torch.zeros(40))
    assert (found.l0, found.dead, found.dense) == (0, 1, 0)
    assert found.fvu > 1


# neighbours


def recall_by_hand(x_nd, out_nd, k, queries=1000, gallery=20_000):
    def nearest(rows_nd, i):
        others = [j for j in range(min(len(rows_nd), gallery)) if j != i]
        similar = [
            float(rows_nd[i] @ rows_nd[j] / (rows_nd[i].norm() * rows_nd[j].norm())) for j in others
        ]
        return {j for _, j in sorted(zip(similar, others, strict=True), reverse=True)[:k]}

    asked = range(min(queries, len(x_nd)))
    kept = [len(nearest(x_nd.double(), i) & nearest(out_nd.double(), i)) / k for i in asked]
    return sum(kept) / len(kept)


def test_identical_reconstructions_keep_all_neighbours():
    x_nd = normal(200, 6)
    assert neighbour_recall(x_nd, x_nd.clone()) == 1
    assert neighbour_recall(x_nd, 3 * x_nd) == pytest.approx(1, abs=1e-3)  # cosine has no scale


def test_random_reconstructions_keep_as_many_as_chance_does():
    n, k = 500, 10
    found = neighbour_recall(normal(n, 20), normal(n, 20, seed=1), k)
    assert found == pytest.approx(k / (n - 1), rel=0.25)


@pytest.mark.parametrize(
    ("k", "queries", "gallery"), [(1, 1000, 20_000), (5, 17, 20_000), (5, 9, 30)]
)
def test_neighbour_recall_is_that_of_a_search_by_hand(k, queries, gallery):
    x_nd = normal(60, 5)
    out_nd = x_nd + 0.5 * normal(60, 5, seed=1)
    found = neighbour_recall(x_nd, out_nd, k, queries, gallery)
    assert 0 < found < 1
    assert found == pytest.approx(recall_by_hand(x_nd, out_nd, k, queries, gallery))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_tokens_have_few_neighbours(n):
    assert neighbour_recall(normal(n, 3), normal(n, 3, seed=1)) == 1  # all others are neighbours


# stability


def test_the_same_dictionary_in_another_order_and_scale_is_stable():
    rows_cd = normal(40, 12)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert stability(rows_cd, rows_cd[order]) == pytest.approx(1)
    assert stability(rows_cd, 3 * rows_cd[order]) == pytest.approx(1)


def test_negated_directions_are_not_the_same_concepts():
    rows_cd = torch.eye(4)
    assert stability(rows_cd, -rows_cd) == pytest.approx(0)


@pytest.mark.parametrize("seed", range(5))
def test_stability_is_the_best_of_all_one_to_one_matchings(seed):
    first_cd, second_cd = normal(5, 3, seed=seed), normal(5, 3, seed=seed + 50)
    best = max(
        sum(
            float(torch.nn.functional.cosine_similarity(first_cd[i], second_cd[j], dim=0))
            for i, j in enumerate(order)
        )
        for order in permutations(range(5))
    )
    assert stability(first_cd, second_cd) == pytest.approx(best / 5, abs=1e-6)
    assert stability(second_cd, first_cd) == pytest.approx(best / 5, abs=1e-6)


def test_concepts_that_both_want_the_same_partner_get_one_each():
    first_cd = torch.tensor([[1.0, 0.0], [1.0, 0.01]])
    second_cd = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert stability(first_cd, second_cd) == pytest.approx((1 + 0.01) / 2, abs=1e-3)
