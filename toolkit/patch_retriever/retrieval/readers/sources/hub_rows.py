"""Rows of a dataset of the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from patch_retriever.containers.hf_datasets import DATASETS, lasting, load, parts
from patch_retriever.containers.parquet import picture_fields
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
        without_bytes = [True] * len(table)
        if image is not None:
            bytes_, paths = picture_fields(table.schema.field(image).type)
            if bytes_ is not None:
                column = table[image]
                without_bytes = _field(column, bytes_).is_null().to_pylist()
                table = table.drop_columns([image])
                if paths is not None:
                    table = table.append_column(image, _field(column, paths))
        for n, (record, lacking) in enumerate(zip(table.to_pylist(), without_bytes, strict=True)):
            key, picture = start + n, None
            if image is not None and not lacking:
                record.pop(image, None)
                picture = DatasetPicture(self.location, image, key, self._pictures)
            where = f"{DATASETS}{self.location}#{key}"
            row = self.reading.row(where, key, record, folder, str(key))
            yield row if picture is None else replace(row, picture=picture)

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


def _field(column: Any, field: str) -> Any:
    """A field of a column of structs (`.bytes`), or the column itself."""
    import pyarrow.compute as pc

    return pc.struct_field(column, field[1:]) if field else column
