"""Sparse codes against dense tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.sae import model
from patch_retriever.sae.codes import Codes
from patch_retriever.sae.model import SparseAutoencoder

QUICK = settings(deadline=None, database=None, max_examples=60)

VALUES = st.sampled_from([0.0, 0.0, 0.0, 0.5, 1.25, 3.0, -2.0])


@st.composite
def dense_codes(draw, min_rows=0):
    n, c = draw(st.integers(min_rows, 7)), draw(st.integers(1, 6))
    values = draw(st.lists(VALUES, min_size=n * c, max_size=n * c))
    return torch.tensor(values).reshape(n, c)


@QUICK
@given(dense_codes())
def test_dense_inverts_from_dense(codes_nc):
    codes = Codes.from_dense(codes_nc)
    assert torch.equal(codes.dense(), codes_nc)
    assert (len(codes), codes.n_concepts) == tuple(codes_nc.shape)


@QUICK
@given(dense_codes())
def test_only_active_concepts_are_stored_row_after_row(codes_nc):
    codes = Codes.from_dense(codes_nc)
    assert len(codes.values_e) == int((codes_nc != 0).sum())
    assert codes.starts_n1.tolist()[0] == 0
    assert codes.starts_n1.diff().tolist() == (codes_nc != 0).sum(1).tolist()
    assert torch.equal(codes.values_e, codes_nc[codes.rows_e, codes.concepts_e])


@QUICK
@given(dense_codes(min_rows=1), st.data())
def test_from_batches_puts_batches_in_the_order_of_their_numbers(codes_nc, data):
    n = len(codes_nc)
    order = data.draw(st.permutations(range(n)))
    cuts = [*sorted(data.draw(st.sets(st.integers(1, n)))), n]
    batches = [order[a:b] for a, b in zip([0, *cuts], cuts, strict=False) if a < b]
    codes = Codes.from_batches([(b, Codes.from_dense(codes_nc[b])) for b in batches])
    assert torch.equal(codes.dense(), codes_nc)


@QUICK
@given(dense_codes(min_rows=1))
def test_transposed_has_a_row_for_every_concept(codes_nc):
    turned = Codes.from_dense(codes_nc).transposed()
    assert torch.equal(turned.dense(), codes_nc.T)
    assert torch.equal(turned.transposed().dense(), codes_nc)


@QUICK
@given(dense_codes(min_rows=1))
def test_padded_rows_hold_every_entry_and_nothing_else(codes_nc):
    codes = Codes.from_dense(codes_nc)
    concepts_nk, values_nk = codes.padded()
    assert concepts_nk.shape == values_nk.shape == (len(codes), int(codes.active_n.max()))
    assert torch.equal(torch.zeros_like(codes_nc).scatter_add_(1, concepts_nk, values_nk), codes_nc)
    assert torch.equal((values_nk != 0).sum(1), codes.active_n)


@QUICK
@given(dense_codes(min_rows=1), st.data())
def test_indexing_takes_rows_in_any_order_and_repeats(codes_nc, data):
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(codes_nc) - 1))), dtype=torch.long)
    taken = Codes.from_dense(codes_nc)[rows]
    assert len(taken) == len(rows)
    assert torch.equal(taken.dense(), codes_nc[rows])


@QUICK
@given(dense_codes(min_rows=1), st.data())
def test_indexing_twice_is_indexing_by_the_picked_rows(codes_nc, data):
    numbers = st.integers(0, len(codes_nc) - 1)
    first = torch.tensor(data.draw(st.lists(numbers, min_size=1)))
    second = torch.tensor(data.draw(st.lists(st.integers(0, len(first) - 1), min_size=1)))
    codes = Codes.from_dense(codes_nc)
    assert torch.equal(codes[first][second].dense(), codes[first[second]].dense())


@QUICK
@given(dense_codes(), st.data())
def test_scaled_multiplies_every_column(codes_nc, data):
    c = codes_nc.shape[1]
    scale_c = torch.tensor(data.draw(st.lists(VALUES, min_size=c, max_size=c)))
    assert torch.equal(Codes.from_dense(codes_nc).scaled(scale_c).dense(), codes_nc * scale_c)


@QUICK
@given(dense_codes())
def test_sum_is_over_items(codes_nc):
    assert torch.allclose(Codes.from_dense(codes_nc).sum(), codes_nc.sum(0))


@QUICK
@given(dense_codes(min_rows=1))
def test_mean_counts_silent_items_too(codes_nc):
    assert torch.allclose(Codes.from_dense(codes_nc).mean(), codes_nc.mean(0))


def test_mean_of_no_items_is_zero():
    assert torch.equal(Codes.from_dense(torch.zeros(0, 3)).mean(), torch.zeros(3))


@QUICK
@given(dense_codes(), st.integers(1, 4), st.integers(0, 1000))
def test_matmul_is_the_dense_product(codes_nc, d, seed):
    generator = torch.Generator().manual_seed(seed)
    dictionary_cd = torch.randn(codes_nc.shape[1], d, generator=generator)
    product_nd = Codes.from_dense(codes_nc).matmul(dictionary_cd)
    assert torch.allclose(product_nd, codes_nc @ dictionary_cd, atol=1e-5)


def test_matmul_in_float64_keeps_its_digits():
    codes_nc = torch.tensor([[0.0, 2.0, 0.5]])
    dictionary_cd = torch.tensor([[1.0], [1e-12], [2.0]], dtype=torch.float64)
    product_nd = Codes.from_dense(codes_nc).matmul(dictionary_cd)
    assert product_nd.dtype == torch.float64
    assert torch.equal(product_nd, codes_nc.double() @ dictionary_cd)


def test_items_without_any_concept_stay_items():
    codes_nc = torch.zeros(4, 3)
    codes_nc[1, 2] = 5.0
    codes = Codes.from_dense(codes_nc)
    assert len(codes) == 4
    assert torch.equal(codes.dense(), codes_nc)
    assert torch.equal(codes.matmul(torch.eye(3)), codes_nc)
    assert torch.equal(codes[torch.tensor([3, 1, 1, 0])].dense(), codes_nc[[3, 1, 1, 0]])


def test_nothing_active_at_all():
    codes = Codes.from_dense(torch.zeros(3, 2))
    assert len(codes.values_e) == 0
    assert torch.equal(codes.matmul(torch.ones(2, 4)), torch.zeros(3, 4))
    assert torch.equal(codes.sum(), torch.zeros(2))


@QUICK
@given(dense_codes())
def test_from_entries_inverts_taking_them_apart(codes_nc):
    rows_e, concepts_e = codes_nc.nonzero(as_tuple=True)
    codes = Codes.from_entries(rows_e, concepts_e, codes_nc[rows_e, concepts_e], *codes_nc.shape)
    assert torch.equal(codes.dense(), codes_nc)
    assert (len(codes), codes.n_concepts) == tuple(codes_nc.shape)
    assert torch.equal(codes.starts_n1, Codes.from_dense(codes_nc).starts_n1)


@QUICK
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(1, 5), st.data())
def test_stacked_puts_several_below_each_other(heights, c, data):
    parts = []
    for n in heights:
        values = data.draw(st.lists(VALUES, min_size=n * c, max_size=n * c))
        parts.append(torch.tensor(values).reshape(n, c))
    stacked = Codes.stacked([Codes.from_dense(codes_nc) for codes_nc in parts])
    assert torch.equal(stacked.dense(), torch.cat(parts))
    assert torch.equal(stacked.starts_n1, Codes.from_dense(torch.cat(parts)).starts_n1)


@QUICK
@given(dense_codes(), st.sampled_from([-3.0, 0.0, 0.5, 1.0, 9.0]))
def test_kept_leaves_every_item_and_only_some_entries(codes_nc, lowest):
    codes = Codes.from_dense(codes_nc)
    kept = codes.kept(codes.values_e > lowest)
    assert torch.equal(kept.dense(), codes_nc * (codes_nc > lowest))
    assert (len(kept), kept.n_concepts) == tuple(codes_nc.shape)


@QUICK
@given(dense_codes())
def test_counts_are_of_active_items(codes_nc):
    assert torch.equal(Codes.from_dense(codes_nc).counts(), (codes_nc != 0).sum(0))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def eighths(*shape, seed=0):
    return (8 * normal(*shape, seed=seed)).round() / 8


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("chunk_codes", [1, 45, 10**6])
def test_an_saes_sparse_codes_are_its_dense_ones(k, chunk_codes, monkeypatch):
    monkeypatch.setattr(model, "CHUNK_CODES", chunk_codes)
    threshold_c = 0.3 * torch.ones(20)
    # in eighths sums are exact, in whatever order a processor takes them
    weights = [eighths(*shape) for shape in ((5, 20), (20,), (20, 5), (5,))]
    sae = SparseAutoencoder(*weights, threshold_c, k)
    x_nd = eighths(13, 5, seed=1)
    codes = sae.codes(x_nd)
    assert 0 < len(codes.values_e) < 13 * 20
    assert torch.allclose(codes.dense(), sae.encode(x_nd), atol=1e-6)
    assert torch.allclose(codes.matmul(sae.W_dec_cd) + sae.b_dec_d, sae.decode(sae.encode(x_nd)))


def test_codes_of_no_activations_are_empty():
    sae = SparseAutoencoder(normal(5, 20), normal(20), normal(20, 5), normal(5), torch.zeros(20))
    codes = sae.codes(torch.zeros(0, 5))
    assert (len(codes), codes.n_concepts, len(codes.values_e)) == (0, 20, 0)


@pytest.mark.parametrize("concepts", [[], [3], [4, 0, 2]])
def test_some_columns_are_those_of_the_dense_matrix(concepts):
    codes_nc = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    codes_nc = codes_nc * (codes_nc > 0.5)
    concepts_m = torch.tensor(concepts, dtype=torch.long)
    assert torch.equal(Codes.from_dense(codes_nc).of(concepts_m).dense(), codes_nc[:, concepts_m])
