"""Rows of text files: JSON lines, CSV and TSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING

from patch_retriever.errors import UserError
from patch_retriever.retrieval.readers.sources.rows import Reading, Row

if TYPE_CHECKING:
    import _csv

EXAMPLE = '{"image": ..., "text": ...}'


@dataclass(frozen=True)
class _TextFile:
    """A text file with a row in each line; a row's key is the byte at which it begins."""

    path: Path
    reading: Reading
    containers: Sequence[Path] = ()

    def _lines(self, file: IO[bytes]) -> Iterator[str]:
        """Lines from where `file` stands, with their ends; only a line feed ends one."""
        for line in file:
            try:
                yield line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self.path}: cannot be read: not a UTF-8 text file ({error})"
                ) from None

    def _open(self) -> IO[bytes]:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None


class JsonLines(_TextFile):
    """A JSON object a line."""

    def rows(self) -> Iterator[Row]:
        """Every line that is not empty."""
        start = 0
        with self._open() as file:
            for number, line in enumerate(self._lines(file), 1):
                if line.strip():
                    yield self._row(f"{self.path}:{number}", start, line, number)
                start = file.tell()

    def row(self, key: int) -> Row:
        """The line that begins at byte `key`."""
        with self._open() as file:
            file.seek(key)
            return self._row(f"{self.path} at byte {key}", key, next(self._lines(file), ""), 0)

    def _row(self, where: str, key: int, line: str, number: int) -> Row:
        other_id = f"{self.path.name}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            return Row(where, key, other_id, fault=f"{where}: not a JSON object like {EXAMPLE}")
        return self.reading.row(where, key, record, self.path.parent, other_id)


class Csv(_TextFile):
    """Comma-separated values with a header, or tab-separated ones in a .tsv file."""

    def rows(self) -> Iterator[Row]:
        """Every record that is not empty; one may go over several lines."""
        with self._open() as file:
            records = self._records(file)
            if self._first(records):
                self.reading.columns(self._header, str(self.path))
            while True:
                start, line = file.tell(), records.line_num + 1
                try:
                    values = next(records)
                except StopIteration:
                    return
                except csv.Error as error:
                    where = f"{self.path}:{line}"
                    yield Row(where, start, where, fault=f"{where}: not CSV ({error})")
                    continue
                if values:
                    yield self._row(f"{self.path}:{line}", start, values, line)

    def row(self, key: int) -> Row:
        """The record that begins at byte `key`."""
        with self._open() as file:
            file.seek(key)
            values = self._first(self._records(file))
            return self._row(f"{self.path} at byte {key}", key, values, 0)

    @cached_property
    def _header(self) -> list[str]:
        with self._open() as file:
            header = self._first(self._records(file))
        for name in header:
            if header.count(name) > 1:
                raise UserError(f"{self.path}: two columns are called {name!r}")
        return header

    def _first(self, records: _csv.Reader) -> list[str]:
        """The first record that is not empty."""
        try:
            return next((values for values in records if values), [])
        except csv.Error as error:
            raise UserError(f"{self.path}: not CSV ({error})") from None

    def _records(self, file: IO[bytes]) -> _csv.Reader:
        comma = "\t" if self.path.suffix.lower() == ".tsv" else ","
        return csv.reader(self._lines(file), delimiter=comma, strict=True)

    def _row(self, where: str, key: int, values: list[str], line: int) -> Row:
        other_id = f"{self.path.name}:{line}"
        if len(values) != len(self._header):
            fault = f"{where}: {len(values)} values, but the header has {len(self._header)}"
            return Row(where, key, other_id, fault=fault)
        record = {name: value or None for name, value in zip(self._header, values, strict=True)}
        return self.reading.row(where, key, record, self.path.parent, other_id)
