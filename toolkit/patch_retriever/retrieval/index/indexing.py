"""A corpus to an index folder: encode what is new, build or add, keep the pooled vectors."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from patch_retriever.errors import UserError
from patch_retriever.files import LOCK, value_hash
from patch_retriever.items import Item
from patch_retriever.lazy import Lazy
from patch_retriever.pictures.stores import locator
from patch_retriever.progress import Progress, Say, no_progress, silent
from patch_retriever.retrieval.embeddings import (
    KEY,
    StoredVectors,
    embed_items,
    open_store,
)
from patch_retriever.retrieval.embeddings import MANIFEST as STORED
from patch_retriever.retrieval.encoder import Encoder, Role
from patch_retriever.retrieval.index.factory import check_factory, factory_string
from patch_retriever.retrieval.index.items import Entry, Items
from patch_retriever.retrieval.index.manifest import (
    DRAFT,
    EMBEDDINGS,
    MANIFEST,
    MadeBy,
    Manifest,
    changing,
    check_parts,
)
from patch_retriever.retrieval.index.writing import build_folder, grow, read_draft


class Corpus(Protocol):
    """Items by their ids, made when they are asked for; a line for each that was left out."""

    @property
    def ids(self) -> Sequence[str]:
        """One for every item, none twice."""

    @property
    def items(self) -> Sequence[Item]:
        """The items."""

    @property
    def skipped(self) -> Sequence[str]:
        """What could not be read."""


@dataclass(frozen=True)
class IndexOptions:
    """How an index is made. `shard_items`: items in a file at most, by themselves what
    fills 4 GiB."""

    factory: str = "auto"
    role: Role = "document"
    shard_items: int | None = None
    keep_embeddings: bool = True


@dataclass(frozen=True)
class Indexed:
    """What was done: items in the index now, added, encoded for it, there before; left out."""

    count: int
    added: int
    encoded: int
    there_before: int
    skipped: tuple[str, ...]


def index_corpus(
    corpus: Corpus,
    encoder: Encoder,
    folder: Path,
    options: IndexOptions = IndexOptions(),
    skip_bad: bool = False,
    batch_size: int = 64,
    progress: Progress = no_progress,
    say: Say = silent,
) -> Indexed:
    """Encode a corpus and index it in `folder`; a stopped run goes on where it stood.

    Raises:
        UserError: another index is there, an item cannot be read (with `skip_bad` it is left
            out), the factory does not fit, or the disk is full.
    """
    made_by = MadeBy.of(encoder, options.role)
    _check_free(folder, made_by)
    check_factory(options.factory, len(corpus.ids), encoder.dimension)
    with ExitStack() as stack:
        stack.enter_context(changing(folder, new=True))
        store = stack.enter_context(open_store(folder / EMBEDDINGS, encoder, options.role, say=say))
        say(f"encoding {len(corpus.items)} items with {encoder.name}")
        done = embed_items(
            encoder,
            corpus.items,
            options.role,
            store,
            batch_size=batch_size,
            skip_bad=skip_bad,
            progress=progress,
        )
        coming = _Coming(corpus, done.keys_n)
        if not len(coming):
            raise UserError(f"no usable item among {len(corpus.ids)}; {done.skipped[0]}")
        factory = factory_string(options.factory, len(coming), encoder.dimension)
        how = [made_by.fingerprint, made_by.role, factory, options.shard_items]
        key = value_hash([how, coming.digest])
        vectors = StoredVectors(encoder, options.role, store, coming.keys_n)
        indexed = Indexed(
            len(coming), len(coming), done.encoded, 0, (*corpus.skipped, *done.skipped)
        )
        if (folder / MANIFEST).is_file():
            there = Manifest.read(folder / MANIFEST)
            if there.key != key:
                raise UserError(f"{folder}: holds an index of other items or settings; {_INSTEAD}")
            check_parts(folder, there.parts)
            say(f"{folder}: done before")
            return indexed
        d, size = encoder.dimension, options.shard_items
        say(f"{factory}: {len(coming)} items of {d} dimensions")
        build_folder(folder, key, made_by, vectors, coming.entries, factory, d, size, say)
    if not options.keep_embeddings:
        shutil.rmtree(folder / EMBEDDINGS)
    return indexed


def add_corpus(
    corpus: Corpus,
    encoder: Encoder,
    folder: Path,
    skip_bad: bool = False,
    batch_size: int = 64,
    progress: Progress = no_progress,
    say: Say = silent,
) -> Indexed:
    """Add what an index lacks of a corpus; an item with the id and the content of one that is
    there is left as it is.

    Raises:
        UserError: another model made the index, an id is there with another content, an item
            cannot be read (with `skip_bad` it is left out), or the disk is full.
    """
    with ExitStack() as stack:
        stack.enter_context(changing(folder))
        start = Manifest.read(folder / MANIFEST)
        start.made_by.check(folder, encoder)
        # the same model, perhaps in another place now
        start = replace(start, made_by=MadeBy.of(encoder, cast("Role", start.made_by.role)))
        check_parts(folder, start.parts)
        there = Items(folder, start.shards).find(corpus.ids)
        new = _New(corpus, there)
        kept = (folder / EMBEDDINGS).is_dir()
        role = cast("Role", start.made_by.role)
        store = stack.enter_context(open_store(folder / EMBEDDINGS, encoder, role, say=say))
        say(f"encoding {len(new.items)} items with {encoder.name}")
        done = embed_items(
            encoder,
            new.items,
            role,
            store,
            batch_size=batch_size,
            skip_bad=skip_bad,
            progress=progress,
        )
        coming = _Coming(new, done.keys_n)
        indexed = Indexed(
            start.count + len(coming),
            len(coming),
            done.encoded,
            len(there),
            (*corpus.skipped, *done.skipped),
        )
        if len(coming):
            key = value_hash([start.key, coming.digest])
            draft = read_draft(folder, key, say) or replace(start, key=key)
            vectors = StoredVectors(encoder, role, store, coming.keys_n)
            grow(folder, draft, start.next, vectors, coming.entries, say)
    if not kept:
        shutil.rmtree(folder / EMBEDDINGS)
    return indexed


_INSTEAD = "add to it with --add, or name another folder"


def _check_free(folder: Path, made_by: MadeBy) -> None:
    """Refuse a folder that holds anything but an index by the same model, before encoding."""
    if folder.is_file():
        raise UserError(f"{folder}: a file; name a folder to write to")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    ours = names & {MANIFEST, DRAFT} or (folder / EMBEDDINGS / STORED).is_file()
    if not ours and not names <= {LOCK, EMBEDDINGS}:
        raise UserError(f"{folder}: not empty and no index; name another folder")
    if (folder / MANIFEST).is_file():
        there = Manifest.read(folder / MANIFEST).made_by
        if there.fingerprint != made_by.fingerprint:
            raise UserError(f"{folder}: holds an index by {there.model}; name another folder")


class _Coming:
    """The items of a corpus that have a vector, to be added."""

    def __init__(self, corpus: Corpus, keys_n: NDArray[Any]) -> None:
        self._corpus = corpus
        self._positions = np.flatnonzero(keys_n != b"")
        self.keys_n = keys_n[self._positions]
        digest = hashlib.sha256()
        for position, key in zip(self._positions.tolist(), self.keys_n, strict=True):
            digest.update(f"{corpus.ids[position]}\0{_hex(key)}\0".encode())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._positions)

    def entries(self, positions: range, first: int) -> Iterator[Entry]:
        """Some of the items, as the index keeps them, numbered from `first`."""
        for number, position in enumerate(positions, first):
            at = int(self._positions[position])
            item = self._corpus.items[at]
            picture = None if item.picture is None else locator(item.picture)
            content = _hex(self.keys_n[position])
            yield Entry(number, self._corpus.ids[at], item.text, picture, content)


class _New:
    """The part of a corpus that is not in an index yet; items are made when they are asked for."""

    def __init__(self, corpus: Corpus, there: Mapping[str, Entry]) -> None:
        self.skipped = corpus.skipped
        self.ids: list[str] = []
        positions = []
        for position, name in enumerate(corpus.ids):
            if name not in there:
                self.ids.append(name)
                positions.append(position)
            elif not corpus.items[position].content_hash().startswith(there[name].content):
                raise UserError(
                    f"{name!r}: in the index with another content; remove it first, or give the "
                    "new item another id"
                )
        self.items = Lazy(positions, corpus.items.__getitem__)


def _hex(key: bytes) -> str:
    return bytes(key).ljust(KEY.itemsize, b"\0").hex()
