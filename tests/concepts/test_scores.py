"""Concept scores against double loops over concepts, written from the paper's formulas."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.backbones.roles import ROLES
from patch_retriever.concepts.scores import (
    bridge_by_pairs,
    bridge_by_tiles,
    bridge_scores,
    codes_of,
    contribution,
    score_concepts,
    unexplained,
)
from patch_retriever.concepts.table import ConceptTable
from patch_retriever.features import Features
from patch_retriever.sae.codes import Codes
from patch_retriever.sae.model import SparseAutoencoder

TEXT, IMAGE, BOTH = 0, 1, 2
steady = settings(deadline=None, derandomize=True, max_examples=40)


class World:
    """Items with codes and kinds, a dictionary, pairs and hard negatives, all random."""

    def __init__(self, seed, n=14, c=11, d=5, active=0.3, negative=0.0, n_pairs=9):
        self.generator = torch.Generator().manual_seed(seed)
        self.n, self.c, self.d = n, c, d
        self.z = self.uniform(n, c) * (self.uniform(n, c) < active)
        self.z *= torch.where(self.uniform(n, c) < negative, -1, 1)
        self.kinds = torch.tensor([TEXT, IMAGE, BOTH]).repeat(n)[:n]
        self.rows = torch.randn(c, d, generator=self.generator, dtype=torch.float64)
        self.rows /= self.rows.norm(dim=1, keepdim=True)
        self.pairs, self.wrong, self.wrong_centred = (self.crossing(n_pairs) for _ in range(3))

    def uniform(self, *shape):
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def crossing(self, n_pairs):
        """A text and an image each, the text first in about half of them."""
        sides = [(self.kinds == kind).nonzero()[:, 0] for kind in (TEXT, IMAGE)]
        picks = [side[(self.uniform(n_pairs) * len(side)).long()] for side in sides]
        flip = self.uniform(n_pairs) < 0.5
        pairs = torch.stack(picks, 1)
        return torch.where(flip[:, None], pairs.flip(1), pairs)

    @property
    def codes(self):
        return Codes.from_dense(self.z.float())

    @property
    def dictionary(self):
        return self.rows.float()

    @property
    def features(self):
        empty_nd = torch.zeros(self.n, self.d)
        energy_cr = torch.arange(4.0 * self.c).reshape(self.c, 4)
        return Features(empty_nd, empty_nd, self.codes, self.kinds.to(torch.int8), energy_cr)

    def scored(self) -> ConceptTable:
        pairs = (self.pairs, self.wrong, self.wrong_centred)
        return score_concepts(self.features, self.dictionary, *pairs)

    # the paper's formulas, by double loops

    def gram(self, i, j):
        return float(sum(self.rows[i, x] * self.rows[j, x] for x in range(self.d)))

    def brute_attribution(self, z, pairs):
        """A_i = E[a_i sum_j M_ij b_j + b_i sum_j M_ij a_j]."""
        z, found = z.tolist(), [0.0] * self.c
        gram = [[self.gram(i, j) for j in range(self.c)] for i in range(self.c)]
        for a, b in pairs.tolist():
            for i in range(self.c):
                for j in range(self.c):
                    found[i] += gram[i][j] * (z[a][i] * z[b][j] + z[b][i] * z[a][j]) / len(pairs)
        return found

    def brute_bridge(self):
        """B_ij = E[z_image,i z_text,j] (D_i . D_j)."""
        z, b = self.z.tolist(), [[0.0] * self.c for _ in range(self.c)]
        for pair in self.pairs.tolist():
            image, text = sorted(pair, key=lambda item: int(self.kinds[item]) != IMAGE)
            for i in range(self.c):
                for j in range(self.c):
                    b[i][j] += z[image][i] * z[text][j] / len(self.pairs)
        return [[self.gram(i, j) * b[i][j] for j in range(self.c)] for i in range(self.c)]

    def brute_bridge_scores(self):
        b = self.brute_bridge()
        return [sum(abs(b[i][j]) + abs(b[j][i]) for j in range(self.c)) for i in range(self.c)]

    def brute_mean(self, kinds, i):
        rows = [n for n in range(self.n) if int(self.kinds[n]) in kinds]
        return sum(float(self.z[n, i]) for n in rows) / max(len(rows), 1)

    def centred(self):
        z = self.z.clone()
        for n in range(self.n):
            for i in range(self.c):
                z[n, i] -= self.brute_mean({int(self.kinds[n])}, i)
        return z


def close(found_c, expected):
    expected_c = torch.as_tensor(expected, dtype=torch.float64)
    return torch.allclose(found_c.double(), expected_c, rtol=1e-5, atol=1e-5)


def minus(ours, theirs):
    return [a - b for a, b in zip(ours, theirs, strict=True)]


worlds = st.builds(
    World,
    seed=st.integers(0, 2**20),
    n=st.integers(3, 16),
    c=st.integers(1, 12),
    d=st.integers(1, 7),
    active=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    negative=st.sampled_from([0.0, 0.0, 0.3]),
    n_pairs=st.integers(1, 12),
)


@steady
@given(worlds)
def test_every_score_equals_the_double_loop(world):
    table = world.scored()
    every = {TEXT, IMAGE, BOTH}
    for i in range(world.c):
        text, image = world.brute_mean({TEXT}, i), world.brute_mean({IMAGE}, i)
        expected = {
            "energy": world.brute_mean(every, i),
            "energy_texts": text,
            "energy_images": image,
            "energy_both": world.brute_mean({BOTH}, i),
            "frequency": sum(float(world.z[n, i]) != 0 for n in range(world.n)) / world.n,
        }
        if text + image > 1e-3:  # with negative codes the share may be anything
            expected["modality"] = text / (text + image)
        for name, value in expected.items():
            assert float(getattr(table, name)[i]) == pytest.approx(value, rel=1e-5, abs=1e-5), name
    z, centred = world.z, world.centred()
    attribution = world.brute_attribution(z, world.pairs)
    assert close(table.attribution, attribution)
    wrong = world.brute_attribution(z, world.wrong)
    assert close(table.discriminative, minus(attribution, wrong))
    right = world.brute_attribution(centred, world.pairs)
    wrong = world.brute_attribution(centred, world.wrong_centred)
    assert close(table.discriminative_centred, minus(right, wrong))
    assert close(table.bridge, world.brute_bridge_scores())


@steady
@given(worlds, st.integers(1, 400))
def test_bridge_scores_by_tiles_of_any_size_equal_the_double_loop(world, floats):
    found_c = bridge_by_tiles(*sides(world), world.dictionary, floats) / len(world.pairs)
    assert close(found_c, world.brute_bridge_scores())


@steady
@given(worlds.filter(lambda world: bool((world.z >= 0).all())), st.integers(1, 400))
def test_bridge_scores_by_pairs_in_parts_of_any_size_equal_the_double_loop(world, floats):
    found_c = bridge_by_pairs(*sides(world), world.dictionary, floats) / len(world.pairs)
    assert close(found_c, world.brute_bridge_scores())


def sides(world):
    """Codes of the image and of the text of every pair."""
    first_is_image = world.kinds[world.pairs[:, 0]] == IMAGE
    image = torch.where(first_is_image, world.pairs[:, 0], world.pairs[:, 1])
    text = torch.where(first_is_image, world.pairs[:, 1], world.pairs[:, 0])
    return world.codes[image], world.codes[text]


def attribution(world, pairs, **more):
    zero_kc = torch.zeros(3, world.c)
    return contribution(world.codes, world.kinds, zero_kc, world.dictionary, pairs, **more)


def test_sums_over_pairs_would_be_wrong_for_negative_codes_so_they_are_not_used():
    world = World(0, active=0.2, negative=0.5, c=40, n_pairs=3)
    by_pairs = bridge_by_pairs(*sides(world), world.dictionary) / len(world.pairs)
    expected = world.brute_bridge_scores()
    assert not close(by_pairs, expected)
    found_c = bridge_scores(world.codes, world.kinds, world.dictionary, world.pairs)
    assert close(found_c, expected)


def test_attribution_sums_to_twice_the_mean_reconstructed_inner_product():
    world = World(1)
    rebuilt = world.z @ world.rows
    inner = sum(float(rebuilt[a] @ rebuilt[b]) for a, b in world.pairs.tolist())
    found_c = attribution(world, world.pairs)
    assert float(found_c.sum()) == pytest.approx(2 * inner / len(world.pairs), abs=1e-5)


def test_signed_row_and_column_sums_of_the_bridge_matrix_are_the_attribution():
    world = World(2)
    b = world.brute_bridge()
    signed = [sum(b[i][j] + b[j][i] for j in range(world.c)) for i in range(world.c)]
    assert close(attribution(world, world.pairs), signed)


def test_the_order_of_a_pair_changes_nothing():
    world = World(3)
    before, flipped = attribution(world, world.pairs), attribution(world, world.pairs.flip(1))
    assert torch.allclose(before, flipped, atol=1e-6)
    bridges = [
        bridge_scores(world.codes, world.kinds, world.dictionary, pairs)
        for pairs in (world.pairs, world.pairs.flip(1))
    ]
    assert torch.allclose(*bridges, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 13, 14, 15])
def test_chunks_of_items_do_not_change_contributions(chunk):
    world = World(4)
    found_c = attribution(world, world.pairs, chunk=chunk)
    assert torch.allclose(found_c, attribution(world, world.pairs), atol=1e-6)


def test_modality_is_one_half_where_neither_text_nor_image_fires():
    world = World(5)
    world.z[:, 4] = 0
    world.z[:, 7] = 0.5 * (world.kinds == BOTH)
    assert world.scored().modality[[4, 7]].tolist() == [0.5, 0.5]


def test_energy_by_role_is_that_of_the_features():
    world = World(6)
    table = world.scored()
    for r, role in enumerate(ROLES):
        energy_c = getattr(table, f"role_{role}")
        assert torch.equal(energy_c, world.features.role_energy_cr[:, r])
    features = world.features
    without = Features(features.pooled_nd, features.mean_nd, features.codes, features.kinds_n)
    table = score_concepts(without, world.dictionary, world.pairs, world.wrong, world.wrong)
    assert bool(table.role_image.isnan().all())


def test_a_split_without_items_of_both_kinds_scores_the_same_pairs():
    world = World(7, n=21)
    table = world.scored()
    kept = (world.kinds != BOTH).nonzero()[:, 0]
    place = torch.full((world.n,), -1)
    place[kept] = torch.arange(len(kept))
    empty_nd = torch.zeros(len(kept), world.d)
    features = Features(empty_nd, empty_nd, world.codes[kept], world.kinds[kept])
    pairs = (place[p] for p in (world.pairs, world.wrong, world.wrong_centred))
    without = score_concepts(features, world.dictionary, *pairs)
    for name in ("modality", "bridge", "attribution", "discriminative", "discriminative_centred"):
        assert torch.allclose(getattr(without, name), getattr(table, name), atol=1e-6), name
    assert without.energy_both.tolist() == [0.0] * world.c


def test_many_concepts_need_no_matrix_of_them():
    n, c, k = 600, 300_000, 6  # items by concepts would be 0.7 GB, concepts by concepts 360 GB
    generator = torch.Generator().manual_seed(0)
    concepts_e = torch.randint(0, c, (n * k,), generator=generator)
    values_e = torch.rand(n * k, generator=generator)
    codes = Codes(torch.arange(0, n * k + 1, k), concepts_e, values_e, c)
    rows_cd = torch.nn.functional.normalize(torch.randn(c, 4, generator=generator), dim=1)
    kinds_n = torch.arange(n) % 2
    pairs_n2 = torch.arange(n).reshape(-1, 2)
    empty_nd = torch.zeros(n, 4)
    table = score_concepts(
        Features(empty_nd, empty_nd, codes, kinds_n), rows_cd, pairs_n2, pairs_n2, pairs_n2
    )
    inner_n = (codes.matmul(rows_cd)[::2] * codes.matmul(rows_cd)[1::2]).sum(1)
    assert float(table.attribution.sum()) == pytest.approx(2 * float(inner_n.mean()), rel=1e-4)
    assert float(table.discriminative.abs().max()) == 0
    assert all(getattr(table, f.name).shape == (c,) for f in fields(ConceptTable))


# codes of tokens and of pooled vectors


def make_sae(d=6, c=15):
    rows_cd = torch.nn.functional.normalize(
        torch.randn(c, d, generator=torch.Generator().manual_seed(0)), dim=1
    )
    return SparseAutoencoder(
        rows_cd.T.contiguous(),
        torch.zeros(c),
        rows_cd,
        torch.full((d,), 0.1),
        torch.full((c,), 0.2),
    )


def make_features(sae, n=12):
    x_nd = torch.randn(n, sae.d_in, generator=torch.Generator().manual_seed(1))
    x_nd[torch.arange(n) % 3 == BOTH] = 1.0  # all alike: nothing to explain
    codes = Codes.from_dense(sae.encode(0.5 * x_nd))
    return Features(x_nd, x_nd, codes, torch.arange(n) % 3)


def test_codes_are_those_of_the_tokens_or_of_the_pooled_vectors():
    sae = make_sae()
    features = make_features(sae)
    assert codes_of(features, sae, "tokens") is features.codes
    pooled = codes_of(features, sae, "pooled")
    assert torch.equal(pooled.dense(), sae.encode(features.pooled_nd))


def test_unexplained_variance_by_kind_is_that_of_loops():
    sae = make_sae()
    features = make_features(sae)
    for which in ("tokens", "pooled"):
        codes = codes_of(features, sae, which)
        found = unexplained(features, codes, sae)
        assert set(found) == {"all", "text", "image"}  # the others are all alike
        rebuilt_nd = sae.decode(codes.dense())
        for name, kinds in (("all", (0, 1, 2)), ("text", (TEXT,)), ("image", (IMAGE,))):
            rows = [n for n in range(12) if int(features.kinds_n[n]) in kinds]
            mean_d = sum(features.pooled_nd[n] for n in rows) / len(rows)
            left = sum(float((features.pooled_nd[n] - rebuilt_nd[n]).norm() ** 2) for n in rows)
            there = sum(float((features.pooled_nd[n] - mean_d).norm() ** 2) for n in rows)
            assert found[name] == pytest.approx(left / there, rel=1e-4)
