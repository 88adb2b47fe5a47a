"""Taking items out of an index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patch_retriever.errors import UserError
from patch_retriever.files import value_hash
from patch_retriever.retrieval.index.items import Items, ShardItems, write_items
from patch_retriever.retrieval.index.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    changing,
    check_parts,
)
from patch_retriever.retrieval.index.writing import commit, load, next_name, write_index

if TYPE_CHECKING:
    import pyarrow as pa


def remove_items(folder: Path, ids: Sequence[str]) -> int:
    """Take the items with these ids out of an index; returns how many are left.

    The shards that held them are written anew, then the manifest. Their vectors stay in
    `embeddings/`, by content.

    Raises:
        UserError: an id is not there (nothing is removed then), FAISS cannot remove from this
            kind of index, a file is damaged, or the disk is full.
    """
    with changing(folder):
        manifest = Manifest.read(folder / MANIFEST)
        check_parts(folder, manifest.parts)
        found = Items(folder, manifest.shards).find(ids)
        if missing := [name for name in ids if name not in found]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{folder}: no item {missing[0]!r}{more} in it; nothing is removed")
        gone = np.array(sorted(entry.number for entry in found.values()), dtype=np.int64)
        shards: list[Shard] = []
        for shard in manifest.shards:
            here = gone[(gone >= shard.first) & (gone <= shard.last)]
            if len(here) == shard.count:
                continue
            shards.append(_without(folder, shard, here, manifest.factory) if len(here) else shard)
        key = value_hash([manifest.key, sorted(found)])
        manifest = replace(manifest, key=key, shards=tuple(shards))
        commit(folder, manifest)
    return manifest.count


def _without(folder: Path, shard: Shard, gone: NDArray[np.int64], factory: str) -> Shard:
    index: Any = load(folder / shard.index.file)
    try:
        index.remove_ids(gone)
    except RuntimeError:
        raise UserError(
            f"{folder}: FAISS cannot remove from {factory}; index what shall stay into a new "
            "folder (flat, ivf, ivf-pq, sq8 and rabitq can remove)"
        ) from None
    name = next_name(folder)
    return replace(
        shard,
        count=index.ntotal,
        index=write_index(index, folder / f"index-{name}.faiss"),
        items=write_items(folder / f"items-{name}.parquet", _kept(ShardItems(folder, shard), gone)),
    )


def _kept(items: ShardItems, gone: NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    for batch in items.batches():
        kept = np.isin(batch["number"].to_numpy(), gone, invert=True)
        yield batch.filter(pa.array(kept))
