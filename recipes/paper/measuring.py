"""R@k of two sides of a task, by an exact search on the CPU or on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from patch_retriever.retrieval.comparison.baselines import MappedVectors
from patch_retriever.retrieval.metrics import CUTOFFS, query_metrics
from patch_retriever.retrieval.ranking import Judgements, Search, rank
from patch_retriever.retrieval.tasks import RetrievalTask
from patch_retriever.retrieval.vectors import CHUNK, Vectors, at_hand

if TYPE_CHECKING:
    from patch_retriever.patch.operators import Affine


def recalls(task: RetrievalTask, sides: Sequence[Vectors], device: str = "cpu") -> list[float]:
    """R@1, R@5 and R@10 in percent of queries and candidates, as M-BEIR and the official code
    count: queries with a relevant candidate among the first k, of all queries."""
    queries, candidates = sides
    search = None if device == "cpu" else on_device(candidates, device)
    queries_qd = at_hand(queries, most=1 << 62)[: len(queries)]
    ranking = rank(task, queries_qd, candidates, max(CUTOFFS), search)
    judgements = Judgements(task)
    found = query_metrics(judgements.grades(ranking.found_qk), judgements.judged_qm, CUTOFFS)
    return [100 * float(found[f"hit_rate@{k}"].mean()) for k in CUTOFFS]


def on_device(candidates: Vectors, device: str, queries_at_once: int = 2048) -> Search:
    """An exact search that multiplies on `device`, a chunk of candidates at a time."""

    def search(
        queries_qd: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        parts = torch.from_numpy(queries_qd).to(device).split(queries_at_once)
        best = [
            (torch.zeros(len(p), 0, device=device), torch.zeros(len(p), 0, device=device).long())
            for p in parts
        ]
        for first in range(0, len(candidates), CHUNK):
            chunk_nd = torch.tensor(candidates[first : first + CHUNK]).to(device)
            numbers_n = torch.arange(first, first + len(chunk_nd), device=device)
            for i, part_qd in enumerate(parts):
                scores_qm = torch.cat([best[i][0], part_qd @ chunk_nd.T], 1)
                numbers_qm = torch.cat([best[i][1], numbers_n.expand(len(part_qd), -1)], 1)
                top = scores_qm.topk(min(k, scores_qm.shape[1]), dim=1)
                best[i] = top.values, numbers_qm.gather(1, top.indices)
        scores_qk, found_qk = (torch.cat(side).cpu().numpy() for side in zip(*best, strict=True))
        return scores_qk, found_qk

    return search


def all_mapped(sides: Sequence[Vectors], steps: Sequence[Affine]) -> list[Vectors]:
    """Each side through its own map, whatever its items hold, and normalised."""
    return [
        MappedVectors(vectors, step, np.zeros(len(vectors), np.int8))
        for vectors, step in zip(sides, steps, strict=True)
    ]
