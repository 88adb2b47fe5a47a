"""An index to another model without encoding: where models differ after the pooling alone."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from patch_retriever.errors import UserError
from patch_retriever.files import LOCK, link_or_copy, value_hash, write
from patch_retriever.progress import Say, silent
from patch_retriever.retrieval.embeddings import (
    KEY,
    EmbeddingStore,
    StoredVectors,
    open_store,
)
from patch_retriever.retrieval.index.factory import FlatVectors, flat_vectors
from patch_retriever.retrieval.index.items import Items
from patch_retriever.retrieval.index.manifest import (
    EMBEDDINGS,
    MANIFEST,
    MadeBy,
    Manifest,
    changing,
    check_parts,
)
from patch_retriever.retrieval.index.writing import build_folder, load
from patch_retriever.retrieval.vectors import CHUNK, Shards, Vectors

if TYPE_CHECKING:
    from patch_retriever.retrieval.encoder import Encoder, Role

_LENGTHS = (0.01, 100.0)
"""By which a vector is lengthened, to see whether a head looks at lengths."""
_SAME = 1e-5
"""Entries of unit vectors that differ by less differ by rounding."""


def migrate(folder: Path, encoder: Encoder, out: Path, say: Say = silent) -> int:
    """Write the index of `folder` anew in `out` for another model, and encode nothing.

    Returns:
        How many items it holds.

    Raises:
        UserError: the models differ before the pooling, or the pooled vectors were not kept and
            the index holds too little to make them up; either says what to run instead.
    """
    old = Manifest.read(folder / MANIFEST)
    check_parts(folder, old.parts)
    role = cast("Role", old.made_by.role)
    made_by = MadeBy.of(encoder, role)
    if made_by.fingerprint == old.made_by.fingerprint:
        raise UserError(f"{folder}: made by this very model; there is nothing to bring over")
    if made_by.stored != old.made_by.stored:
        raise UserError(
            f"{folder}: {_difference(old.made_by, made_by)}, so the items must be encoded again: "
            f"patch-retriever index ITEMS -m {encoder.name} -o {out}"
        )
    if (out / MANIFEST).is_file():
        raise UserError(f"{out}: holds an index; name another folder")
    items = Items(folder, old.shards)
    with changing(out, new=True), ExitStack() as stack:
        store = _kept_store(folder, encoder, role, out, say)
        vectors: Vectors
        if store is not None:
            stack.enter_context(store)
            vectors = StoredVectors(encoder, role, store, items.contents().view(KEY))
            if not store.has(vectors.keys_n).all():
                raise UserError(
                    f"{folder}/{EMBEDDINGS}: damaged; encode the items again: "
                    f"patch-retriever index ITEMS -m {encoder.name} -o {out}"
                )
        else:
            vectors = _FromFlat(folder, old, encoder, role)
        key = value_hash([old.key, made_by.fingerprint])
        d, size = encoder.dimension, old.shard_items
        done = build_folder(out, key, made_by, vectors, items.all, old.factory, d, size, say)
        return done.count


def _difference(old: MadeBy, new: MadeBy) -> str:
    """Why pooled vectors of one model are not those of the other."""
    if old.trunk == new.trunk:
        return f"{new.model} puts another prompt before items than {old.model}"
    if old.patched_tokens or new.patched_tokens:
        patched = new.model if new.patched_tokens else old.model
        return f"the patch of {patched} works on tokens, before the pooling"
    return f"{new.model} differs from {old.model} before the pooling (backbone, readout or pooling)"


def _kept_store(
    folder: Path, encoder: Encoder, role: Role, out: Path, say: Say
) -> EmbeddingStore | None:
    """The pooled vectors of the old index, from now on the new one's too."""
    name = encoder.store_key(role)[:16]
    source, target = folder / EMBEDDINGS / name, out / EMBEDDINGS / name
    if not source.is_dir():
        return None
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.name != LOCK and not (target / path.name).exists():
            write(target / path.name, partial(link_or_copy, path))
    return open_store(out / EMBEDDINGS, encoder, role, say=say)


class _FromFlat:
    """`Vectors` from the unit vectors of a Flat index, whose lengths are lost."""

    def __init__(self, folder: Path, old: Manifest, encoder: Encoder, role: Role) -> None:
        self._folder, self._encoder, self._role = folder, encoder, role
        shards = [flat_vectors(load(folder / s.index.file, mapped=True)) for s in old.shards]
        if None in shards:
            raise self._needs_encoding(f"an index of {old.factory} does not hold whole vectors")
        if not old.made_by.normalised:
            raise self._needs_encoding(f"the patch of {old.made_by.model} cannot be taken back")
        self._shards = Shards(cast("list[FlatVectors]", shards))
        self[:CHUNK]  # refused before anything is written

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        """The new head's vectors of some items."""
        unit_nd = self._shards[rows]
        found_nd = self._encoder.finish(unit_nd, self._role)
        for factor in _LENGTHS:
            other_nd = self._encoder.finish(unit_nd * np.float32(factor), self._role)
            if np.abs(found_nd - other_nd).max() > _SAME:
                raise self._needs_encoding(
                    f"the patch of {self._encoder.name} looks at the lengths of pooled vectors, "
                    "which unit vectors have lost"
                )
        return found_nd

    def _needs_encoding(self, why: str) -> UserError:
        return UserError(
            f"{self._folder}: its pooled vectors were not kept ({EMBEDDINGS}/) and {why}, so the "
            "items must be encoded again with patch-retriever index"
        )
