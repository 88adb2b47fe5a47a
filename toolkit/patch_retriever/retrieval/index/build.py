"""Vectors to a FAISS index, a chunk in memory at a time beyond the index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from patch_retriever.retrieval.index.factory import (
    default_search,
    factory_string,
    new_index,
    reserve,
    sample_size,
    set_search,
    train,
)

if TYPE_CHECKING:
    import faiss

CHUNK = 8192
"""Vectors added at once."""


class Vectors(Protocol):
    """Unit vectors, wherever they are: how many, and some of them in chunks."""

    def __len__(self) -> int:
        """How many."""

    def rows(self, numbers: Sequence[int] | NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """The vectors of these ascending numbers, in chunks (c, d) of a bounded size."""


class Shards:
    """`Vectors` in arrays one after the other; memory-mapped ones stay on disk."""

    def __init__(self, arrays: Sequence[NDArray[np.float32]]) -> None:
        self._arrays = arrays
        self._ends = np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def rows(self, numbers: Sequence[int] | NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """The vectors of these ascending numbers, never more than `CHUNK` at once."""
        wanted = np.asarray(numbers, dtype=np.int64)
        which = np.searchsorted(self._ends, wanted, side="right")
        for shard in np.unique(which):
            array, end = self._arrays[shard], self._ends[shard]
            local = wanted[which == shard] - (end - len(array))
            for start in range(0, len(local), CHUNK):
                some = local[start : start + CHUNK]
                together = some[-1] - some[0] == len(some) - 1
                rows = array[some[0] : some[-1] + 1] if together else array[some]
                yield np.ascontiguousarray(rows, dtype=np.float32)


def build_index(
    shards: Sequence[NDArray[np.float32]] | Vectors, factory: str, dimension: int
) -> faiss.Index:
    """A FAISS index in memory by inner product, its labels the rows' numbers from 0.

    Args:
        shards: unit vectors (n, d), in arrays (memory-mapped ones stay on disk) or as `Vectors`.
        factory: `auto`, `flat`, `ivf`, `hnsw`, `ivf-pq`, `sq8`, `rabitq`, or a FAISS factory
            string.
        dimension: d.

    Raises:
        UserError: FAISS does not understand the string, or there is too little to train on.
    """
    vectors = shards if hasattr(shards, "rows") else Shards(shards)
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
        chunks = list(vectors.rows(np.sort(chosen)))
        train(index, np.concatenate(chunks or [np.empty((0, dimension), np.float32)]), factory)
    return index


def fill(index: faiss.Index, vectors: Vectors, numbers: range, first: int | None = None) -> None:
    """Add the vectors of `numbers`, labelled with them or, where given, counted from `first`."""
    reserve(index, len(numbers))
    label = numbers.start if first is None else first
    for rows_cd in vectors.rows(numbers):
        index.add_with_ids(rows_cd, np.arange(label, label + len(rows_cd)))
        label += len(rows_cd)
