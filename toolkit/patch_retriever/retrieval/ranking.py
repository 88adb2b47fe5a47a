"""Rankings: the candidates of a task that each query finds, in trec_eval's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from patch_retriever.retrieval.tasks import RetrievalTask

DEPTH = 1000
"""Candidates of a ranking, as in TREC runs: how deep `mrr` and `map` go."""
NOTHING = -1
"""In the place of a candidate where a ranking is over."""
_QUERIES, _CANDIDATES = 512, 32768
"""Scored at once."""


class Vectors(Protocol):
    """Vectors (n, d) that may stay on disk: read by slices or by arrays of row numbers."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, rows: Any, /) -> NDArray[np.float32]:
        """Some rows."""


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

    def grades(self, task: RetrievalTask) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Grades at each place (q, k), and all grades that the qrels hold (q, m); 0 for none."""
        positions = _positions(task, (c for judged in task.qrels.values() for c in judged))
        n = len(task.candidate_ids)
        keys: list[int] = []
        values: list[int] = []
        most = max(1, *(len(task.qrels[query]) for query in task.query_ids))
        judged_qm = np.zeros((len(task.query_ids), most), dtype=np.int64)
        for q, query in enumerate(task.query_ids):
            judged = task.qrels[query]
            judged_qm[q, : len(judged)] = list(judged.values())
            known = {positions[c]: grade for c, grade in judged.items() if c in positions}
            keys += [q * n + position for position in known]
            values += known.values()
        grades_qk = np.zeros(self.found_qk.shape, dtype=np.int64)
        if keys:
            order = np.argsort(keys)
            keys_s, values_s = np.array(keys)[order], np.array(values)[order]
            asked_qk = self.found_qk + n * np.arange(len(self.found_qk))[:, None]
            place_qk = np.searchsorted(keys_s, asked_qk).clip(max=len(keys) - 1)
            there_qk = (keys_s[place_qk] == asked_qk) & (self.found_qk != NOTHING)
            grades_qk = np.where(there_qk, values_s[place_qk], 0)
        return grades_qk, judged_qm


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
    return _without(ranking, _excluded(task), depth)


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
    if order_n is None:
        order_n = np.arange(len(candidates))
    parts = []
    for start in range(0, len(queries_qd), _QUERIES):
        part_qd = queries_qd[start : start + _QUERIES]
        best_qk = np.zeros((len(part_qd), 0), dtype=np.uint64)
        for first in range(0, len(candidates), _CANDIDATES):
            chunk_nd = candidates[first : first + _CANDIDATES]
            orders_n = order_n[first : first + len(chunk_nd)]
            best_qk = _best(part_qd @ chunk_nd.T, orders_n, best_qk, k)
        parts.append(best_qk)
    keys_qk = -np.sort(-np.concatenate(parts).view(np.int64), axis=1)
    return _from_keys(keys_qk.view(np.uint64), order_n)
