"""Vectors of a task's items that stay on disk until a search reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patch_retriever.patch.operators import Affine
from patch_retriever.retrieval.embeddings import EmbeddingStore
from patch_retriever.retrieval.encoder import Encoder, Role
from patch_retriever.retrieval.ranking import Vectors

IN_MEMORY = 1 << 30
"""Bytes up to which vectors are kept in memory once they are made."""
_CHUNK = 8192


class StoredVectors:
    """The final vectors (n, d) of stored items: pooled vectors from disk through the head."""

    def __init__(
        self, encoder: Encoder, role: Role, store: EmbeddingStore, keys_n: NDArray[Any]
    ) -> None:
        self._encoder, self._role, self._store, self._keys_n = encoder, role, store, keys_n

    def __len__(self) -> int:
        return len(self._keys_n)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        """Some of them, by a slice or an array of numbers."""
        return self._encoder.finish(self._store.read(self._keys_n[rows]), self._role)


class MappedVectors:
    """Other vectors, each kind through its group of an affine map, and normalised."""

    def __init__(self, vectors: Vectors, step: Affine, kinds_n: NDArray[np.int8]) -> None:
        self._vectors = vectors
        self._weight_gde, self._bias_ge = step.weight_gde.numpy(), step.bias_ge.numpy()
        self._group_n = np.array([step.group(0, kind) for kind in range(3)])[kinds_n]

    def __len__(self) -> int:
        return len(self._vectors)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        """Some of them, by a slice or an array of numbers."""
        x_nd, group_n = self._vectors[rows], self._group_n[rows]
        out_ne = np.empty((len(x_nd), self._bias_ge.shape[1]), dtype=np.float32)
        for group in np.unique(group_n):
            mine = group_n == group
            out_ne[mine] = x_nd[mine] @ self._weight_gde[group] + self._bias_ge[group]
        return out_ne / np.maximum(np.linalg.norm(out_ne, axis=1, keepdims=True), 1e-12)


def at_hand(vectors: Vectors, most: int = IN_MEMORY) -> Vectors:
    """The same vectors as an array, where they take no more than `most` bytes."""
    if isinstance(vectors, np.ndarray) or not len(vectors):
        return vectors
    if len(vectors) * vectors[:1].nbytes > most:
        return vectors
    return np.concatenate(list(chunks(vectors, range(len(vectors)))))


def chunks(vectors: Vectors, numbers: Sequence[int] | NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """The vectors of these numbers, a bounded chunk at a time."""
    wanted = np.asarray(numbers, dtype=np.int64)
    for start in range(0, len(wanted), _CHUNK):
        yield vectors[wanted[start : start + _CHUNK]]
