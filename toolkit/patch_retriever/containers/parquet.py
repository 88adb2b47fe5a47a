"""Rows of a Parquet file of any size, a window of them in memory at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from patch_retriever.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

WINDOW = 32 * 2**20
"""Bytes of a window, uncompressed; a row group that is smaller is one window."""
MOST_ROWS = 2**16
"""Rows of a window, however small they are."""


class Turn:
    """Whose turn it is to be open: of the files that share one, only the last that was read holds
    a window of rows and is open. One thread reads at a time: `with turn.lock`."""

    def __init__(self) -> None:
        self._holder: ParquetRows | None = None
        self.lock = Lock()

    def take(self, holder: ParquetRows) -> None:
        """Close the one before."""
        if self._holder is not None and self._holder is not holder:
            self._holder.close()
        self._holder = holder


class ParquetRows:
    """Some columns of a Parquet file, or fields of them (`image.bytes`), by the number of a row.

    Reading forwards reads the file once; another row of the same window costs nothing, one before
    it reads its row group from the start.
    """

    def __init__(self, path: Path, columns: Sequence[str], turn: Turn | None = None) -> None:
        self.path, self.columns = path, tuple(columns)
        self._turn = turn or Turn()
        self.close()

    def close(self) -> None:
        """Let go of the file and of the rows in memory; reading opens it again."""
        self._window: pa.RecordBatch | None = None
        self._first = 0  # row of the window's first
        self._group = -1
        self._windows: Iterator[pa.RecordBatch] = iter(())

    def __len__(self) -> int:
        return int(self._about.num_rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """A row as Python values.

        Raises:
            UserError: there is no such row, or the file cannot be read.
        """
        if not 0 <= row < len(self):
            raise UserError(f"{self.path}: {len(self)} rows, so no row {row}")
        if not self.columns:
            return {}
        with self._turn.lock:
            self._turn.take(self)
            try:
                with reading(self.path):
                    while self._window is None or not 0 <= row - self._first < len(self._window):
                        self._move(row)
                    window = self._window.slice(row - self._first, 1)
            except UserError:
                self.close()
                raise
        values: dict[str, Any] = window.to_pylist()[0]
        return values

    def _move(self, row: int) -> None:
        """To the next window of the row's group, or to its first one."""
        group = bisect_right(self._starts, row) - 1
        if group != self._group or row < self._first:
            self._group, self._first, self._window = group, self._starts[group], None
            self._windows = self._batches(group)
        if self._window is not None:
            self._first += len(self._window)
        self._window = next(self._windows)

    def _batches(self, group: int) -> Iterator[pa.RecordBatch]:
        """The windows of a row group; the file is open as long as they are asked for."""
        about = self._about.row_group(group)
        sizes = (about.column(i).total_uncompressed_size for i in self._leaves(about))
        rows = max(1, WINDOW * about.num_rows // max(1, sum(sizes)))
        with open_parquet(self.path) as file:
            yield from file.iter_batches(
                min(rows, MOST_ROWS), row_groups=[group], columns=list(self.columns)
            )

    def missing(self) -> Iterator[bool]:
        """Whether the only column is null, row by row; statistics say it where they can.

        Raises:
            UserError: the file cannot be read.
        """
        for group in range(self._about.num_row_groups):
            about = self._about.row_group(group)
            leaves = [about.column(i) for i in self._leaves(about)]
            if [leaf.num_values for leaf in leaves] != [about.num_rows]:
                raise UserError(f"{self.path}: cannot be read as Parquet (damaged footer)")
            statistics = leaves[0].statistics
            nulls = None if statistics is None else statistics.null_count
            if nulls in (0, about.num_rows):
                yield from [bool(nulls)] * about.num_rows
                continue
            with reading(self.path):
                for batch in self._batches(group):
                    column = batch.column(0)
                    if "." in self.columns[0]:
                        column = column.flatten()[0]
                    yield from column.is_null().to_pylist()

    def _leaves(self, about: pq.RowGroupMetaData) -> list[int]:
        paths = (about.column(i).path_in_schema for i in range(about.num_columns))
        return [
            i
            for i, path in enumerate(paths)
            if any(path == c or path.startswith(f"{c}.") for c in self.columns)
        ]

    @cached_property
    def _about(self) -> pq.FileMetaData:
        with open_parquet(self.path) as file:
            about = file.metadata
        groups = range(about.num_row_groups)
        if about.num_rows != sum(about.row_group(i).num_rows for i in groups):
            raise UserError(f"{self.path}: cannot be read as Parquet (damaged footer)")
        return about

    @cached_property
    def _starts(self) -> list[int]:
        groups = range(self._about.num_row_groups)
        return list(accumulate((self._about.row_group(i).num_rows for i in groups), initial=0))[:-1]


def open_parquet(path: Path) -> pq.ParquetFile:
    """The file, of which only the part that is asked for is read.

    Raises:
        UserError: it is missing, damaged or no Parquet file.
    """
    import pyarrow.parquet as pq

    with reading(path):
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20)


def parquet_schema(path: Path) -> pa.Schema:
    """The columns of a file.

    Raises:
        UserError: as `open_parquet`.
    """
    with open_parquet(path) as file:
        return file.schema_arrow


def picture_fields(kind: pa.DataType) -> tuple[str | None, str | None]:
    """What follows a column's name for the bytes of its pictures, and for their paths.

    `(".bytes", ".path")` for the struct that `datasets` writes, `("", None)` for bytes; all else
    is taken for paths. In a list of any of these the same, after what Parquet calls its elements.
    """
    import pyarrow as pa

    if is_list(kind):
        within = f".list.{kind.value_field.name}"
        bytes_, paths = picture_fields(kind.value_type)
        return (
            None if bytes_ is None else within + bytes_,
            None if paths is None else within + paths,
        )
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return (
            ".bytes" if "bytes" in names else None,
            ".path" if "path" in names else None,
        )
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "", None
    return None, ""


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists."""
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in one line what Arrow says about a file."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names not in UTF-8
        reason = first_line(error)
        raise UserError(f"{path}: cannot be read as Parquet ({reason})") from None
