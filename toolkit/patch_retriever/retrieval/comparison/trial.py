"""A trial: one model on one task, query by query, kept in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patch_retriever.files import write
from patch_retriever.retrieval.geometry import (
    Hubness,
    Moments,
    alignment,
    modality_share,
    uniformity,
)
from patch_retriever.retrieval.metrics import query_metrics
from patch_retriever.retrieval.ranking import NOTHING, Judgements, Ranking, rank
from patch_retriever.retrieval.tasks import RetrievalTask
from patch_retriever.retrieval.vectors import Vectors, chunks

SHOWN = 10
"""Candidates of a ranking that are kept."""
_ABOUT = b"patch_retriever"
_AT_ONCE = 2048
"""Queries whose rankings are judged at once."""


@dataclass(frozen=True)
class Trial:
    """What a model does on a task.

    `metrics[name]` (q,) are scores of every query; `first_q` the rank of its first relevant
    candidate, 0 where none was found; `top` the ids of its first candidates. `figures` are of the
    whole: seconds, bytes, geometry.
    """

    query_ids: tuple[str, ...]
    metrics: dict[str, NDArray[np.float64]]
    first_q: NDArray[np.int64]
    top: tuple[tuple[str, ...], ...]
    figures: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write a Parquet file: a row for every query; the figures in its metadata."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {"query_id": list(self.query_ids)} | self.metrics
        table = pa.table(columns | {"first_relevant": self.first_q, "top": list(self.top)})
        table = table.replace_schema_metadata({_ABOUT: json.dumps(self.figures)})
        write(path, lambda p: pq.write_table(table, p))

    @classmethod
    def load(cls, path: Path) -> Trial | None:
        """Read what `save` wrote; None where there is no such file or it is damaged."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path)
            figures = json.loads(table.schema.metadata[_ABOUT])
            return cls(
                tuple(table["query_id"].to_pylist()),
                {name: table[name].to_numpy() for name in table.column_names if name not in _OTHER},
                table["first_relevant"].to_numpy(),
                tuple(map(tuple, table["top"].to_pylist())),
                figures,
            )
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            return None


_OTHER = ("query_id", "first_relevant", "top")


def try_out(
    task: RetrievalTask,
    queries: Vectors,
    candidates: Vectors,
    kinds: tuple[NDArray[np.int8], NDArray[np.int8]],
    cutoffs: Sequence[int],
    factory: str = "",
) -> Trial:
    """Search a task's candidates with its queries, and judge what is found.

    Args:
        kinds: of the queries and of the candidates, numbers in `KINDS`.
        factory: a FAISS index (`build_index`) to search with; "" compares every pair.
    """
    queries_qd = np.concatenate(list(chunks(queries, range(len(queries)))))
    figures: dict[str, Any] = {"index_bytes": len(candidates) * queries_qd[:1].nbytes}
    timed: _Timed | None = None
    if factory and not task.pools:
        timed = _Timed(candidates, factory, queries_qd.shape[1])
        figures = {"index_bytes": timed.bytes, "index_seconds": timed.build_seconds}
    began = time.perf_counter()
    ranking = rank(task, queries_qd, candidates, search=timed)
    seconds = timed.seconds if timed else time.perf_counter() - began
    figures["search_ms_per_query"] = 1000 * seconds / max(1, len(queries_qd))
    k = max(cutoffs)
    if timed:
        exact = rank(task, queries_qd, candidates, depth=k)
        figures["index_recall"] = _agreement(ranking.found_qk[:, :k], exact.found_qk)
    judgements = Judgements(task)
    parts, first = [], []
    for start in range(0, len(queries_qd), _AT_ONCE):
        grades_qk = judgements.grades(ranking.found_qk[start : start + _AT_ONCE], start)
        judged_qm = judgements.judged_qm[start : start + _AT_ONCE]
        parts.append(query_metrics(grades_qk, judged_qm, cutoffs))
        relevant_qk = grades_qk > 0
        first.append(np.where(relevant_qk.any(1), relevant_qk.argmax(1) + 1, 0))
    return Trial(
        tuple(task.query_ids),
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
        np.concatenate(first).astype(np.int64),
        _ids(task, ranking),
        figures
        | {
            "geometry": _geometry(
                queries_qd, candidates, kinds, ranking.found_qk[:, :k], judgements.positive_pairs()
            )
        },
    )


def _geometry(
    queries_qd: NDArray[np.float32],
    candidates: Vectors,
    kinds: tuple[NDArray[np.int8], NDArray[np.int8]],
    found_qk: NDArray[np.int64],
    pairs_n2: NDArray[np.int64],
) -> dict[str, Any]:
    """All figures of `retrieval.geometry`; those of rankings are of the first k."""
    moments = Moments.of(queries_qd, kinds[0]) + Moments.of(candidates, kinds[1])
    return {
        "k": found_qk.shape[1],
        "anisotropy": _known(moments.anisotropy),
        "modality_gap": moments.gaps(),
        "uniformity": _known(uniformity(candidates)),
        "alignment": _known(alignment(queries_qd, candidates, pairs_n2)),
        "hubness": asdict(Hubness.of(found_qk, len(candidates))),
        "modality_share": modality_share(found_qk, *kinds),
    }


def _known(figure: float) -> float | None:
    """JSON has no word for what cannot be said of so few items."""
    return None if np.isnan(figure) else figure


def _ids(task: RetrievalTask, ranking: Ranking) -> tuple[tuple[str, ...], ...]:
    shown = ranking.found_qk[:, :SHOWN].tolist()
    return tuple(tuple(task.candidate_ids[c] for c in row if c != NOTHING) for row in shown)


def _agreement(found_qk: NDArray[np.int64], exact_qk: NDArray[np.int64]) -> float:
    """The share of what an exact search finds that an index found, too."""
    there = [
        np.isin(exact_k[exact_k != NOTHING], found_k)
        for found_k, exact_k in zip(found_qk, exact_qk, strict=True)
    ]
    return float(np.concatenate(there).mean())


class _Timed:
    """A FAISS index, its size, and the seconds that its making and its searches took."""

    def __init__(self, candidates: Vectors, factory: str, dimension: int) -> None:
        from patch_retriever.retrieval.index.build import build_index

        began = time.perf_counter()
        self._index: Any = build_index(candidates, factory, dimension)
        self.build_seconds = time.perf_counter() - began
        self.seconds = 0.0
        self.bytes = _index_bytes(self._index)

    def __call__(
        self, queries_qd: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and candidate numbers."""
        from patch_retriever.retrieval.index.factory import matrix_products

        began = time.perf_counter()
        with matrix_products():
            found = self._index.search(np.ascontiguousarray(queries_qd), k)
        self.seconds += time.perf_counter() - began
        return found


def _index_bytes(index: Any) -> int:
    """As much as the index takes on disk; counted without another copy of it."""
    from patch_retriever.retrieval.index.factory import import_faiss

    faiss, total = import_faiss(), 0

    def count(data: bytes) -> None:
        nonlocal total
        total += len(data)

    faiss.write_index(index, faiss.PyCallbackIOWriter(count))
    return total
