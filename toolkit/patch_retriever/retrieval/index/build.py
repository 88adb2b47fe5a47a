"""Vectors to a FAISS index, a chunk in memory at a time beyond the index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patch_retriever.retrieval.index.factory import (
    default_search,
    factory_string,
    new_index,
    reserve,
    sample_size,
    set_search,
    train,
)
from patch_retriever.retrieval.vectors import Vectors, chunks

if TYPE_CHECKING:
    import faiss


def build_index(vectors: Vectors, factory: str, dimension: int) -> faiss.Index:
    """A FAISS index in memory by inner product, its labels the rows' numbers from 0.

    Args:
        vectors: unit vectors (n, d): an array, or read a chunk at a time.
        factory: `auto`, `flat`, `ivf`, `hnsw`, `ivf-pq`, `sq8`, `rabitq`, or a FAISS factory
            string.
        dimension: d.

    Raises:
        UserError: FAISS does not understand the string, or there is too little to train on.
    """
    factory = factory_string(factory, len(vectors), dimension)
    index = trained_index(vectors, factory, dimension)
    fill(index, vectors, range(len(vectors)))
    set_search(index, default_search(index))
    return index


def trained_index(vectors: Vectors, factory: str, dimension: int) -> faiss.Index:
    """An empty index, trained on a random sample of `vectors` where it needs that (always the same
    sample of the same vectors)."""
    index = new_index(factory, dimension)
    size = min(sample_size(index), len(vectors))
    if not index.is_trained:
        chosen = np.random.default_rng(0).choice(len(vectors), size, replace=False)
        parts = list(chunks(vectors, np.sort(chosen)))
        train(index, np.concatenate(parts or [np.empty((0, dimension), np.float32)]), factory)
    return index


def fill(index: faiss.Index, vectors: Vectors, numbers: range, first: int | None = None) -> None:
    """Add the vectors of `numbers`, labelled with them or, where given, counted from `first`."""
    reserve(index, len(numbers))
    label = numbers.start if first is None else first
    for rows_cd in chunks(vectors, numbers):
        rows_cd = np.ascontiguousarray(rows_cd, dtype=np.float32)
        index.add_with_ids(rows_cd, np.arange(label, label + len(rows_cd)))
        label += len(rows_cd)
