"""Rows of Parquet files, read a row group at a time when they are asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from patch_retriever.errors import UserError, first_line
from patch_retriever.pictures import PictureFile, _Stored

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, Table
    from pyarrow.parquet import ParquetFile


class ParquetRows(Sequence[dict[str, Any]]):
    """Some columns of Parquet shards as one sequence of rows; one row group is in memory."""

    def __init__(self, paths: Iterable[Path], columns: Sequence[str]) -> None:
        """Look at the shards' footers.

        Raises:
            UserError: a file is no Parquet, or lacks a column.
        """
        self.columns = list(columns)
        self._groups: list[tuple[Path, int, int]] = []  # path, group in it, rows before it in it
        self._starts = [0]
        self._open: tuple[Path, ParquetFile] | None = None
        self._loaded: tuple[int, Table] | None = None
        for path in paths:
            file = self._file(path)
            there = file.schema_arrow.names
            if lacking := [name for name in columns if name not in there]:
                raise UserError(f"{path}: no column {lacking[0]}; it has {', '.join(there)}")
            before = 0
            for group in range(file.num_row_groups):
                self._groups.append((path, group, before))
                before += file.metadata.row_group(group).num_rows
                self._starts.append(self._starts[-1] + file.metadata.row_group(group).num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, row = self._locate(index)
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = None  # let go of the last group before the next one is read
            self._loaded = number, self._read(number, self.columns)
        return self._loaded[1].slice(row, 1).to_pylist()[0]

    def where(self, index: int) -> str:
        """A row's file and its number in it, from 0."""
        number, row = self._locate(index)
        path, _, before = self._groups[number]
        return f"{path}:{before + row}"

    def folder(self, index: int) -> Path:
        """Where a row's file is."""
        return self._groups[self._locate(index)[0]][0].parent

    def column(self, name: str) -> Iterator[Any]:
        """All values of one column, a row group in memory at a time."""
        for values in self._chunks(name):
            yield from values.to_pylist()

    def blank(self, name: str) -> np.ndarray:
        """Which rows have no text in a column, bool (n,)."""
        import pyarrow.compute as pc

        empty = [
            pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values.cast("string")), ""), True)
            for values in self._chunks(name)
        ]
        return np.concatenate([np.zeros(0, dtype=bool), *(e.to_numpy() for e in empty)])

    def without_picture(self, name: str, wanted: np.ndarray) -> Iterator[int]:
        """Rows without a picture in an image column, among those `wanted`, bool (n,).

        Row groups whose statistics count as many nulls as rows that want no picture are not read.
        """
        leaf = f"{name}.bytes"
        for number in range(len(self._groups)):
            start, end = self._starts[number : number + 2]
            want = wanted[start:end]
            if not want.any() or self._nulls(number, leaf) == (~want).sum():
                continue
            values = self._read(number, [name])[name]
            if str(values.type) == "null":
                yield from (start + np.flatnonzero(want)).tolist()
                continue
            for row in np.flatnonzero(want):
                value = values[int(row)].as_py()
                if not (value and (value.get("bytes") or value.get("path"))):
                    yield start + int(row)

    def _nulls(self, number: int, leaf: str) -> int | None:
        path, group, _ = self._groups[number]
        metadata = self._file(path).metadata.row_group(group)
        for column in range(metadata.num_columns):
            found = metadata.column(column)
            if found.path_in_schema == leaf and found.is_stats_set:
                return found.statistics.null_count if found.statistics.has_null_count else None
        return None

    def _chunks(self, name: str) -> Iterator[ChunkedArray]:
        for number in range(len(self._groups)):
            yield self._read(number, [name])[name]

    def _locate(self, index: int) -> tuple[int, int]:
        """The row group, and the row in it."""
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def _read(self, number: int, columns: list[str]) -> Table:
        path, group, _ = self._groups[number]
        try:
            return self._file(path).read_row_group(group, columns=columns)
        except Exception as error:  # of Arrow, of a codec or of the system
            raise UserError(f"{path}: damaged ({first_line(error)}); download it again") from None

    def _file(self, path: Path) -> ParquetFile:
        from pyarrow.parquet import ParquetFile

        if self._open is None or self._open[0] != path:
            try:
                self._open = path, ParquetFile(path)
            except Exception as error:
                raise UserError(f"{path}: not a Parquet file ({first_line(error)})") from None
        return self._open[1]


@dataclass(frozen=True)
class ParquetPicture(_Stored):
    """A picture in a column of Hugging Face's type `Image`: a struct of bytes and path."""

    rows: ParquetRows = field(repr=False)
    row: int
    column: str = "image"

    @property
    def name(self) -> str:
        """File and row."""
        return self.rows.where(self.row)

    def read(self) -> bytes:
        """The bytes, or those of the file that is named, relative to the Parquet file.

        Raises:
            UserError: there is no picture.
        """
        value = self.rows[self.row][self.column] or {}
        if value.get("bytes"):
            return value["bytes"]
        if value.get("path"):
            return PictureFile(self.rows.folder(self.row) / value["path"]).read()
        raise UserError(f"{self.name}: no {self.column} in this row")


def column_names(path: Path) -> list[str]:
    """What a Parquet file's columns are called.

    Raises:
        UserError: it is no Parquet file.
    """
    return ParquetRows([path], [])._file(path).schema_arrow.names
