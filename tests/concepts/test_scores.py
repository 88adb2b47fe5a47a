"""Concept scores against brute force: loops over pairs and whole c x c matrices, in float64."""

from __future__ import annotations

from dataclasses import fields

import pyarrow.parquet as pq
import pytest
import torch

from patch_retriever.concepts.scores import (
    ConceptTable,
    bridge_scores,
    contribution,
    score_concepts,
)
from patch_retriever.features import Features
from patch_retriever.sae.codes import Codes

N, C, D = 30, 23, 7
KINDS_N = torch.arange(N) % 3
SILENT, ONLY_BOTH = 4, 9
"""A concept that never fires, and one that fires only where there is image and text."""


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make_codes():
    codes_nc = torch.rand(N, C, generator=generator(0))
    codes_nc *= torch.rand(N, C, generator=generator(1)) < 0.3
    codes_nc[:, SILENT] = 0
    codes_nc[:, ONLY_BOTH] = 0.5 * (KINDS_N == 2)
    return codes_nc


def crossing(n, seed):
    """(query, document) items: a text and an image, the text first in about half of them."""
    texts, images = ((kind == KINDS_N).nonzero()[:, 0] for kind in (0, 1))
    pick = torch.randint(0, len(texts), (2, n), generator=generator(seed))
    pairs_n2 = torch.stack([texts[pick[0]], images[pick[1]]], dim=1)
    flipped_n = torch.rand(n, generator=generator(seed + 100)) < 0.5
    return torch.where(flipped_n[:, None], pairs_n2.flip(1), pairs_n2)


CODES_NC = make_codes()
CODES = Codes.from_dense(CODES_NC)
DICTIONARY_CD = torch.nn.functional.normalize(torch.randn(C, D, generator=generator(2)), dim=1)
PAIRS_N2, NEGATIVES_N2, CENTRED_NEGATIVES_N2 = crossing(40, 3), crossing(25, 4), crossing(31, 5)
ZERO_KC = torch.zeros(3, C)


def brute_contribution(codes_nc, pairs_n2):
    """E[a * (M b) + b * (M a)] with the whole M."""
    m_cc = DICTIONARY_CD.double() @ DICTIONARY_CD.double().T
    total_c = torch.zeros(C, dtype=torch.float64)
    for query, document in pairs_n2.tolist():
        a_c, b_c = codes_nc[query].double(), codes_nc[document].double()
        for i in range(C):
            total_c[i] += a_c[i] * (m_cc[i] * b_c).sum() + b_c[i] * (m_cc[i] * a_c).sum()
    return total_c / len(pairs_n2)


def brute_bridge_matrix():
    """B = E[z_image^T z_text] * (D D^T), rows image concepts and columns text concepts."""
    b_cc = torch.zeros(C, C, dtype=torch.float64)
    for pair in PAIRS_N2.tolist():
        image, text = sorted(pair, key=lambda item: KINDS_N[item] != 1)
        b_cc += torch.outer(CODES_NC[image].double(), CODES_NC[text].double())
    return b_cc / len(PAIRS_N2) * (DICTIONARY_CD.double() @ DICTIONARY_CD.double().T)


def centred(codes_nc):
    means_kc = torch.stack([codes_nc[kind == KINDS_N].mean(0) for kind in range(3)])
    return codes_nc - means_kc[KINDS_N], means_kc


def close(found, expected):
    return torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)


def raw_attribution(**more):
    return contribution(CODES, KINDS_N, ZERO_KC, DICTIONARY_CD, PAIRS_N2, **more)


@pytest.fixture(scope="module")
def table():
    features = Features(torch.zeros(N, D), torch.zeros(N, D), CODES, KINDS_N.to(torch.int8))
    return score_concepts(features, DICTIONARY_CD, PAIRS_N2, NEGATIVES_N2, CENTRED_NEGATIVES_N2)


def test_contribution_equals_brute_force():
    assert close(raw_attribution(), brute_contribution(CODES_NC, PAIRS_N2))


def test_contribution_of_centred_codes_equals_brute_force():
    centred_nc, means_kc = centred(CODES_NC)
    found_c = contribution(CODES, KINDS_N, means_kc, DICTIONARY_CD, PAIRS_N2)
    assert close(found_c, brute_contribution(centred_nc, PAIRS_N2))
    assert not torch.allclose(found_c, raw_attribution(), atol=1e-3)


def test_attribution_sums_to_twice_the_mean_reconstructed_inner_product():
    reconstructed_nd = CODES_NC.double() @ DICTIONARY_CD.double()
    a_nd, b_nd = reconstructed_nd[PAIRS_N2[:, 0]], reconstructed_nd[PAIRS_N2[:, 1]]
    assert close(raw_attribution().sum(), 2 * (a_nd * b_nd).sum(1).mean())


def test_the_order_of_a_pair_does_not_change_the_attribution():
    flipped_c = contribution(CODES, KINDS_N, ZERO_KC, DICTIONARY_CD, PAIRS_N2.flip(1))
    assert torch.allclose(flipped_c, raw_attribution(), atol=1e-6)


def test_bridge_scores_are_row_and_column_sums_of_the_absolute_matrix():
    b_cc = brute_bridge_matrix().abs()
    found_c = bridge_scores(CODES, KINDS_N, DICTIONARY_CD, PAIRS_N2)
    assert close(found_c, b_cc.sum(1) + b_cc.sum(0))


def test_signed_row_and_column_sums_of_the_bridge_matrix_are_the_attribution():
    b_cc = brute_bridge_matrix()
    assert close(raw_attribution(), b_cc.sum(1) + b_cc.sum(0))


@pytest.mark.parametrize("chunk", [1, 7, 40, 41])
def test_chunks_of_pairs_do_not_change_contributions(chunk):
    assert torch.allclose(raw_attribution(chunk=chunk), raw_attribution(), atol=1e-6)


@pytest.mark.parametrize("block", [1, 5, 23, 24])
def test_blocks_of_concepts_do_not_change_bridge_scores(block):
    arguments = (CODES, KINDS_N, DICTIONARY_CD, PAIRS_N2)
    assert torch.allclose(
        bridge_scores(*arguments, block=block), bridge_scores(*arguments), atol=1e-6
    )


def test_energy_is_the_mean_over_all_items(table):
    assert close(table.energy, CODES_NC.double().mean(0))


def test_modality_is_the_share_of_text(table):
    for c in range(C):
        text = float(CODES_NC[KINDS_N == 0, c].double().mean())
        image = float(CODES_NC[KINDS_N == 1, c].double().mean())
        expected = text / (text + image) if text + image > 0 else 0.5
        assert float(table.modality[c]) == pytest.approx(expected, abs=1e-6)


def test_modality_is_one_half_where_neither_text_nor_image_fires(table):
    assert table.modality[[SILENT, ONLY_BOTH]].tolist() == [0.5, 0.5]


def test_scores_of_pairs_in_the_table_equal_brute_force(table):
    b_cc = brute_bridge_matrix().abs()
    assert close(table.bridge, b_cc.sum(1) + b_cc.sum(0))
    assert close(table.attribution, brute_contribution(CODES_NC, PAIRS_N2))


def test_discriminative_attribution_is_pairs_less_hard_negatives(table):
    positive_c = brute_contribution(CODES_NC, PAIRS_N2)
    assert close(table.discriminative, positive_c - brute_contribution(CODES_NC, NEGATIVES_N2))


def test_discriminative_attribution_on_centred_codes(table):
    centred_nc, _ = centred(CODES_NC)
    expected_c = brute_contribution(centred_nc, PAIRS_N2)
    expected_c -= brute_contribution(centred_nc, CENTRED_NEGATIVES_N2)
    assert close(table.discriminative_centred, expected_c)


def test_a_split_without_items_of_both_kinds_scores_the_same_pairs(table):
    kept = (KINDS_N != 2).nonzero()[:, 0]
    place = torch.full((N,), -1)
    place[kept] = torch.arange(len(kept))
    empty_nd = torch.zeros(len(kept), D)
    features = Features(empty_nd, empty_nd, CODES[kept], KINDS_N[kept])
    pairs = (place[p] for p in (PAIRS_N2, NEGATIVES_N2, CENTRED_NEGATIVES_N2))
    without = score_concepts(features, DICTIONARY_CD, *pairs)
    for name in ("modality", "bridge", "attribution", "discriminative", "discriminative_centred"):
        assert torch.allclose(getattr(without, name), getattr(table, name), atol=1e-6), name


def test_parquet_round_trip(table, tmp_path):
    path = tmp_path / "concepts.parquet"
    table.save(path)
    loaded = ConceptTable.load(path)
    for field in fields(ConceptTable):
        assert torch.equal(getattr(loaded, field.name), getattr(table, field.name)), field.name


def test_parquet_has_a_row_per_concept_for_any_reader(table, tmp_path):
    path = tmp_path / "concepts.parquet"
    table.save(path)
    columns = pq.read_table(path).to_pydict()
    assert columns["concept"] == list(range(C))
    assert set(columns) == {"concept", *(f.name for f in fields(ConceptTable))}
