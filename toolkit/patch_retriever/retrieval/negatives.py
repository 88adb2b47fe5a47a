"""Hard negatives: the wrong documents that look most like the answer."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from patch_retriever.retrieval.collection import Task
from patch_retriever.retrieval.metrics import search


def hard_negatives(
    embeddings_nd: Tensor,
    tasks: Iterable[Task],
    per_query: int = 5,
    as_query_nd: Tensor | None = None,
) -> Tensor:
    """(query item, wrong document item), the `per_query` most similar of each query, (n, 2).

    `as_query_nd` are the embeddings of items as queries, where those differ.
    """
    unit = torch.nn.functional.normalize(embeddings_nd, dim=1).numpy()
    asked = unit
    if as_query_nd is not None:
        asked = torch.nn.functional.normalize(as_query_nd, dim=1).numpy()
    found: list[tuple[int, int]] = []
    for task in tasks:
        most = max(len(r) for r in task.relevant)
        k = min(len(task.documents), per_query + most)
        _, near_qk = search(asked[list(task.queries)], unit[list(task.documents)], k)
        for query, near_k, relevant in zip(task.queries, near_qk, task.relevant, strict=True):
            wrong = near_k[~np.isin(near_k, relevant)][:per_query]
            found += [(query, task.documents[int(w)]) for w in wrong]
    return torch.tensor(found, dtype=torch.long).reshape(-1, 2)
