"""Rows of Parquet files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from patch_retriever.containers.parquet import (
    ParquetRows,
    Turn,
    is_list,
    parquet_schema,
    picture_fields,
)
from patch_retriever.pictures.stores import ParquetColumn, ParquetPicture
from patch_retriever.retrieval.readers.sources.rows import Reading, Row


@dataclass(frozen=True)
class ParquetFiles:
    """Rows of one file or several, numbered on from one to the next.

    Pictures are paths, bytes, or the `{"bytes", "path"}` that `datasets` writes (the path for rows
    without bytes).
    """

    containers: Sequence[Path]
    reading: Reading

    def rows(self) -> Iterator[Row]:
        """Every row."""
        for file in self._files:
            yield from map(file.row, range(file.first, file.first + len(file.records)))

    def row(self, key: int) -> Row:
        """The row of this number."""
        return self._files[bisect_right(self._firsts, key) - 1].row(key)

    @cached_property
    def _files(self) -> list[_File]:
        files: list[_File] = []
        first, turns = 0, (Turn(), Turn())
        for path in self.containers:
            files.append(_File(path, first, self.reading, *turns))
            first += len(files[-1].records)
        return files

    @cached_property
    def _firsts(self) -> list[int]:
        return [file.first for file in self._files]


class _File:
    """One file; `first` is the number of its first row. Files take turns at being open."""

    def __init__(
        self, path: Path, first: int, reading: Reading, of_rows: Turn, of_pictures: Turn
    ) -> None:
        self.path, self.first, self._reading = path, first, reading
        schema = parquet_schema(path)
        columns = reading.columns(schema.names, str(path))
        read = [name for name in (columns.id, columns.text) if name is not None]
        self._pictures: ParquetColumn | None = None
        self._lists = False
        if columns.image is not None:
            kind = schema.field(columns.image).type
            self._lists = is_list(kind)
            bytes_, paths = picture_fields(kind)
            if bytes_ is not None:
                self._pictures = ParquetColumn(path, columns.image, of_pictures)
            if paths is not None:
                read.append(columns.image + paths)
        self.records = ParquetRows(path, read, of_rows)

    def row(self, key: int) -> Row:
        """The row of this number."""
        n = key - self.first
        record = self.records[n]
        pictures = self._stored(n)
        if self._pictures is not None and pictures:
            record.pop(self._pictures.column, None)  # the path says where the bytes came from
        where, other_id = f"{self.path}:{n}", f"{self.path.name}:{n}"
        row = self._reading.row(where, key, record, self.path.parent, other_id)
        return replace(row, pictures=pictures) if pictures else row

    def _stored(self, n: int) -> tuple[ParquetPicture, ...]:
        """The pictures of a row whose bytes are here."""
        column = self._pictures
        if column is None:
            return ()
        if self._lists:
            cells = column.bytes[n][column.column] or []
            stored = [c.get("bytes") if isinstance(c, dict) else c for c in cells]
            places = range(len(stored)) if all(stored) else ()
            return tuple(ParquetPicture(column, n, place) for place in places)
        return () if self._without_bytes[n] else (column.picture(n),)

    @cached_property
    def _without_bytes(self) -> bytearray:
        return bytearray(() if self._pictures is None else self._pictures.bytes.missing())
