"""Rows of a user's own data, before anything about them is checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from patch_retriever.errors import UserError
from patch_retriever.picture_urls import PictureUrl, is_url
from patch_retriever.pictures import Picture, PictureBytes, PictureFile

IMAGE_COLUMNS = ("image", "file_name", "image_path", "img", "jpg", "png", "image_url", "url")
"""Names that a column of pictures has; the first that is there is taken."""
TEXT_COLUMNS = ("text", "caption", "txt", "sentence", "title", "description")
"""Names that a column of texts has."""
ID_COLUMNS = ("id", "__key__")


@dataclass(frozen=True)
class Row:
    """What one line, record or file says.

    - `where`: how errors call it: `pairs.jsonl:3`, `part.parquet:12`, `shard.tar#img/12`.
    - `key`: by which its source finds it again.
    - `id`: its own, or one that its source gives it.
    - `picture`: None where there is none; `unusable` is what stands in its place.
    - `text`: as it stands there, of any type.
    - `fault`: what is wrong with the row as a whole, as an error says it.
    """

    where: str
    key: int
    id: str
    picture: Picture | None = None
    text: Any = None
    unusable: Any = None
    fault: str | None = None


class Source(Protocol):
    """Where rows come from. Pictures are not opened, and no picture's bytes are kept."""

    @property
    def containers(self) -> Sequence[Path]:
        """The files that hold pictures inside."""

    def rows(self) -> Iterator[Row]:
        """Every row in order.

        Raises:
            UserError: the source as a whole cannot be read.
        """

    def row(self, key: int) -> Row:
        """The row with this key again; `where` may be less exact."""


@dataclass(frozen=True)
class Reading:
    """How rows are read: what columns are called, where relative paths start, and whether pictures
    may be downloaded."""

    image_columns: tuple[str, ...] = IMAGE_COLUMNS
    text_columns: tuple[str, ...] = TEXT_COLUMNS
    images: Path | None = None
    allow_urls: bool = False

    def row(
        self, where: str, key: int, record: Mapping[Any, Any], folder: Path, other_id: str
    ) -> Row:
        """A record with named values; `folder` is where it lies, `other_id` for one without an id."""
        own = _first(record, ID_COLUMNS)
        own_id = str(own) if isinstance(own, str | int) and str(own) else other_id
        text = _first(record, self.text_columns)
        value = _first(record, self.image_columns)
        try:
            picture = self.picture(value, where, folder)
        except UserError as error:
            return Row(where, key, own_id, text=text, fault=f"{where}: {error}")
        unusable = None if picture is not None else value
        return Row(where, key, own_id, picture, text, unusable)

    def picture(self, value: Any, name: str, folder: Path) -> Picture | None:
        """A picture from a path, an address, bytes, or the `{"bytes", "path"}` of `datasets`.

        None if it is none of these. Bytes stay in memory with it.

        Raises:
            UserError: an address, and they are not allowed.
        """
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return PictureBytes(name, value)
        if not isinstance(value, str) or not value:
            return None
        if is_url(value):
            if not self.allow_urls:
                raise UserError(
                    f"{value}: an address, and pictures are not downloaded unasked; "
                    "download them first or allow it with --allow-urls"
                )
            return PictureUrl(value)
        return PictureFile((self.images or folder) / value)


def _first(record: Mapping[Any, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)
