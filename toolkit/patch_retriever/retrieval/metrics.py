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
    most = max(len(r) for r in relevant)
    scores_qk, found_qk = search(queries_qd, documents_nd, min(len(documents_nd), depth + most))
    out_q = np.full(len(relevant), depth + 1)
    for q, answers in enumerate(relevant):
        hit_k = np.isin(found_qk[q], answers)
        if hit_k.any():  # else at least `depth` irrelevant documents came first
            best = scores_qk[q][hit_k].max()
            ahead = int(((scores_qk[q] >= best) & ~hit_k).sum())
            out_q[q] = min(ahead, depth) + 1
    return out_q


def hits(ranks_q: NDArray[np.int64]) -> NDArray[np.float64]:
    """Whether each query has a hit at each of `CUTOFFS`, (q, 3) of 0 and 1."""
    return (ranks_q[:, None] <= np.array(CUTOFFS)).astype(np.float64)
