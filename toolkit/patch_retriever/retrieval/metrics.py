"""Search with FAISS and hit rates, ties counted against the query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
    most, n = max(len(r) for r in relevant), len(documents_nd)
    scores_qk, found_qk = search(queries_qd, documents_nd, min(n, depth + most))
    answers = np.concatenate([np.asarray(r) + n * q for q, r in enumerate(relevant)])
    hit_qk = np.isin(found_qk + n * np.arange(len(relevant))[:, None], answers)
    best_q1 = np.where(hit_qk, scores_qk, -np.inf).max(1, keepdims=True)
    ahead_q = ((scores_qk >= best_q1) & ~hit_qk).sum(1)
    # without a hit, at least `depth` irrelevant documents came first
    return np.minimum(ahead_q, depth) + 1


def hits(ranks_q: NDArray[np.int64]) -> NDArray[np.float64]:
    """Whether each query has a hit at each of `CUTOFFS`, (q, 3) of 0 and 1."""
    return (ranks_q[:, None] <= np.array(CUTOFFS)).astype(np.float64)
