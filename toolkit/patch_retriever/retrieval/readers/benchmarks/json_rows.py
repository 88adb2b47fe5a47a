"""JSON files: lines that are parsed when they are asked for, and files that are small enough."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from patch_retriever.errors import UserError, first_line


class JsonLines:
    """A file of a JSON object a line; only where its lines start is kept in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts = array("q")
        self._file: BinaryIO | None = None

    def scan(self) -> Iterator[dict[str, Any] | str | None]:
        """All lines in order; None for an empty one, what is wrong for one that is no object.

        Raises:
            UserError: there is no such file.
        """
        starts, start = array("q"), 0
        with self._opened() as file:
            for line in file:
                starts.append(start)
                start += len(line)
                yield _object(line)
        self._starts = starts

    def __getitem__(self, row: int) -> dict[str, Any]:
        """A line that `scan` has passed.

        Raises:
            UserError: the file has changed since.
        """
        self._file = self._file or self._opened()
        self._file.seek(self._starts[row])
        found = _object(self._file.readline())
        if not isinstance(found, dict):
            raise UserError(f"{self.where(row)}: the file has changed while it was read")
        return found

    def where(self, row: int) -> str:
        """The file and the line, from 1."""
        return f"{self.path}:{row + 1}"

    def _opened(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from None


def _object(line: bytes) -> dict[str, Any] | str | None:
    if not line.strip():
        return None
    try:
        found = json.loads(line)
    except ValueError as error:
        return f"not JSON ({first_line(error)})"
    return found if isinstance(found, dict) else "not a JSON object"


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        UserError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({first_line(error)})") from None
