"""An encoder without a model: vectors from the hash of an item, and a head that is a matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from patch_retriever.files import value_hash
from patch_retriever.items import Item

WIDTH = 12


class ToyEncoder:
    """Stands for `Encoder`: pooled vectors are random by content, and as long as they like.

    `shift` makes the head look at lengths; `trunk` and `asks` (its prompt) stand for what comes
    before the pooling.
    """

    workers = 1

    def __init__(
        self,
        name: str = "toy",
        head: int | None = 1,
        shift: float = 0.0,
        trunk: str = "trunk",
        asks: str = "",
        dimension: int = 8,
    ) -> None:
        self.name, self.width, self.trunk_fingerprint = name, WIDTH, trunk
        self.fingerprint = value_hash([head, shift, trunk, asks, dimension])
        self.only_normalises = head is None and not shift
        self._asks = asks
        self.matrix_wd = np.eye(WIDTH, dtype=np.float32)
        if head is not None:
            rng = np.random.default_rng(head)
            self.matrix_wd = rng.normal(size=(WIDTH, dimension)).astype(np.float32)
        self.dimension = self.matrix_wd.shape[1]
        self._shift = np.float32(shift)
        self.encoded: list[Item] = []

    def prompt(self, role: str) -> str:
        return f"{role}{self._asks}"

    def store_key(self, role: str, _prompt: str | None = None) -> str:
        return value_hash([self.trunk_fingerprint, self._asks, role])

    def pooled(
        self, items: Sequence[Item], _role: str, _prompt: str | None = None, _batch_size: int = 64
    ) -> NDArray[np.float32]:
        self.encoded += items
        return np.stack([_vector(item, self.trunk_fingerprint) for item in items])

    def stream(
        self,
        items: Iterable[Item],
        role: str,
        prompt: str | None = None,
        batch_size: int = 64,
    ) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        drawn, start = iter(items), 0
        while batch := list(islice(drawn, batch_size)):
            yield list(range(start, start + len(batch))), self.pooled(batch, role, prompt)
            start += len(batch)

    def finish(self, pooled_nw: NDArray[np.float32], _role: str) -> NDArray[np.float32]:
        out_nd = pooled_nw @ self.matrix_wd + self._shift
        return out_nd / np.linalg.norm(out_nd, axis=1, keepdims=True)

    def embed(self, items: Sequence[Item], role: str, batch_size: int = 64) -> NDArray[np.float32]:
        return self.finish(self.pooled(items, role, None, batch_size), role)


def _vector(item: Item, trunk: str) -> NDArray[np.float32]:
    rng = np.random.default_rng(int(value_hash([item.content_hash(), trunk])[:8], 16))
    return (rng.normal(size=WIDTH) * rng.uniform(0.1, 10)).astype(np.float32)


def corpus(*numbers: int, prefix: str = "text") -> SimpleNamespace:
    """Texts, by ids `item-N`."""
    items = [Item(f"{prefix} {number}") for number in numbers]
    return SimpleNamespace(ids=[f"item-{n}" for n in numbers], items=items, skipped=())


def pictures(folder: Path, n: int) -> SimpleNamespace:
    """Small pictures on disk, by their names."""
    from PIL import Image

    from patch_retriever.pictures.picture import PictureFile

    paths = [folder / f"{i}.png" for i in range(n)]
    for i, path in enumerate(paths):
        Image.new("RGB", (8, 8), (5 * i, 0, 0)).save(path)
    items = [Item(None, PictureFile(path)) for path in paths]
    return SimpleNamespace(ids=[path.name for path in paths], items=items, skipped=())
