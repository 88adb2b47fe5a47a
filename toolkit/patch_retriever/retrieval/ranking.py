"""Rankings: the candidates of a task that each query finds, in trec_eval's order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patch_retriever.retrieval.tasks import RetrievalTask
from patch_retriever.retrieval.vectors import Vectors

DEPTH = 1000
"""Candidates of a ranking, as in TREC runs: how deep `mrr` and `map` go."""
NOTHING = -1
"""In the place of a candidate where a ranking is over."""
_QUERIES = 4096
"""Searched for at once; many, since FAISS is slow with few."""
_CANDIDATE_BYTES = 1 << 28
"""Of the candidates that are in memory at once."""
_ROWS = 256
"""Queries of which all scores are kept at once, where scores are equal."""


Search = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.int64]]]
"""Takes queries (q, d) and k; gives scores and candidate numbers (q, k), -1 for none."""


@dataclass(frozen=True)
class Ranking:
    """Candidate numbers of every query (q, k), best first, with their scores.

    Ordered as trec_eval does: by score as a 32-bit float, equal scores by id, descending.
    `NOTHING` stands where there are no more.
    """

    found_qk: NDArray[np.int64]
    scores_qk: NDArray[np.float32]


class Judgements:
    """A task's qrels, ready to grade rankings by.

    `judged_qm` are all grades that a query's qrels hold (q, m), 0 for none.
    """

    def __init__(self, task: RetrievalTask) -> None:
        at = positions(task, (c for judged in task.qrels.values() for c in judged))
        self._n = len(task.candidate_ids)
        keys: list[int] = []
        values: list[int] = []
        most = max(1, *(len(task.qrels[query]) for query in task.query_ids))
        self.judged_qm = np.zeros((len(task.query_ids), most), dtype=np.int64)
        for q, query in enumerate(task.query_ids):
            judged = task.qrels[query]
            self.judged_qm[q, : len(judged)] = list(judged.values())
            known = {at[c]: grade for c, grade in judged.items() if c in at}
            keys += [q * self._n + position for position in known]
            values += known.values()
        order = np.argsort(keys)
        self._keys_s = np.array(keys, dtype=np.int64)[order]
        self._values_s = np.array(values, dtype=np.int64)[order]

    def grades(self, found_qk: NDArray[np.int64], first: int = 0) -> NDArray[np.int64]:
        """The grade at each place (q, k) of the rankings of the queries from `first` on; 0 where
        nothing is judged."""
        if not len(self._keys_s):
            return np.zeros(found_qk.shape, dtype=np.int64)
        asked_qk = found_qk + self._n * np.arange(first, first + len(found_qk))[:, None]
        place_qk = np.searchsorted(self._keys_s, asked_qk).clip(max=len(self._keys_s) - 1)
        there_qk = (self._keys_s[place_qk] == asked_qk) & (found_qk != NOTHING)
        return np.where(there_qk, self._values_s[place_qk], 0)

    def positive_pairs(self) -> NDArray[np.int64]:
        """(query number, candidate number) of all that is relevant and in the pool, (n, 2)."""
        keys = self._keys_s[self._values_s > 0]
        return np.stack([keys // self._n, keys % self._n], axis=1)


def rank(
    task: RetrievalTask,
    queries_qd: NDArray[np.float32],
    candidates: Vectors,
    depth: int = DEPTH,
    search: Search | None = None,
) -> Ranking:
    """The first `depth` candidates of every query by inner product.

    A candidate that is excluded for a query is left out; where queries have pools of their own,
    each searches its pool, exactly. `search` is an index over the candidates; without one, all are
    compared, a part at a time.
    """
    order_n = _id_order(task.candidate_ids)
    if task.pools:
        return _rank_pools(task, queries_qd, candidates, depth, order_n)
    most = max((len(task.excluded.get(query, ())) for query in task.query_ids), default=0)
    k = min(len(candidates), depth + most)
    if search is None:
        ranking = search_exactly(queries_qd, candidates, k, order_n)
    else:
        scores_qk, found_qk = search(queries_qd, k)
        ranking = _ordered(scores_qk, found_qk.astype(np.int64), order_n)
    return _without(ranking, _excluded(task), depth, len(candidates))


def search_exactly(
    queries_qd: NDArray[np.float32],
    candidates: Vectors,
    k: int,
    order_n: NDArray[np.int64] | None = None,
) -> Ranking:
    """The k largest inner products; of equal ones those that come first in `order_n`.

    Scores are compared with the order of equal ones in 64-bit keys, so that ties at the end are
    cut where the order says. Vectors that are no numbers are never found.
    """
    queries_qd = np.ascontiguousarray(queries_qd, dtype=np.float32)
    if order_n is None:
        order_n = np.arange(len(candidates))
    starts = range(0, len(queries_qd), _QUERIES)
    best = [np.zeros((len(queries_qd[s : s + _QUERIES]), 0), dtype=np.uint64) for s in starts]
    step = max(1, _CANDIDATE_BYTES // (4 * queries_qd.shape[1]))
    for first in range(0, len(candidates), step):  # read once: they may be on disk
        chunk_nd = candidates[first : first + step]
        orders_n = order_n[first : first + len(chunk_nd)]
        for i, start in enumerate(starts):
            part_qd = queries_qd[start : start + _QUERIES]
            best[i] = _best(part_qd, chunk_nd, orders_n, best[i], k)
    return _from_keys(np.sort(np.concatenate(best), axis=1)[:, ::-1], order_n)


def _id_order(ids: Sequence[str]) -> NDArray[np.int64]:
    """The place of every candidate among equal scores (n,): ids descending, as trec_eval has it."""
    names = list(ids)
    order_n = np.empty(len(names), dtype=np.int64)
    order_n[sorted(range(len(names)), key=names.__getitem__, reverse=True)] = np.arange(len(names))
    return order_n


_LAST = np.uint64(0xFFFFFFFF)


def _keys(scores: NDArray[np.float32], orders: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64-bit keys that are larger the earlier a candidate comes: the score's bits, made sortable,
    then its order among equals. 0 for a score that is no number or minus infinity."""
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    sortable = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
    keys = (sortable << np.uint64(32)) | (_LAST - orders.astype(np.uint64))
    return np.where(scores > -np.inf, keys, np.uint64(0))


def _from_keys(keys_qk: NDArray[np.uint64], order_n: NDArray[np.int64]) -> Ranking:
    """The ranking that sorted keys (q, k) stand for."""
    place_n = np.argsort(order_n)  # the candidate at each place of the order
    high = (keys_qk >> np.uint64(32)).astype(np.uint32)
    bits = np.where(high >> 31, high & np.uint32(0x7FFFFFFF), ~high)
    nothing_qk = keys_qk == 0
    at_qk = np.where(nothing_qk, 0, _LAST - (keys_qk & _LAST)).astype(np.int64)
    found_qk = np.where(nothing_qk, NOTHING, place_n[at_qk])
    return Ranking(found_qk, np.where(nothing_qk, -np.inf, bits.view(np.float32)))


def _largest(keys_qk: NDArray[np.uint64], k: int) -> NDArray[np.uint64]:
    """The k largest of each row, in any order."""
    if keys_qk.shape[1] <= k:
        return keys_qk
    return np.partition(keys_qk, keys_qk.shape[1] - k, axis=1)[:, -k:]


def _best(
    queries_qd: NDArray[np.float32],
    chunk_nd: NDArray[np.float32],
    orders_n: NDArray[np.int64],
    best_qk: NDArray[np.uint64],
    k: int,
) -> NDArray[np.uint64]:
    """The k largest keys of a chunk of candidates and of those before."""
    from patch_retriever.retrieval.index.factory import import_faiss, matrix_products

    faiss = import_faiss()
    if len(chunk_nd) <= 4 * k:
        keys_qn = _keys(queries_qd @ chunk_nd.T, orders_n[None])
        return _largest(np.concatenate([best_qk, keys_qn], axis=1), k)
    # the fast selection by score alone, and again where equal scores cross its end
    ip = faiss.METRIC_INNER_PRODUCT
    with matrix_products():
        top_qk, at_qk = faiss.knn(queries_qd, np.ascontiguousarray(chunk_nd), k + 1, metric=ip)
    keys_qk = np.where(at_qk < 0, np.uint64(0), _keys(top_qk, orders_n[at_qk]))[:, :k]
    crossing = np.flatnonzero((top_qk[:, k] == top_qk[:, k - 1]) & (at_qk[:, k] >= 0))
    for start in range(0, len(crossing), _ROWS):
        rows = crossing[start : start + _ROWS]
        keys_qk[rows] = _largest(_keys(queries_qd[rows] @ chunk_nd.T, orders_n[None]), k)
    return _largest(np.concatenate([best_qk, keys_qk], axis=1), k)


def _ordered(
    scores_qk: NDArray[np.float32], found_qk: NDArray[np.int64], order_n: NDArray[np.int64]
) -> Ranking:
    """What an index found, equal scores in the order; an index says -1 where it found no more."""
    orders_qk = order_n[np.maximum(found_qk, 0)]
    keys_qk = np.where(found_qk == NOTHING, np.uint64(0), _keys(scores_qk, orders_qk))
    return _from_keys(np.sort(keys_qk, axis=1)[:, ::-1], order_n)


def positions(task: RetrievalTask, wanted: Iterable[str]) -> dict[str, int]:
    """Where the candidates of some ids are, for those that there are."""
    ids = set(wanted)
    return {name: i for i, name in enumerate(task.candidate_ids) if name in ids}


def _excluded(task: RetrievalTask) -> NDArray[np.int64]:
    """What is excluded, as query number times candidates plus candidate number."""
    n = len(task.candidate_ids)
    at = positions(task, (c for some in task.excluded.values() for c in some))
    keys = [
        q * n + at[c]
        for q, query in enumerate(task.query_ids)
        for c in task.excluded.get(query, ())
        if c in at
    ]
    return np.array(keys, dtype=np.int64)


def _without(ranking: Ranking, excluded: NDArray[np.int64], depth: int, n: int) -> Ranking:
    """A ranking without what is excluded, cut at `depth`."""
    found_qk, scores_qk = ranking.found_qk, ranking.scores_qk
    if len(excluded):
        asked_qk = found_qk + n * np.arange(len(found_qk))[:, None]
        out_qk = np.isin(asked_qk, excluded) & (found_qk != NOTHING)
        found_qk = np.where(out_qk, NOTHING, found_qk)
        scores_qk = np.where(out_qk, -np.inf, scores_qk)
        order_qk = np.argsort(found_qk == NOTHING, axis=1, kind="stable")
        found_qk = np.take_along_axis(found_qk, order_qk, 1)
        scores_qk = np.take_along_axis(scores_qk, order_qk, 1)
    return Ranking(found_qk[:, :depth], scores_qk[:, :depth])


def _rank_pools(
    task: RetrievalTask,
    queries_qd: NDArray[np.float32],
    candidates: Vectors,
    depth: int,
    order_n: NDArray[np.int64],
) -> Ranking:
    """Every query over its own candidates; those without a pool over all."""
    named = (*task.pools.values(), *task.excluded.values())
    at = positions(task, (c for some in named for c in some))
    everything = np.arange(len(order_n))
    width = max(len(task.pools.get(query, everything)) for query in task.query_ids)
    keys_qk = np.zeros((len(task.query_ids), min(width, depth)), dtype=np.uint64)
    for q, query in enumerate(task.query_ids):
        rows, out = everything, task.excluded.get(query, frozenset())
        if query in task.pools:
            rows = np.array([at[c] for c in task.pools[query]], dtype=np.int64)
        rows = rows[~np.isin(rows, [at[c] for c in out if c in at])]
        scores_1n = queries_qd[q : q + 1] @ candidates[rows].T
        best_k = _largest(_keys(scores_1n, order_n[rows][None]), keys_qk.shape[1])[0]
        keys_qk[q, : len(best_k)] = np.sort(best_k)[::-1]
    return _from_keys(keys_qk, order_n)
