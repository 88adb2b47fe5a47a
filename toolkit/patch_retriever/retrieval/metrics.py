"""Metrics: those of a build, where ties count against the query, and those of benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SCORES_AT_ONCE = 1 << 24
"""Of queries and documents (64 MiB in float32)."""

CUTOFFS = (1, 5, 10)
"""k of every reported R@k: the share of queries with a relevant document among the first k
(UniIR's and M-BEIR's Recall@k; mteb calls it hit_rate_at_k)."""


def search(
    queries_qd: NDArray[np.float32], documents_nd: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores and document numbers (q, k) of the k largest inner products (FAISS, exact)."""
    import faiss

    index = faiss.IndexFlatIP(documents_nd.shape[1])
    index.add(np.ascontiguousarray(documents_nd, dtype=np.float32))
    return index.search(np.ascontiguousarray(queries_qd, dtype=np.float32), k)


def ranks(
    queries_qd: NDArray[np.float32],
    documents_nd: NDArray[np.float32],
    relevant: Sequence[Sequence[int]],
    depth: int = max(CUTOFFS),
) -> NDArray[np.int64]:
    """Rank (q,) of each query's best relevant document among the irrelevant ones; `depth` + 1
    for anything below `depth`.

    A relevant document that ties with irrelevant ones ranks behind them, so that a model that
    gives everything the same vector finds nothing.
    """
    import torch

    counts_q = np.fromiter(map(len, relevant), dtype=np.int64, count=len(relevant))
    answers_a = np.fromiter(chain.from_iterable(relevant), dtype=np.int64, count=counts_q.sum())
    starts_q = counts_q.cumsum() - counts_q
    documents = torch.from_numpy(np.ascontiguousarray(documents_nd, dtype=np.float32))
    ranks_q = np.empty(len(relevant), dtype=np.int64)
    step = max(1, _SCORES_AT_ONCE // len(documents))
    for first in range(0, len(relevant), step):
        part = slice(first, first + step)
        queries = torch.from_numpy(np.ascontiguousarray(queries_qd[part], dtype=np.float32))
        scores_qn = (queries @ documents.T).numpy()
        rows_a = np.repeat(np.arange(len(scores_qn)), counts_q[part])
        columns_a = answers_a[starts_q[first] :][: len(rows_a)]
        found_a = scores_qn[rows_a, columns_a]
        best_q = np.fmax.reduceat(found_a, starts_q[part] - starts_q[first])
        scores_qn[rows_a, columns_a] = -np.inf
        ahead_q = (scores_qn >= best_q[:, None]).sum(1)
        ahead_q[np.isnan(best_q)] = depth  # what is no number is never found
        ranks_q[part] = np.minimum(ahead_q, depth) + 1
    return ranks_q


Measure = Callable[[NDArray[np.int64], int], NDArray[np.float64]]
"""What queries score by the ranks (q,) of what answers them and the number of documents, (q, m)."""


def hits(ranks_q: NDArray[np.int64], _n: int = 0) -> NDArray[np.float64]:
    """Whether each query has a hit at each of `CUTOFFS`, (q, 3) of 0 and 1; of any number of
    documents."""
    return (ranks_q[:, None] <= np.array(CUTOFFS)).astype(np.float64)


def log_recall(ranks_q: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """The area under every query's R@k over log k, from 1 to `n` documents: 1 - log rank / log n,
    (q, 1). R@1, R@5 and R@10 are three points of that curve, and say less where n is small."""
    area_q = 1 - np.log(ranks_q) / np.log(max(n, 2))
    return np.clip(area_q, 0, 1)[:, None]


def query_metrics(
    grades_qk: NDArray[np.int64], judged_qm: NDArray[np.int64], cutoffs: Sequence[int]
) -> dict[str, NDArray[np.float64]]:
    """What every query scores (q,), by metric, as trec_eval computes it.

    Args:
        grades_qk: the grade of the candidate at each place of a ranking, relevant above 0; 0 where
            nothing is judged or the ranking is over.
        judged_qm: all grades that a query's qrels hold, in any order, 0 for none: what is not in
            the pool or not found counts as missed.
        cutoffs: k of every metric at k.

    `hit_rate@k` is 1 if a relevant candidate is among the first k (M-BEIR's and UniIR's "recall",
    the R@k of our tables); `recall@k` is the share of the relevant candidates that are;
    `precision@k` the share of the first k that are relevant; `mrr@k` 1 / rank of the first
    relevant one; `map@k` the precision at every relevant one, summed and divided by their number;
    `ndcg@k` sum of grade / log2(1 + rank), divided by that of the best ranking (Jarvelin &
    Kekalainen 2002, linear gains). `mrr` and `map` go as deep as the ranking does. A query without
    a relevant candidate scores 0.
    """
    gains_qk = np.maximum(grades_qk, 0).astype(np.float64)
    best_qm = -np.sort(-np.maximum(judged_qm, 0), axis=1).astype(np.float64)
    relevant_qk = gains_qk > 0
    found_qk = relevant_qk.cumsum(1)
    places_k = np.arange(1, gains_qk.shape[1] + 1)
    total_q = np.maximum((best_qm > 0).sum(1), 1)
    reciprocal_qk = np.maximum.accumulate(relevant_qk / places_k, axis=1)
    precision_qk = (relevant_qk * found_qk / places_k).cumsum(1)
    dcg_qk, ideal_qm = _discounted(gains_qk), _discounted(best_qm)
    out = {}
    for k in cutoffs:
        found_q = _at(found_qk, k)
        out[f"hit_rate@{k}"] = (found_q > 0).astype(np.float64)
        out[f"recall@{k}"] = found_q / total_q
        out[f"precision@{k}"] = found_q / k
        out[f"mrr@{k}"] = _at(reciprocal_qk, k)
        out[f"map@{k}"] = _at(precision_qk, k) / total_q
        ideal_q = _at(ideal_qm, k)
        out[f"ndcg@{k}"] = _at(dcg_qk, k) / np.where(ideal_q > 0, ideal_q, 1)
    depth = gains_qk.shape[1]
    return out | {"mrr": _at(reciprocal_qk, depth), "map": _at(precision_qk, depth) / total_q}


def _discounted(gains_qk: NDArray[np.float64]) -> NDArray[np.float64]:
    """The discounted cumulative gain at each place."""
    return (gains_qk / np.log2(np.arange(2, gains_qk.shape[1] + 2))).cumsum(1)


def _at(running_qk: NDArray[Any], k: int) -> NDArray[np.float64]:
    """A running sum or maximum after the first k places; 0 where there are no places."""
    if running_qk.shape[1] == 0:
        return np.zeros(len(running_qk))
    return running_qk[:, min(k, running_qk.shape[1]) - 1].astype(np.float64)
