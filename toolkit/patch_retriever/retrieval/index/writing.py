"""Index folders grow a shard at a time: what is finished stays, whatever stops the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from patch_retriever.errors import UserError, first_line
from patch_retriever.files import write
from patch_retriever.progress import Say, silent
from patch_retriever.retrieval.index.build import fill, trained_index
from patch_retriever.retrieval.index.factory import default_search, import_faiss
from patch_retriever.retrieval.index.items import Entry, ShardItems, batches, write_items
from patch_retriever.retrieval.index.manifest import (
    DRAFT,
    MANIFEST,
    MadeBy,
    Manifest,
    Part,
    Shard,
    check_parts,
    clear,
)
from patch_retriever.retrieval.vectors import Vectors

if TYPE_CHECKING:
    import faiss

SHARD_BYTES = 4 << 30
"""Of whole vectors in a shard, where nothing else is asked for."""
Entries = Callable[[range, int], Iterator[Entry]]
"""The items at some positions, numbered from a first number."""


def read_draft(folder: Path, key: str, say: Say) -> Manifest | None:
    """How far a stopped run with the same `key` came; None if there is none that can go on."""
    path = folder / DRAFT
    if not path.is_file():
        return None
    try:
        draft = Manifest.read(path)
        if draft.key != key:
            return None
        check_parts(folder, draft.parts)
    except UserError as error:
        say(f"{error}: begun again")
        return None
    say(f"{folder}: goes on after {draft.count} items")
    return draft


def build_folder(
    folder: Path,
    key: str,
    made_by: MadeBy,
    vectors: Vectors,
    entries: Entries,
    factory: str,
    dimension: int,
    shard_items: int | None = None,
    say: Say = silent,
) -> Manifest:
    """Index `vectors` in `folder`; a run that was stopped goes on if its `key` was the same.

    Args:
        factory: a FAISS factory string.
        shard_items: items in one file at most; by itself what fills 4 GiB with whole vectors.

    Raises:
        UserError: the factory does not fit, or the disk is full; finished shards stay.
    """
    draft = read_draft(folder, key, say)
    if draft is None:
        clear(folder, keep=())
        index = trained_index(vectors, factory, dimension)
        trained = write_index(index, folder / "trained.faiss")
        search = default_search(index)
        shard_items = shard_items or SHARD_BYTES // (4 * dimension)
        draft = Manifest(key, made_by, factory, dimension, shard_items, search, trained, next=0)
    return grow(folder, draft, 0, vectors, entries, say)


def grow(
    folder: Path,
    draft: Manifest,
    begun_with: int,
    vectors: Vectors,
    entries: Entries,
    say: Say,
) -> Manifest:
    """Add what `draft` lacks of `vectors`, then make it the folder's manifest.

    A last shard with room is filled up. `entries` are the items of the vectors.

    Args:
        begun_with: the number of the first of `vectors`.

    Raises:
        UserError: the disk is full; finished shards stay.
    """
    draft.write(folder / DRAFT)
    while (done := draft.next - begun_with) < len(vectors):
        full, last = draft.shards, None
        if full and full[-1].count < draft.shard_items:
            full, last = full[:-1], full[-1]
        room = draft.shard_items - (last.count if last else 0)
        positions = range(done, min(done + room, len(vectors)))
        index = load(folder / (last.index if last else draft.trained).file)
        fill(index, vectors, positions, draft.next)
        new = batches(entries(positions, draft.next))
        items = chain(ShardItems(folder, last).batches(), new) if last else new
        name = next_name(folder)
        shard = Shard(
            last.first if last else draft.next,
            draft.next + len(positions) - 1,
            index.ntotal,
            write_index(index, folder / f"index-{name}.faiss"),
            write_items(folder / f"items-{name}.parquet", items),
        )
        del index  # before the next one is made
        draft = replace(draft, shards=(*full, shard), next=draft.next + len(positions))
        draft.write(folder / DRAFT)
        say(f"{shard.index.file}: {shard.count} items, {draft.count} in all")
    commit(folder, draft)
    return draft


def commit(folder: Path, manifest: Manifest) -> None:
    """Make `manifest` the folder's, and delete what it does not list."""
    manifest.write(folder / MANIFEST)
    (folder / DRAFT).unlink(missing_ok=True)
    clear(folder, keep=manifest.parts)


def load(path: Path, mapped: bool = False) -> faiss.Index:
    """Read a FAISS index into memory, or map it where this FAISS can.

    Raises:
        UserError: it is no FAISS index.
    """
    faiss = import_faiss()
    flags = getattr(faiss, "IO_FLAG_MMAP_IFC", 0) if mapped else 0
    try:
        return faiss.read_index(str(path), flags)
    except RuntimeError as error:
        raise UserError(
            f"{path}: not a readable FAISS index ({first_line(error)}); index the items again"
        ) from None


def write_index(index: faiss.Index, path: Path) -> Part:
    """Write a FAISS index.

    Raises:
        UserError: the disk is full.
    """

    def save(p: Path) -> None:
        try:
            import_faiss().write_index(index, str(p))
        except RuntimeError as error:  # how FAISS reports a full disk
            reason = "no space left" if "No space left" in str(error) else first_line(error)
            raise OSError(reason) from error

    write(path, save)
    return Part.of(path)


def next_name(folder: Path) -> str:
    """A number that no shard here has had."""
    found = (path.stem.removeprefix("index-") for path in folder.glob("index-*.faiss"))
    taken = [int(number) for number in found if number.isdecimal()]
    return f"{max(taken, default=-1) + 1:05d}"
