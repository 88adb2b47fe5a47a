"""Rows of a dataset of the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from patch_retriever.containers.hf_datasets import DATASETS, lasting, load, parts
from patch_retriever.containers.parquet import is_list, picture_fields
from patch_retriever.pictures.stores import DatasetPicture
from patch_retriever.retrieval.readers.sources.rows import Columns, Reading, Row

BATCH = 1000


@dataclass(frozen=True)
class DatasetRows:
    """Rows of one split; pictures stay undecoded on disk, where `datasets` keeps them."""

    location: str
    reading: Reading

    @property
    def containers(self) -> Sequence[Path]:
        """The files that `datasets` keeps it in."""
        return [Path(file["filename"]) for file in self._table.cache_files]

    def rows(self) -> Iterator[Row]:
        """Every row."""
        for start in range(0, len(self._table), BATCH):
            yield from self._rows(start, self._table[start : start + BATCH])

    def row(self, key: int) -> Row:
        """The row of this number."""
        return next(self._rows(key, self._table[key]))

    def _rows(self, start: int, table: Any) -> Iterator[Row]:
        """Rows of an Arrow table; of pictures only whether they are there is looked at."""
        image, folder = self._columns.image, self._folder
        places: list[Sequence[int | None]] = [()] * len(table)
        if image is not None:
            bytes_, paths = picture_fields(table.schema.field(image).type)
            if bytes_ is not None:
                column = table[image]
                places = _stored(column)
                table = table.drop_columns([image])
                if paths is not None:
                    table = table.append_column(image, _paths(column))
        for n, (record, stored) in enumerate(zip(table.to_pylist(), places, strict=True)):
            key = start + n
            pictures: tuple[DatasetPicture, ...] = ()
            if image is not None and stored:
                record.pop(image, None)
                pictures = tuple(
                    DatasetPicture(self.location, image, key, self._pictures, p) for p in stored
                )
            where = f"{DATASETS}{self.location}#{key}"
            row = self.reading.row(where, key, record, folder, str(key))
            yield replace(row, pictures=pictures) if pictures else row

    @cached_property
    def _table(self) -> Any:
        found = (self._columns.id, self._columns.text, self._columns.image)
        return self._whole.select_columns([name for name in found if name is not None])

    @cached_property
    def _columns(self) -> Columns:
        return self.reading.columns(self._whole.column_names, f"{DATASETS}{self.location}")

    @cached_property
    def _whole(self) -> Any:
        return load(self.location)

    @cached_property
    def _pictures(self) -> Any:
        return self._table.select_columns([self._columns.image])

    @property
    def _folder(self) -> Path:
        return Path(parts(lasting(self.location))[0])


def _stored(column: Any) -> list[Sequence[int | None]]:
    """For every row the places of the pictures whose bytes are there: `[None]` for one that is in
    no list; none where a picture of a list has no bytes."""
    if not is_list(column.type):
        return [[None] if there else () for there in _field(column, "bytes").is_valid().to_pylist()]
    return [range(len(there)) if all(there) else () for there in _of_lists(column, "bytes", True)]


def _paths(column: Any) -> Any:
    """The pictures' paths in place of the pictures."""
    import pyarrow as pa

    if not is_list(column.type):
        return _field(column, "path")
    return pa.array(_of_lists(column, "path", False), pa.list_(pa.string()))


def _of_lists(column: Any, field: str, whether: bool) -> list[list[Any]]:
    """A field of the structs in a column of lists, or only whether it is there."""
    import pyarrow.compute as pc

    values = _field(pc.list_flatten(column), field)
    found = iter((values.is_valid() if whether else values).to_pylist())
    lengths = pc.list_value_length(column).fill_null(0).to_pylist()
    return [list(islice(found, length)) for length in lengths]


def _field(column: Any, field: str) -> Any:
    """A field of a column of structs, or the column itself."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.struct_field(column, field) if pa.types.is_struct(column.type) else column
