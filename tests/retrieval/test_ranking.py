"""Rankings and their metrics: equal to pytrec_eval, ties and all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.items import Item
from patch_retriever.retrieval import ranking
from patch_retriever.retrieval.metrics import query_metrics
from patch_retriever.retrieval.ranking import NOTHING, Judgements, rank, search_exactly
from patch_retriever.retrieval.tasks import RetrievalTask

steady = settings(deadline=None, derandomize=True)
CUTOFFS = (1, 3, 5, 10)
TREC = {"hit_rate": "success", "recall": "recall", "precision": "P", "map": "map_cut"}


def task_of(names, qrels, **more) -> RetrievalTask:
    queries = list(qrels)
    return RetrievalTask(
        "made", "test", "t->t", queries, [Item(q) for q in queries], names,
        [Item(n) for n in names], qrels, **more,
    )  # fmt: skip


def vectors(scores_qn) -> tuple[np.ndarray, np.ndarray]:
    """Queries and candidates whose inner products are exactly the given scores."""
    scores_qn = np.asarray(scores_qn, dtype=np.float32)
    return np.eye(len(scores_qn), dtype=np.float32), np.ascontiguousarray(scores_qn.T)


def by_trec(qrels, run) -> dict[str, dict[str, float]]:
    """Every metric of every query by pytrec_eval; `run` is {query: {candidate: score}}."""
    cut = ",".join(map(str, CUTOFFS))
    measures = {f"{m}.{cut}" for m in ("success", "recall", "P", "map_cut", "ndcg_cut")}
    judge = pytrec_eval.RelevanceEvaluator(qrels, measures | {"recip_rank", "map"})
    found = judge.evaluate(run)
    out = {}
    for q in qrels:
        mine = found[q]
        values = {
            f"{ours}@{k}": mine[f"{trec}_{k}"] for ours, trec in TREC.items() for k in CUTOFFS
        }
        values |= {f"ndcg@{k}": mine[f"ndcg_cut_{k}"] for k in CUTOFFS}
        for k in CUTOFFS:  # the reciprocal rank of a run that is cut at k, in trec_eval's order
            order = sorted(run[q], key=lambda c: (np.float32(run[q][c]), c), reverse=True)[:k]
            cut_run = {q: {c: float(len(order) - i) for i, c in enumerate(order)}}
            one = pytrec_eval.RelevanceEvaluator({q: qrels[q]}, {"recip_rank"})
            values[f"mrr@{k}"] = one.evaluate(cut_run)[q]["recip_rank"]
        out[q] = values | {"mrr": mine["recip_rank"], "map": mine["map"]}
    return out


@st.composite
def runs(draw):
    """Ids in any order, qrels with grades of -1 to 3 (some of candidates that are nowhere), and
    scores of which many are equal, some only as 32-bit floats."""
    names = draw(st.lists(st.text("ab01é_", min_size=1, max_size=4), min_size=1, max_size=25,
                          unique=True))  # fmt: skip
    n_queries = draw(st.integers(1, 4))
    judged = st.dictionaries(st.sampled_from([*names, "nowhere", "gone"]), st.integers(-1, 3),
                             min_size=1, max_size=8)  # fmt: skip
    score = st.sampled_from([-1.0, 0.0, 0.5, 0.5 + 1e-9, 2.0, 0.1, 1e-30])
    qrels = {f"q{i}": draw(judged) for i in range(n_queries)}
    row = st.lists(score, min_size=len(names), max_size=len(names))
    return names, qrels, draw(st.lists(row, min_size=n_queries, max_size=n_queries))


def ours(task, scores, **more):
    found = rank(task, *vectors(scores), **more)
    return judged(task, found, CUTOFFS), found


def judged(task, found, cutoffs):
    """Query by query, as if there were many."""
    judgements = Judgements(task)
    parts = [
        query_metrics(judgements.grades(row_k[None], q), judgements.judged_qm[q : q + 1], cutoffs)
        for q, row_k in enumerate(found.found_qk)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@steady
@given(runs())
def test_metrics_are_pytrec_evals(made):
    names, qrels, scores = made
    found, _ = ours(task_of(names, qrels), scores)
    run = {q: dict(zip(names, row, strict=True)) for q, row in zip(qrels, scores, strict=True)}
    expected = by_trec(qrels, run)
    assert set(found) == set(next(iter(expected.values())))
    for i, q in enumerate(qrels):
        assert {m: values[i] for m, values in found.items()} == pytest.approx(expected[q], abs=1e-9)


@steady
@given(runs(), st.data())
def test_what_is_excluded_and_pools_are_as_if_the_rest_was_not_there(made, data):
    names, qrels, scores = made
    out = {q: frozenset(data.draw(st.lists(st.sampled_from([*names, "gone"])))) for q in qrels}
    pools = {q: data.draw(st.lists(st.sampled_from(names), unique=True)) for q in list(qrels)[1:]}
    for task in (
        task_of(names, qrels, excluded=out),
        task_of(names, qrels, excluded=out, pools=pools),
    ):
        found, ranked = ours(task, scores)
        run = {}
        for q, row in zip(qrels, scores, strict=True):
            pool = set(task.pools.get(q, names)) - out[q]
            run[q] = {c: s for c, s in zip(names, row, strict=True) if c in pool}
            shown = ranked.found_qk[list(qrels).index(q)]
            assert {names[c] for c in shown[shown != NOTHING]} == pool
        expected = by_trec(qrels, {q: r or {"": 0.0} for q, r in run.items()})
        for i, q in enumerate(qrels):
            mine = {m: values[i] for m, values in found.items()}
            assert mine == pytest.approx(expected[q], abs=1e-9)


@pytest.mark.parametrize("k", [1, 7, 40])
def test_a_search_in_parts_is_a_sort_of_all_with_ties_cut_by_the_order(monkeypatch, k):
    rng = np.random.default_rng(k)
    queries_qd = rng.integers(-1, 2, (37, 3)).astype(np.float32)
    candidates_nd = rng.integers(-1, 2, (900, 3)).astype(np.float32)
    order_n = rng.permutation(900)
    scores_qn = queries_qd @ candidates_nd.T
    expected = [np.lexsort((order_n, -row))[:k] for row in scores_qn]
    for queries, candidates in ((1000, 10_000), (10, 200), (5, 100)):
        monkeypatch.setattr(ranking, "_QUERIES", queries)
        monkeypatch.setattr(ranking, "_ROWS", queries // 2)
        monkeypatch.setattr(ranking, "_CANDIDATE_BYTES", candidates * 3 * 4)
        found = search_exactly(queries_qd, candidates_nd, k, order_n)
        np.testing.assert_array_equal(found.found_qk, expected)
        np.testing.assert_array_equal(
            found.scores_qk, np.take_along_axis(scores_qn, np.array(expected), 1)
        )


def test_an_index_may_stand_in_for_the_search_and_find_too_little():
    names = ["a", "b", "c", "d"]
    task = task_of(names, {"q": {"b": 1, "d": 1}}, excluded={"q": frozenset({"a"})})
    asked = []

    def search(queries_qd, k):
        asked.append((queries_qd.shape, k))
        return np.array([[0.5, 0.5, 0.4, 0]], "f4"), np.array([[0, 3, 1, -1]])

    found = rank(task, *vectors([[0.0, 0.0, 0.0, 0.0]]), depth=3, search=search)
    assert asked == [((1, 1), 4)]
    assert found.found_qk.tolist() == [[3, 1, NOTHING]]
    metrics = judged(task, found, [2])
    assert metrics["recall@2"] == metrics["ndcg@2"] == [1.0]


def test_deeper_than_the_ranking_nothing_more_is_found():
    task = task_of(["a", "b", "c"], {"q": {"a": 1, "c": 2}})
    found, _ = ours(task, [[1.0, 3.0, 2.0]], depth=2)
    assert found["recall@10"] == [0.5]
    assert found["mrr"] == [0.5]


def test_vectors_that_are_no_numbers_find_nothing(monkeypatch):
    broken = np.full((200, 2), np.nan, dtype=np.float32)
    for candidates in (1000, 50):
        monkeypatch.setattr(ranking, "_CANDIDATE_BYTES", candidates * 2 * 4)
        assert (search_exactly(broken[:3], broken, 5).found_qk == NOTHING).all()


def test_positive_pairs_are_those_in_the_pool():
    task = task_of(["a", "b", "c"], {"q": {"c": 2, "gone": 1, "a": 0}, "r": {"a": 1, "c": 1}})
    assert Judgements(task).positive_pairs().tolist() == [[0, 2], [1, 0], [1, 2]]


def test_a_query_without_anything_relevant_scores_zero():
    task = task_of(["a", "b"], {"q": {}, "r": {"a": 0}, "s": {"b": 1}})
    found, _ = ours(task, [[1, 2]] * 3)
    assert all(values[0] == values[1] == 0 for values in found.values())
    assert found["ndcg@1"][2] == 1


def test_the_order_of_the_candidates_does_not_matter():
    names = [f"c{i}" for i in range(30)]
    rng = np.random.default_rng(0)
    task = task_of(names, {f"q{i}": {names[i]: 1} for i in range(8)})
    scores = rng.integers(0, 3, (8, 30))
    order = rng.permutation(30)
    moved = replace(
        task,
        candidate_ids=[names[i] for i in order],
        candidates=[task.candidates[i] for i in order],
    )
    before, after = ours(task, scores)[0], ours(moved, scores[:, order])[0]
    for metric, values in before.items():
        np.testing.assert_array_equal(values, after[metric])
