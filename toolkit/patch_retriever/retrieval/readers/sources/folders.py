"""Rows of a folder of pictures, each perhaps with a text beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from patch_retriever.pictures.picture import PICTURE_SUFFIXES, PictureFile
from patch_retriever.retrieval.readers.sources.rows import Row


@dataclass(frozen=True)
class PictureFolder:
    """Every picture in a folder and below, in the order of their paths; its id is that path.

    A picture's text, where `texts` are asked for, is the `.txt` file of the same name.
    """

    folder: Path
    texts: bool = True
    containers: Sequence[Path] = ()

    @cached_property
    def _paths(self) -> list[Path]:
        return sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)

    def rows(self) -> Iterator[Row]:
        """One for each picture."""
        return map(self.row, range(len(self._paths)))

    def row(self, key: int) -> Row:
        """That of the picture with this number."""
        path = self._paths[key]
        own_id, pictures = path.relative_to(self.folder).as_posix(), (PictureFile(path),)
        beside = path.with_suffix(".txt")
        if not self.texts or not beside.is_file():
            return Row(str(path), key, own_id, pictures)
        try:
            return Row(str(path), key, own_id, pictures, beside.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError) as error:
            fault = f"{beside}: not a UTF-8 text file ({error})"
            return Row(str(path), key, own_id, fault=fault)
