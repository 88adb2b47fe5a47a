"""Searching a saved index: mapped into memory, its shards together, by inner product."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from patch_retriever.errors import UserError
from patch_retriever.retrieval.index.factory import (
    import_faiss,
    matrix_products,
    set_search,
    to_gpu,
)
from patch_retriever.retrieval.index.items import Items
from patch_retriever.retrieval.index.manifest import MANIFEST, Manifest, check_parts
from patch_retriever.retrieval.index.writing import load

if TYPE_CHECKING:
    import faiss

    from patch_retriever.retrieval.encoder import Encoder

QUERIES_AT_ONCE = 4096


class SavedIndex:
    """An index folder, opened for search."""

    def __init__(self, folder: Path, encoder: Encoder | None = None, gpu: bool = False) -> None:
        """Open an index whose queries `encoder` encodes; with `gpu` it is copied to all GPUs.

        Raises:
            UserError: there is no finished index, a file of it is damaged, or another model than
                `encoder` made it.
        """
        self.folder = folder
        self.manifest = Manifest.read(folder / MANIFEST)
        if encoder is not None:
            self.manifest.made_by.check(folder, encoder)
        check_parts(folder, self.manifest.parts)
        self.items = Items(folder, self.manifest.shards)
        shards = [load(folder / s.index.file, mapped=not gpu) for s in self.manifest.shards]
        for shard in shards:
            set_search(shard, self.manifest.search)
        self._shards = [to_gpu(shard) for shard in shards] if gpu else shards

    def __len__(self) -> int:
        return self.manifest.count

    def search(
        self, queries_qd: NDArray[np.float32], k: int, settings: Mapping[str, int] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and numbers (q, k) of the k items with the largest inner products, best first.

        Where an index finds fewer than k, the rest have number -1. `settings` (`nprobe`,
        `efSearch`, ...) stay for later searches.

        Raises:
            UserError: this kind of index has no such setting, or the queries are of another
                dimension.
        """
        if queries_qd.shape[1] != self.manifest.dimension:
            raise UserError(
                f"{self.folder}: holds vectors of {self.manifest.dimension} dimensions, the query "
                f"has {queries_qd.shape[1]}"
            )
        for shard in self._shards:
            set_search(shard, settings or {})
        k = min(k, len(self))
        queries_qd = np.ascontiguousarray(queries_qd, dtype=np.float32)
        if not k or not len(queries_qd):
            empty = (len(queries_qd), k)
            return np.zeros(empty, np.float32), np.zeros(empty, np.int64)
        index = self._together()
        with matrix_products():
            found = [
                index.search(queries_qd[start : start + QUERIES_AT_ONCE], k)
                for start in range(0, len(queries_qd), QUERIES_AT_ONCE)
            ]
        scores, numbers = zip(*found, strict=True)
        return np.concatenate(scores), np.concatenate(numbers)

    def _together(self) -> faiss.Index:
        if len(self._shards) == 1:
            return self._shards[0]
        faiss = import_faiss()
        # one after the other, each with all threads
        index = faiss.IndexShards(self.manifest.dimension, False, False)
        index.metric_type = faiss.METRIC_INNER_PRODUCT
        for shard in self._shards:
            index.add_shard(shard)
        return index
