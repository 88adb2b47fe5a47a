"""What all readers share: bad rows, items that are made when asked for, the kinds of a side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from patch_retriever.errors import UserError
from patch_retriever.items import Kind

LETTERS: dict[Kind, str] = {"text": "t", "image": "i", "both": "it"}
"""A kind as directions write it."""


class BadRows:
    """Rows that cannot be used: the first one stops the reading, or all are left out and listed."""

    def __init__(self, skip: bool) -> None:
        self._skip = skip
        self._lines: list[str] = []

    def add(self, problem: str) -> None:
        """Leave out a row; `problem` says where it is and what is wrong.

        Raises:
            UserError: bad rows are not to be skipped.
        """
        if not self._skip:
            raise UserError(f"{problem}; mend it or pass --skip-bad")
        self._lines.append(problem)

    @property
    def lines(self) -> tuple[str, ...]:
        """One line for every row that was left out."""
        return tuple(self._lines)


def side(kinds: Iterable[Kind]) -> str:
    """A side of a direction: "t", "i", "it", or "mixed" where there are several kinds."""
    found = set(kinds)
    return LETTERS[found.pop()] if len(found) == 1 else "mixed"


def said(text: object) -> str | None:
    """A text, or None where there is nothing in it."""
    return text if isinstance(text, str) and text.strip() else None


def image_folder(chosen: Path | None, usual: Sequence[Path], paths: Iterable[str]) -> Path:
    """Where pictures are: as chosen, or the first usual folder in which one of `paths` exists.

    Raises:
        UserError: they are in none of the usual folders.
    """
    if chosen is not None:
        return chosen
    some = [path for _, path in zip(range(100), paths, strict=False)]
    for folder in usual:
        if any((folder / path).is_file() for path in some):
            return folder
    looked = ", ".join(map(str, usual))
    raise UserError(f"{some[0]}: no such picture in {looked}; say where with --images")
