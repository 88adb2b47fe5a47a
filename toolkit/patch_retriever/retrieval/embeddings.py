"""Embedding stores: pooled vectors on disk by the content of their items, so that nothing is
encoded twice and a stopped encoding goes on where it stood."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patch_retriever.backbones.inputs import WINDOW
from patch_retriever.errors import UserError
from patch_retriever.files import file_hash, lock, write, write_json
from patch_retriever.items import Item
from patch_retriever.progress import Progress, Say, Ticks, no_progress, silent
from patch_retriever.retrieval.encoder import Encoder, Role
from patch_retriever.retrieval.reading import read_items

MANIFEST = "embeddings.json"
FORMAT = 1
ROWS_PER_SHARD = 8192
_FLUSH_SECONDS = 20
"""After so long a shard is written although it is not full: what a killed process may lose."""
KEY = np.dtype("S16")
"""The first half of an item's content hash; empty for an item that was left out."""


class EmbeddingStore:
    """Shards of pooled vectors, each with the keys of its rows, in one folder.

    `embeddings.json` lists the shards with their hashes and is written after each; a shard that
    is not listed, or whose bytes changed, is not read: its items count as missing.
    """

    def __init__(self, folder: Path, key: str, width: int, say: Say = silent) -> None:
        """Open or begin a store of vectors that are `width` wide; `key` says what made them
        (`Encoder.store_key`).

        Raises:
            UserError: the folder holds vectors of another model, another process is writing
                here, or it cannot be written.
        """
        self.folder, self.key, self.width = folder, key, width
        self._waiting: list[tuple[NDArray[Any], NDArray[np.float32]]] = []
        self._lock = lock(
            folder, f"{folder}: another process is writing here; wait for it or name another folder"
        )
        self._sorted_keys = np.zeros(0, KEY)
        self._shard_n, self._row_n = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._vectors: list[NDArray[np.float32]] = []
        self._shards = [shard for shard in self._listed() if self._is_whole(shard, say)]
        for shard in self._shards:
            self._remember(shard)

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write here; what was not flushed is lost."""
        self._lock.close()

    def __len__(self) -> int:
        return len(self._sorted_keys)

    def _listed(self) -> list[dict[str, Any]]:
        path = self.folder / MANIFEST
        if not path.is_file():
            return []
        try:
            values = json.loads(path.read_text())
            made_by, shards = values["key"], list(values["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path}: damaged; delete {self.folder} and encode again") from None
        if values["format"] != FORMAT or made_by != self.key:
            raise UserError(
                f"{self.folder}: holds vectors of another model; name another folder or delete it"
            )
        return shards

    def _is_whole(self, shard: dict[str, Any], say: Say) -> bool:
        for name, sha256 in shard["files"].items():
            path = self.folder / name
            if not path.is_file() or file_hash(path) != sha256:
                say(f"{path}: damaged or missing; its items are encoded again")
                return False
        return True

    def _remember(self, shard: dict[str, Any]) -> None:
        """Know where the rows of a shard are: shard and row of every key, by sorted keys."""
        keys_n = np.load(self.folder / f"{shard['name']}.keys.npy").view(KEY)[:, 0]
        number = len(self._vectors)
        path = self.folder / f"{shard['name']}.vectors.npy"
        self._vectors.append(np.load(path, mmap_mode="r"))
        keys = np.concatenate([self._sorted_keys, keys_n])
        shard_n = np.concatenate([self._shard_n, np.full(len(keys_n), number)])
        row_n = np.concatenate([self._row_n, np.arange(len(keys_n))])
        order = np.argsort(keys, kind="stable")  # what was sorted before costs next to nothing
        self._sorted_keys = keys[order]
        self._shard_n, self._row_n = shard_n[order], row_n[order]

    def has(self, keys_n: NDArray[Any]) -> NDArray[np.bool_]:
        """Which keys have a vector on disk."""
        return self._find(keys_n)[1]

    def _find(self, keys_n: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Where keys stand in sorted order, and which are there at all."""
        if not len(self._sorted_keys):
            return np.zeros(len(keys_n), int), np.zeros(len(keys_n), bool)
        at = np.searchsorted(self._sorted_keys, keys_n).clip(max=len(self._sorted_keys) - 1)
        return at, self._sorted_keys[at] == keys_n

    def add(self, keys_n: NDArray[Any], vectors_nw: NDArray[np.float32]) -> None:
        """Add vectors; they are read after the next flush, which comes with every full shard."""
        self._waiting.append((keys_n, vectors_nw))
        if sum(len(keys) for keys, _ in self._waiting) >= ROWS_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a shard.

        Raises:
            UserError: the disk is full; finished shards stay.
        """
        if not self._waiting:
            return
        keys_n = np.concatenate([keys for keys, _ in self._waiting]).astype(KEY)
        vectors_nw = np.concatenate([vectors for _, vectors in self._waiting])
        taken = {shard["name"] for shard in self._shards}
        name = next(n for i in range(len(taken) + 1) if (n := f"shard-{i:05d}") not in taken)
        files = {}
        # bytes, not strings: NumPy's strings drop zeros at their end
        as_bytes = np.frombuffer(keys_n.tobytes(), np.uint8).reshape(len(keys_n), -1)
        for kind, rows in (("keys", as_bytes), ("vectors", vectors_nw.astype("<f4"))):
            path = self.folder / f"{name}.{kind}.npy"
            write(path, _saver(rows))
            files[path.name] = file_hash(path)
        self._shards.append({"name": name, "rows": len(keys_n), "files": files})
        values = {"format": FORMAT, "key": self.key, "width": self.width, "shards": self._shards}
        write_json(self.folder / MANIFEST, values)
        self._waiting.clear()
        self._remember(self._shards[-1])

    def read(self, keys_n: NDArray[Any]) -> NDArray[np.float32]:
        """Vectors (n, w) of keys that are there.

        Raises:
            KeyError: one is not.
        """
        at, there = self._find(keys_n)
        if not there.all():
            raise KeyError(f"{self.folder}: a vector is asked for that is not there")
        out_nw = np.empty((len(keys_n), self.width), np.float32)
        for shard in np.unique(self._shard_n[at]):
            here = self._shard_n[at] == shard
            out_nw[here] = self._vectors[shard][self._row_n[at[here]]]
        return out_nw


@dataclass(frozen=True)
class Embedded:
    """What `embed_items` did: the key of every item (empty for one left out), how many had to be
    encoded, in how many seconds, and a line for each item that was left out."""

    keys_n: NDArray[Any]
    encoded: int
    seconds: float
    skipped: tuple[str, ...]


def embed_items(
    encoder: Encoder,
    items: Sequence[Item],
    role: Role,
    store: EmbeddingStore,
    prompt: str | None = None,
    batch_size: int = 64,
    skip_bad: bool = False,
    progress: Progress = no_progress,
) -> Embedded:
    """Encode what `store` lacks of `items`; finished shards survive whatever stops this.

    Raises:
        UserError: an item cannot be read (with `skip_bad` it is left out), the model does not take
            such items, or the disk is full.
    """
    keys_n = np.zeros(len(items), KEY)
    skipped: list[str] = []
    coming: set[bytes] = set()  # asked for, but not in a shard yet
    wanted: list[int] = []  # numbers of the items that are encoded
    ticks = Ticks(progress, len(items))

    def with_key(item: Item) -> tuple[Item, bytes]:
        key = bytes.fromhex(item.content_hash())[: KEY.itemsize]
        if skip_bad:
            item.check_picture()
        return item, key

    def missing(read: Iterable[tuple[Item, bytes] | UserError]) -> Iterator[Item]:
        for number, found in enumerate(read):
            if isinstance(found, UserError):
                if not skip_bad:
                    raise found
                skipped.append(str(found))
                ticks.tick()
                continue
            item, keys_n[number] = found
            if found[1] in coming or store.has(keys_n[number : number + 1])[0]:
                ticks.tick()
                continue
            coming.add(found[1])
            wanted.append(number)
            yield item

    began, flushed = time.perf_counter(), time.monotonic()
    encoded = 0
    try:
        ahead = WINDOW * batch_size
        with closing(read_items(items, with_key, encoder.workers, ahead)) as read:
            for positions, vectors_nw in encoder.stream(missing(read), role, prompt, batch_size):
                before = len(store)
                store.add(keys_n[[wanted[position] for position in positions]], vectors_nw)
                encoded += len(positions)
                ticks.tick(len(positions))
                if time.monotonic() - flushed > _FLUSH_SECONDS:
                    store.flush()
                if len(store) != before:
                    flushed = time.monotonic()
                    there_n = store.has(np.array(list(coming), KEY))
                    coming = {k for k, there in zip(coming, there_n, strict=True) if not there}
    finally:  # a bad picture at the end costs nothing that was encoded before it
        store.flush()
    ticks.end()
    seconds = time.perf_counter() - began if encoded else 0.0
    return Embedded(keys_n, encoded, seconds, tuple(skipped))


class StoredVectors:
    """The final vectors (n, d) of stored items: pooled vectors from disk through the head."""

    def __init__(
        self, encoder: Encoder, role: Role, store: EmbeddingStore, keys_n: NDArray[Any]
    ) -> None:
        self._encoder, self._role, self._store = encoder, role, store
        self.keys_n = keys_n

    def __len__(self) -> int:
        return len(self.keys_n)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        """Some of them, by a slice or an array of numbers."""
        return self._encoder.finish(self._store.read(self.keys_n[rows]), self._role)


def open_store(
    root: Path, encoder: Encoder, role: Role, prompt: str | None = None, say: Say = silent
) -> EmbeddingStore:
    """The store under `root` of an encoder's pooled vectors in a role."""
    key = encoder.store_key(role, prompt)
    return EmbeddingStore(root / key[:16], key, encoder.width, say)


def _saver(rows: NDArray[Any]) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, rows, allow_pickle=False)

    return save
