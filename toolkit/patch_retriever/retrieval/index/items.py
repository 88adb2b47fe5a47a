"""The items of an index in Parquet, beside the vectors: read a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patch_retriever.files import write
from patch_retriever.retrieval.index.manifest import Part, Shard

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Entry:
    """An item of an index: its number there, its id, its text, its (first) picture's name, its
    content (the first half of its hash, in hex)."""

    number: int
    id: str
    text: str | None
    picture: str | None
    content: str


def write_items(path: Path, parts: Iterable[pa.RecordBatch]) -> Part:
    """Write batches of entries, one after the other.

    Raises:
        UserError: the disk is full.
    """
    import pyarrow.parquet as pq

    def save(p: Path) -> None:
        with pq.ParquetWriter(p, _schema()) as file:
            for batch in parts:
                file.write_batch(batch)

    write(path, save)
    return Part.of(path)


def batches(entries: Iterable[Entry]) -> Iterator[pa.RecordBatch]:
    """Entries in batches for `write_items`."""
    import pyarrow as pa

    entries = iter(entries)
    while some := list(islice(entries, ROWS_AT_ONCE)):
        yield pa.RecordBatch.from_pylist([vars(entry) for entry in some], _schema())


def _schema() -> pa.Schema:
    import pyarrow as pa

    texts = [(name, pa.string()) for name in ("id", "text", "picture", "content")]
    return pa.schema([("number", pa.int64()), *texts])


class ShardItems:
    """The items of one shard."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.shard = shard
        self._path = folder / shard.items.file

    @cached_property
    def _file(self) -> pq.ParquetFile:
        import pyarrow.parquet as pq

        return pq.ParquetFile(self._path)

    @cached_property
    def _group_starts(self) -> NDArray[np.int64]:
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        return np.cumsum([0, *sizes])

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """The numbers of all items, ascending."""
        whole = self.shard.last - self.shard.first + 1 == self.shard.count
        if whole:
            return np.arange(self.shard.first, self.shard.last + 1)
        return self._file.read(["number"])["number"].to_numpy()

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All items in order, some columns of them or all."""
        yield from self._file.iter_batches(ROWS_AT_ONCE, columns=columns)

    def entries(self, numbers: Sequence[int]) -> dict[int, Entry]:
        """The items with these numbers, all of which are in this shard."""
        rows = np.searchsorted(self.numbers, numbers)
        groups = np.searchsorted(self._group_starts, rows, side="right") - 1
        found: dict[int, Entry] = {}
        for group in np.unique(groups):
            local = rows[groups == group] - self._group_starts[group]
            table = self._file.read_row_group(int(group)).take(np.unique(local))
            found |= {row["number"]: Entry(**row) for row in table.to_pylist()}
        return found


class Items:
    """The items of all shards."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._shards = [ShardItems(folder, shard) for shard in shards]
        self._firsts = np.array([shard.first for shard in shards], dtype=np.int64)

    def entries(self, numbers: Iterable[int]) -> dict[int, Entry]:
        """The items with these numbers."""
        wanted = np.unique(np.fromiter(numbers, dtype=np.int64))
        which = np.searchsorted(self._firsts, wanted, side="right") - 1
        found: dict[int, Entry] = {}
        for shard in np.unique(which):
            found |= self._shards[shard].entries(wanted[which == shard].tolist())
        return found

    def all(self, positions: range, first: int) -> Iterator[Entry]:
        """Items by their place among all, numbered anew from `first`."""
        end = 0
        for shard in self._shards:
            for batch in shard.batches():
                begin, end = end, end + len(batch)
                inside = slice(max(0, positions.start - begin), max(0, positions.stop - begin))
                for row in batch[inside].to_pylist():
                    yield Entry(**{**row, "number": first})
                    first += 1

    def contents(self) -> NDArray[np.void]:
        """The content of every item, as bytes, (n, 16)."""
        found = bytearray()
        for shard in self._shards:
            for batch in shard.batches(["content"]):
                found += bytes.fromhex("".join(batch["content"].to_pylist()))
        return np.frombuffer(found, np.uint8)

    def find(self, ids: Iterable[str]) -> dict[str, Entry]:
        """The items with these ids, those that are there."""
        import pyarrow as pa
        import pyarrow.compute as pc

        wanted = pa.array(ids, pa.string())
        found: dict[str, Entry] = {}
        for shard in self._shards:
            for batch in shard.batches():
                chosen: Any = batch.filter(pc.is_in(batch["id"], wanted))
                found |= {row["id"]: Entry(**row) for row in chosen.to_pylist()}
        return found
