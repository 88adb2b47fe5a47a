"""Pictures that lie in other files, and opening any picture again by its name.

A name is a path (`photos/a.jpg`), or the path of the file that holds the picture, `#`, and where it
is in there: `shard-0001.tar#img/12.jpg`, `part-0.parquet#image/12` (column and row, from 0),
`datasets:org/name:train#image/12`. Of a list of pictures the place, too: `image/12.0`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from patch_retriever.containers.hf_datasets import DATASETS, lasting, load
from patch_retriever.containers.parquet import ParquetRows, Turn, parquet_schema, picture_fields
from patch_retriever.containers.tars import TarMember, tar_members, tar_read
from patch_retriever.errors import UserError
from patch_retriever.pictures.picture import Picture, PictureFile, _Stored
from patch_retriever.pictures.urls import PictureUrl, is_url


@dataclass(frozen=True)
class TarPicture(_Stored):
    """A member of a tar."""

    path: Path
    member: TarMember

    @property
    def name(self) -> str:
        """The tar's path and the member's."""
        return f"{self.path}#{self.member.name}"

    @property
    def locator(self) -> str:
        """With the whole path of the tar."""
        return f"{self.path.resolve()}#{self.member.name}"

    def read(self) -> bytes:
        """The member's bytes.

        Raises:
            UserError: the tar is missing or ends too early.
        """
        return tar_read(self.path, self.member)


@dataclass(frozen=True)
class ParquetColumn:
    """A column of pictures: bytes, or the `{"bytes", "path"}` that `datasets` writes.

    Its pictures share the window of rows that is in memory, as do columns of the same `turn`.
    """

    path: Path
    column: str
    turn: Turn = field(default_factory=Turn, repr=False, compare=False)

    @cached_property
    def bytes(self) -> ParquetRows:
        """The pictures' bytes alone, without the paths beside them.

        Raises:
            UserError: the file has no such column, or it holds none.
        """
        schema = parquet_schema(self.path)
        if self.column not in schema.names:
            raise UserError(f"{self.path}: no column {self.column!r}")
        suffix, _ = picture_fields(schema.field(self.column).type)
        if suffix is None:
            raise UserError(f"{self.path}: the column {self.column!r} does not hold pictures")
        return ParquetRows(self.path, [self.column + suffix], self.turn)

    def picture(self, row: int) -> ParquetPicture:
        """The picture of a row."""
        return ParquetPicture(self, row)


@dataclass(frozen=True)
class ParquetPicture(_Stored):
    """A picture in a Parquet file; `place` is that in the list of its row, where there is one."""

    column: ParquetColumn
    row: int
    place: int | None = None

    @property
    def name(self) -> str:
        """The file's path, the column, the row and perhaps the place."""
        return f"{self.column.path}#{self.column.column}/{_row(self.row, self.place)}"

    @property
    def locator(self) -> str:
        """With the whole path of the file."""
        return f"{self.column.path.resolve()}#{self.column.column}/{_row(self.row, self.place)}"

    def read(self) -> bytes:
        """The bytes of the picture.

        Raises:
            UserError: there are none, or the file cannot be read.
        """
        return _bytes(self.column.bytes[self.row][self.column.column], self.place, self.name)


@dataclass(frozen=True)
class DatasetPicture(_Stored):
    """A picture in a dataset of `datasets`, undecoded.

    `table` is the dataset as Arrow, `place` that in the list of its row.
    """

    location: str
    column: str
    row: int
    table: Any = field(repr=False, compare=False)
    place: int | None = None

    @property
    def name(self) -> str:
        """The dataset, the column, the row and perhaps the place."""
        return f"{DATASETS}{self.location}#{self.column}/{_row(self.row, self.place)}"

    @property
    def locator(self) -> str:
        """With the whole path of a dataset that lies here."""
        where = f"{DATASETS}{lasting(self.location)}#{self.column}"
        return f"{where}/{_row(self.row, self.place)}"

    def read(self) -> bytes:
        """The bytes of the picture.

        Raises:
            UserError: there are none, or no such row.
        """
        if not 0 <= self.row < len(self.table):
            raise UserError(f"{self.name}: {len(self.table)} rows, so none with this number")
        return _bytes(self.table[self.row][self.column][0].as_py(), self.place, self.name)


def _row(row: int, place: int | None) -> str:
    return f"{row}" if place is None else f"{row}.{place}"


def _bytes(value: Any, place: int | None, name: str) -> bytes:
    """Bytes of a cell, or of a place in its list; its path stands in where it has none."""
    path = None
    if isinstance(value, list):
        value = value[place] if place is not None and place < len(value) else None
    if isinstance(value, Mapping):
        value, path = value.get("bytes"), value.get("path")
    if isinstance(value, bytes):
        return value
    path = value if isinstance(value, str) else path
    if path:
        return PictureFile(Path(path)).read()
    raise UserError(f"{name}: no picture there")


class PictureStores:
    """Opens pictures by their names, and each file that holds them once."""

    def __init__(self) -> None:
        self._tars: dict[str, dict[str, TarMember]] = {}
        self._columns: dict[tuple[str, str], ParquetColumn] = {}
        self._turn = Turn()
        self._datasets: dict[tuple[str, str], Any] = {}

    def picture_at(self, name: str) -> Picture:
        """The picture of this name, not opened yet.

        Raises:
            UserError: there is none.
        """
        if is_url(name):
            return PictureUrl(name, download=False)
        if name.startswith(DATASETS):
            return self._in_dataset(name)
        for end in (i for i, letter in enumerate(name) if letter == "#"):
            container, within = name[:end], name[end + 1 :]
            suffix = Path(container).suffix.lower()
            if suffix == ".tar" and (container in self._tars or Path(container).is_file()):
                return self._in_tar(name, container, within)
            if suffix == ".parquet" and Path(container).is_file():
                return self._in_parquet(name, container, within)
        if not Path(name).is_file():
            raise UserError(f"{name}: no such picture; it was moved or deleted")
        return PictureFile(Path(name))

    def _in_tar(self, name: str, tar: str, within: str) -> Picture:
        if tar not in self._tars:
            members = self._tars[tar] = {}
            with suppress(UserError):  # what lies before the damage can be opened
                members.update((member.name, member) for member in tar_members(Path(tar)))
        if within not in self._tars[tar]:
            raise UserError(f"{name}: no such member in this tar, or it is damaged")
        return TarPicture(Path(tar), self._tars[tar][within])

    def _in_parquet(self, name: str, path: str, within: str) -> Picture:
        column, row, place = _cell(name, within)
        store = self._columns.get((path, column))
        if store is None:
            store = self._columns[path, column] = ParquetColumn(Path(path), column, self._turn)
        if row >= len(store.bytes):
            raise UserError(f"{name}: {len(store.bytes)} rows, so none with this number")
        return ParquetPicture(store, row, place)

    def _in_dataset(self, name: str) -> Picture:
        location, _, within = name.removeprefix(DATASETS).rpartition("#")
        column, row, place = _cell(name, within)
        if (location, column) not in self._datasets:
            whole = load(location)
            if column not in whole.column_names:
                raise UserError(f"{name}: no column {column!r} in this dataset")
            self._datasets[location, column] = whole.select_columns([column])
        table = self._datasets[location, column]
        if row >= len(table):
            raise UserError(f"{name}: {len(table)} rows, so none with this number")
        return DatasetPicture(location, column, row, table, place)


def _cell(name: str, within: str) -> tuple[str, int, int | None]:
    """Column and row, and the place in a list of pictures."""
    column, _, cell = within.rpartition("/")
    row, point, place = cell.partition(".")
    if not column or not row.isdecimal() or (point and not place.isdecimal()):
        raise UserError(f"{name}: a column and a row expected after the #, such as image/12")
    return column, int(row), int(place) if point else None


def locator(picture: Picture) -> str:
    """A name that `picture_at` opens from any working folder."""
    return picture.locator if isinstance(picture, _Stored) else picture.name


def picture_at(name: str) -> Picture:
    """The picture of this name, not opened yet; for many names keep a `PictureStores`.

    Raises:
        UserError: there is none.
    """
    return PictureStores().picture_at(name)
