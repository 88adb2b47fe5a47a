"""Embeddings the official way, on disk: nothing is encoded twice, and a stopped run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paper.official import (
    POOLINGS,
    PoolingName,
    asked,
    load_official,
    official_prompt,
    with_poolings,
)
from paper.settings import Settings
from patch_retriever.items import Item
from patch_retriever.progress import Progress, Say, no_progress, silent
from patch_retriever.retrieval.embeddings import EmbeddingStore, embed_items, open_store
from patch_retriever.retrieval.encoder import Encoder


class Embedder:
    """The backbone as the official code reads it, with its stores, which `stack` closes."""

    def __init__(
        self,
        settings: Settings,
        stack: ExitStack,
        say: Say = silent,
        progress: Progress = no_progress,
    ) -> None:
        self._settings, self._progress = settings, progress
        s = settings
        self.transformer = load_official(s.model, s.weights, s.dtype, s.device, s.revision)
        self._stores: dict[Sequence[PoolingName], tuple[Encoder, EmbeddingStore]] = {}
        for poolings in (("mean",), POOLINGS):
            encoder = Encoder(with_poolings(self.transformer, poolings), s.weights)
            store = open_store(s.folder / "embeddings", encoder, "document", say=say)
            self._stores[poolings] = encoder, stack.enter_context(store)

    @property
    def width(self) -> int:
        """Of the activations."""
        return int(self.transformer.get_embedding_dimension())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides an embedding."""
        return self._stores["mean",][0].fingerprint

    def asked(self, items: Sequence[Item], direction: str) -> Sequence[Item]:
        """Items as the model is to be given them, with the prompts of a direction."""
        return asked(items, official_prompt(direction), self._settings.model)

    def embed(
        self, items: Sequence[Item], direction: str, poolings: Sequence[PoolingName] = ("mean",)
    ) -> Pooled:
        """Embed what is not stored yet, with the prompts of a direction.

        Raises:
            UserError: a picture cannot be read, the model overflows, or the disk is full.
        """
        encoder, store = self._stores[poolings]
        found = embed_items(
            encoder,
            self.asked(items, direction),
            "document",
            store,
            batch_size=self._settings.batch_size,
            progress=self._progress,
        )
        return Pooled(store, found.keys_n, poolings)


class Pooled:
    """Stored vectors of one pooling, with length one."""

    def __init__(
        self,
        store: EmbeddingStore,
        keys_n: NDArray[Any],
        poolings: Sequence[PoolingName],
        pooling: PoolingName = "mean",
    ) -> None:
        self._store, self._keys_n, self._poolings = store, keys_n, tuple(poolings)
        self._width = store.width // len(self._poolings)
        self._first = self._width * self._poolings.index(pooling)

    def __len__(self) -> int:
        return len(self._keys_n)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        """Some of them, by a slice or an array of numbers."""
        x_nd = self.raw(rows)
        return x_nd / np.maximum(np.linalg.norm(x_nd, axis=1, keepdims=True), 1e-12)

    def raw(self, rows: Any = slice(None)) -> NDArray[np.float32]:
        """The same with the length that they have."""
        whole_nw = self._store.read(self._keys_n[rows])
        return whole_nw[:, self._first : self._first + self._width]

    def of(self, pooling: PoolingName) -> Pooled:
        """The same items under another pooling."""
        return Pooled(self._store, self._keys_n, self._poolings, pooling)
