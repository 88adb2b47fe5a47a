"""Sparse operations against torch's dense ones and plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.sae import ops
from patch_retriever.sae.ops import (
    ByConcept,
    Entries,
    PreActivations,
    above,
    sampled_products,
    topk_concepts,
    topk_of_batch,
    weighted_rows,
)

QUICK = settings(deadline=None, database=None, max_examples=100)
SEEDS = st.integers(0, 100_000)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
CHUNK = 4


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "CHUNK_TOKENS", CHUNK)
        yield


def random_values(seed, *shape, kind="plain"):
    """Normal values; or with many that are equal, or mostly negative, or many minus infinity."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator).double()
    if kind == "ties":
        return values.round().clamp(-1, 1)
    if kind == "negative":
        return values - 2
    if kind == "infinite":
        return values.masked_fill(torch.rand(*shape, generator=generator) < 0.6, -torch.inf)
    return values


FINITE = ["plain", "ties", "negative"]


def given_values(u_nc):
    """Pre-activations that are the given ones, exactly."""
    c = u_nc.shape[1]
    return PreActivations(u_nc, torch.eye(c, dtype=u_nc.dtype), torch.zeros(c, dtype=u_nc.dtype))


def random_pre_activations(seed, n, d, c, dtype=torch.float64):
    x_nd, W_cd, b_c = (
        random_values(seed + i, *shape).to(dtype) for i, shape in enumerate([(n, d), (c, d), (c,)])
    )
    return PreActivations(x_nd, W_cd, b_c), x_nd @ W_cd.T + b_c


@st.composite
def entry_lists(draw, min_entries=0):
    """Entries of a few rows and concepts in the order of rows; some have none."""
    n, c = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    pairs = st.tuples(st.integers(0, n - 1), st.integers(0, c - 1))
    chosen = sorted(draw(st.sets(pairs, min_size=min_entries)))
    indices_e2 = torch.tensor(chosen, dtype=torch.long).view(-1, 2)
    return Entries(indices_e2[:, 0].contiguous(), indices_e2[:, 1].contiguous(), n), c


def dense_of(entries, values_e, c):
    """Entries' values as a matrix (rows, c)."""
    dense_rc = torch.zeros(entries.n_rows, c, dtype=values_e.dtype)
    for row, concept, value in zip(entries.rows_e, entries.concepts_e, values_e, strict=True):
        dense_rc[row, concept] = value
    return dense_rc


# --- sums of rows and inner products -------------------------------------------------------------


@QUICK
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(1, 5), SEEDS)
def test_weighted_rows_are_sums_row_by_row(counts, t, seed):
    starts_r = torch.tensor([sum(counts[:r]) for r in range(len(counts))])
    generator = torch.Generator().manual_seed(seed)
    index_e = torch.randint(0, t, (sum(counts),), generator=generator)
    values_e, table_td = random_values(seed, sum(counts)), random_values(seed + 1, t, 3)
    expected_rd = torch.zeros(len(counts), 3).double()
    e = 0
    for r, count in enumerate(counts):
        for _ in range(count):
            expected_rd[r] += values_e[e] * table_td[index_e[e]]
            e += 1
    found_rd = weighted_rows(values_e, index_e, starts_r, table_td)
    torch.testing.assert_close(found_rd, expected_rd)


def test_weighted_rows_are_differentiable_in_values_and_table():
    index_e, starts_r = torch.tensor([0, 2, 2, 1]), torch.tensor([0, 0, 3])
    arguments = random_values(0, 4).requires_grad_(), random_values(1, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda values_e, table_td: weighted_rows(values_e, index_e, starts_r, table_td), arguments
    )


@QUICK
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), st.integers(0, 20), SEEDS)
def test_sampled_products_are_inner_products_of_the_chosen_pairs(n, c, d, count, seed):
    a_nd, b_cd = random_values(seed, n, d), random_values(seed + 1, c, d)
    generator = torch.Generator().manual_seed(seed)
    rows_e = torch.randint(0, n, (count,), generator=generator)
    index_e = torch.randint(0, c, (count,), generator=generator)
    expected = [float(a_nd[i] @ b_cd[j]) for i, j in zip(rows_e, index_e, strict=True)]
    found_e = sampled_products(a_nd, b_cd, rows_e, index_e)
    torch.testing.assert_close(found_e, torch.tensor(expected, dtype=torch.float64))


def test_sampled_products_of_a_matrix_that_is_not_contiguous():
    a_nd, b_cd = random_values(0, 3, 4).T, random_values(1, 2, 3)
    rows_e, index_e = torch.tensor([3, 0, 3]), torch.tensor([0, 1, 1])
    expected_e = (a_nd @ b_cd.T)[rows_e, index_e]
    torch.testing.assert_close(sampled_products(a_nd, b_cd, rows_e, index_e), expected_e)
    row_nd = random_values(2, 1, 3).expand(4, 3)
    expected_e = (row_nd @ b_cd.T)[rows_e, index_e]
    torch.testing.assert_close(sampled_products(row_nd, b_cd, rows_e, index_e), expected_e)


# --- pre-activations -----------------------------------------------------------------------------


@QUICK
@given(st.integers(1, 14), st.integers(1, 5), st.integers(1, 9), SEEDS)
def test_pre_activations_are_products_chunk_by_chunk_as_often_as_wanted(n, d, c, seed):
    pre_activations, u_nc = random_pre_activations(seed, n, d, c)
    assert pre_activations.n == n
    for _ in range(2):
        chunks = [(first, u_cm.clone()) for first, u_cm in pre_activations]
        assert [first for first, _ in chunks] == list(range(0, n, CHUNK))
        assert max(u_cm.shape[1] for _, u_cm in chunks) <= CHUNK
        torch.testing.assert_close(torch.cat([u_cm for _, u_cm in chunks], dim=1), u_nc.T)


def test_whole_chunks_share_one_memory():
    pre_activations, _ = random_pre_activations(0, 3 * CHUNK + 1, 2, 5)
    kept = [u_cm for _, u_cm in pre_activations]  # all alive, so their places are different
    places = [u_cm.data_ptr() for u_cm in kept]
    assert len(set(places[:3])) == 1
    assert [u_cm.shape[1] for u_cm in kept] == [CHUNK] * 3 + [1]


@pytest.mark.parametrize("tokens", [1, 3, 5, 16])
def test_few_are_the_first_tokens_as_far_as_there_are_any(tokens):
    pre_activations, u_nc = random_pre_activations(0, 5, 3, 7)
    torch.testing.assert_close(pre_activations.few(tokens), u_nc[:tokens].T)


def test_the_arguments_decide_the_precision_of_the_product():
    pre_activations, _ = random_pre_activations(0, 6, 300, 5, torch.bfloat16)
    exact_nc = pre_activations.x_nd.double() @ pre_activations.W_cd.double().T
    exact_nc += pre_activations.b_c.double()
    for first, u_cm in pre_activations:
        assert u_cm.dtype == torch.bfloat16
        expected_cm = exact_nc[first : first + CHUNK].T
        torch.testing.assert_close(u_cm.double(), expected_cm, rtol=0.01, atol=0.1)


# --- selection -----------------------------------------------------------------------------------


@settings(QUICK, max_examples=400)
@given(st.data(), DTYPES, st.sampled_from([*FINITE, "infinite"]), SEEDS)
def test_topk_concepts_are_those_with_the_largest_values(data, dtype, kind, seed):
    fan = data.draw(st.sampled_from([2, 3, 4, 4]))
    c = data.draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 81, 96, 128, 256])))
    k = data.draw(st.one_of(st.integers(1, min(c, 6)), st.integers(1, c)))
    n = data.draw(st.integers(1, 6))
    u_cn = random_values(seed, c, n, kind=kind).to(dtype)
    concepts_nk = topk_concepts(u_cn, k, fan)
    assert concepts_nk.shape == (n, k)
    assert all(len(set(row)) == k for row in concepts_nk.tolist())
    found_nk = u_cn.T.gather(1, concepts_nk).sort(dim=1, descending=True).values
    assert torch.equal(found_nk, u_cn.T.topk(k, dim=1).values)


@QUICK
@given(st.integers(1, 14), st.integers(1, 9), st.sampled_from(FINITE), st.booleans(), SEEDS)
def test_above_are_all_entries_above_in_the_order_of_tokens(n, c, kind, per_concept, seed):
    u_nc = random_values(seed, n, c, kind=kind)
    lowest = random_values(seed + 1, c, 1, kind="ties") if per_concept else 0.0
    tokens_e, concepts_e, values_e = above(given_values(u_nc), lowest)
    expected_nc = u_nc > (lowest.T if per_concept else lowest)
    expected = expected_nc.nonzero(as_tuple=True)
    assert torch.equal(tokens_e, expected[0])
    assert torch.equal(concepts_e, expected[1])
    assert torch.equal(values_e, u_nc[expected])


class Counted(PreActivations):
    """Counts how often it is gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def counted(u_nc):
    plain = given_values(u_nc)
    return Counted(plain.x_nd, plain.W_cd, plain.b_c)


def assert_largest_of_batch(entries, u_nc, k):
    assert entries.n_rows == len(u_nc)
    assert bool((entries.rows_e.diff() >= 0).all())
    pairs = set(zip(entries.rows_e.tolist(), entries.concepts_e.tolist(), strict=True))
    assert len(pairs) == len(entries.rows_e)
    best_e = u_nc.flatten().topk(min(len(u_nc) * k, u_nc.numel())).values
    found_e = u_nc[entries.rows_e, entries.concepts_e].sort(descending=True).values
    assert torch.equal(found_e, best_e[best_e > 0])


@settings(QUICK, max_examples=300)
@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 13),
    st.sampled_from(FINITE),
    DTYPES,
    SEEDS,
)
def test_topk_of_batch_are_the_largest_positive_ones(n, c, k, kind, dtype, seed):
    u_nc = random_values(seed, n, c, kind=kind).to(dtype)
    assert_largest_of_batch(topk_of_batch(given_values(u_nc), k), u_nc, k)


def test_a_guess_that_is_low_enough_needs_one_pass_and_few_candidates(monkeypatch):
    u_nc = random_values(0, 400, 50)
    candidates = []

    def spied(*arguments):
        out = above(*arguments)
        candidates.append(len(out[0]))
        return out

    monkeypatch.setattr(ops, "above", spied)
    pre_activations = counted(u_nc)
    assert_largest_of_batch(topk_of_batch(pre_activations, 3), u_nc, 3)
    assert pre_activations.passes == len(candidates) == 1
    assert 3 * 400 <= candidates[0] < 0.2 * u_nc.numel()


@pytest.mark.parametrize("kind", FINITE)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_guess_that_was_too_high_is_repaired_in_a_second_pass(kind, k):
    """The first sixteen tokens, which the guess is made from, are much stronger than the rest."""
    u_nc = random_values(0, 60, 20, kind=kind)
    u_nc[:16] = 100 + u_nc[:16].abs()
    pre_activations = counted(u_nc)
    assert_largest_of_batch(topk_of_batch(pre_activations, k), u_nc, k)
    assert pre_activations.passes == 2


def test_nothing_positive_in_a_batch():
    entries = topk_of_batch(given_values(-torch.ones(9, 4)), 2)
    assert (len(entries.rows_e), len(entries.concepts_e), entries.n_rows) == (0, 0, 9)


# --- entries -------------------------------------------------------------------------------------


def test_entries_of_columns():
    entries = Entries.of_columns(torch.tensor([[4, 1], [0, 4], [2, 3]]))
    assert entries.rows_e.tolist() == [0, 0, 1, 1, 2, 2]
    assert entries.concepts_e.tolist() == [4, 1, 0, 4, 2, 3]
    assert (entries.n_rows, entries.starts_r.tolist()) == (3, [0, 2, 4])


@QUICK
@given(entry_lists())
def test_starts_are_where_each_rows_entries_begin(case):
    entries, _ = case
    rows = entries.rows_e.tolist()
    expected = [sum(row < r for row in rows) for r in range(entries.n_rows)]
    assert entries.starts_r.tolist() == expected


@QUICK
@given(entry_lists(), entry_lists())
def test_stacked_entries_are_matrices_one_below_the_other(above_case, below_case):
    (first, c), (second, c_below) = above_case, below_case
    c = max(c, c_below)
    stacked = first.stacked(second)
    parts = [dense_of(e, torch.ones(len(e.rows_e)), c) for e in (first, second)]
    assert torch.equal(dense_of(stacked, torch.ones(len(stacked.rows_e)), c), torch.cat(parts))
    assert bool((stacked.rows_e.diff() >= 0).all())


# --- by concept ----------------------------------------------------------------------------------


@QUICK
@given(entry_lists())
def test_by_concept_sorts_entries_by_concept_and_then_by_row(case):
    entries, c = case
    active = ByConcept.of(entries, c)
    pairs = zip(entries.concepts_e.tolist(), entries.rows_e.tolist(), strict=True)
    found = zip(active.concepts_e.tolist(), active.rows_e.tolist(), strict=True)
    assert list(found) == sorted(pairs)
    assert torch.equal(entries.concepts_e[active.order_e], active.concepts_e)
    for concept in range(c):
        own = slice(int(active.starts_c1[concept]), int(active.starts_c1[concept + 1]))
        assert active.concepts_e[own].tolist() == [concept] * (own.stop - own.start)
    assert int(active.starts_c1[-1]) == len(entries.rows_e)


@QUICK
@given(entry_lists(), SEEDS)
def test_decode_is_a_product_with_dense_codes_and_so_is_its_gradient(case, seed):
    entries, c = case
    active = ByConcept.of(entries, c)
    values_e = random_values(seed, len(entries.rows_e)).requires_grad_()
    W_cd, d_out_rd = random_values(seed + 1, c, 3), random_values(seed + 2, entries.n_rows, 3)
    found_rd = active.decode(values_e, W_cd)
    dense_rc = torch.zeros(entries.n_rows, c).double()
    dense_rc = dense_rc.index_put((active.rows_e, active.concepts_e), values_e)
    torch.testing.assert_close(found_rd, dense_rc @ W_cd)
    (found_e,) = torch.autograd.grad(found_rd, values_e, d_out_rd)
    (expected_e,) = torch.autograd.grad(dense_rc @ W_cd, values_e, d_out_rd)
    torch.testing.assert_close(found_e, expected_e)


@QUICK
@given(entry_lists(), st.data(), SEEDS)
def test_row_sums_are_sums_concept_by_concept(case, data, seed):
    entries, c = case
    active = ByConcept.of(entries, c)
    start = data.draw(st.integers(0, c - 1))
    concepts = slice(start, data.draw(st.integers(start + 1, c)))
    values_e, table_rd = random_values(seed, len(entries.rows_e)), random_values(seed + 1, 6, 3)
    expected_jd = torch.zeros(concepts.stop - start, 3).double()
    for row, concept, value in zip(active.rows_e, active.concepts_e, values_e, strict=True):
        if concepts.start <= concept < concepts.stop:
            expected_jd[concept - start] += value * table_rd[row]
    found_jd = active.row_sums(concepts, values_e, active.rows_e, table_rd)
    torch.testing.assert_close(found_jd, expected_jd)
