"""Vectors that may stay on disk: read by rows, a bounded chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

IN_MEMORY = 1 << 30
"""Bytes up to which vectors are kept in memory once they are made."""
CHUNK = 8192
"""Vectors read at once."""


class Vectors(Protocol):
    """Vectors (n, d) that may stay on disk: read by slices or by arrays of row numbers."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, rows: Any, /) -> NDArray[np.float32]:
        """Some rows."""


def chunks(vectors: Vectors, numbers: Sequence[int] | NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """The vectors of these numbers, `CHUNK` at a time; neighbours as a slice, which need not be
    copied."""
    wanted = np.asarray(numbers, dtype=np.int64)
    for start in range(0, len(wanted), CHUNK):
        some = wanted[start : start + CHUNK]
        neighbours = len(some) == some[-1] - some[0] + 1 and bool((np.diff(some) == 1).all())
        yield vectors[int(some[0]) : int(some[-1]) + 1] if neighbours else vectors[some]


def at_hand(vectors: Vectors, most: int = IN_MEMORY) -> Vectors:
    """The same vectors as an array, where they take no more than `most` bytes."""
    if isinstance(vectors, np.ndarray) or not len(vectors):
        return vectors
    if len(vectors) * vectors[:1].nbytes > most:
        return vectors
    return np.concatenate(list(chunks(vectors, range(len(vectors)))))


class Shards:
    """Several `Vectors` one after the other; memory-mapped arrays stay on disk."""

    def __init__(self, parts: Sequence[Vectors]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Some of them, by a slice or an array of numbers."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            first, last = np.searchsorted(self._ends, (start, stop - 1), side="right")
            if start < stop and first == last:  # nothing to put together, so nothing to copy
                before = int(self._ends[first]) - len(self._parts[first])
                return self._parts[first][start - before : stop - before]
            rows = np.arange(start, stop)
        which = np.searchsorted(self._ends, rows, side="right")
        out_nd: NDArray[np.float32] | None = None
        for part in np.unique(which):
            here = which == part
            before = int(self._ends[part]) - len(self._parts[part])
            found_nd = self._parts[part][rows[here] - before]
            if out_nd is None:
                out_nd = np.empty((len(rows), found_nd.shape[1]), np.float32)
            out_nd[here] = found_nd
        return self._parts[0][:0] if out_nd is None else out_nd
