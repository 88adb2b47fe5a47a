"""Ranks and hits: equal to a brute-force count and to pytrec_eval; ties count as misses."""

from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.retrieval import metrics
from patch_retriever.retrieval.metrics import CUTOFFS, hits, ranks, search

DEPTH = max(CUTOFFS)
steady = settings(deadline=None, derandomize=True)


def embeddings(scores_qn) -> tuple[np.ndarray, np.ndarray]:
    """Queries and documents whose inner products are exactly the given scores."""
    scores_qn = np.asarray(scores_qn, dtype=np.float32)
    return np.eye(len(scores_qn), dtype=np.float32), np.ascontiguousarray(scores_qn.T)


def ranks_by_counting(scores_qn, relevant) -> list[int]:
    """One plus the irrelevant documents that score at least as much as the best relevant one."""
    found = []
    for scores_n, answers in zip(np.asarray(scores_qn), relevant, strict=True):
        best = max(scores_n[a] for a in answers)
        ahead = sum(s >= best for n, s in enumerate(scores_n) if n not in answers)
        found.append(min(ahead, DEPTH) + 1)
    return found


@st.composite
def judged_scores(draw: st.DrawFn, ties: bool):
    """Scores (q, n) of whole numbers, and the relevant documents of every query."""
    n, q = draw(st.integers(2, 40)), draw(st.integers(1, 5))
    if ties:
        row = st.lists(st.integers(-3, 3), min_size=n, max_size=n)
    else:
        row = st.permutations(range(-5, n - 5))
    answers = st.sets(st.integers(0, n - 1), min_size=1, max_size=6).map(sorted).map(tuple)
    return (
        draw(st.lists(row, min_size=q, max_size=q)),
        draw(st.lists(answers, min_size=q, max_size=q)),
    )


@steady
@given(judged_scores(ties=False))
def test_ranks_are_what_counting_gives(judged):
    scores, relevant = judged
    assert ranks(*embeddings(scores), relevant).tolist() == ranks_by_counting(scores, relevant)


@steady
@given(judged_scores(ties=True))
def test_ranks_with_ties_are_what_counting_gives(judged):
    scores, relevant = judged
    assert ranks(*embeddings(scores), relevant).tolist() == ranks_by_counting(scores, relevant)


def success(scores, relevant) -> list[list[float]]:
    """What pytrec_eval says about every query, at every cutoff."""
    measures = [f"success_{k}" for k in CUTOFFS]
    judged = {f"q{q}": {f"d{n}": 1 for n in answers} for q, answers in enumerate(relevant)}
    run = {f"q{q}": {f"d{n}": float(s) for n, s in enumerate(row)} for q, row in enumerate(scores)}
    evaluator = pytrec_eval.RelevanceEvaluator(judged, {"success.1,5,10"})
    found = evaluator.evaluate(run)
    return [[found[f"q{q}"][m] for m in measures] for q in range(len(relevant))]


@steady
@given(judged_scores(ties=False))
def test_hits_are_pytrec_evals_success(judged):
    scores, relevant = judged
    assert hits(ranks(*embeddings(scores), relevant)).tolist() == success(scores, relevant)


def test_hits_of_random_embeddings_are_pytrec_evals_success():
    rng = np.random.default_rng(0)
    queries_qd = rng.standard_normal((60, 16)).astype(np.float32)
    documents_nd = rng.standard_normal((150, 16)).astype(np.float32)
    relevant = [tuple(rng.choice(150, rng.integers(1, 5), replace=False)) for _ in range(60)]
    found = hits(ranks(queries_qd, documents_nd, relevant))
    assert found.tolist() == success(queries_qd @ documents_nd.T, relevant)
    assert 0 < found.mean() < 1


@steady
@given(judged_scores(ties=True), st.data())
def test_another_relevant_document_never_makes_a_rank_worse(judged, data):
    scores, relevant = judged
    extra = data.draw(st.integers(0, len(scores[0]) - 1))
    more = [tuple({*answers, extra}) for answers in relevant]
    before, after = (ranks(*embeddings(scores), r) for r in (relevant, more))
    assert (after <= before).all()


@steady
@given(judged_scores(ties=True), st.randoms(use_true_random=False))
def test_the_order_of_the_documents_does_not_matter(judged, rng):
    scores, relevant = judged
    order = list(range(len(scores[0])))
    rng.shuffle(order)
    moved = [[row[n] for n in order] for row in scores]
    moved_relevant = [tuple(order.index(n) for n in answers) for answers in relevant]
    before, after = ranks(*embeddings(scores), relevant), ranks(*embeddings(moved), moved_relevant)
    assert before.tolist() == after.tolist()


@pytest.mark.parametrize("width", [3, 32, 192])
@pytest.mark.parametrize(("n_queries", "n_documents"), [(1, 12), (7, 40), (100, 300)])
def test_constant_embeddings_find_nothing(width, n_queries, n_documents):
    same = np.random.default_rng(0).standard_normal(width, dtype=np.float32)
    queries_qd, documents_nd = np.tile(same, (n_queries, 1)), np.tile(same, (n_documents, 1))
    relevant = [(q % n_documents,) for q in range(n_queries)]
    assert hits(ranks(queries_qd, documents_nd, relevant)).sum() == 0


def test_a_tie_with_a_wrong_document_is_no_hit_at_one():
    assert hits(ranks(*embeddings([[1.0, 1.0, 0.0]]), [(0,)])).tolist() == [[0, 1, 1]]


def test_ties_among_relevant_documents_cost_nothing():
    assert ranks(*embeddings([[2.0, 2.0, 2.0, 1.0]]), [(0, 1, 2)]).tolist() == [1]


def test_embeddings_that_are_not_numbers_find_nothing():
    broken = np.full((20, 4), np.nan, dtype=np.float32)
    assert hits(ranks(broken[:3], broken, [(0,), (1,), (2,)])).sum() == 0


def test_hits_count_ranks_up_to_the_cutoff():
    assert CUTOFFS == (1, 5, 10)
    found = hits(np.array([1, 2, 5, 6, 10, 11]))
    assert found.tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_search_gives_the_largest_inner_products_in_order():
    rng = np.random.default_rng(1)
    queries_qd, documents_nd = rng.standard_normal((6, 9)), rng.standard_normal((30, 9))
    scores_qk, found_qk = search(queries_qd, documents_nd, 7)
    all_qn = queries_qd @ documents_nd.T
    np.testing.assert_array_equal(found_qk, np.argsort(-all_qn, axis=1)[:, :7])
    np.testing.assert_allclose(scores_qk, -np.sort(-all_qn, axis=1)[:, :7], rtol=1e-4, atol=1e-5)


@steady
@given(judged_scores(ties=True), st.integers(1, 60))
def test_ranks_do_not_depend_on_how_many_scores_are_made_at_once(judged, at_once):
    scores, relevant = judged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_SCORES_AT_ONCE", at_once)
        found = ranks(*embeddings(scores), relevant)
    assert found.tolist() == ranks_by_counting(scores, relevant)


def test_a_relevant_document_that_is_named_twice_counts_once():
    assert ranks(*embeddings([[1.0, 3.0, 2.0, 4.0]]), [(1, 1, 1)]).tolist() == [2]


def test_a_relevant_document_that_is_no_number_leaves_the_others():
    queries_qd, documents_nd = embeddings([[np.nan, 2.0, 3.0]])
    assert ranks(queries_qd, documents_nd, [(0, 1)]).tolist() == [2]
