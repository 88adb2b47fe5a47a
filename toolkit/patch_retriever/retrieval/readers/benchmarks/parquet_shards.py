"""Columns of Parquet shards as one sequence of rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patch_retriever.containers.parquet import ParquetRows, Turn, open_parquet, reading
from patch_retriever.errors import UserError
from patch_retriever.pictures.stores import ParquetColumn, ParquetPicture

if TYPE_CHECKING:
    from pyarrow import Array


def column_names(path: Path) -> list[str]:
    """What the columns of a Parquet file are called.

    Raises:
        UserError: it is missing, damaged or no Parquet file.
    """
    return open_parquet(path).schema_arrow.names


class ParquetShards:
    """Some columns of files of one layout, their rows numbered on from one file to the next."""

    def __init__(self, paths: Sequence[Path], columns: Sequence[str]) -> None:
        """Look at the files' footers.

        Raises:
            UserError: a file is no Parquet, or lacks a column.
        """
        for path in paths:
            there = column_names(path)
            if lacking := [name for name in columns if name not in there]:
                raise UserError(f"{path}: no column {lacking[0]}; it has {', '.join(there)}")
        rows = Turn()  # of all these files one at a time is open
        self._files = [ParquetRows(path, columns, rows) for path in paths]
        self._starts = list(accumulate(map(len, self._files), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> dict[str, Any]:
        file, row = self._locate(row)
        return self._files[file][row]

    def where(self, row: int) -> str:
        """A row's file and its number in it, from 0."""
        file, row = self._locate(row)
        return f"{self._files[file].path}:{row}"

    def pictures(self, column: str) -> Pictures:
        """The pictures of a column."""
        turn = Turn()
        columns = [ParquetColumn(file.path, column, turn) for file in self._files]
        return Pictures(columns, self._starts)

    def column(self, name: str) -> Iterator[Any]:
        """All values of one column; a batch of them is in memory."""
        for values in self._batches(name):
            yield from values.to_pylist()

    def blank(self, name: str) -> Iterator[bool]:
        """Whether a column has no text, row by row."""
        import pyarrow.compute as pc

        for values in self._batches(name):
            empty = pc.equal(pc.utf8_trim_whitespace(values.cast("string")), "")
            yield from pc.fill_null(empty, True).to_pylist()

    def _batches(self, name: str) -> Iterator[Array]:
        for file in self._files:
            with reading(file.path):
                for batch in open_parquet(file.path).iter_batches(columns=[name]):
                    yield batch.column(0)

    def _locate(self, row: int) -> tuple[int, int]:
        """The file, and the row in it."""
        file = bisect_right(self._starts, row) - 1
        return file, row - self._starts[file]


class Pictures:
    """Pictures by the numbers of their rows; they stay in their files."""

    def __init__(self, columns: list[ParquetColumn], starts: list[int]) -> None:
        self._columns, self._starts = columns, starts

    def __getitem__(self, row: int) -> ParquetPicture:
        file = bisect_right(self._starts, row) - 1
        return self._columns[file].picture(row - self._starts[file])

    def missing(self, wanted: np.ndarray) -> set[int]:
        """Rows without a picture among those `wanted`, bool (n,).

        Raises:
            UserError: the column does not hold pictures.
        """
        found: set[int] = set()
        for column, start, end in zip(self._columns, self._starts, self._starts[1:], strict=False):
            if wanted[start:end].any():
                missing = np.fromiter(column.bytes.missing(), dtype=bool, count=end - start)
                found.update((start + np.flatnonzero(missing & wanted[start:end])).tolist())
        return found
